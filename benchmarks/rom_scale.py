"""What LLM-ROM costs on a model of a billion weights without a GPU: minutes and peak memory.

    python benchmarks/rom_scale.py                          # shapes of Llama 3.2 1B, 20 %, 8,192 tokens

Weights and tokens are random: speed and memory are what is measured, fidelity is not. It is `export --method rom`
without text and without the ONNX: capture, then linears of a lower rank, each calibrated on what the reduced ones
before it feed it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
import transformers
from bench import line
from measure import spending

from dotresize_fx.cost import count_cost
from dotresize_fx.export.capture import capture
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.factorize_graph import factorize_graph, published_ranks
from dotresize_fx.progress import Progress

# Llama 3.2 1B.
SHAPES = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--calibration-tokens", type=int, default=8_192)
    parser.add_argument("--length", type=int, default=512)
    return parser.parse_args(given)


def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SHAPES, num_hidden_layers=arguments.blocks, vocab_size=arguments.vocabulary, tie_word_embeddings=True
    )
    with spending("cpu") as building:
        model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    model.config.use_cache = False
    with spending("cpu") as capturing:
        dense = capture(model).graph
        canonicalise(dense)
    rows = arguments.calibration_tokens // arguments.length
    ids = torch.randint(0, arguments.vocabulary, (rows, arguments.length))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]
    started = time.perf_counter()
    with torch.no_grad(), spending("cpu") as solving:
        found = factorize_graph(dense, batches, published_ranks(dense, arguments.ratio), Progress(), published=True)
    before, after = count_cost(dense, arguments.length), count_cost(found.graph, arguments.length)
    print(
        f"{before.parameters / 1e9:.2f} billion weights, {torch.get_num_threads()} threads, {rows} x {arguments.length}"
    )
    print(found.notes[0], f"in {time.perf_counter() - started:.0f} s\n")
    line(["stage", "seconds", "peak GiB"])
    line(["---"] * 3)
    for name, spent in (("build", building), ("capture", capturing), ("factorise", solving)):
        line([name, f"{spent.seconds:.0f}", f"{spent.peak_gib:.1f}"])
    left = after.macs_per_token / before.macs_per_token
    print(
        f"\nMACs per token {left:.3f} of the dense model's; weights alone take {4 * before.parameters / 2**30:.1f} GiB"
    )


if __name__ == "__main__":
    main()
