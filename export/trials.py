"""What a slim model is tried on beside the dense one: inputs that verify and time it, and what is left of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from dotresize_fx.export.cached_runs import continued, onnx_inputs, prompt_inputs, splits
from dotresize_fx.export.capture_module import untraced_samples
from dotresize_fx.export.fidelity_figures import fidelity_figures
from dotresize_fx.fidelity import Run
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.gram import padding_input
from dotresize_fx.report.contents import DecoderFidelity, EncoderFidelity, OutputFidelity
from dotresize_fx.task import reads_text

if TYPE_CHECKING:
    from dotresize_fx.slim_result import SlimResult

# (batch, length, padded tokens on the left of the last row): shapes that were not traced, padding included.
VERIFIED_SHAPES = ((1, 1, 0), (2, 16, 5), (3, 37, 11), (1, 130, 0))
# Of held-out inputs so many batches verify a module or a program, beside the traced sample and its untraced sizes.
VERIFIED_BATCHES = 2
# Of the text that did not calibrate, at its beginning.
TEXT_LENGTHS = (41, 128)


def verification_inputs(result: SlimResult) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of shapes that were traced and, where these are free, of others."""
    captured = result.captured
    if captured.inputs is None:
        for batch, length, padding in VERIFIED_SHAPES:
            yield _random_inputs(result, batch, min(length, captured.longest), padding)
        return
    yield from untraced_samples(captured.sample, captured.inputs)
    for inputs in result.data.evaluation[:VERIFIED_BATCHES]:
        yield dict(inputs)


def verification_cases(result: SlimResult) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Inputs and outputs of the program; with a cache, the last tokens are also left to be run behind the others."""
    execution = Execution(result.slim, caches=True)
    for inputs in verification_inputs(result):
        expected = execution.outputs(inputs)
        yield onnx_inputs(result.slim, inputs), [output.numpy() for output in expected]
        if result.captured.cache is None:
            continue
        for past in splits(inputs["attention_mask"]):
            before = [output[:, :, :past] for output in expected[1:]]
            given = continued(result.slim, inputs, before, past)
            behind = [expected[0][:, past:], *expected[1:]]
            yield onnx_inputs(result.slim, given), [output.numpy() for output in behind]


@torch.no_grad()
def rounding_noise(result: SlimResult) -> float:
    """How far the slim program's outputs move, at real positions, when every weight moves by about its last bit."""
    moved = result.slim.copy()
    generator = torch.Generator().manual_seed(result.options.seed)
    weights = moved.program.state_dict
    for name, weight in weights.items():
        if weight.is_floating_point():
            last_bit = torch.finfo(weight.dtype).eps / 2
            weights[name] = moved.kept(weight * (1 + last_bit * torch.randn(weight.shape, generator=generator)))
    largest = 0.0
    for inputs in verification_inputs(result):
        mask = padding_input(inputs)
        both = (Execution(graph, caches=True).outputs(inputs) for graph in (result.slim, moved))
        for one, other in zip(*both, strict=True):
            largest = max(largest, float(_at_tokens((one - other).abs(), mask).max()))
    return largest


@torch.no_grad()
def half_noise(result: SlimResult, dtype: torch.dtype) -> tuple[float, ...]:
    """How far products in ``dtype`` move each of the slim program's outputs, at real positions, as a share of its
    largest number: of all inputs the furthest.

    They are those of torch's autocast on a CPU: products and attention read and give ``dtype``, the rest is float32.
    """
    execution = Execution(result.slim, caches=True)
    rows = []
    for inputs in verification_inputs(result):
        mask = padding_input(inputs)
        exact = execution.outputs(inputs)
        with torch.autocast("cpu", dtype=dtype):
            coarse = execution.outputs(inputs)
        moves = [_at_tokens((one - other.float()).abs(), mask).max() for one, other in zip(exact, coarse, strict=True)]
        rows.append([float(move / one.abs().max().clamp_min(1e-30)) for move, one in zip(moves, exact, strict=True)])
    return tuple(map(max, zip(*rows, strict=True)))


def _at_tokens(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What is no padding's: of (batch, length, ...), and of a cache's (batch, heads, length, ...)."""
    if mask is not None and values.shape[:2] == mask.shape:
        return values[mask.bool()]
    if mask is not None and values.ndim == 4 and (values.shape[0], values.shape[2]) == tuple(mask.shape):
        return values.transpose(1, 2)[mask.bool()]
    return values


def latency_inputs(result: SlimResult) -> dict[str, torch.Tensor]:
    """One sequence or sample, or as many as a run has to have."""
    captured = result.captured
    if captured.inputs is None:
        return _random_inputs(result, 1, min(result.options.latency_length, captured.longest), 0)
    inputs = result.data.evaluation[0]
    return captured.inputs.part(inputs, 0, captured.inputs.batch_size or 1)


def mask_name(result: SlimResult) -> str | None:
    """The input that tells padding, whose outputs mean nothing and are not compared."""
    return None if padding_input(result.captured.sample) is None else "attention_mask"


def ids_name(result: SlimResult) -> str:
    """The input whose next tokens are predicted."""
    return "input_ids" if reads_text(result.task) else result.captured.predicts


def text_inputs(result: SlimResult) -> Iterator[dict[str, torch.Tensor]]:
    """The beginning of the text that did not calibrate, at several lengths."""
    text = next(iter(result.data.evaluation))
    for length in TEXT_LENGTHS:
        yield {name: value[:2, :length] for name, value in text.items()}


def _random_inputs(result: SlimResult, batch: int, length: int, padding: int) -> dict[str, torch.Tensor]:
    """Random token ids (a language model's answer to noise is as comparable as any) and a mask padded on the left."""
    generator = torch.Generator().manual_seed(result.options.seed + 1)
    ids = torch.randint(0, result.captured.vocabulary, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    return prompt_inputs(result.captured.cache, ids, mask)


def measure_fidelity(
    result: SlimResult, step: Callable[[], None], run: Run | None = None
) -> DecoderFidelity | EncoderFidelity | OutputFidelity:
    """Slim program, or ``run``, against dense program on what did not calibrate; ``step`` is called once a batch."""
    dense, slim = Execution(result.dense), Execution(result.slim)
    return fidelity_figures(
        lambda batch: dense.outputs(batch)[0],
        run or (lambda batch: slim.outputs(batch)[0]),
        result.data,
        result.task,
        ids_name(result),
        step,
    )
