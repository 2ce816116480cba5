"""Write a slim graph as a Hugging Face checkpoint, load it as anyone would, and hold it against the slim program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from dotresize_fx.cost import count_cost
from dotresize_fx.errors import CheckpointError
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.export.stock_model import stock_model
from dotresize_fx.export.weight_files import first_line
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.report.contents import CheckpointFigures

if TYPE_CHECKING:
    from dotresize_fx.slim_result import SlimResult

Inputs = Mapping[str, torch.Tensor]
FOLDER = "checkpoint"
# Of the largest output. Both are float32 and sum in other orders; a wrong model is off by its outputs' size.
TOLERANCE = 1e-4
PROMPT, GENERATED = 8, 32


def write_checkpoint(
    result: SlimResult, folder: Path, cases: Iterable[Inputs], noise: float = 0.0
) -> tuple[CheckpointFigures, tuple[str, ...]]:
    """``folder``/checkpoint with config, weights and tokenizer; its figures, and notes for the report.

    ``cases``, of shapes that were not traced, are what both are run on. ``noise`` is how far rounding moves outputs.

    Raises:
        CheckpointError: the slim widths, or a weight, have no place in a stock model, or what was written computes
            something else.
    """
    loaded, place = result.loaded, folder / FOLDER
    slimmed = result.slimmed
    gone = [block.number for block in slimmed.gone]
    made = stock_model(loaded, result.dense, slimmed.graph, result.matches.regions, slimmed.plan.widths, gone)
    generation = getattr(loaded.model, "generation_config", None)
    if generation is not None:
        made.model.generation_config = generation
    made.model.config.use_cache = getattr(loaded.config, "use_cache", None)
    with quiet_libraries():
        try:
            made.model.save_pretrained(place)
        except ValueError as error:  # it checks the generation settings that came with the model
            raise CheckpointError(f"--checkpoint: transformers does not save it: {first_line(error)}") from error
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(place)
    changes = dict(made.changes)
    del made
    model = _load(type(loaded.model), place)
    difference, scale, count = largest_difference(model, result.slim, cases)
    allowed = max(TOLERANCE * scale, noise)
    if not difference <= allowed:
        raise CheckpointError(
            f"the checkpoint differs from the slim program by {difference:.2e} (tolerance {allowed:.0e}): nothing was "
            "written; leave out --checkpoint, and please report this model"
        )
    equal, generated = _greedy(model, result)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    figures = CheckpointFigures(
        folder=FOLDER,
        config_changes={name: list(change) for name, change in changes.items()},
        parameters=parameters,
        file_bytes=sum(file.stat().st_size for file in place.glob("*.safetensors")),
        max_abs_difference=difference,
        tolerance=allowed,
        max_abs_output=scale,
        cases=count,
        tokens_generated=generated,
        tokens_equal=equal,
    )
    return figures, _price_of_untying(changes, parameters, count_cost(result.slim, 1).parameters)


@torch.no_grad()
def largest_difference(model: Any, slim: FxGraph, cases: Iterable[Inputs]) -> tuple[float, float, int]:
    """Of the first outputs at positions that are no padding: the difference, the largest output, how many cases."""
    execution = Execution(slim)
    difference = scale = 0.0
    count = 0
    for inputs in cases:
        found, expected = model(**inputs)[0], execution.outputs(inputs)[0]
        if found.shape != expected.shape:
            raise CheckpointError(
                f"the checkpoint puts out {list(found.shape)}, the slim program {list(expected.shape)}"
            )
        if expected.shape[:2] == inputs["attention_mask"].shape:
            real = inputs["attention_mask"].bool()
            found, expected = found[real], expected[real]
        largest = float((found - expected).abs().max())
        # A comparison with NaN is false, and would keep the smaller one.
        difference = largest if not largest <= difference else difference
        scale = max(scale, float(expected.abs().max()))
        count += 1
    return difference, scale, count


def _load(model_class: Any, place: Path) -> Any:
    with quiet_libraries():
        model, info = model_class.from_pretrained(
            place, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    if unfit := sorted({*info["missing_keys"], *info["unexpected_keys"]}, key=str):
        raise CheckpointError(f"the checkpoint that was written lacks or does not take {unfit[0]}: nothing was written")
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _greedy(model: Any, result: SlimResult) -> tuple[int | None, int | None]:
    """How many tokens of a greedy continuation are the slim program's, and of how many; None each for an encoder.

    Raises:
        CheckpointError: they differ where the slim program was not in doubt.
    """
    generated = min(GENERATED, result.captured.longest - PROMPT)
    if result.loaded.task != "decoder" or not model.can_generate() or generated < 1:
        return None, None
    row = next(iter(result.data.evaluation))
    real = row["attention_mask"][0].bool()
    ids = row["input_ids"][0][real][:PROMPT][None]
    model.generation_config = GenerationConfig()
    settings = GenerationConfig(max_new_tokens=generated, do_sample=False, use_cache=True, pad_token_id=0)
    with quiet_libraries():
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    execution = Execution(result.slim)
    for step in range(generated):
        logits = execution.outputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0][0, -1]
        first, second = logits.topk(2).values.tolist()
        chosen = logits.argmax()
        if chosen != found[0, ids.shape[1]]:
            if first - second <= 2 * TOLERANCE * float(logits.abs().max()):
                return step, generated  # a tie, which rounding decides
            raise CheckpointError(
                f"generate with the checkpoint gives another token {step + 1} than the slim program: nothing was "
                "written; leave out --checkpoint, and please report this model"
            )
        ids = torch.cat([ids, chosen.view(1, 1)], 1)
    return generated, generated


def _price_of_untying(changes: Mapping[str, Any], parameters: int, slim: int) -> tuple[str, ...]:
    if "tie_word_embeddings" not in changes:
        return ()
    return (
        "the checkpoint's head has a weight of its own, since no stock model has a matrix in front of a tied one: "
        f"{parameters} parameters, against {slim} in the ONNX",
    )
