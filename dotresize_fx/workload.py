"""What a benchmark runs: a prompt, tokens behind it, and how many sequences at once."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dotresize_fx.errors import UsageError


@dataclass(frozen=True)
class Workload:
    """``prompt`` tokens of each of ``batch`` sequences at once, and behind them ``decode`` tokens one by one."""

    prompt: int = 128
    decode: int = 64
    batch: int = 1

    def __str__(self) -> str:
        return f"prompt={self.prompt},decode={self.decode},batch={self.batch}"


def read_workload(text: str) -> Workload:
    """A workload from "prompt=128,decode=64,batch=1"; what is left out keeps its default.

    Raises:
        UsageError: another name, a name twice, or no number of at least 1 (``decode``: 0).
    """
    known = [field.name for field in fields(Workload)]
    given: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in known or name in given:
            raise UsageError(f"--workload {text}: say each of {', '.join(known)} once, as in {Workload()}")
        if not number.isascii() or not number.isdigit() or int(number) < (name != "decode"):
            raise UsageError(f"--workload {text}: {name} is {number or 'nothing'}: it must be at least 1 (decode: 0)")
        given[name] = int(number)
    return Workload(**given)
