"""The benchmark as one self-contained page, of the same pieces as report.html."""

from __future__ import annotations

from dotresize_fx.report import bench_tables as tables
from dotresize_fx.report.bench_contents import BenchReport
from dotresize_fx.report.latency_plot import latency_plot
from dotresize_fx.report.templates import render


def render_bench_page(report: BenchReport) -> str:
    """The whole HTML document."""
    workloads = []
    for workload in report.workloads:
        phases = []
        for phase in workload.phases:
            marks, ticks = latency_plot({run.model: run.latency for run in phase.runs})
            findings = [(finding.text, tables.loss_tables(finding)) for finding in phase.findings]
            phases.append((tables.phase_table(phase), tables.moved_table(phase), marks, ticks, findings))
        workloads.append((tables.workload_name(workload), phases, workload.notes))
    content = {
        "report": report,
        "sizes": tables.sizes_table(report),
        "workloads": workloads,
        "conditions": tables.conditions(report),
        "ate": tables.ATE,
    }
    return render("bench.html.j2", content)
