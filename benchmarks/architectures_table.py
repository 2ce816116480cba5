"""docs/architectures.md from what architectures.py --json wrote.

    python benchmarks/architectures_table.py FILE ...            # writes docs/architectures.md

Of several rows of one model type the last one counts.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Beyond these a result is wrong: of the ratio-0 proof, and of ONNX Runtime beside the slim program. BROKEN is what a
# wrong map must reach.
WRONG_PROOF, WRONG_ONNX, BROKEN = 1e-4, 1e-3, 1e-3
LONGEST = 160
COLOURS = re.compile(r"\x1b?\[\d+m")
Row = Mapping[str, Any]

HEAD = """# Architectures

What the compiler does with every architecture that transformers {version} has for causal and masked language models and
for image classification: tiny models with random weights, all parameters re-drawn, each examined in a process of its
own (torch {torch}) by

    python benchmarks/architectures.py --json FILE && python benchmarks/architectures_table.py FILE

which wrote this page. "Proof" is the largest difference of the model's first output, in units of the largest output,
over all kinds of width after random admissible maps of full width were inserted and folded, on a batch and length that
were not traced; wrong maps must reach {broken:g} ("proved" counts those alone). "FFN" counts layers whose every
feed-forward matrix, experts' included and routers' excepted, is in a region, of the layers that have such matrices as
far as their names tell. "ONNX" is how far ONNX Runtime is from the slim program with a quarter of the block weights
gone. A program that holds for the traced batch or length alone is examined at that, and counted apart.
"""


def read_rows(files: Sequence[Path]) -> list[Row]:
    """One row a model type, by their names."""
    found: dict[str, Row] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[row["key"]] = row
    return [found[key] for key in sorted(found)]


def captured(row: Row) -> bool:
    return "regions" in row


def for_one_shape(row: Row) -> bool:
    """Whether the captured program holds for the traced batch or length alone, which the compiler refuses."""
    return bool(row.get("one_shape"))


def proved(row: Row, *kinds: str) -> bool:
    """Whether one of these kinds was matched, survives admissible maps and breaks under wrong ones."""
    proof, wrong = row.get("proof", {}), row.get("wrong", {})
    return any(kind in wrong and _within(proof.get(kind), WRONG_PROOF) and _broken(wrong[kind]) for kind in kinds)


def _permuted(row: Row) -> bool:
    """Whether of every stream that was proved permutations alone pass."""
    return proved(row, "residual") and bool(row.get("limits")) and len(row["limits"]) == row["regions"]["residual"]


def _broken(value: float | None) -> bool:
    """Whether a wrong map shows; what is no number was kept as none."""
    return value is None or value >= BROKEN


def _within(value: float | None, bound: float) -> bool:
    return value is not None and value <= bound


def is_wrong(row: Row) -> bool:
    """Whether a result is wrong and nothing said so."""
    proof = [value for value in row.get("proof", {}).values() if not _within(value, WRONG_PROOF)]
    return bool(proof) or ("onnx" in row and not _within(row["onnx"], WRONG_ONNX))


def summary(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What is counted, of the captured ones, and how many there are."""
    known = [row for row in rows if captured(row) and not for_one_shape(row)]
    single = [row for row in rows if captured(row) and for_one_shape(row)]
    with_ffn = [row for row in known if row["ffn_layers"]]
    ran = [row for row in known if "onnx" in row]
    failed = [row for row in known if row.get("failed") == "onnx"]
    dense = [row for row in failed if _within(row.get("dense_onnx"), WRONG_ONNX)]
    uncut = [row for row in known if row.get("failed") == "slim"]
    return [
        ("examined", str(len(rows))),
        ("captured, and the program computes what the model does on shapes that were not traced", str(len(known))),
        (
            "captured for one batch or length alone: examined at that, refused by the compiler, in no count of matches",
            str(len(single)),
        ),
        ("a wrong result without an error", str(sum(map(is_wrong, [*known, *single])))),
        (
            f"FFN or experts matched in every layer that has them (of {len(with_ffn)})",
            str(sum(row["ffn_found"] >= row["ffn_layers"] for row in with_ffn)),
        ),
        ("FFN or experts proved", str(sum(proved(row, "ffn", "experts") for row in known))),
        ("attention: value or query/key width proved", str(sum(proved(row, "value", "query_key") for row in known))),
        (
            f"residual stream proved ({sum(_permuted(row) for row in known)} under permutations alone, not cut)",
            str(sum(proved(row, "residual") for row in known)),
        ),
        (
            f"slim ONNX runs in ONNX Runtime, of {len(ran) + len(dense)} whose dense ONNX does "
            f"({len(failed) - len(dense)} more run neither way)",
            str(len(ran)),
        ),
        ("captured, and nothing or too little to cut for a quarter of the weights", str(len(uncut))),
    ]


def cells(row: Row) -> list[str]:
    """A model type as people read it."""
    task, name = row["key"].split(":")
    if not captured(row):
        return [name, task, *["-"] * 7, f"not examined further ({row['failed']}): {_said(row['error'])}"]
    regions, proof = row["regions"], row.get("proof", {})
    wrong = [kind for kind, value in row.get("wrong", {}).items() if not _broken(value)]
    ffn = f"{row['ffn_found']}/{row['ffn_layers']}" if row["ffn_layers"] else "none"
    counts = [str(regions.get(kind, "-")) for kind in ("experts", "value", "query_key", "kv_heads", "residual")]
    worst = f"{max(float('inf') if value is None else value for value in proof.values()):.0e}" if proof else "-"
    notes = []
    if for_one_shape(row):
        sizes = " and ".join(f"{name} ({size})" for name, size in row["one_shape"].items())
        notes.append(f"for one {sizes} alone, which the compiler refuses")
    notes += [f"wrong maps of {kind} change nothing" for kind in wrong]
    notes += [f"{kind}: {_said(why.partition(': ')[2])}" for kind, why in (row.get("unproved") or {}).items()]
    notes += [_said(why) for why, _ in row.get("refused", [])[:2]]
    notes += [f"stream, permutations alone: {_said(why)}" for why in dict.fromkeys(row.get("limits", []))]
    if not any(regions.get(kind) for kind in ("value", "query_key", "kv_heads")):
        notes += [f"attention: {_said(why)}" for why in _of_attention(row)]
    if not regions.get("residual"):
        notes += [f"stream: {_said(why)}" for why in _of_the_stream(row)]
    if row["ffn_found"] < row["ffn_layers"]:
        notes.append(f"not matched: {', '.join(row['ffn_missing'][:2])}")
    if "failed" in row:
        notes.append(f"{row['failed']}: {_said(row['error'])}")
    onnx = f"{row['onnx']:.0e}" if "onnx" in row else "-"
    return [name, task, ffn, *counts, f"{worst} / {onnx}", "; ".join(dict.fromkeys(notes))]


def _of_attention(row: Row) -> list[str]:
    """Why none of an attention's widths was matched, as its linears say."""
    reasons = [part.partition(": ")[2] for why, _ in row["unmatched"] for part in why.split("; ")]
    return [why for why in reasons if why.startswith("of its ")][:1]


def _of_the_stream(row: Row) -> list[str]:
    reasons = [part for why, _ in row["unmatched"] for part in why.split("; ")]
    stream = [why.partition(": ")[2] for why in reasons if why.startswith("input: ")]
    return [why for why in dict.fromkeys(stream) if "heads" not in why and "conv" not in why][:1]


def _said(text: str) -> str:
    text = " ".join(COLOURS.sub("", text).replace("|", "/").split())
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def page(rows: Sequence[Row], version: str) -> str:
    """The whole page as markdown."""
    torch = ", ".join(sorted({row["torch"] for row in rows if "torch" in row}))
    lines = [HEAD.format(version=version, torch=torch, broken=BROKEN), "| | count |", "|---|---|"]
    lines += [f"| {what} | {count} |" for what, count in summary(rows)]
    columns = ["type", "task", "FFN", "experts", "value", "query/key", "KV heads", "stream", "proof / ONNX", "reasons"]
    lines += ["", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    return "\n".join([*lines, ""])


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    default = Path(__file__).parents[1] / "docs" / "architectures.md"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    rows = read_rows(arguments.files)
    arguments.out.write_text(page(rows, transformers.__version__), encoding="utf-8")
    for what, count in summary(rows):
        print(f"{count:>4}  {what}")


if __name__ == "__main__":
    main()
