"""Writing a report into OUT: for pipelines as JSON, for people as a page."""

from __future__ import annotations

import json
from pathlib import Path

from dotresize_fx.errors import OutputError
from dotresize_fx.report.contents import Report
from dotresize_fx.report.page import render_page


def write_report(report: Report, folder: Path) -> None:
    """Write report.json and report.html into the existing ``folder``. Raises OutputError where that fails."""
    texts = {
        "report.json": json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "report.html": render_page(report),
    }
    for name, text in texts.items():
        try:
            # Bytes, and with lone surrogates escaped: file names can hold what UTF-8 cannot.
            (folder / name).write_bytes(text.encode("utf-8", errors="backslashreplace"))
        except OSError as error:
            raise OutputError(
                f"cannot write {folder / name}: {error.strerror}; free space or choose another OUT"
            ) from error
