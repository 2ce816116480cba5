"""Our graph beside that of ONNX Runtime GenAI's own builder, both run by onnxruntime-genai.

    dotresize-fx export smollm2-135m OUT --ratio 0.2 --regions ffn --uniform --checkpoint --format genai --target cpu
    python benchmarks/genai.py OUT OUT/genai              # folders with a genai_config.json, from the same weights

All take turns, greedy, on the same random prompt; medians of the rounds behind the first, half their interquartile
range, and how many of the tokens are the first folder's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai
from bench import line

COLUMNS = ("folder", "prompt, ms", "tokens/s", "tokens alike")


def generated(model: onnxruntime_genai.Model, prompt: np.ndarray, count: int) -> tuple[float, float, list[int]]:
    """Seconds of the prompt with its first token, seconds of each token behind it, and the tokens."""
    parameters = onnxruntime_genai.GeneratorParams(model)
    whole = len(prompt) + count
    parameters.set_search_options(max_length=whole, min_length=whole, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    started = time.perf_counter()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    first = time.perf_counter()
    tokens = [int(generator.get_next_tokens()[0])]
    while len(tokens) < count and not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return first - started, (time.perf_counter() - first) / max(len(tokens) - 1, 1), tokens


def spread(found: Sequence[float]) -> str:
    low, middle, high = np.percentile(found, [25, 50, 75])
    return f"{middle:.1f} ± {(high - low) / 2:.1f}"


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    return parser.parse_args(given)


def main() -> None:
    arguments = parse()
    config = json.loads((arguments.folders[0] / "genai_config.json").read_text())["model"]
    prompt = np.random.default_rng(0).integers(0, config["vocab_size"], arguments.prompt).astype(np.int32)
    models = {folder: onnxruntime_genai.Model(str(folder)) for folder in arguments.folders}
    rounds = [
        {folder: generated(model, prompt, arguments.decode) for folder, model in models.items()}
        for _ in range(arguments.rounds + 1)
    ][1:]
    line(COLUMNS)
    line(["---"] * len(COLUMNS))
    first = rounds[0][arguments.folders[0]][2]
    for folder in models:
        prompts, steps, tokens = zip(*(each[folder] for each in rounds), strict=True)
        alike = sum(one == other for one, other in zip(tokens[0], first, strict=False))
        speeds = [1 / seconds for seconds in steps]
        line([folder.name, spread([1e3 * taken for taken in prompts]), spread(speeds), f"{alike} of {len(first)}"])


if __name__ == "__main__":
    main()
