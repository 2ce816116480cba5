"""A benchmark's figures as words: tables that terminal and page both print."""

from __future__ import annotations

from dotresize_fx.report import figure_rows as words
from dotresize_fx.report.bench_contents import BenchReport, Finding, Loss, Phase, RunFigures, WorkloadFigures
from dotresize_fx.report.table import Table
from dotresize_fx.report.terminal_table import WIDTH, plain_text, takes_ascii, wrapped

#: Of groups of nodes the terminal prints so many, those that ate most.
SHOWN = 8


def sizes_table(report: BenchReport) -> Table:
    """What the models are and take."""
    peaks = ["peak"] if len(report.workloads) == 1 else [f"peak {w + 1}" for w in range(len(report.workloads))]
    head = ("model", "file size", "KV cache", *peaks)
    rows = []
    for index, model in enumerate(report.models):
        found = [workload.peaks[index] for workload in report.workloads]
        sizes = [words.size(peak.rss_bytes) for peak in found]
        if report.device != "cpu":
            sizes = [f"{size} + {words.size(p.device_bytes)} GPU" for size, p in zip(sizes, found, strict=True)]
        rows.append((model.name, words.size(model.file_bytes), "yes" if model.cached else "no", *sizes))
    detail = "Peak memory is of a process with this model alone"
    detail += ", GPU memory beside CUDA's own context" if report.device != "cpu" else ""
    return Table("Models", head, rows, detail + ".")


def workload_name(workload: WorkloadFigures) -> str:
    """In words."""
    tokens = f", {workload.decode} output tokens" if workload.decode else ""
    return f"batch {workload.batch}, prompt of {workload.prompt}{tokens}"


def phase_table(phase: Phase) -> Table:
    """Latency and what follows from it, a line a model."""
    head = ("model", "median", "to the first [95 %]", "tokens/s", "MACs", "", "GFLOP/s")
    rows = []
    for run in phase.runs:
        half = (run.latency.p75 - run.latency.p25) / 2
        cut = words.DASH if run.macs_ratio is None else words.change(1.0, run.macs_ratio)
        rows.append(
            (
                run.model,
                f"{words.duration(run.latency.median)} ± {words.duration(half)}",
                interval(run),
                words.DASH if run.tokens_per_second is None else f"{run.tokens_per_second:.1f}",
                words.giga(run.macs),
                cut,
                words.DASH if run.gflops is None else words.number(run.gflops),
            )
        )
    title = {"prompt": "Prompt latency", "output token": "Time per output token"}[phase.name]
    return Table(title, head, rows, phase.detail)


def moved_table(phase: Phase) -> Table:
    """What a run moves, a line a model; and of a GPU how long it is busy."""
    on_gpu = any(run.launching is not None or run.gpu_busy is not None for run in phase.runs)
    head = ("model", "weights read", "cache in and out", "together", "", "GB/s", *(("GPU busy",) if on_gpu else ()))
    rows = []
    for run in phase.runs:
        busy = "unknown" if run.gpu_busy is None else f"{run.gpu_busy:.0%}"
        rows.append(
            (
                run.model,
                words.size(run.weight_bytes),
                words.DASH if run.cache_bytes is None else words.size(run.cache_bytes),
                words.size(run.bytes_moved),
                words.DASH if run.bytes_ratio is None else words.change(1.0, run.bytes_ratio),
                words.DASH if run.gigabytes_per_second is None else words.number(run.gigabytes_per_second),
                *((busy,) if on_gpu else ()),
            )
        )
    return Table(f"Bytes moved, {phase.name}", head, rows, "weights once, of embeddings the rows picked")


def interval(run: RunFigures) -> str:
    """The ratio of latencies with its interval."""
    ratio = run.ratio
    return words.DASH if ratio is None else f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def loss_tables(finding: Finding, shown: int | None = None) -> list[Table]:
    """Where the time went, a table a grouping."""
    names = {"op": "kind of op", "region": "region", "layer": "layer"}
    head = ("", "first", "this", "ate", "MACs of this", "")
    return [
        Table(f"By {names[grouping]}", (names[grouping], *head[1:]), [_loss(loss) for loss in losses[:shown]])
        for grouping, losses in finding.losses.items()
        if len(losses) > 1
    ]


def _loss(loss: Loss) -> tuple[str, ...]:
    eaten = ("−" if loss.eaten < 0 else "") + words.duration(abs(loss.eaten))
    macs = words.giga(loss.after_macs) if loss.before_macs or loss.after_macs else words.DASH
    change = words.change(loss.before_macs, loss.after_macs)
    return (loss.label, words.duration(loss.before), words.duration(loss.after), eaten, macs, change)


def bench_table(report: BenchReport, *, ascii_only: bool | None = None) -> str:
    """The whole report as plain text, ending without a line break, in 100 columns."""
    ascii_only = takes_ascii() if ascii_only is None else ascii_only
    lines = _printed(sizes_table(report), ascii_only)
    for workload in report.workloads:
        lines += ["", *wrapped(f"== {workload_name(workload)} ==", 0, ascii_only)]
        for phase in workload.phases:
            lines += _printed(phase_table(phase), ascii_only)
            lines += _printed(moved_table(phase), ascii_only)
            for finding in phase.findings:
                lines += wrapped(f"! {finding.text}.{f' {ATE}' if finding.losses else ''}", 0, ascii_only)
                for table in loss_tables(finding, SHOWN):
                    lines += _printed(table, ascii_only)
        lines += [line for note in workload.notes for line in wrapped(f"Note: {note}", 0, ascii_only)]
    return "\n".join([*lines, "", *wrapped(conditions(report), 0, ascii_only)])


ATE = (
    "What ate it, by ONNX Runtime's profiler: time beyond what the first model took there, cut as all MACs were; the "
    "largest first."
)


def conditions(report: BenchReport) -> str:
    """Under what all was measured."""
    where = report.device if report.device != "cpu" else report.machine.cpu
    threads = f"{report.threads} thread" + ("" if report.threads == 1 else "s")
    runtime = f"ONNX Runtime {report.packages['onnxruntime']}, {report.provider}"
    return (
        f"{runtime}, {where}, {threads}; {report.runs} rounds in turns, median ± half the interquartile range; inputs "
        "and outputs stay where the model runs; GFLOP/s count two operations a MAC."
    )


def _printed(table: Table, ascii_only: bool) -> list[str]:
    rows = [[plain_text(cell, ascii_only) for cell in row] for row in (table.head, *table.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.head))]
    widths[0] = max(8, min(widths[0], WIDTH - sum(width + 2 for width in widths[1:])))
    lines = []
    for row in rows:
        name = row[0] if len(row[0]) <= widths[0] else f"..{row[0][2 - widths[0] :]}"  # names differ at their ends
        cells = "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append(f"{name:<{widths[0]}}{cells}")
    rule = plain_text("─", ascii_only) * max(len(line) for line in lines)
    title = wrapped(f"{table.title}" + (f" ({table.detail.rstrip('.')})" if table.detail else ""), 0, ascii_only)
    return [*title, rule, lines[0].rstrip(), rule, *(line.rstrip() for line in lines[1:])]
