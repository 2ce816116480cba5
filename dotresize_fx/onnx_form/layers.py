"""Edits of an ONNX graph that taking layers out needs: their caches go, and the others' numbers close up."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

import onnx_ir as ir

from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.onnx_form.heads import HeadEdits
from dotresize_fx.onnx_form.sizes import sizes_of

_NUMBERED = re.compile(r"^(\D*)(\d+)(.*)$")


class LayerEdits(HeadEdits):
    """The edits of :class:`dotresize_fx.onnx_form.graph.OnnxGraph` that a depth needs."""

    def remove_ops(self, names: Sequence[str]) -> None:
        """See :meth:`Graph.remove_ops`: no op of ONNX writes into a tensor, so that those nothing needs are dead."""
        self.remove_dead()

    def remove_caches(self, outputs: Collection[str]) -> None:
        """See :meth:`Graph.remove_caches`.

        Raises:
            NothingToSlimError: something beside the layer reads more of its cache than how long it is, or no cache of
                its shape is left that would tell.
        """
        gone = {self._values[name]: self._values[self.caches.pop(name)] for name in outputs}
        kept = [self._values[past] for past in self.caches.values()]
        for output in gone:
            self._graph.outputs.remove(output)
        self.changed()
        self.remove_dead()
        for past in gone.values():
            if uses := list(past.uses()):
                other = _alike(past, kept)
                if other is None or any(node.op_type != "Shape" for node, _ in uses):
                    raise NothingToSlimError(
                        f"{past.name} is read by more than its own layer, so the depth of the model cannot change"
                    )
                for node, index in uses:  # how many earlier tokens there are any cache tells
                    node.replace_input_with(index, other)
            self._graph.inputs.remove(past)
        self._close_up({str(value.name) for pair in gone.items() for value in pair})
        self.changed()

    def _close_up(self, gone: Collection[str]) -> None:
        names = [name for pair in self.caches.items() for name in pair]
        new = closed_up(names, gone)
        for value in [value for value in (*self._graph.inputs, *self._graph.outputs) if value.name in new]:
            value.name = new[str(value.name)]
        caches = {new[output]: new[past] for output, past in self.caches.items()}
        self.caches.clear()
        self.caches.update(caches)


def closed_up(names: Iterable[str], gone: Collection[str]) -> dict[str, str]:
    """Each name of a layer's cache, and what it is once those of ``gone`` layers went: of a lower number by as many as
    went before it.
    """
    numbers = {int(found[2]) for name in gone if (found := _NUMBERED.match(name))}

    def closer(found: re.Match[str]) -> str:
        number = int(found[2])
        return f"{found[1]}{number - sum(other < number for other in numbers)}{found[3]}"

    return {name: _NUMBERED.sub(closer, name) for name in names}


def _alike(past: ir.Value, kept: Sequence[ir.Value]) -> ir.Value | None:
    """A cache of as many axes and of the same sizes, where these are stated; keys for keys if there are some."""
    sizes = [_stated(value) for value in (past, *kept)]
    same = [value for value, other in zip(kept, sizes[1:], strict=True) if other == sizes[0]]
    role = _role(past)
    return next((value for value in same if _role(value) == role), same[0] if same else None)


def _stated(value: ir.Value) -> list[int | None]:
    return [size if isinstance(size, int) else None for size in sizes_of(value) or ()]


def _role(value: ir.Value) -> str:
    return _NUMBERED.sub(r"\1\3", str(value.name))
