"""onnxscript's rewrite rules, tried at no node but those of the op that a rule's pattern ends in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def rules_by_op() -> Iterator[None]:
    """Inside, a pattern does not begin with a node that its first output cannot be.

    It would find that out first thing; but one of several outputs lists all nodes of the graph before it looks, for
    each node anew, which takes most of a conversion's time. Does nothing where onnxscript has no such matcher.
    """
    try:
        from onnxscript.rewriter._basics import MatchResult
        from onnxscript.rewriter._matcher import SimplePatternMatcher
    except ImportError:
        yield
        return
    matcher: Any = SimplePatternMatcher
    original = matcher.match

    def match(self: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        ends = self.pattern.output_nodes[0]
        if not ends.op.matches(node.op_type) or not ends.domain.matches(node.domain):
            return MatchResult().fail(f"no {ends.op}", node)
        return original(self, model, graph, node, **options)

    matcher.match = match
    try:
        yield
    finally:
        matcher.match = original
