"""What slimming costs as models grow: seconds and memory, forecast from shapes alone and measured.

    python benchmarks/scale.py measure 0.1 1 3 8 --rows 128 --length 2048          # models of random weights
    python benchmarks/scale.py measure 8 --blocks 8 --rows 128 --length 2048       # its first blocks alone
    python benchmarks/scale.py foretell 70 405 --rows 128 --length 2048            # files that hold no numbers
    torchrun --nproc-per-node 2 benchmarks/scale.py slim 1 --rows 128 --length 2048    # two GPUs, rank 0 tells

A model is named by its billions of weights, see MODELS. It is written to ``--folder`` in bfloat16, a shard for each
block, with a tokenizer of words and a text of random words: speed and memory are what is measured, fidelity is not.
The forecast's seconds are those of loading and capture, and of calibrating and solving; the slimming's are from weights
on disk to slim weights on disk, no file converted, and by stage.
"bare" is transformers' own forward pass over the calibration tokens, in bfloat16 on a GPU; it and the slimming each
have a process of their own. "GPU GiB" is the most that was allocated, "host GiB" the most memory of the process's own
(anonymous or shared; pages of files are not), "pinned GiB" what CUDA had of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from bench import line
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from dotresize_fx.compiler import compute_device, slim
from dotresize_fx.export.dry_run import dry_run
from dotresize_fx.memory import read_size
from dotresize_fx.options import Options
from dotresize_fx.progress import Progress

# hidden, ffn, blocks, heads, KV heads, vocabulary, tied: SmolLM2-135M, Llama 3.2 1B and 3B, Llama 3.1 8B, 70B and 405B.
MODELS = {
    "0.1": (576, 1536, 30, 9, 3, 49_152, True),
    "1": (2048, 8192, 16, 32, 8, 128_256, True),
    "3": (3072, 8192, 28, 24, 8, 128_256, True),
    "8": (4096, 14_336, 32, 32, 8, 128_256, False),
    "70": (8192, 28_672, 80, 64, 8, 128_256, False),
    "405": (16_384, 53_248, 126, 128, 8, 128_256, False),
}
WORDS = 4096
# Of memory that is watched, seconds between looks.
EVERY = 0.02


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["measure", "foretell", "bare", "slim"])
    parser.add_argument("models", nargs="+", choices=list(MODELS))
    parser.add_argument("--blocks", type=int, help="so many of them; default: all")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory-budget")
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--regions", nargs="+", default=[], help="default: what export cuts")
    parser.add_argument("--folder", type=Path, default=Path("scale"))
    return parser.parse_args(given)


# -- models ----------------------------------------------------------------------------------------


def write_model(name: str, arguments: argparse.Namespace, *, numbers: bool) -> Path:
    """A folder with configuration, tokenizer and weights; without ``numbers`` files that are nothing but headers and
    holes.
    """
    hidden, ffn, blocks, heads, kv_heads, vocabulary, tied = MODELS[name]
    blocks = arguments.blocks or blocks
    folder: Path = arguments.folder / f"{name}b-{blocks}{'' if numbers else '-empty'}"
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    if tied:
        shapes.pop("lm_head.weight", None)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        block = key.split(".")[2] if ".layers." in key else "rest"
        shards.setdefault(f"model-{block}.safetensors", {})[key] = shape
    device = compute_device(Options(device=arguments.device))
    for file, inside in shards.items():
        if numbers:
            save_file({key: _random(shape, device) for key, shape in inside.items()}, folder / file, {"format": "pt"})
        else:
            _write_header(inside, folder / file)
    where = {key: file for file, inside in shards.items() for key in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def _random(shape: tuple[int, ...], device: str) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(shape[-1] ** -0.5).cpu()


def _write_header(inside: dict[str, tuple[int, ...]], file: Path) -> None:
    header, at = {}, 0
    for key, shape in inside.items():
        size = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)


def write_text(arguments: argparse.Namespace) -> Path:
    """Random words, enough for calibration and evaluation."""
    file: Path = arguments.folder / f"words-{arguments.rows}x{arguments.length}.txt"
    if not file.exists():
        chosen = random.Random(0)
        lines = int(arguments.rows * arguments.length / 0.8 / 64) + 400
        file.write_text("\n".join(" ".join(f"w{chosen.randrange(WORDS)}" for _ in range(64)) for _ in range(lines)))
    return file


# -- measuring -------------------------------------------------------------------------------------


class Watch:
    """The highest anonymous and shared memory of this process while it is entered, in bytes."""

    def __enter__(self) -> Watch:
        self.peak, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(EVERY):
            told = Path("/proc/self/status").read_text().splitlines()
            own = sum(int(row.split()[1]) for row in told if row.startswith(("RssAnon", "RssShmem"))) * 1024
            self.peak = max(self.peak, own)


def run_bare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of transformers' forward pass over the calibration tokens, the second time; the first warms up."""
    folder, device = write_model(name, arguments, numbers=True), compute_device(Options(device=arguments.device))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    model.config.use_cache = False
    at_once = max(1, 8192 // arguments.length)
    batches = torch.randint(0, WORDS, (arguments.rows, arguments.length), device=device).split(at_once)
    with torch.no_grad():
        model(batches[0])
        _settled(device)
        started = time.perf_counter()
        for batch in batches:
            model(batch)
        _settled(device)
    return {"seconds": time.perf_counter() - started, "ceiling": _ceiling(device, dtype)}


def _ceiling(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large product: what the card can do."""
    n = 8192 if device == "cuda" else 2048
    x = torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        _settled(device)
        started = time.perf_counter()
        x @ x
        _settled(device)
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def _settled(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def run_slim(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """From weights on disk to the slim blocks' weights on disk."""
    folder, text = write_model(name, arguments, numbers=True), write_text(arguments)
    work = arguments.folder / f"work-{os.environ.get('RANK', '0')}"
    shutil.rmtree(work, ignore_errors=True)  # what another run finished would be taken over
    work.mkdir()
    progress = Progress()
    options = _options(arguments)
    with Watch() as watched:
        started = time.perf_counter()
        slim(str(folder), arguments.ratio, calibration=text, work=work, progress=progress, **options)
        seconds = time.perf_counter() - started
    gpu, pinned = 0, 0
    if torch.cuda.is_available():
        gpu = torch.cuda.max_memory_allocated()
        pinned = int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))
    return {"seconds": seconds, "stages": progress.seconds, "host": watched.peak, "gpu": gpu, "pinned": pinned}


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "device": arguments.device,
        "effort": arguments.effort,
        "compute_dtype": arguments.compute_dtype,
        "regions": tuple(arguments.regions),
        "sequence_length": arguments.length,
        "calibration_tokens": arguments.rows * arguments.length,
        "evaluation_tokens": 2 * arguments.length,
    }
    return chosen | ({} if arguments.memory_budget is None else {"memory_budget": read_size(arguments.memory_budget)})


def foretell(name: str, arguments: argparse.Namespace, *, numbers: bool) -> Any:
    folder = write_model(name, arguments, numbers=numbers)
    options = Options(ratio=arguments.ratio, **_options(arguments))
    return dry_run(str(folder), options, trust_remote_code=False, progress=Progress(quiet=True)).forecast


def in_a_process(job: str, name: str) -> dict[str, Any]:
    """What the job prints as its last line."""
    options = sys.argv[next((i for i, word in enumerate(sys.argv) if word.startswith("--")), len(sys.argv)) :]
    command = [sys.executable, __file__, job, name, *options]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def main() -> None:
    arguments = parse()
    if arguments.job in ("bare", "slim"):
        print(json.dumps((run_bare if arguments.job == "bare" else run_slim)(arguments.models[0], arguments)))
        return
    columns = ["billions", "blocks", "forecast s", "forecast GPU GiB", "forecast host GiB"]
    if arguments.job == "measure":
        columns += ["s", "GPU GiB", "host GiB", "pinned GiB", "bare s", "times bare", "ceiling T/s", "stages"]
    line(columns)
    line(["---"] * len(columns))
    for name in arguments.models:
        told = foretell(name, arguments, numbers=arguments.job == "measure")
        blocks = arguments.blocks or MODELS[name][2]
        analysing, solving = (told.stages[stage] for stage in ("load and capture", "calibrate and solve"))
        row = [
            name,
            str(blocks),
            f"{analysing:.0f} + {solving:.0f}",
            f"{told.gpu / 2**30:.1f}",
            f"{told.host / 2**30:.1f}",
        ]
        if arguments.job == "measure":
            bare, took = in_a_process("bare", name), in_a_process("slim", name)
            row += [f"{took['seconds']:.1f}", f"{took['gpu'] / 2**30:.1f}", f"{took['host'] / 2**30:.1f}"]
            row.append(f"{took['pinned'] / 2**30:.1f}")
            row += [f"{bare['seconds']:.1f}", f"{took['seconds'] / bare['seconds']:.1f}"]
            row.append(f"{bare['ceiling'] / 1e12:.0f}")
            row.append(", ".join(f"{stage} {seconds:.1f}" for stage, seconds in took["stages"].items()))
        line(row)


if __name__ == "__main__":
    main()
