"""The report's figures as words, for people: one list of rows that terminal and page both print."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dotresize_fx.report.contents import DecoderFidelity, EncoderFidelity, Figures, Latency, OutputFidelity, Report

NOT_MEASURED = "not measured"
DASH = "–"


@dataclass(frozen=True, slots=True)
class FigureRow:
    """One line of the dense/slim table. ``better`` is None where better and worse say nothing of it."""

    label: str
    dense: str
    slim: str
    change: str
    better: bool | None = None
    detail: str = ""


def count(value: float | None) -> str:
    """134515008 -> "134.5 M"."""
    return NOT_MEASURED if value is None else _scaled(value, ("", "k", "M", "B", "T"))


def giga(value: float | None) -> str:
    """19481493504 -> "19.48 G"; three digits or more, whatever the unit."""
    if value is None:
        return NOT_MEASURED
    step = 0
    while abs(value) >= 999.995 and step < 4:
        value, step = value / 1000, step + 1
    return f"{value:.2f} {'kMGT'[step - 1]}" if step else f"{value:.0f}"


def size(value: float | None) -> str:
    """Bytes in decimal units: 538060032 -> "538.1 MB"."""
    return NOT_MEASURED if value is None else _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    step = 0
    # 999.95 would print as 1000.0, and 999.5 without a unit as 1000: it belongs to the next unit.
    while abs(value) >= (999.95 if step else 999.5) and step < len(units) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.1f} {units[step]}" if step else f"{value:.0f} {units[0]}".rstrip()


def duration(seconds: float | None) -> str:
    """0.0123 -> "12.3 ms", 134 -> "2 min 14 s"; three significant digits."""
    if seconds is None:
        return NOT_MEASURED
    if seconds >= 99.95:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1 or unit == "µs":
            scaled = seconds * factor
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f} {unit}"
    raise AssertionError("the last unit always fits")


def number(value: float | None) -> str:
    """A small quantity: 0.000123 -> "1.2e-4", 0.1834 -> "0.183", 26.3 -> "26.30"."""
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return "infinite" if math.isinf(value) else "not a number"
    if value == 0:
        return "0"
    if not 1e-2 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


def share(value: float | None) -> str:
    """0.2 -> "20.0 %"."""
    return NOT_MEASURED if value is None else f"{100 * value:.1f} %"


def change(dense: float | None, slim: float | None) -> str:
    """Relative change with its sign: (100, 80) -> "−20.0 %"; a dash where either was not measured."""
    if not dense or slim is None:
        return DASH
    percent = 100 * (slim / dense - 1)
    sign = "" if abs(percent) < 0.05 else "−" if percent < 0 else "+"
    return f"{sign}{abs(percent):.1f} %"


def spread(latency: Latency | None) -> str:
    """Median and half the distance between the quartiles, both in one unit."""
    if latency is None:
        return NOT_MEASURED
    half = (latency.p75 - latency.p25) / 2
    scale = max(latency.median, half)
    # Not by the whole second: what is nearly one would be shown as 1000.0 of the smaller unit.
    factor, unit = (1.0, "s") if scale >= 0.99995 else (1e3, "ms") if scale >= 0.99995e-3 else (1e6, "µs")
    return f"{latency.median * factor:.1f} ± {half * factor:.1f} {unit}"


def conditions(latency: Latency) -> str:
    """Under what a latency was measured, in one line."""
    shape = "" if latency.batch is None else f"batch {latency.batch}"
    shape += "" if latency.length is None else f" × {latency.length} tokens"
    threads = f"{latency.threads} thread" + ("" if latency.threads == 1 else "s")
    parts = ("ONNX Runtime", latency.provider, threads, shape, f"{latency.runs} interleaved runs each")
    return ", ".join(part for part in parts if part)


def speed(figures: Figures) -> tuple[str, bool | None]:
    """The speedup in words, and whether it is one: None where the quartile ranges of both sides overlap."""
    dense, slim, factor = figures.dense.latency, figures.slim.latency, figures.speedup
    if dense is None or slim is None or factor is None:
        return DASH, None
    if dense.p25 <= slim.p75 and slim.p25 <= dense.p75:
        return f"{factor:.2f}× (within spread)", None
    return (f"{factor:.2f}× faster", True) if factor > 1 else (f"{1 / factor:.2f}× slower", False)


def figure_rows(report: Report) -> list[FigureRow]:
    """Every figure of the issue's table, in its order; a figure without a value says "not measured"."""
    figures = report.figures
    dense, slim = figures.dense, figures.slim
    at = "" if figures.macs_length is None else f" at {figures.macs_length} tokens"

    def sized(label: str, before: int | None, after: int | None, detail: str = "") -> FigureRow:
        show = size if label == "file size" else count
        better = None if before is None or after is None or before == after else after < before
        return FigureRow(label, show(before), show(after), change(before, after), better, detail)

    rows = [
        sized("parameters", dense.parameters, slim.parameters),
        sized("block linear weights", dense.block_linear_weights, slim.block_linear_weights),
        sized(f"MACs per token{at}", dense.macs_per_token, slim.macs_per_token, "head and attention included"),
        sized("MACs per token, block linears only", dense.block_macs_per_token, slim.block_macs_per_token),
        sized("file size", dense.file_bytes, slim.file_bytes, "model.onnx and its external data"),
        *_fidelity_rows(report),
    ]
    words, better = speed(figures)
    measured = slim.latency or dense.latency
    detail = "" if measured is None else f"{conditions(measured)}; median ± half the interquartile range"
    rows.append(FigureRow("latency", spread(dense.latency), spread(slim.latency), words, better, detail))
    rows += _target_rows(figures)
    verification = figures.verification
    label = f"largest difference to {'slim program' if verification is None else verification.against}"
    if verification is None:
        return [*rows, FigureRow(label, DASH, NOT_MEASURED, DASH), *_checkpoint_rows(figures)]
    limit = (
        f"within {number(verification.tolerance)}" if verification.passed else f"over {number(verification.tolerance)}"
    )
    scale = "" if verification.max_abs_output is None else f"largest output {number(verification.max_abs_output)}"
    difference = number(verification.max_abs_difference)
    rows.append(FigureRow(label, DASH, difference, limit, verification.passed, scale))
    return rows + _checkpoint_rows(figures)


def _target_rows(figures: Figures) -> list[FigureRow]:
    found = figures.latency_target
    if found is None:
        return []
    asked = DASH if found.target is None else f"asked for {found.target:.3f}"
    better = None if found.target is None else found.measured <= found.target
    tried = ", ".join(f"{share:.3f}" for share in found.rehearsals)
    detail = (
        f"{found.workload}: 95 % interval {found.low:.3f} to {found.high:.3f}, kernels predicted {found.predicted:.3f}"
        + (f", rehearsed {tried}" if tried else "")
    )
    return [FigureRow("share of the dense latency", DASH, f"{found.measured:.3f}", asked, better, detail)]


def _checkpoint_rows(figures: Figures) -> list[FigureRow]:
    found = figures.checkpoint
    if found is None:
        return []
    said = ", ".join(f"{name} {before} → {after}" for name, (before, after) in found.config_changes.items())
    generated = ""
    if found.tokens_generated:
        generated = f"; {found.tokens_equal} of {found.tokens_generated} greedy tokens equal"
    within = f"within {number(found.tolerance)}"
    detail = f"largest output {number(found.max_abs_output)}, loaded with from_pretrained{generated}"
    return [
        FigureRow("checkpoint: parameters", DASH, count(found.parameters), DASH, None, said or "config unchanged"),
        FigureRow(
            "checkpoint: weight files", DASH, size(found.file_bytes), DASH, None, f"{found.folder}/, safetensors"
        ),
        FigureRow("checkpoint: to slim program", DASH, number(found.max_abs_difference), within, True, detail),
    ]


def _fidelity_rows(report: Report) -> list[FigureRow]:
    if not report.figures.fidelity:
        labels = {"encoder": "cosine of pooled outputs", "outputs": "relative error of outputs"}
        label = labels.get(report.model.task, "perplexity")
        return [FigureRow(label, NOT_MEASURED, NOT_MEASURED, DASH)]
    rows = []
    for item in report.figures.fidelity:
        if isinstance(item, DecoderFidelity):
            excess = DASH if item.excess is None else f"{number(item.excess)} nats excess"
            where = f"{item.text}, {item.tokens} tokens"
            before, after = number(item.dense_perplexity), number(item.slim_perplexity)
            rows += [
                FigureRow("perplexity", before, after, excess, None, where),
                FigureRow("next-token top-1 agreement", DASH, share(item.top1_agreement), DASH),
                FigureRow("KL to dense, nats per token", DASH, number(item.kl_to_dense), DASH),
            ]
        elif isinstance(item, OutputFidelity):
            where = f"{item.data}; {item.count} rows"
            rows.append(FigureRow("relative error of outputs", DASH, number(item.relative_error), DASH, None, where))
            if item.mean_cosine is not None:
                rows.append(FigureRow("cosine of outputs", DASH, f"{item.mean_cosine:.4f}", DASH))
        else:
            where = f"{item.text}, {item.count} embeddings"
            cosine = NOT_MEASURED if item.mean_cosine is None else f"{item.mean_cosine:.4f}"
            rows.append(FigureRow("cosine of pooled outputs", DASH, cosine, DASH, None, where))
    return rows


def verdict(report: Report) -> str:
    """The run in one sentence, of measured figures only."""
    return ", ".join(verdict_parts(report))


def verdict_parts(report: Report) -> list[str]:
    """What :func:`verdict` joins: weights, speed, fidelity, verification."""
    figures = report.figures
    removed = figures.block_weights_removed
    parts = []
    if removed is not None:
        parts.append(f"{share(abs(removed))} of block weights {'added' if removed < -5e-4 else 'removed'}")
    words, _ = speed(figures)
    parts.append("latency not measured" if words == DASH else words)
    first = figures.fidelity[0] if figures.fidelity else None
    if isinstance(first, DecoderFidelity) and first.excess is not None:
        parts.append(f"excess {number(first.excess)} nats")
        if first.top1_agreement is not None:
            parts.append(f"top-1 agreement {share(first.top1_agreement)}")
    elif isinstance(first, OutputFidelity) and first.relative_error is not None:
        parts.append(f"outputs off by {share(first.relative_error)}")
    elif isinstance(first, EncoderFidelity) and first.mean_cosine is not None:
        parts.append(f"cosine {first.mean_cosine:.4f}")
    else:
        parts.append("fidelity not measured")
    check = figures.verification
    if check is None:
        parts.append("not verified")
    elif check.passed:
        parts.append(f"verified to {number(check.max_abs_difference)}")
    else:
        parts.append(
            f"VERIFICATION FAILED: off by {number(check.max_abs_difference)}, allowed {number(check.tolerance)}"
        )
    return parts
