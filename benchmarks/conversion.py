"""What conversion costs beside transformers' own ONNX exporter: the same model, cache and free sizes, random weights.

    python benchmarks/conversion.py                 # SmolLM2-135M's shapes
    python benchmarks/conversion.py --layers 6

"bare" is ``OnnxExporter().export`` on the forward pass that we trace, "ours" is capture with its check against the
model, canonicalisation and emission, "emission" the last of these; all write model.onnx. Each is a process of its own.
CPU seconds are the figure to compare on a machine that others use too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from dotresize_fx.export.cached_forward import cached_forward
from dotresize_fx.export.capture import no_fast_path, sample_inputs
from dotresize_fx.export.capture_cache import capture_with_cache, free_sizes
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.onnx_file import ONNX_FILE
from dotresize_fx.export.peak_memory import peak_rss_bytes
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.passes.canonicalise import canonicalise

VOCABULARY = 49_152


def llama(layers: int) -> transformers.LlamaForCausalLM:
    """A model of SmolLM2-135M's shapes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


@contextmanager
def row(name: str) -> Iterator[None]:
    """Prints a row of the table: what the block took."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"| {name} | {wall:.1f} | {cpu:.1f} | {(peak_rss_bytes() or 0) / 1e6:.0f} |", flush=True)


def bare(layers: int) -> None:
    """transformers' exporter alone."""
    model = llama(layers)
    sample = sample_inputs(VOCABULARY)
    cached = cached_forward(model, sample["input_ids"], sample["attention_mask"])
    shapes = cached.shapes(*free_sizes(model.config.max_position_embeddings))
    with row("bare"), tempfile.TemporaryDirectory() as folder:
        with quiet_libraries(), no_fast_path(), torch.no_grad(), cached.on(model):
            config = OnnxConfig(dynamic=True, dynamic_shapes=shapes)
            exported = OnnxExporter().export(model, dict(cached.sample), config)
        OnnxExporter.save_program(exported.program, Path(folder) / ONNX_FILE)


def ours(layers: int) -> None:
    """Capture to model.onnx."""
    model = llama(layers)
    with row("ours"):
        captured = capture_with_cache(model)
        canonicalise(captured.graph, check=False)
        with row("emission"), tempfile.TemporaryDirectory() as folder:
            emit_onnx(model, captured, captured.graph, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    layers = parser.parse_args().layers
    print("| | s | CPU s | peak MB |\n|---|---|---|---|", flush=True)
    sides: tuple[Callable[[int], None], ...] = (bare, ours)
    for side in sides:
        process = multiprocessing.get_context("spawn").Process(target=side, args=(layers,))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
