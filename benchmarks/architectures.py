"""Every architecture of transformers, tiny and with random weights: what is captured, matched, proved, slimmed and run.

    python benchmarks/architectures.py --json architectures.jsonl            # all, about an hour on two cores
    python benchmarks/architectures.py --json some.jsonl --only causal:llama masked:bert image:vit
    python benchmarks/architectures.py --json fused.jsonl --cache --target cpu
    python benchmarks/architectures_table.py architectures.jsonl             # writes docs/architectures.md

Each model is built in a process of its own. All parameters are re-drawn; the proof inserts and folds random admissible
maps of full width into every region of a kind and compares with the model itself on a batch and length that were not
traced, at real positions (a program that holds for the traced ones alone is examined at those, and counted apart); a
map that the symmetry does not admit must break the bound a hundredfold. Then a quarter of the block weights goes
(``--ratio``), the slim program becomes ONNX, and ONNX Runtime must put out what it does. ``--cache`` captures decoders
with their cache, as an export does, and also runs the ONNX behind a past; ``--target`` is whose ops the ONNX holds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import onnx
import torch
import transformers
from architectures_table import WRONG_ONNX, WRONG_PROOF
from bench import append
from tiny_inputs import LENGTH, ROWS, batches
from tiny_models import TASKS, Architecture, architectures, tiny_model

from dotresize_fx.errors import CaptureError, VerificationError
from dotresize_fx.export.cached_runs import continued, onnx_inputs, prompt_inputs
from dotresize_fx.export.capture import Captured, capture
from dotresize_fx.export.capture_cache import capture_with_cache
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.fidelity import Inputs
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.options import TARGETS, Options
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.prove_exactness import map_regions
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress
from dotresize_fx.region_map import random_admissible_map, random_wrong_map
from dotresize_fx.regions import ATTENTION_KINDS, MatchReport, RegionKind

STAGES = ("build", "capture", "match", "prove", "slim", "onnx")
KINDS = (RegionKind.FFN, RegionKind.EXPERTS, *ATTENTION_KINDS, RegionKind.RESIDUAL)
SECONDS = 240
# A layer's own number stands in a parameter's name behind the name of a list.
LAYER = re.compile(r"^(.*?\.\d+)\.(.+)$")
FFN_NAMES = re.compile(r"mlp|ffn|feed_forward|ff\b|fc|intermediate|expert|dense_h_to|output\.dense|moe|lin1|lin2")
ROUTER_NAMES = re.compile(r"router|shared_expert_gate|\bgate\.(weight|wg|down_proj)|gate\.linear|_bias$|wg\b")
# What mixes the streams of hyper-connections, and what a low-rank adapter reads the stream into its rank with.
OTHER_NAMES = re.compile(r"_hc\.fn$|adapter_list\.\d+\.0\.")
ATTENTION_NAMES = re.compile(r"att|mixer|mamba|ssm|rnn|conv|crossattention", re.IGNORECASE)


def difference(found: torch.Tensor, expected: torch.Tensor, batch: Inputs) -> float:
    """Largest absolute difference at real positions, in units of the largest output; infinite for other shapes."""
    if found.shape != expected.shape:
        return float("inf")
    mask = batch.get("attention_mask")
    if mask is not None and found.shape[:2] == mask.shape:
        found, expected = found[mask.bool()], expected[mask.bool()]
    worst = float((found - expected).abs().max() / expected.abs().max())
    return worst if worst == worst else float("inf")


def first(outputs: Any) -> torch.Tensor:
    return next(value for value in outputs.values() if isinstance(value, torch.Tensor))


def used_parameters(graph: FxGraph) -> set[str]:
    """Names of the parameters that the program reads: a vision tower, say, is none of a text model's."""
    specs = {spec.arg.name: str(spec.target) for spec in graph.program.graph_signature.input_specs}
    return {specs[node.name] for node in graph.nodes.nodes if node.op == "placeholder" and node.users}


class Examination:
    """One architecture; ``row`` holds what was found, up to the stage that failed."""

    def __init__(self, architecture: Architecture, ratio: float, target: str = "any", cache: bool = False) -> None:
        self.architecture, self.ratio, self.target, self.cache = architecture, ratio, target, cache
        self.row: dict[str, Any] = {"kind": "row", "key": architecture.key, "class": architecture.class_name}
        self.row["torch"] = torch.__version__.partition("+")[0]
        self.shape = {"batch": ROWS, "length": LENGTH}

    def run(self, stages: Sequence[str] = STAGES) -> dict[str, Any]:
        """The stages in their order, each of which needs those before it but for "prove"."""
        seconds: dict[str, float] = {}
        for name in stages:
            stage: Callable[[], None] = getattr(self, name)
            started = time.perf_counter()
            try:
                stage()
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
                self.row |= {"failed": name, "error": why, "at": f"{Path(place.filename).name}:{place.lineno}"}
                break
            finally:
                seconds[name] = round(time.perf_counter() - started, 1)
        return self.row | {"seconds": seconds}

    def build(self) -> None:
        self.model = tiny_model(self.architecture)
        self._compare_with(1)
        if not self.expected.isfinite().all():
            raise ValueError("the model puts out NaN")

    def _batches(self, count: int, seed: int) -> list[Inputs]:
        return batches(self.architecture, count, seed, self.shape["batch"], self.shape["length"])

    def _compare_with(self, seed: int) -> None:
        """Draw what results are compared on."""
        (self.batch,) = self._batches(1, seed)
        with torch.no_grad():
            self.expected = first(self.model(**self.batch))

    def capture(self) -> None:
        (images,) = batches(self.architecture, 1, 0, rows=2)
        self.captured = self._captured(images)
        self.dense: FxGraph = self.captured.graph
        self.used = used_parameters(self.dense)
        canonicalise(self.dense, check=True)
        self._examine_at_one_shape()
        self.row["capture"] = self.error(self.dense)
        if self.row["capture"] > WRONG_PROOF:
            raise CaptureError("the captured program does not compute what the model does")

    def _captured(self, images: Inputs) -> Captured:
        if self.cache and self.architecture.task == "causal":
            try:
                captured = capture_with_cache(self.model)
            except CaptureError as error:
                self.row["no_cache"] = str(error)
            else:
                self.batch = prompt_inputs(captured.cache, self.batch["input_ids"], self.batch["attention_mask"])
                with torch.no_grad():  # some count positions without their padding only where they are given
                    self.expected = first(self.model(**self.batch))
                return captured
        return capture(self.model, images if self.architecture.task == "image" else None)

    def _examine_at_one_shape(self) -> None:
        """Where the program holds for the traced batch or length alone all is examined at that, and the row says so."""
        if not self.captured.fixed:
            return
        try:
            holds = self.error(self.dense) <= WRONG_PROOF
        except (RuntimeError, IndexError, ValueError):
            holds = False
        if not holds:
            self.row["one_shape"] = self.captured.fixed
            self.shape |= self.captured.fixed
            self._compare_with(1)

    def error(self, graph: FxGraph) -> float:
        return difference(Execution(graph).outputs(self.batch)[0], self.expected, self.batch)

    def match(self) -> None:
        self.matches: MatchReport = find_regions(self.dense)
        regions = self.matches.regions
        self.row["regions"] = dict(Counter(str(region.kind) for region in regions))
        self.row["limits"] = [region.limit for region in self.matches.of_kind(RegionKind.RESIDUAL) if region.limit]
        ends: set[str] = set()
        for region in self.matches.of_kind(RegionKind.FFN, RegionKind.EXPERTS):
            ops = [self.dense.op(name) for name in (*region.writers, *region.readers)]
            ends |= {self.dense.parameter_name(op.weight) for op in ops if op.weight is not None}
        wanted = [
            name for name in self.parameters() if name in self.used and (m := LAYER.match(name)) and _is_ffn(m[2])
        ]
        # A part of a packed weight has a name that begins as the whole's.
        missing = [name for name in wanted if not any(end.startswith(name.removesuffix(".weight")) for end in ends)]
        layers = {name: LAYER.match(name)[1] for name in wanted}  # type: ignore[index]
        self.row["ffn_layers"] = len(set(layers.values()))
        self.row["ffn_found"] = self.row["ffn_layers"] - len({layers[name] for name in missing})
        self.row["ffn_missing"] = missing[:4]
        self.row["linears"] = len(self.matches.linears)
        self.row["unmatched"] = Counter(row.reason for row in self.matches.linears if row.reason).most_common(12)
        self.row["refused"] = Counter(reason for _, reason in self.matches.refused).most_common(6)
        self.row["attention"] = sum(op.kind == "attention" for op in self.dense.ops)

    def parameters(self) -> list[str]:
        """Names of the model's matrices and expert tensors."""
        return [name for name, parameter in self.model.named_parameters() if parameter.ndim > 1]

    def prove(self) -> None:
        """Largest difference by kind, of admissible maps and of wrong ones."""
        self.row["proof"], self.row["wrong"], self.row["unproved"] = {}, {}, {}
        for kind in KINDS:
            if not self.row["regions"].get(str(kind)):
                continue
            try:
                for draw, where in ((random_admissible_map, "proof"), (random_wrong_map, "wrong")):
                    graph = self.dense.copy()
                    map_regions(graph, (kind,), draw)
                    self.row[where][str(kind)] = self.error(graph)
            except Exception as error:
                self.row["unproved"][str(kind)] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def slim(self) -> None:
        options = Options(ratio=self.ratio, allocation="uniform")
        calibrating = self._batches(8, 2)
        with torch.no_grad():
            slimmed = slim_graph(self.dense, self.matches, calibrating, options, Progress(quiet=True))
        self.graph = slimmed.graph
        self.row["cut"] = dict(Counter(str(one.region.kind) for one in slimmed.swept))
        self.row["notes"] = list(slimmed.notes)
        self.row["slim"] = self.error(self.graph)

    def onnx(self) -> None:
        """As an export does, it refuses what ONNX Runtime computes otherwise; the dense model is then tried too."""
        try:
            found = self._in_onnx_runtime(self.graph)
            if found > WRONG_ONNX:
                raise VerificationError(f"ONNX Runtime is {found:.1e} from the slim program")
            self.row["onnx"] = found
        except Exception:
            self.row["dense_onnx"] = self._in_onnx_runtime(self.dense)
            raise

    def _in_onnx_runtime(self, graph: FxGraph) -> float:
        """How far ONNX Runtime is from the program, which it is given."""
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            path = emit_onnx(self.model, self.captured, graph, Path(folder), self.target)
            self.row["ops"] = dict(
                Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
            )
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            names = {value.name for value in session.get_inputs()}
            worst = 0.0
            for given, expected, real in self._runs(graph):
                feed = {name: value for name, value in onnx_inputs(graph, given).items() if name in names}
                found = torch.from_numpy(session.run([session.get_outputs()[0].name], feed)[0])
                worst = max(worst, difference(found, expected, real))
        return worst

    def _runs(self, graph: FxGraph) -> Iterator[tuple[Inputs, torch.Tensor, Inputs]]:
        """Inputs, what the program puts out, and where that is real: all at once, and behind a past if there is one."""
        cached = self.captured.cache
        if cached is None:
            yield self.batch, Execution(graph).outputs(self.batch)[0], self.batch
            return
        ids, mask = self.batch["input_ids"], self.batch["attention_mask"]
        whole = prompt_inputs(cached, ids, mask)
        logits, *present = Execution(graph, caches=True).outputs(whole)
        yield whole, logits, whole
        for past in (ids.shape[1] // 2, ids.shape[1] - 1):
            given = continued(graph, whole, [each[:, :, :past] for each in present], past)
            yield given, logits[:, past:], {"attention_mask": mask[:, past:]}


def _is_ffn(name: str) -> bool:
    """Whether a layer's parameter of this name belongs to a feed-forward part, as names tell."""
    others = (ATTENTION_NAMES, ROUTER_NAMES, OTHER_NAMES)
    return bool(FFN_NAMES.search(name)) and not any(names.search(name) for names in others)


def _child(out: Connection, *asked: Any) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    out.send(Examination(*asked).run())


def examine(
    architecture: Architecture, ratio: float, target: str = "any", cache: bool = False, seconds: float = SECONDS
) -> dict[str, Any]:
    """The row of one architecture, made in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sending, architecture, ratio, target, cache))
    process.start()
    sending.close()
    row = {"kind": "row", "key": architecture.key, "class": architecture.class_name, "failed": "run"}
    row["error"] = f"no answer within {seconds:.0f} s"
    try:
        if receiving.poll(seconds):
            row = receiving.recv()
    except EOFError:
        row["error"] = "the process died"
    process.kill()
    process.join()
    return row


def warm_up() -> None:
    """Have one architecture examined here, so that its processes need not import and register everything anew.

    With one thread, since a process that has several must not fork.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    Examination(next(a for a in architectures(("causal",)) if a.model_type == "llama"), 0.25).run()


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--only", nargs="+", default=None, metavar="TASK:TYPE")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--target", choices=TARGETS, default="any")
    parser.add_argument("--cache", action="store_true", help="capture decoders with their cache")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="append all rows to it")
    return parser.parse_args(given)


def line(row: Mapping[str, Any]) -> str:
    """A row on the terminal."""
    proof = " ".join(f"{kind} {error:.0e}" for kind, error in row.get("proof", {}).items())
    end = f"FAILED in {row['failed']}: {row['error']}" if "failed" in row else f"onnx {row.get('onnx', -1):.0e}"
    ffn = f"ffn {row.get('ffn_found', 0)}/{row.get('ffn_layers', 0)}"
    return f"{row['key']:34} {ffn} | {proof} | {row.get('unproved') or ''} {end}"


def main() -> None:
    arguments = parse()
    warm_up()
    chosen = [a for a in architectures(tuple(arguments.tasks)) if arguments.only is None or a.key in arguments.only]
    for architecture in chosen:
        row = examine(architecture, arguments.ratio, arguments.target, arguments.cache)
        append(arguments.json, row)
        print(line(row), flush=True)


if __name__ == "__main__":
    main()
