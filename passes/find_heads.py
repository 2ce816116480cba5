"""Find the widths of every attention: its value heads, its query and key heads, and how many KV heads there are.

From the attention op the four ways to its linears are followed. What stands on them decides which of the three
widths are regions and what changes of basis they allow; they are dimensions of the same weights and overlap.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.head_layout import HeadLayout
from dotresize_fx.passes.close_dimension import Escape
from dotresize_fx.passes.follow_heads import INTERLEAVED, PACKED, Way, follow_back
from dotresize_fx.passes.follow_mixed import follow_on
from dotresize_fx.passes.head_axes import is_broadcast
from dotresize_fx.passes.region_ends import common_module, stream_behind
from dotresize_fx.regions import Region, RegionKind, Symmetry

ROLES = ("query", "key", "value")
QK_NORM = "a norm acts on the head (QK-norm): leaving numbers out would change its mean square"


@dataclass
class FoundHeads:
    """``reads_reasons`` and ``writes_reasons`` say of linears (op names) why no region has their heads' dimension.

    ``refused``: widths that are no region, while others of the same attention are; pairs of what and why.
    """

    regions: list[Region] = field(default_factory=list)
    reads_reasons: dict[str, str] = field(default_factory=dict)
    writes_reasons: dict[str, str] = field(default_factory=dict)
    refused: tuple[tuple[str, str], ...] = ()


def find_heads(graph: Graph) -> FoundHeads:
    """The regions of every attention whose form the view knows (``scale`` among its attributes), in graph order."""
    found = FoundHeads()
    for op in graph.ops:
        if (
            op.kind is Kind.ATTENTION
            and "scale" in op.attributes
            and len(op.inputs) >= (2 if op.attributes.get("mixes") else 3)
        ):
            _Attention(graph, op, found).find()
    return found


class _Attention:
    def __init__(self, graph: Graph, op: Op, found: FoundHeads) -> None:
        self.graph, self.op, self.found = graph, op, found
        self.ways: dict[str, Way] = {}
        self.reasons: dict[str, str] = {}
        self.inputs = (
            {"value": op.inputs[1]} if op.attributes.get("mixes") else dict(zip(ROLES, op.inputs, strict=False))
        )
        for role in ROLES:
            if role in self.inputs:
                self._try(role, self.inputs[role])
            else:
                self.reasons[role] = "its scores are computed op by op"
        self._try("output", None)

    def _try(self, role: str, value: Value | None) -> None:
        try:
            way = follow_on(self.graph, self.op) if value is None else self._back(role, value)
            assert way.linear.weight is not None
            if len(self.graph.users(way.linear.weight)) > 1:
                raise Escape("its weight is used elsewhere too")
            self.ways[role] = way
        except Escape as escape:
            self.reasons[role] = escape.reason

    def _back(self, role: str, value: Value) -> Way:
        attributes = self.op.attributes
        turned, heads, place = role == "key" and bool(attributes.get("turned")), 0, 0
        if attributes.get("merged"):
            place = 0 if role == "query" else len(attributes["sizes"]) - 1
            heads = attributes["sizes"][place]
        way = follow_back(self.graph, self.op, value, turned=turned, heads=heads)
        if heads and (role == "query" or (role == "key" and place)):
            way.of_heads.append((self.op.name, place))
        if role in attributes.get("cache", ()):
            way.cache.append(attributes["cache"][role])
        return way

    def find(self) -> None:
        refused = {}
        regions = []
        for kind, find in ((RegionKind.VALUE, self._value), (RegionKind.QUERY_KEY, self._query_key)):
            try:
                regions.append(find())
            except Escape as escape:
                refused[kind] = escape.reason
        try:
            regions += self._kv_heads()
        except Escape as escape:
            refused[RegionKind.HEADS] = escape.reason
        self.found.regions += regions
        if regions:
            stem = regions[0].name.removesuffix(f" {regions[0].kind}")
            self.found.refused += tuple((f"{stem} {kind}", reason) for kind, reason in refused.items())
        self._explain(refused)

    # -- the three widths --------------------------------------------------------------------------

    def _value(self) -> Region:
        value, output = self._way("value"), self._way("output")
        self._fit(value, output)
        self._each_of_its_size()
        if value.norms or value.rotary:
            raise Escape("a norm or a rotary embedding acts on the values")
        ways, gate = [value], output.gate
        sizes, symmetry = [*value.of_size, *output.of_size], Symmetry.HEADWISE_LINEAR
        if gate is not None:
            self._only_reader(gate)
            ways, symmetry = [value, gate], Symmetry.PERMUTATION
            sizes += gate.of_size
        layout = HeadLayout(sizes=tuple(sizes), cache=tuple(value.cache))
        return self._region(RegionKind.VALUE, symmetry, value.size, ways, layout)

    def _query_key(self) -> Region:
        query, key = self._way("query"), self._way("key")
        self._fit(key, query)
        self._each_of_its_size()
        if query.norms or key.norms:
            raise Escape(QK_NORM)
        rotaries = [way.rotary for way in (query, key) if way.rotary is not None]
        if any(rotary.partial for rotary in rotaries):
            raise Escape("only a part of the head is rotated (partial rotary embedding), which is not supported yet")
        if len(rotaries) == 1:
            raise Escape("a rotary embedding acts on queries or keys alone")
        tables: dict[str, list[str]] = {}
        for rotary in rotaries:
            for table, reader in rotary.tables:
                tables.setdefault(table.name, []).append(reader)
        layout = HeadLayout(
            sizes=(*query.of_size, *key.of_size),
            lower_halves=tuple(rotary.halves[0] for rotary in rotaries if rotary.halves),
            upper_halves=tuple(rotary.halves[1] for rotary in rotaries if rotary.halves),
            tables=tuple((name, tuple(readers)) for name, readers in tables.items()),
            cache=tuple(key.cache),
        )
        symmetry = Symmetry.ROTARY_PAIRS if rotaries else Symmetry.HEADWISE_LINEAR
        return self._region(RegionKind.QUERY_KEY, symmetry, key.size, [query, key], layout)

    def _kv_heads(self) -> list[Region]:
        query, key, value, output = (self._way(role) for role in (*ROLES, "output"))
        self._fit(key, query)
        self._fit(value, output)
        if key.heads != value.heads:
            raise Escape("keys and values have different numbers of heads")
        if value.heads == 1:
            return []
        axis = len(self.op.output.shape) - 3
        if not all(is_broadcast(mask.shape, axis + 3, axis) for mask in self.op.inputs[3:]):
            raise Escape("the mask that is added to the scores differs from head to head")
        ways = [query, key, value]
        if output.gate is not None:
            self._only_reader(output.gate)
            ways.append(output.gate)
        for way in (*ways, output):
            if way.by_head or way.in_place:
                raise Escape(way.in_place or "what acts on it differs from head to head")
        sizes = (of_heads for way in (*ways, output) for of_heads in way.of_heads)
        layout = HeadLayout(sizes=tuple(sizes), cache=(*key.cache, *value.cache))
        return [self._region(RegionKind.HEADS, Symmetry.PERMUTATION, value.heads, ways, layout)]

    def _each_of_its_size(self) -> None:
        if self.op.attributes.get("one_size"):
            raise Escape(f"{self.op.spelling} takes query, key and value heads of one size alone")

    def _only_reader(self, gate: Way) -> None:
        weight = gate.linear.weight
        assert weight is not None
        if len(self.graph.users(weight)) > 1:
            raise Escape("the weight of its gate is used elsewhere too")

    def _way(self, role: str) -> Way:
        if role not in self.ways:
            reason = self.reasons[role]
            raise Escape(reason if reason in (PACKED, INTERLEAVED) else f"of its {role}: {reason}")
        return self.ways[role]

    def _fit(self, shared: Way, whole: Way) -> None:
        """The heads of keys or values, repeated where they are, must be those of queries or output."""
        repeated = shared.heads * shared.groups
        grouped = bool(self.op.attributes["grouped"]) and whole.heads % repeated == 0
        if whole.groups != 1 or shared.size != whole.size:
            raise Escape("the sizes of its heads do not fit")
        if repeated != whole.heads and not grouped:
            raise Escape("the numbers of its heads do not fit")

    def _region(
        self, kind: RegionKind, symmetry: Symmetry, width: int, ways: Iterable[Way], layout: HeadLayout
    ) -> Region:
        graph, output, gated = self.graph, self._way("output"), symmetry is Symmetry.PERMUTATION
        written = sorted({way.linear for way in ways}, key=lambda op: graph.positions[op.name])
        crossed = dict.fromkeys(name for way in (*ways, output) for name in way.crossed)
        known = [way.linear for way in self.ways.values()]
        key = self.ways.get("key")
        return Region(
            name=f"{common_module(graph, known) or self.op.name} {kind}",
            kind=kind,
            symmetry=symmetry,
            width=width,
            writers=tuple(op.name for op in written),
            readers=() if kind is RegionKind.QUERY_KEY else (output.linear.name,),
            target=stream_behind(graph, output.linear),
            linear_branch=(self.ways["value"].linear.name,) if kind is RegionKind.VALUE and gated else (),
            crossed=tuple(crossed),
            heads=next(iter(ways)).heads if kind is RegionKind.VALUE else self.ways["key"].heads,
            attention=self.op.name,
            attention_reader=output.linear.name,
            key_writers=() if key is None or kind is RegionKind.VALUE else (key.linear.name,),
            layout=layout,
        )

    # -- what is said of those that are none -------------------------------------------------------

    def _explain(self, refused: dict[RegionKind, str]) -> None:
        """Each of the attention's linears gets its own reason, or else that of the region it would be in."""
        region = {"query": RegionKind.QUERY_KEY, "key": RegionKind.QUERY_KEY}
        packed = {role for role in ROLES if self.reasons.get(role) in (PACKED, INTERLEAVED)}
        for role, value in sorted(self.inputs.items(), key=lambda pair: pair[0] not in packed):
            linear = self.ways[role].linear if role in self.ways else _linear_behind(self.graph, value)
            reason = self.reasons.get(role, refused.get(region.get(role, RegionKind.VALUE), ""))
            if linear is not None and reason:
                self.found.writes_reasons.setdefault(linear.name, reason)
        reason = self.reasons.get("output", refused.get(RegionKind.VALUE, ""))
        if "output" in self.ways and reason:
            self.found.reads_reasons[self.ways["output"].linear.name] = reason


def _linear_behind(graph: Graph, value: Value) -> Op | None:
    """The linear that a way leads back to, whatever stands on it: one norm at most, else it is another sublayer's."""
    op, norms = graph.producer(value), 0
    while op is not None and op.kind is not Kind.LINEAR:
        norms += op.kind in (Kind.RMS_NORM, Kind.LAYER_NORM)
        before = [v for v in op.inputs if v.shape != () and 0 not in v.shape] or list(op.inputs[:1])
        op = graph.producer(before[0]) if before and norms < 2 else None
    return op
