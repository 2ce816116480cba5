"""What is left of a model's answers, as its report says it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dotresize_fx.calibration import CalibrationData
from dotresize_fx.fidelity import Inputs, Run, compare_answers, compare_decoders, mean_cosine
from dotresize_fx.report.contents import DecoderFidelity, EncoderFidelity, OutputFidelity
from dotresize_fx.task import Task


def fidelity_figures(
    dense: Run, slim: Run, data: CalibrationData, task: Task, predicts: str, step: Callable[[], None]
) -> DecoderFidelity | EncoderFidelity | OutputFidelity:
    """Both runs on the batches that did not calibrate; ``step`` is called once a batch.

    ``predicts`` names the input whose next tokens a decoder's answers are.
    """

    def batches() -> Iterator[Inputs]:
        for batch in data.evaluation:
            yield batch
            step()

    if task == "encoder":
        cosine, count = mean_cosine(dense, slim, batches())
        return EncoderFidelity(text=data.description, count=count, mean_cosine=cosine)
    if task == "outputs":
        found = compare_answers(dense, slim, batches())
        return OutputFidelity(
            data=data.description,
            count=found.count,
            relative_error=found.relative_error,
            mean_cosine=found.mean_cosine,
        )
    figures = compare_decoders(dense, slim, batches(), predicts)
    return DecoderFidelity(
        text=data.description,
        tokens=figures.tokens,
        dense_perplexity=figures.dense_perplexity,
        slim_perplexity=figures.slim_perplexity,
        top1_agreement=figures.top1_agreement,
        kl_to_dense=figures.kl_to_dense,
    )
