"""Writing a report, or a benchmark: for pipelines as JSON, for people as a page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dotresize_fx.errors import OutputError
from dotresize_fx.report.bench_contents import BenchReport
from dotresize_fx.report.bench_page import render_bench_page
from dotresize_fx.report.contents import REPORT_FILE, Report
from dotresize_fx.report.page import render_page


def write_report(report: Report, folder: Path) -> None:
    """Write report.json and report.html into the existing ``folder``. Raises OutputError where that fails."""
    texts = {
        REPORT_FILE: _json_text(report.to_json()),
        "report.html": render_page(report),
    }
    for name, text in texts.items():
        _write(folder / name, text)


def check_writable(file: Path) -> None:
    """Raise OutputError where ``file`` cannot be made: before the work that it is to hold."""
    if file.is_dir():
        raise OutputError(f"cannot write {file}: it is a folder; give the name of a file")
    if not file.absolute().parent.is_dir():
        raise OutputError(f"cannot write {file}: there is no folder {file.parent}; make it first")


def write_bench(report: BenchReport, json_file: Path | None, page_file: Path | None) -> None:
    """Write a benchmark where it is wanted. Raises OutputError where that fails."""
    if json_file is not None:
        _write(json_file, _json_text(report.to_json()))
    if page_file is not None:
        _write(page_file, render_bench_page(report))


def _json_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _write(file: Path, text: str) -> None:
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        # Bytes, and with lone surrogates escaped: file names can hold what UTF-8 cannot.
        beside.write_bytes(text.encode("utf-8", errors="backslashreplace"))
        beside.replace(file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(f"cannot write {file}: {error.strerror}; free space or choose another place") from error
