"""What an export will take, told from shapes alone: memory, and a rough time over a measured rate of products."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dotresize_fx.calibration import sequences_at_once
from dotresize_fx.cost import Cost, count_cost, one_stream
from dotresize_fx.fidelity import POSITIONS_AT_ONCE
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.memory import show_size
from dotresize_fx.offload.pinned_memory import pinned_size
from dotresize_fx.prices import SIDE_BY_SIDE
from dotresize_fx.regions import Region, RegionKind
from dotresize_fx.sensitivity import GPU_SCALE, PRICE_TOKENS, SHAPE_TOKENS

# Copies of the stream that the sweep holds: dense, which is wanted behind a sublayer, slim, what its reader should put
# out and what it does.
STREAMS = 4
# (n, n) float64 at once while a region is solved: its Gram matrices that fit and that measure, and the solver's own.
SQUARES = 5
# (n, out) float64 likewise: reader, its sums with what is wanted and with what is put out, the fit.
READERS = 8
# Passes of the calibration text through what is cut: both streams, once more merged and once as it was; what is in
# front of the first cut is run once for both models.
PASSES, PASSES_BEFORE = 4.0, 1.0
# Where widths are measured so many of the sublayers are cut, the last ones mostly.
CUT = 2 / 3
# What of a Gram matrix is computed.
GRAM_SHARE = 0.6
# Passes of the text that measures.
MEASURED = 4
# Operations for each n³ that a region of width n is solved by, in float64: elimination, factorisations, the fit.
SOLVING = {"cpu": 12, "cuda": 8}
# What the libraries that convert and check take.
LIBRARIES = 450 << 20
# Of what the analysis took, which a dry run has just done: converting and checking the slim file and the dense one.
CONVERTED = 3.0
# How often comparing a program with its model reads the weights, bytes a second of that, and of hashing and reading.
COMPARED, COMPARING, READING = 2.5, 1e10, 3e9
# Of square products of this size the rate is taken, and what share of it whole models reach; a GPU needs large ones.
PRODUCT, REACHED = {"cpu": 1024, "cuda": 4096}, {"cpu": 1.0, "cuda": 0.8}
# Seconds that a GPU waits for each op of each batch to be queued.
QUEUED = 3e-5
# Operations for each weight and token of a step of repair: forward and both ways back.
REPAIRED = 6.0
# How often such a step reads or writes each of attention's scores, bytes a second of that.
SCORED, WRITTEN = 28, {"cpu": 1e10, "cuda": 2e12}
# Copies of a stream to and from pinned memory a sublayer, and bytes a second of these.
COPIES, COPIED = 6, 5e10


@dataclass(frozen=True)
class Forecast:
    """``host`` and ``gpu`` are bytes at the peak (``gpu`` 0 without one), ``stages`` seconds by what they go to."""

    host: int
    gpu: int
    stages: Mapping[str, float]
    operations: float
    rate: float

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())

    def lines(self) -> list[str]:
        gpu = f", {show_size(self.gpu)} of the GPU's" if self.gpu else ""
        told = ", ".join(f"{name} {_show_time(seconds)}" for name, seconds in self.stages.items())
        return [
            f"memory at the peak: about {show_size(self.host)}{gpu} (of files mapped into it nothing)",
            f"time: about {_show_time(self.seconds)} ({told}), of {self.operations / 1e12:.3g} T operations at the "
            f"measured {self.rate / 1e9:.0f} G/s; without ONNX Runtime's runs",
        ]


def _show_time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def stream_bytes(graph: FxGraph, tokens: int) -> int:
    """What the sweep's streams take over so many tokens."""
    return STREAMS * one_stream(graph, tokens)


@dataclass(frozen=True)
class Work:
    """What an export is to do: ``tokens`` calibrate and ``measuring`` ones measure, in sequences of ``length``.

    ``lazy``: weights wait in files; ``streams``: where these do, see :class:`stored_tensors.Spool`. ``half``: products
    of activations are bfloat16's. ``measured``: widths are planned by sensitivity. ``analysed``: seconds that
    loading, capture and finding regions took, nothing read or compared. ``stored``: bytes of a weight in its file.
    ``ratio``: what share goes. ``steps``: of repair, for each sublayer.
    """

    tokens: int
    measuring: int
    length: int
    device: str
    lazy: bool
    streams: str
    half: bool
    measured: bool
    analysed: float
    stored: int
    ratio: float = 0.0
    steps: int = 0

    @property
    def at_once(self) -> int:
        """Tokens of a batch, which a step of repair takes."""
        return self.length * sequences_at_once(self.tokens, self.length, self.device, repairs=self.steps > 0)

    @property
    def cut(self) -> float:
        """Which share of the sublayers is."""
        return CUT if self.measured else 1.0

    @property
    def passes(self) -> float:
        """Of the calibration text through the blocks."""
        return self.cut * PASSES + (1 - self.cut) * PASSES_BEFORE


def forecast(graph: FxGraph, regions: Sequence[Region], work: Work) -> Forecast:
    """Of a graph whose weights need not be there."""
    cost, weights = count_cost(graph, work.length), _weights(graph)
    host, gpu = _memory(graph, regions, weights, work)
    rate, double = (
        _rate(work.device, dtype) for dtype in (torch.bfloat16 if work.half else torch.float32, torch.float64)
    )
    widths = [_width(graph, region) for region in regions]
    operations = _operations(cost, widths, work)
    operations += work.cut * sum(_summing(graph, region, work) for region in regions)
    left = max(0.0, work.cut - work.ratio)  # of the weights about those of what is cut that stay
    operations += left * REPAIRED * work.steps * work.at_once * sum(_ends(graph, region) for region in regions)
    solved = sum(SOLVING[work.device] * float(n) ** 3 for n in widths) * (work.cut + work.measured)
    parameters = sum(weights) / 4
    solving = operations / rate / REACHED[work.device] + solved / double
    solving += work.cut * work.steps * work.at_once * SCORED * 4 * _scores(cost, regions) / WRITTEN[work.device]
    if work.device != "cpu":
        solving += QUEUED * work.passes * work.tokens / work.at_once * len(graph.ops)
    if work.streams == "pinned":
        sublayers = work.cut * len({region.target for region in regions})
        solving += COPIES * sublayers * one_stream(graph, work.tokens) / COPIED
    measuring = 2.0 * cost.macs_per_token * MEASURED * work.measuring
    reading = 4 * COMPARED * parameters / COMPARING + work.stored * parameters / READING
    stages = {
        "load and capture": work.analysed + reading,
        "calibrate and solve": solving,
        "convert and measure": CONVERTED * work.analysed + measuring / rate / REACHED[work.device],
    }
    return Forecast(host, gpu, stages, operations + solved + measuring, rate)


def _memory(graph: FxGraph, regions: Sequence[Region], weights: Sequence[int], work: Work) -> tuple[int, int]:
    """The host's and the GPU's, in bytes, of which each of the ``weights`` takes so many."""
    flowing = stream_bytes(graph, work.tokens)
    whole, largest = sum(weights), max(weights, default=0)
    block = max((_ends(graph, region) for region in regions), default=0) * 4
    solving = max((_solving(graph, region) for region in regions), default=0)
    vocabulary = max((int(graph.weight(op).shape[0]) for op in graph.ops if op.kind is Kind.EMBEDDING), default=0)
    answers = 3 * work.length * vocabulary * 4 + 4 * POSITIONS_AT_ONCE * vocabulary * 4
    there = flowing if work.streams == "device" else 0
    working = max(2 * block + solving + there, answers + largest, 2 * largest)
    host = (
        LIBRARIES
        + (0 if work.lazy else 2 * whole)
        + (pinned_size(flowing, one_stream(graph, work.at_once)) if work.streams == "pinned" else 0)
    )
    if work.device == "cpu":
        return host + working, 0
    beside = 0
    if work.lazy and work.measured and work.streams != "files":  # of each probe what waits, on the text that prices
        beside = min(SIDE_BY_SIDE, one_stream(graph, _priced(work)) * (len(regions) + 1))
    resident = 0 if work.lazy else whole + whole // 2  # of the slim model only what was cut is another
    return host + max(2 * largest, answers), resident + max(working, answers + beside) + largest


def _operations(cost: Cost, widths: Sequence[int], work: Work) -> float:
    """Of running both models."""
    whole, blocks = 2.0 * cost.macs_per_token, 2.0 * (cost.block_macs_per_token + cost.attention_macs_per_token)
    operations = blocks * work.passes * work.tokens
    if work.measured:
        shaped, priced = min(_scale(work) * SHAPE_TOKENS, work.tokens), _priced(work)
        operations += blocks * (shaped + priced * len(widths) / 2) + whole * priced
    return operations


def _summing(graph: FxGraph, region: Region, work: Work) -> float:
    """Operations of its Gram matrices and products with what is wanted, as it is and merged."""
    n = _width(graph, region)
    return 2.0 * 2 * work.tokens * n * (GRAM_SHARE * n + _read_rows(graph, region, n))


def _scores(cost: Cost, regions: Sequence[Region]) -> float:
    """Of all attentions together for a token, where they are repaired."""
    sizes = [region.width for region in regions if region.kind in (RegionKind.QUERY_KEY, RegionKind.VALUE)]
    return cost.attention_macs_per_token / 2 / max(sizes) if sizes else 0.0


def _read_rows(graph: FxGraph, region: Region, n: int) -> int:
    """How many outputs its reader has."""
    return int(graph.weight(graph.op(region.readers[0])).shape[-2]) if region.readers else n


def _scale(work: Work) -> int:
    return 1 if work.device == "cpu" else GPU_SCALE


def _priced(work: Work) -> int:
    """Tokens that price probes."""
    return min(_scale(work) * PRICE_TOKENS["decoder"], work.tokens)


def _weights(graph: FxGraph) -> Sequence[int]:
    """Bytes of each, a shared one once."""
    values = {value for op in graph.ops for value in (op.weight, op.bias) if value}
    return [graph.parameter(value).nbytes for value in values]


def _width(graph: FxGraph, region: Region) -> int:
    """How many rows its Gram matrix has: all heads' together."""
    if region.readers:
        return int(graph.weight(graph.op(region.readers[0])).shape[-1])
    return int(graph.weight(graph.op(region.writers[0])).shape[0])


def _ends(graph: FxGraph, region: Region) -> int:
    return sum(graph.weight(graph.op(name)).numel() for name in (*region.writers, *region.readers))


def _solving(graph: FxGraph, region: Region) -> int:
    n = _width(graph, region)
    return 8 * (SQUARES * n * n + READERS * n * _read_rows(graph, region, n))


def _rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a product, the best of three."""
    size = PRODUCT[device]
    x = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):  # the first one warms up
        if x.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        x @ x
        if x.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
