"""Edits of what stands between an attention and its linears: stated sizes, slices, tables, inputs, the scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir
import torch

from dotresize_fx.graph import Op, Value
from dotresize_fx.onnx_form.attention_ops import head_counts
from dotresize_fx.onnx_form.constants import integers
from dotresize_fx.onnx_form.moves import stated_sizes
from dotresize_fx.onnx_form.reading import OnnxReading

OPEN = 2**63 - 1  # an end of a slice that is the axis' end


class HeadEdits(OnnxReading):
    """The edits of :class:`dotresize_fx.onnx_form.graph.OnnxGraph` that regions of an attention need."""

    def resize_axes(self, op: Op, sizes: Mapping[int, int]) -> None:
        """See :meth:`Graph.resize_axes`. What a target states is replaced, and what it computes stays."""
        node = self._node(op.name)
        if names := head_counts(node):
            for place, size in sizes.items():
                node.attributes.add(ir.AttrInt64(names[place], size))
            self._moved = True
            self.changed()
            return
        stated = stated_sizes(node.inputs[1])
        assert stated is not None
        shift = len(op.output.shape) - len(stated)
        new = {axis - shift: size for axis, size in sizes.items() if (stated[axis - shift] or 0) > 0}
        if new:
            node.replace_input_with(1, self._target(node, stated, new))
        self._moved = True
        self.changed()

    def _target(self, node: ir.Node, stated: Sequence[int | None], new: Mapping[int, int]) -> ir.Value:
        """The target of a Reshape or Expand with these sizes in place of what it states there."""
        editor, name = self._editor, f"{node.outputs[0].name}_sizes"
        whole = integers(node.inputs[1])
        if whole is not None:
            return editor.add_initializer(name, torch.tensor([new.get(i, size) for i, size in enumerate(whole)]))
        old = node.inputs[1]
        concat = old.producer() if old is not None else None
        assert old is not None
        assert concat is not None
        parts, start = list(concat.inputs), 0
        for i, part in enumerate(concat.inputs):
            known = integers(part)
            count = len(known) if known is not None else int(part.shape[0])  # type: ignore[union-attr, index, arg-type]
            if known is not None and any(start <= place < start + count for place in new):
                sizes = [new.get(start + place, size) for place, size in enumerate(known)]
                parts[i] = editor.add_initializer(name, torch.tensor(sizes))
            start += count
        output = ir.val(editor.fresh(f"{node.outputs[0].name}_shape"), ir.DataType.INT64, [len(stated)])
        editor.insert("Concat", parts, output, {"axis": 0}, before=node)
        return output

    def resize_slice(self, op: Op, start: int, stop: int | None) -> None:
        node = self._node(op.name)
        if node.op_type == "Split":
            self._resize_part(node, self._index(op.name), start if stop is None else stop - start)
        else:
            for index, bound in ((1, start), (2, OPEN if stop is None else stop)):
                given = node.inputs[index]
                assert given is not None
                if integers(given) != [bound]:
                    stored = torch.tensor([bound])
                    node.replace_input_with(index, self._editor.add_initializer(f"{op.name}_bound", stored))
        self._moved = True
        self.changed()

    def _resize_part(self, node: ir.Node, index: int, size: int) -> None:
        """Another size for one part of a Split; of the upper of two halves no more is known than where it starts."""
        given = node.attributes.get("split")
        sizes = (
            list(given.as_ints()) if given is not None else integers(node.inputs[1] if len(node.inputs) > 1 else None)
        )
        if sizes is None or sizes[index] == size:  # parts of one size need not be stated
            return
        sizes[index] = size
        if given is not None:
            node.attributes.add(ir.AttrInt64s("split", sizes))
        else:
            node.replace_input_with(
                1, self._editor.add_initializer(f"{node.outputs[0].name}_sizes", torch.tensor(sizes))
            )

    def insert_gather(self, source: Value, indices: torch.Tensor, *, users: Iterable[Op], name: str = "gathered") -> Op:
        start = self._values[source.name]
        readers = {self._node(op.name) for op in users}
        uses = [use for use in start.uses() if readers & set(self._readers(use.node))]
        first = min((use.node for use in uses), key=self._order.__getitem__)
        places = self._editor.add_initializer(f"{name}.indices", indices.to(torch.int64))
        shape = None if start.shape is None else ir.Shape([*start.shape[:-1], len(indices)])
        output = ir.val(self._editor.fresh(name), start.dtype, shape)
        for node, index in uses:
            node.replace_input_with(index, output)
        gather = self._editor.insert("Gather", [start, places], output, {"axis": -1}, before=first)
        self._moved = True
        self.changed()
        return self._read_op(gather)

    def set_attention_scale(self, op: Op, scale: float) -> None:
        self._node(op.name).attributes.add(ir.AttrFloat32("scale", scale))
        self.changed()

    def input_sizes(self, name: str) -> tuple[int | str, ...]:
        return self._value(self._values[name]).shape

    def resize_input(self, name: str, sizes: Mapping[int, int]) -> None:
        """See :meth:`Graph.resize_input`; the output that carries a cache on states the same sizes."""
        for value in (self._values[n] for n in (name, *(out for out, past in self.caches.items() if past == name))):
            assert value.shape is not None
            value.shape = ir.Shape([sizes.get(axis, size) for axis, size in enumerate(value.shape)])
        self._moved = True
        self.changed()
