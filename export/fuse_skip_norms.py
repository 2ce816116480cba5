"""The sum of a residual stream and the RMS norm behind it as one op that ONNX Runtime has for both."""

from __future__ import annotations

import onnx_ir

from dotresize_fx.export.replace_value import replace_value

SKIP_NORM = "SkipSimplifiedLayerNormalization"
MICROSOFT = "com.microsoft"


def fuse_skip_norms(model: onnx_ir.Model) -> int:
    """Rewrite each norm of a sum of two tensors of one shape; returns how many.

    before::

        stream = Add(before, update)
        normed = RMSNormalization(stream, gain)

    after::

        normed, _, _, stream = SkipSimplifiedLayerNormalization(before, update, gain)
    """
    graph = model.graph
    fused = 0
    for norm in [node for node in graph if node.op_type == "RMSNormalization" and node.domain == ""]:
        stream = norm.inputs[0]
        added = stream.producer() if stream is not None else None
        if stream is None or added is None or added.op_type != "Add" or stream.is_graph_output() or not _fits(norm):
            continue
        before, update = added.inputs
        if before is None or update is None or not before.shape == update.shape == stream.shape:
            continue
        node = onnx_ir.node(
            SKIP_NORM,
            [before, update, norm.inputs[1]],
            {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
            domain=MICROSOFT,
            num_outputs=4,
            name=norm.name,
            metadata_props=dict(norm.metadata_props),
        )
        graph.insert_after(added, node)
        for old, new in ((norm.outputs[0], node.outputs[0]), (stream, node.outputs[3])):
            replace_value(old, new)
        for unused in node.outputs[1:3]:
            unused.name = ""
        graph.remove([norm, added], safe=True)
        fused += 1
    if fused:
        model.opset_imports.setdefault(MICROSOFT, 1)
    return fused


def _fits(norm: onnx_ir.Node) -> bool:
    """Whether a norm is over the last axis of (batch, length, width), its statistics in float32."""
    stream, gain = norm.inputs
    axis = norm.attributes.get_int("axis", -1)
    ranks = [len(value.shape) if value is not None and value.shape is not None else 0 for value in (stream, gain)]
    return ranks == [3, 1] and axis in (-1, 2) and norm.attributes.get_int("stash_type", 1) == 1
