"""What a node computes beside what the neutral view shows: its attributes, and constants that it reads unseen."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx_ir as ir

from dotresize_fx.onnx_form.constants import constant


def details(nodes: Iterable[ir.Node], shown: Collection[str]) -> tuple[object, ...]:
    """The same for nodes that do the same with what is ``shown``, values by name."""
    return tuple(_of(node, shown) for node in nodes)


def _of(node: ir.Node, shown: Collection[str]) -> tuple[object, ...]:
    attributes = sorted((name, _told(given)) for name, given in node.attributes.items())
    unseen = [constant(value) if value is not None and value.name not in shown else None for value in node.inputs]
    return node.domain, node.op_type, tuple(attributes), tuple(map(_content, unseen))


def _told(given: ir.Attr) -> str:
    if given.type == ir.AttributeType.TENSOR:
        return repr(_content(given.as_tensor()))
    return str(given.type) if given.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) else repr(given.value)


def _content(tensor: ir.TensorProtocol | None) -> tuple[object, ...]:
    if tensor is None or tensor.dtype == ir.DataType.STRING:
        return ()
    return (*tensor.shape.numpy(), hash(tensor.tobytes()))
