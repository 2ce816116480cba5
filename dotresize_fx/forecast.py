"""What an export will take, told from shapes alone: memory, and a rough time over a measured rate of products."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dotresize_fx.cost import count_cost, stream_width
from dotresize_fx.fidelity import POSITIONS_AT_ONCE
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.memory import show_size
from dotresize_fx.regions import Region
from dotresize_fx.sensitivity import GPU_SCALE, PRICE_TOKENS, SHAPE_TOKENS

# Copies of the stream that the sweep holds: dense, which is wanted behind a sublayer, slim, what its reader should put
# out and what it does.
STREAMS = 4
# (n, n) float64 at once while a region is solved: its Gram matrices that fit and that measure, and the solver's own.
SQUARES = 5
# (n, out) float64 likewise: reader, its sums with what is wanted and with what is put out, the fit.
READERS = 8
# Forward passes of the calibration text: both streams, and what is cut once more merged and once as it was.
PASSES = 4.0
# Operations for each n³ that a region of width n is solved by, in float64: elimination, factorisations, the fit.
SOLVING = 12
# What the libraries that convert and check take, and seconds for each op that is traced, converted and written twice.
LIBRARIES = 450 << 20
SECONDS_PER_OP = 0.1
# Of square products of this size the rate is taken, and what share of it whole models reach; a GPU needs large ones.
PRODUCT, REACHED = {"cpu": 1024, "cuda": 4096}, {"cpu": 1.0, "cuda": 0.5}
# Bytes a second of streams that wait in pinned memory, and how often one is copied a sublayer.
COPIED, COPIES = 2e10, 6


@dataclass(frozen=True)
class Forecast:
    """``host`` and ``gpu`` are bytes at the peak (``gpu`` 0 without one), ``seconds`` about."""

    host: int
    gpu: int
    seconds: float
    operations: float
    rate: float

    def lines(self) -> list[str]:
        gpu = f", {show_size(self.gpu)} of the GPU's" if self.gpu else ""
        time_taken = f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.0f} min"
        return [
            f"memory at the peak: about {show_size(self.host)}{gpu} (of files mapped into it nothing)",
            f"time: about {time_taken}, of {self.operations / 1e12:.3g} T operations at the measured "
            f"{self.rate / 1e9:.0f} G/s; without ONNX Runtime's runs",
        ]


def stream_bytes(graph: FxGraph, tokens: int) -> int:
    """What the sweep's streams take over so many tokens."""
    return STREAMS * tokens * stream_width(graph) * 4


def forecast(
    graph: FxGraph,
    regions: Sequence[Region],
    *,
    tokens: int,
    measuring: int,
    length: int,
    device: str,
    lazy: bool,
    streams: str,
    half: bool,
    measured: bool,
) -> Forecast:
    """For ``tokens`` that calibrate and ``measuring`` ones in sequences of ``length``.

    ``lazy``: weights wait in files; ``streams``: where these do, see :class:`stored_tensors.Spool`. ``half``: products
    of activations are bfloat16's. ``measured``: widths are planned by sensitivity.
    """
    cost = count_cost(graph, length)
    weights = {value: graph.parameter(value).nbytes for op in graph.ops for value in (op.weight, op.bias) if value}
    whole = sum(weights.values())
    largest = max(weights.values(), default=0)
    block = max((_ends(graph, region) for region in regions), default=0) * 4
    solving = max((_solving(graph, region) for region in regions), default=0)
    flowing = stream_bytes(graph, tokens)
    vocabulary = max((int(graph.weight(op).shape[0]) for op in graph.ops if op.kind is Kind.EMBEDDING), default=0)
    answers = 3 * length * vocabulary * 4 + 4 * POSITIONS_AT_ONCE * vocabulary * 4
    working = max(2 * block + solving + (flowing if streams == "device" else 0), answers + largest, 2 * largest)
    resident = 0 if lazy else 2 * whole
    host = LIBRARIES + resident + (working if device == "cpu" else max(2 * largest, answers))
    host += flowing if streams == "pinned" else 0
    gpu = 0 if device == "cpu" else resident + working + largest
    run = 2.0 * cost.macs_per_token
    operations = run * (PASSES * tokens + 4 * measuring)
    if measured:
        scale = 1 if device == "cpu" else GPU_SCALE
        shaped, priced = min(scale * SHAPE_TOKENS, tokens), min(scale * PRICE_TOKENS["decoder"], tokens)
        operations += run * shaped + run * priced * (len(regions) / 2 + 1)
    widths = [_width(graph, region) for region in regions]
    operations += sum(2.0 * 2 * tokens * n * n for n in widths)
    rate, double = (_rate(device, dtype) for dtype in (torch.bfloat16 if half else torch.float32, torch.float64))
    solved = sum(SOLVING * float(n) ** 3 for n in widths) * (2 if measured else 1)
    copied = COPIES * len(regions) * flowing / STREAMS / COPIED if streams == "pinned" else 0.0
    seconds = (operations / rate + solved / double) / REACHED[device] + copied + SECONDS_PER_OP * len(graph.ops)
    return Forecast(host, gpu, seconds, operations + solved, rate)


def _width(graph: FxGraph, region: Region) -> int:
    """How many rows its Gram matrix has: all heads' together."""
    if region.readers:
        return int(graph.weight(graph.op(region.readers[0])).shape[-1])
    return int(graph.weight(graph.op(region.writers[0])).shape[0])


def _ends(graph: FxGraph, region: Region) -> int:
    return sum(graph.weight(graph.op(name)).numel() for name in (*region.writers, *region.readers))


def _solving(graph: FxGraph, region: Region) -> int:
    n = _width(graph, region)
    rows = int(graph.weight(graph.op(region.readers[0])).shape[-2]) if region.readers else n
    return 8 * (SQUARES * n * n + READERS * n * rows)


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
