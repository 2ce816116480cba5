"""What the table says of model.onnx in another precision: dense and slim written alike, each beside dense float32."""

from __future__ import annotations

from dotresize_fx.report.contents import (
    DecoderFidelity,
    EncoderFidelity,
    Figures,
    Latency,
    PrecisionFigures,
    Report,
    SideFigures,
)
from dotresize_fx.report.figure_rows import DASH, FigureRow, change, number, share, size, speed, spread


def precision_rows(report: Report) -> list[FigureRow]:
    """Rows in the columns of :func:`figure_rows`; none where model.onnx is float32."""
    sides = {row.side: row for row in report.figures.precisions}
    dense, slim = sides.get("dense"), sides.get("slim")
    if dense is None or slim is None:
        return []
    name = slim.precision
    smaller = None if dense.file_bytes is None or slim.file_bytes is None else slim.file_bytes < dense.file_bytes
    off = "" if slim.linears is None else f", {slim.quantised_linears} of {slim.linears} products quantised"
    rows = [
        FigureRow(
            f"file size, {name}",
            size(dense.file_bytes),
            size(slim.file_bytes),
            change(dense.file_bytes, slim.file_bytes),
            smaller,
            f"{change(report.figures.dense.file_bytes, slim.file_bytes)} beside dense float32{off}",
        ),
        *_fidelity(dense, slim),
    ]
    words, better = _speed(dense.latency, slim.latency)
    both, _ = _speed(report.figures.dense.latency, slim.latency)
    detail = f"slim {name} beside dense float32: {both}"
    rows.append(FigureRow(f"latency, {name}", spread(dense.latency), spread(slim.latency), words, better, detail))
    if (check := slim.verification) is not None:
        limit = f"{'within' if check.passed else 'over'} {number(check.tolerance)}"
        detail = "of an output's largest number"
        found = number(check.max_abs_difference)
        rows.append(FigureRow(f"difference to slim program, {name}", DASH, found, limit, check.passed, detail))
    return rows


def _speed(before: Latency | None, after: Latency | None) -> tuple[str, bool | None]:
    return speed(Figures(dense=SideFigures(latency=before), slim=SideFigures(latency=after)))


def _excess(found: DecoderFidelity) -> str:
    return DASH if found.excess is None else number(found.excess)


def _fidelity(dense: PrecisionFigures, slim: PrecisionFigures) -> list[FigureRow]:
    first, second, name = dense.fidelity, slim.fidelity, slim.precision
    if isinstance(first, DecoderFidelity) and isinstance(second, DecoderFidelity):
        where = "beside dense float32, measured in ONNX Runtime"
        with_dense, with_own = share(first.top1_agreement), share(dense.top1_agreement)
        return [
            FigureRow(f"perplexity, {name}", number(first.slim_perplexity), number(second.slim_perplexity), DASH),
            FigureRow(f"excess in nats, {name}", _excess(first), _excess(second), DASH, None, where),
            FigureRow(f"KL to dense float32, {name}", number(first.kl_to_dense), number(second.kl_to_dense), DASH),
            FigureRow(f"agreement with dense float32, {name}", with_dense, share(second.top1_agreement), DASH),
            FigureRow(f"agreement with own float32, {name}", with_own, share(slim.top1_agreement), DASH),
        ]
    if isinstance(first, EncoderFidelity) and isinstance(second, EncoderFidelity):
        label, values = "cosine to dense", (first.mean_cosine, second.mean_cosine)
    elif first is not None and second is not None:
        label = "relative error to dense"
        values = (getattr(first, "relative_error", None), getattr(second, "relative_error", None))
    else:
        return []
    return [FigureRow(f"{label}, {name}", number(values[0]), number(values[1]), DASH)]
