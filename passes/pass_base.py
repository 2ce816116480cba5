"""What every pass is: requires -> call -> ensures, returning what it did."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from dotresize_fx.graph import Graph


class PassContractError(AssertionError):
    """A pass was given a graph it cannot take, or left one it promised not to leave: a bug, not a user's mistake."""


@dataclass(frozen=True)
class PassResult:
    """``records`` says in words, one line a change, what the pass did; empty when it did nothing."""

    records: tuple[str, ...] = ()

    @property
    def modified(self) -> bool:
        """Whether the graph is another one now."""
        return bool(self.records)


class Pass(ABC):
    """A rewrite of a graph in place. Subclasses are named by a verb and a noun and live in a file of that name."""

    def requires(self, graph: Graph) -> None:
        """Raise :class:`PassContractError` when the graph is not one this pass can take."""

    @abstractmethod
    def call(self, graph: Graph) -> PassResult:
        """Rewrite the graph."""

    def ensures(self, graph: Graph) -> None:
        """Raise :class:`PassContractError` when the rewritten graph is not what the pass promises."""

    def __call__(self, graph: Graph, *, check: bool = True) -> PassResult:
        """Run the pass; ``check`` runs its pre- and postcondition around it."""
        if check:
            self.requires(graph)
        result = self.call(graph)
        if check:
            self.ensures(graph)
        return result


def promise(condition: bool, message: str) -> None:
    """Raise :class:`PassContractError` with ``message`` unless the condition holds."""
    if not condition:
        raise PassContractError(message)
