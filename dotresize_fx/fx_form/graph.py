"""The torch.fx form of the neutral view: a :class:`torch.export.ExportedProgram` read and edited as a Graph.

What it reads is in :mod:`dotresize_fx.fx_form.reading`, its edits are in :mod:`dotresize_fx.fx_form.edits`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch.export import ExportedProgram

from dotresize_fx.fx_form.cache import remove_caches
from dotresize_fx.fx_form.edits import FxEdits
from dotresize_fx.fx_form.expert_lists import join_expert_lists
from dotresize_fx.fx_form.functional import drop_in_place, fold_constants
from dotresize_fx.fx_form.patches import recognise_patches
from dotresize_fx.fx_form.pointwise import recognise_pointwise, restore_pointwise
from dotresize_fx.fx_form.shapes import moved, refresh_shapes
from dotresize_fx.fx_form.slices import distribute_slices


class FxGraph(FxEdits):
    """An exported program whose parameters are placeholders, as ``torch.export`` makes it.

    Edits write to the program in place: nodes, the graph signature and the state dict.
    """

    def refresh_shapes(self) -> None:
        """Compute every node's shape anew, symbols included, after edits that changed widths."""
        if not self._shapes_stale:
            return
        refresh_shapes(self.program)
        self._shapes_stale = False
        self.changed()

    def drop_in_place(self) -> list[str]:
        return drop_in_place(self)

    def recognise_patches(self) -> list[str]:
        return recognise_patches(self)

    def recognise_pointwise(self) -> list[str]:
        return recognise_pointwise(self)

    def restore_pointwise(self) -> FxGraph:
        """A copy with convolutions where :meth:`recognise_pointwise` put linears, as runtimes know them."""
        restored = self.copy()
        restore_pointwise(restored)
        return restored

    def join_expert_lists(self) -> list[str]:
        changed = join_expert_lists(self)
        if changed:  # the lengths of the parts, which no number told, are gone
            self.remove_dead()
            self._shapes_stale = True
            self.refresh_shapes()
        return changed

    def distribute_slices(self) -> list[str]:
        return distribute_slices(self)

    def fold_constants(self, largest: int) -> list[str]:
        return fold_constants(self, largest)

    def remove_caches(self, outputs: Collection[str]) -> None:
        remove_caches(self, outputs)

    def to(self, device: str) -> None:
        """Move parameters, constants and the devices that tracing baked in, in place."""
        self.program = moved(self.program, device)
        self.changed()

    def copy(self) -> FxGraph:
        program = self.program
        graph = torch.fx.Graph()
        made: dict[torch.fx.Node, torch.fx.Node] = {}
        ends: Any = graph.graph_copy(program.graph_module.graph, made, return_output_node=True)
        result, old = ends
        for source, node in made.items():
            if node.op == "placeholder":  # an input may be called what a builtin is, which a copy is not
                node.name = source.name
        graph.output(result).meta.update(old.meta)
        copied = FxGraph(
            ExportedProgram(
                root=program.graph_module,
                graph=graph,
                graph_signature=copy.deepcopy(program.graph_signature),
                state_dict=dict(program.state_dict),
                range_constraints=dict(program.range_constraints),
                module_call_graph=program.module_call_graph,
                example_inputs=program.example_inputs,
                constants=dict(program.constants),
                verifiers=program.verifiers,
            )
        )
        copied.spool, copied.causal_masks = self.spool, self.causal_masks
        copied.half_products = self.half_products
        copied._shapes_stale = self._shapes_stale
        copied.packings.update(self.packings)
        copied.caches.update(self.caches)
        return copied
