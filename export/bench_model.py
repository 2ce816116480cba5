"""The models of a benchmark, looked at before any is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dotresize_fx.errors import InputsDifferError
from dotresize_fx.export.bytes_moved import WeightBytes, weight_bytes
from dotresize_fx.export.graph_inputs import InputPlan, plan_inputs
from dotresize_fx.export.node_regions import node_modules
from dotresize_fx.export.onnx_file import ONNX_FILE, find_onnx, onnx_size, read_onnx
from dotresize_fx.workload import Workload


@dataclass(frozen=True, eq=False)
class GivenModel:
    """``modules`` tells what module a node came from, ``equations`` those of its Einsum nodes, ``weights`` what a run
    reads of them.
    """

    name: str
    path: Path
    file_bytes: int
    plans: list[InputPlan]
    modules: dict[str, str]
    equations: dict[str, str]
    weights: WeightBytes

    @property
    def reads_text(self) -> bool:
        return any(plan.name == "input_ids" for plan in self.plans)

    @property
    def batch_is_free(self) -> bool:
        return any("batch" in plan.dims for plan in self.plans)

    @property
    def cached(self) -> bool:
        return any(plan.cache for plan in self.plans)

    def why_no_tokens(self, workload: Workload) -> str:
        """Why no output token can be timed; nothing where one can."""
        if not workload.decode:
            return "no output token was asked for (decode=0)"
        if not self.cached:
            return "it takes no cache (no input past_key_values...), so that every token costs a whole run"
        if lost := [plan.name for plan in self.plans if plan.cache and plan.present is None]:
            return f"its cache {lost[0]} has no output present..., so that there is nothing to go on with"
        if any(isinstance(dim, int) for plan in self.plans if plan.name == "input_ids" for dim in plan.dims[1:]):
            return "its input_ids are of one fixed length"
        return ""


def open_models(names: Sequence[Path]) -> list[GivenModel]:
    """Folders that export wrote, or .onnx files, in their order.

    Raises:
        ModelNotFoundError, BadWeightsError: see :func:`read_onnx`.
        UsageError: an input that cannot be made.
        InputsDifferError: another input, type, rank or fixed size than the first model's; a cache's layers, sizes and
            precision may differ, but one without a cache is another thing.
    """
    paths = [find_onnx(name) for name in names]
    labels = _labels(paths)
    found = []
    for path, label in zip(paths, labels, strict=True):
        graph = read_onnx(path).graph
        einsums = {node.name: node for node in graph.node if node.op_type == "Einsum"}
        found.append(
            GivenModel(
                name=label,
                path=path,
                file_bytes=onnx_size(path),
                plans=plan_inputs(graph, str(path)),
                modules=node_modules(graph),
                equations={
                    name: attribute.s.decode()
                    for name, node in einsums.items()
                    for attribute in node.attribute
                    if attribute.name == "equation"
                },
                weights=weight_bytes(graph),
            )
        )
    for other in found[1:]:
        _check_alike(found[0], other)
    return found


def _labels(paths: Sequence[Path]) -> list[str]:
    """Short names that differ: of the folder for a model.onnx, of the file otherwise, counted where both are alike."""
    short = [path.resolve().parent.name if path.name == ONNX_FILE else path.stem for path in paths]
    if len(set(short)) < len({path.resolve() for path in paths}):
        short = [str(path) for path in paths]
    seen: Counter[str] = Counter()
    labels = []
    for name in short:
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return labels


def _check_alike(first: GivenModel, other: GivenModel) -> None:
    wanted, found = ({plan.name: plan for plan in model.plans} for model in (first, other))
    cached = all(any(plan.cache for plan in plans.values()) for plans in (wanted, found))
    unlike = {name for name in wanted.keys() ^ found.keys() if not (cached and (wanted | found)[name].cache)}
    if unlike:
        name = min(unlike)
        has, lacks = (first, other) if name in wanted else (other, first)
        raise InputsDifferError(
            f"{has.path} takes an input {name} and {lacks.path} does not: give models of the same inputs"
        )
    for name in wanted.keys() & found.keys():
        plan = wanted[name]
        alike = plan.cache or (plan.dtype, plan.dims) == (found[name].dtype, found[name].dims)
        if not alike or len(plan.dims) != len(found[name].dims):
            raise InputsDifferError(
                f"input {name} is {plan.dtype} {list(plan.dims)} in {first.path} and {found[name].dtype} "
                f"{list(found[name].dims)} in {other.path}: give models of the same inputs"
            )


def sizes_told(model: GivenModel, workload: Workload) -> tuple[Workload, list[str]]:
    """The workload as the model's fixed sizes have it, and what is to be said about that."""
    ids = next((plan for plan in model.plans if plan.name == "input_ids"), None) or model.plans[0]
    batch = next((plan.dims[0] for plan in model.plans if not plan.cache and plan.dims), workload.batch)
    length = ids.dims[1] if len(ids.dims) > 1 and model.reads_text else workload.prompt
    if isinstance(batch, str):
        batch = workload.batch
    if isinstance(length, str):
        length = workload.prompt
    fixed = Workload(length, workload.decode, batch)
    notes = [f"the graph has fixed sizes: {fixed} was run for {workload}"] if fixed != workload else []
    return fixed, notes
