"""Find every width of a graph by dataflow, with its writers, its readers and its symmetry.

From a linear's output (or input) the coupled dimension is followed through the ops that stand between, forwards
and backwards, until every way ends at a linear or an embedding: that is a region. A way that ends anywhere else
(the graph's output, a split into heads, an op nobody taught us) is an escape: the width is left alone and the
match report says why. The widths of an attention's heads lie inside the dimensions that it splits: they are found
from the attention (:mod:`dotresize_fx.passes.find_heads`). No architecture is asked for by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.passes.centre_layer_norms import why_not_centred
from dotresize_fx.passes.close_channels import close_channels
from dotresize_fx.passes.close_dimension import ClosedDimension, Escape, close_dimension, is_nonlinear
from dotresize_fx.passes.find_heads import FoundHeads, find_heads
from dotresize_fx.passes.fold_norm_gains import why_no_bias_folds
from dotresize_fx.passes.pass_base import promise
from dotresize_fx.passes.region_ends import common_module, stream_behind
from dotresize_fx.regions import SEPARATOR, LinearMatch, MatchReport, Region, RegionKind, Symmetry


def find_regions(graph: Graph) -> MatchReport:
    """Every region and the fate of every linear. The graph is not changed."""
    search = _Search(graph)
    regions, found = search.run(), search.found
    heads = find_heads(graph)
    ordered = sorted((*regions, *heads.regions), key=lambda r: graph.positions[r.writers[0]])
    unique = _with_unique_names(ordered)
    renamed = dict(zip(ordered, unique, strict=True))
    linears = [_linear_match(graph, op, found, renamed, heads) for op in graph.ops if op.is_linear]
    tables = {name for region in unique for name in region.tables}
    return MatchReport(tuple(unique), (*linears, *_not_understood(graph, tables)), heads.refused)


class _Search:
    """``found`` has, for every value that was followed, its region or why there is none."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.found: dict[Value, Region | str] = {}

    def run(self) -> list[Region]:
        regions: list[Region] = []
        permuted: list[Value] = []
        for start in _starts(self.graph):
            if start in self.found:
                continue
            try:
                closed = close_dimension(self.graph, start)
            except Escape as escape:
                self.found.update(dict.fromkeys((start, *escape.values), escape.reason))
                permuted += [start] if escape.permutes else []
                continue
            promise(self._is_new(closed), "regions overlap")
            regions.append(self._rotated(closed, start))
        # Only behind them, so that no stream with rotations is taken for a part of one that has none.
        tried: set[Value] = set()
        for start in permuted:
            if isinstance(self.found[start], Region) or start in tried:
                continue
            try:
                closed = close_channels(self.graph, start)
            except Escape as escape:
                self._escaped(start, escape)
                tried |= escape.values
                continue
            if self._is_new(closed):
                regions.append(self._ordered(closed))
        return regions

    def _escaped(self, start: Value, escape: Escape) -> None:
        """That permutations do not pass either is said behind why nothing else does."""
        for value in (start, *escape.values):
            before = self.found.get(value, "")
            if isinstance(before, str) and escape.reason not in before:
                self.found[value] = f"{before}, and {escape.reason}" if before else escape.reason

    def _is_new(self, closed: ClosedDimension) -> bool:
        return not any(isinstance(self.found.get(value), Region) for value in closed.vectors)

    def _rotated(self, closed: ClosedDimension, start: Value) -> Region:
        """The region, or the same one under permutations alone where its norms cannot be opened."""
        region = _region(self.graph, closed)
        if region.symmetry is Symmetry.ORTHOGONAL:
            why = why_no_bias_folds(self.graph, region) or why_not_centred(self.graph, region)
            try:
                ordered = close_channels(self.graph, start) if why else closed
            except Escape:
                ordered = closed
            if ordered is not closed and self._is_new(ordered):
                region, closed = _region(self.graph, ordered, why), ordered
        self.found.update(dict.fromkeys(closed.vectors, region))
        return region

    def _ordered(self, closed: ClosedDimension) -> Region:
        """A region of which permutations alone pass; of the reasons the one that most of its values met."""
        reasons = Counter(reason for value in closed.vectors if isinstance(reason := self.found.get(value), str))
        region = _region(self.graph, closed, reasons.most_common(1)[0][0])
        self.found.update(dict.fromkeys(closed.vectors, region))
        return region


def _starts(graph: Graph) -> Iterable[Value]:
    for op in graph.ops:
        if op.is_linear:
            yield op.inputs[0]
        if op.is_linear or op.kind is Kind.EMBEDDING:
            yield op.output


def _region(graph: Graph, closed: ClosedDimension, limit: str = "") -> Region:
    writers, readers = closed.writers, closed.readers
    pointwise = [op for op in closed.crossed if is_nonlinear(op, closed.places)]
    experts = {int(graph.weight(op).shape[0]) for op in (*writers, *readers) if op.kind is Kind.EXPERTS}
    if closed.in_order and _is_stream(closed):
        kind, symmetry = RegionKind.RESIDUAL, Symmetry.PERMUTATION
    elif closed.norms and not closed.in_order:
        kind, symmetry = RegionKind.RESIDUAL, Symmetry.ORTHOGONAL
    elif (
        pointwise
        and not closed.tables
        and len(experts) == 1
        and all(_of_experts(graph, op, experts) for op in (*writers, *readers))
        and _stay_with_experts(closed, *experts)
    ):
        kind, symmetry = RegionKind.EXPERTS, Symmetry.PERMUTATION
    elif pointwise or closed.in_order:
        kind, symmetry = RegionKind.FFN, Symmetry.PERMUTATION
    else:
        kind, symmetry = RegionKind.PLAIN, Symmetry.GENERAL_LINEAR
    functions = {op.function for op in closed.crossed if op.kind is Kind.POINTWISE}
    products = [op for op in closed.crossed if op.kind is Kind.MUL and not op.scales_rows]
    return Region(
        name=_name(graph, writers, readers, kind),
        kind=kind,
        symmetry=symmetry,
        width=closed.width,
        writers=tuple(op.name for op in writers),
        readers=tuple(op.name for op in readers),
        norms=tuple(op.name for op in closed.norms),
        normed_readers=tuple(op.name for op in readers if op.inputs[0] in closed.normed),
        linear_branch=() if closed.in_order else _linear_branch(graph, products, writers, readers),
        positive_scale=functions == {"relu"} and not products and not closed.in_order and not closed.places,
        target=stream_behind(graph, readers[-1]) if kind in (RegionKind.FFN, RegionKind.EXPERTS) else "",
        heads=max(experts, default=1) if kind is RegionKind.EXPERTS else 1,
        crossed=tuple(op.name for op in closed.crossed),
        tables=tuple(value.name for value in closed.tables),
        places=tuple((value.name, place) for value, place in closed.places.items()),
        limit=limit,
    )


def _is_stream(closed: ClosedDimension) -> bool:
    """Whether blocks read it and add to it: two of its values are summed, which not one linear wrote."""
    sums = (op for op in closed.crossed if op.kind is Kind.ADD)
    summed = any(sum(value in closed.values for value in op.inputs) > 1 for op in sums)
    return summed and len(closed.writers) > 1 and len(closed.readers) > 1


def _of_experts(graph: Graph, op: Op, experts: set[int]) -> bool:
    """Whether an end is each expert's own: a product, or a bias in a table of so many rows."""
    return op.kind is Kind.EXPERTS or (op.kind is Kind.EMBEDDING and len(graph.weight(op)) in experts)


def _stay_with_experts(closed: ClosedDimension, experts: int) -> bool:
    """Whether rows are routed once, and stay in their places from the writers to the readers.

    Otherwise one basis for all experts is what passes.
    """
    ends = {op.inputs[1:] for op in (*closed.writers, *closed.readers) if op.kind is Kind.EXPERTS}
    moved = any(
        (op.kind is Kind.KEEP and "cast" not in op.attributes) or op.function == "vector_norm" for op in closed.crossed
    )
    sees_all = ends == {()}
    return len(ends) == 1 and not moved and (not sees_all or all(v.shape[0] == experts for v in closed.values))


def _name(graph: Graph, writers: list[Op], readers: list[Op], kind: RegionKind) -> str:
    """The module that holds all its weights, as far as names tell; names are for people only."""
    if kind is RegionKind.RESIDUAL:
        return "residual stream"
    return common_module(graph, (*writers, *readers)) or writers[0].name


def _with_unique_names(regions: list[Region]) -> list[Region]:
    seen: dict[str, int] = {}
    unique = []
    for region in regions:
        seen[region.name] = count = seen.get(region.name, 0) + 1
        unique.append(region if count == 1 else replace(region, name=f"{region.name} #{count}"))
    return unique


def _linear_branch(graph: Graph, products: list[Op], writers: list[Op], readers: list[Op]) -> tuple[str, ...]:
    """Writers from which the last product is reached through nothing but linear ops.

    Earlier products may stand in the other factor: SiLU spelled as x * sigmoid(x). From the last one on nothing but
    linear ops may lead to the readers, and no other way may: a scale on the branch has to arrive whole.
    """
    ends = {op.name for op in readers}
    last = [op for op in products if len(op.inputs) == 2 and _reached(graph, op.output) == ends]
    if len(last) != 1:
        return ()
    names = {op.name for op in writers}
    chosen: list[str] = []
    for value in last[0].inputs:
        op, alone = graph.producer(value), len(graph.users(value)) == 1
        while op is not None and op.kind in (Kind.KEEP, Kind.SCALE):
            alone = alone and len(graph.users(op.inputs[0])) == 1
            op = graph.producer(op.inputs[0])
        if op is not None and op.name in names and alone:
            chosen.append(op.name)
    # Two plain branches are a bilinear form: one of them may take the scale, not both.
    return tuple(chosen[:1])


def _reached(graph: Graph, value: Value) -> set[str]:
    """Names of the ops at which ``value`` arrives through ops that pass it on, scaled at most."""
    reached: set[str] = set()
    for op in graph.users(value):
        passed_on = op.kind in (Kind.KEEP, Kind.SCALE)
        reached |= _reached(graph, op.output) if passed_on else {op.name}
    return reached


def _not_understood(graph: Graph, tables: set[str]) -> Iterable[LinearMatch]:
    """Products with a weight matrix that no adapter sees as a linear: listed, so that nothing is passed over.

    ``tables`` are parameters of regions.
    """
    for op in graph.ops:
        if op.is_linear or op.kind is Kind.EMBEDDING:
            continue
        if "quantised" in op.attributes:
            name, shape = op.attributes["quantised"]
            reason = f"its weight is quantised ({op.spelling}), which is not cut: give the model before quantisation"
            yield LinearMatch(op.name, name, shape, None, None, reason, reason)
            continue
        for value in op.inputs:
            unknown = value.is_parameter and value.name not in tables and not graph.is_buffer(value)
            if unknown and len(value.shape) > 1:
                reason = f"{op.spelling or op.kind} with a weight is not understood as a linear"
                rows, columns = graph.parameter(value).shape[:2]
                yield LinearMatch(op.name, graph.parameter_name(value), (rows, columns), None, None, reason, reason)


def _linear_match(
    graph: Graph, op: Op, found: dict[Value, Region | str], renamed: dict[Region, Region], heads: FoundHeads
) -> LinearMatch:
    reads, reads_reason = _part(found.get(op.inputs[0], "not reached"), renamed)
    writes, writes_reason = _part(found.get(op.output, "not reached"), renamed)
    reading = [renamed[region].name for region in heads.regions if op.name in region.readers]
    writing = [renamed[region].name for region in heads.regions if op.name in region.writers]
    reads = SEPARATOR.join(reading) or reads
    writes = SEPARATOR.join(writing) or writes
    rows, columns = graph.weight(op).shape[-2:]
    assert op.weight is not None
    return LinearMatch(
        op=op.name,
        parameter=graph.parameter_name(op.weight),
        shape=(rows, columns),
        reads=reads,
        writes=writes,
        reads_reason="" if reads else heads.reads_reasons.get(op.name, reads_reason),
        writes_reason="" if writes else heads.writes_reasons.get(op.name, writes_reason),
    )


def _part(found: Region | str, renamed: dict[Region, Region]) -> tuple[str | None, str]:
    """Name of the region that was found, or why there is none."""
    return (renamed[found].name, "") if isinstance(found, Region) else (None, found)
