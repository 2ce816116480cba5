"""Calibration statistics: Gram matrices in float64, never activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dotresize_fx.errors import SolverError
from dotresize_fx.ranks import Ranks
from dotresize_fx.regions import Region

# A Gram matrix is computed in about so many panels of its rows, each up to the diagonal: little more than half of it.
PANELS = 8
# A panel's rows are a multiple of so many, as fast products are: a GPU computes few no faster than many.
PANEL_STEP = {"cpu": 64, "cuda": 1024}


class GramAccumulator:
    """Sums x.T @ x and x.T @ y over batches of rows.

    Products are float32 at least, see :func:`transposed_product`, sums float64. ``gram`` is (n, n), each entry of
    ``cross`` (n, m) and each of ``energy`` a float64 scalar, the sum of y squared. A ``gram`` that was asked for is not
    whole any more once rows are added.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._gram, self._whole = torch.zeros(0), True
        self.cross: dict[str, torch.Tensor] = {}
        self.energy: dict[str, torch.Tensor] = {}

    @property
    def gram(self) -> torch.Tensor:
        if not self._whole:
            for start, end in _panels(self._gram):
                self._gram[..., start:end, end:] = self._gram[..., end:, start:end].mT
            self._whole = True
        return self._gram

    @gram.setter
    def gram(self, gram: torch.Tensor) -> None:
        self._gram, self._whole = gram, True

    def _add_square(self, gram: torch.Tensor, x: torch.Tensor) -> None:
        """x.T @ x, in this Gram matrix of this one's; what is above the panels follows once it is asked for."""
        x = _multiplied(x)
        for start, end in _panels(gram):
            gram[start:end, :end] += transposed_product(x[:, start:end], x[:, :end])
        self._whole = False

    def add(self, x: torch.Tensor, **others: torch.Tensor) -> None:
        """x: (tokens, n); others: (tokens, m) each."""
        if self.tokens == 0:
            self.gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        self.tokens += len(x)
        x = _multiplied(x)
        self._add_square(self._gram, x)
        for name, y in others.items():
            if name not in self.cross:
                self.cross[name] = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
                self.energy[name] = torch.zeros((), dtype=torch.float64, device=x.device)
            self.cross[name] += transposed_product(x, y)
            exact = torch.promote_types(y.dtype, torch.float32)
            self.energy[name] += torch.linalg.vector_norm(y, dim=1, dtype=exact).double().square().sum()

    def add_sums(
        self, tokens: int, gram: torch.Tensor, cross: Mapping[str, torch.Tensor], energy: Mapping[str, torch.Tensor]
    ) -> None:
        """What was summed elsewhere over ``tokens`` rows: gram (n, n), and by name cross (n, m) and energy, scalars."""
        if self.tokens == 0:
            self.gram = torch.zeros_like(gram, dtype=torch.float64)
        self.tokens += tokens
        self.gram += gram
        for name, product in cross.items():
            if name not in self.cross:
                self.cross[name] = torch.zeros_like(product, dtype=torch.float64)
                self.energy[name] = torch.zeros((), dtype=torch.float64)
            self.cross[name] += product
            self.energy[name] += energy[name]

    def add_up(self, ranks: Ranks, device: torch.device, names: Sequence[str] = ()) -> None:
        """The sums over all ranks, in place; ``names`` are those of ``cross``: a rank without rows knows none."""
        if ranks.count == 1:
            return
        known = torch.zeros(3 + len(names), dtype=torch.int64, device=device)
        if self.tokens:
            known[3 - self.gram.ndim : 3] = torch.tensor(self.gram.shape)
            known[3:] = torch.tensor([self.cross[name].shape[-1] for name in names])
        *shape, n = [size for size in ranks.largest(known)[:3].tolist() if size] or [0]
        if not n:
            return
        if not self.tokens:
            self.gram = torch.zeros(*shape, n, dtype=torch.float64, device=device)
            for name, width in zip(names, known[3:].tolist(), strict=True):
                self.cross[name] = torch.zeros(n, width, dtype=torch.float64, device=device)
                self.energy[name] = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = int(ranks.sum(torch.tensor(self.tokens, device=device)))
        for tensor in (self.gram, *(part for name in names for part in (self.cross[name], self.energy[name]))):
            ranks.sum(tensor)

    def to_means(self) -> None:
        """Make means over rows of the sums, in place."""
        for tensor in (self.gram, *self.cross.values(), *self.energy.values()):
            tensor /= max(self.tokens, 1)

    def of(self, kept: torch.Tensor) -> GramAccumulator:
        """What would have been summed over the columns ``kept`` of x, (k,) int64, alone."""
        found = GramAccumulator()
        found.tokens, found.energy = self.tokens, {name: energy.clone() for name, energy in self.energy.items()}
        found.gram = self.gram.index_select(0, kept).index_select(1, kept)
        found.cross = {name: cross.index_select(0, kept) for name, cross in self.cross.items()}
        return found

    def through(self, matrix: torch.Tensor) -> GramAccumulator:
        """What would have been summed over x @ matrix; matrix: (n, k) float64."""
        mapped = GramAccumulator()
        mapped.tokens = self.tokens
        mapped.gram = matrix.T @ self.gram @ matrix
        mapped.cross = {name: matrix.T @ cross for name, cross in self.cross.items()}
        mapped.energy = {name: energy.clone() for name, energy in self.energy.items()}
        return mapped


def transposed_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(n, m) x.T @ y, float32 at least; x: (tokens, n), y: (tokens, m).

    On a GPU products of bfloat16 numbers, which are exact, are summed in float32; a ``y`` of float32 is taken as the
    sum of two such numbers, which keeps 16 bits of it.
    """
    x = _multiplied(x)
    if x.dtype is not torch.bfloat16:
        return x.T @ y.to(x.dtype)
    high = y.bfloat16()
    product = torch.mm(x.T, high, out_dtype=torch.float32)
    if y.dtype is not torch.bfloat16:
        product += torch.mm(x.T, (y - high).bfloat16(), out_dtype=torch.float32)
    return product


def _multiplied(x: torch.Tensor) -> torch.Tensor:
    """In the dtype of its products: on a GPU bfloat16 where it is that already, else float32 at least."""
    half = x.is_cuda and x.dtype is torch.bfloat16
    return x if half else x.to(torch.promote_types(x.dtype, torch.float32))


def _panels(gram: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Of a Gram matrix's rows the first and the one behind the last of each panel."""
    n, step = gram.shape[-1], PANEL_STEP["cuda" if gram.is_cuda else "cpu"]
    height = step * max(1, -(-n // (PANELS * step)))
    return ((start, min(n, start + height)) for start in range(0, n, height))


def with_ones(rows: torch.Tensor) -> torch.Tensor:
    """(tokens, n + 1): a constant one beside the activations, which a bias multiplies."""
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1)


def check_finite(gram: torch.Tensor, region: Region) -> None:
    """Raises SolverError when calibration met activations that are no numbers, and names the expert if it is one's."""
    if gram.isfinite().all():
        return
    whose = ""
    if gram.ndim == 3:
        broken = [str(expert) for expert, part in enumerate(gram) if not part.isfinite().all()]
        whose = f" of expert {', '.join(broken)}"
    raise SolverError(
        f"{region.name}: activations{whose} on the calibration data are infinite or NaN; the model overflows on it"
    )


def padding_input(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The batch's attention mask (batch, length), not 0 where there is a token; None where none says so.

    A mask of floats is added to scores, or multiplies something: its zeros are no padding. Beside a decoder's own
    inputs the mask is the encoder's, and rows of the decoder might be taken for the encoder's.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.is_floating_point() or any(name.startswith("decoder_") for name in batch):
        return None
    return mask


def padding_mask(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """:func:`padding_input`, and None where it leaves nothing out.

    Asked once a batch: the answer waits for the device, and so does every selection of rows by a mask.
    """
    mask = padding_input(batch)
    return None if mask is None or bool(mask.all()) else mask


def token_rows(value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The rows (tokens, width) of an activation that belong to real tokens.

    value: (batch, length, width), or with the leading dimensions joined. mask: (batch, length), 0 for padding, or
    None. An activation that has no row per token (a pooled one) is taken whole.
    """
    rows = value.reshape(-1, value.shape[-1])
    if mask is None or len(rows) != mask.numel():
        return rows
    return rows[mask.reshape(-1).bool()]


@dataclass(frozen=True)
class RegionStatistics:
    """What a solver sees of a region on calibration data; all float64.

    gram: (n, n), mean of x x.T over tokens, x being what the readers read (for a residual stream: the normalised
    stream, so that every token counts alike; for the heads of an attention: all heads together). Empty where
    nothing reads the region. reader_weight: (out, n), or None for a stream, which many linears read.
    entry_gram: (d + 1, d + 1), the same for what queries' and keys' writers read, a constant one beside it for their
    biases; None for other regions. coherence: (n/2, n/2) complex128, how alike rotary pairs turn, see
    :func:`dotresize_fx.rotary_coherence.coherence`; None where nothing rotates or it is not known.
    writer_weights: of queries and keys, (n, d + 1) by op name, the bias as last column. samples: (tokens, n), some
    rows of x, or None.
    Of EXPERTS gram is (experts, n, n), reader_weight (experts, out, n), expert_rows (experts,) int64 how many rows
    each one saw, and ``of_experts`` the same one by one, once asked for.
    eliminations: the orders in which neurons went, as far as elimination was run: a longer run begins as a shorter one
    does.
    """

    tokens: int
    gram: torch.Tensor
    reader_weight: torch.Tensor | None = None
    entry_gram: torch.Tensor | None = None
    writer_weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    samples: torch.Tensor | None = None
    coherence: torch.Tensor | None = None
    expert_rows: torch.Tensor | None = None
    of_experts: list[RegionStatistics] = field(default_factory=list, compare=False, repr=False)
    eliminations: list[torch.Tensor] = field(default_factory=list, compare=False, repr=False)

    @property
    def activation_norm(self) -> torch.Tensor:
        """(n,): root mean square of each neuron's activation."""
        return self.gram.diagonal().clamp_min(0).sqrt()

    @property
    def reader_norm(self) -> torch.Tensor:
        """(n,): Euclidean norm of the weights that read each neuron; ones for a stream."""
        return self.gram.new_ones(len(self.gram)) if self.reader_weight is None else self.reader_weight.norm(dim=0)

    def written_gram(self, writer: str) -> torch.Tensor:
        """(n, n): mean of y y.T over tokens, y being what the writer of this op name writes."""
        if self.entry_gram is None:
            raise ValueError(f"{writer}: what it reads was not watched")
        weight = self.writer_weights[writer]
        return weight @ self.entry_gram @ weight.T
