"""Capture of a module by its example inputs, or of a saved program: which sizes are free is found by trying."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind

from dotresize_fx.errors import CaptureError
from dotresize_fx.export.capture import Captured, no_fast_path, trace, what_it_said
from dotresize_fx.export.model_source import LoadedModel
from dotresize_fx.export.module_source import output_tensors
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.fx_form.reading import plain_size
from dotresize_fx.graph import Graph, Kind
from dotresize_fx.program_inputs import InputSpec, ProgramInputs

Sample = Mapping[str, torch.Tensor]
Run = Callable[[Sample], Sequence[torch.Tensor]]

# Two float32 runs of one function differ by rounding only.
TOLERANCE = 1e-4
AUTO, DYNAMIC = torch.export.Dim.AUTO, torch.export.Dim.DYNAMIC
# Integers that are no ids of a vocabulary, by what their names hold.
_NO_IDS = re.compile("mask|position|type|label|length")


def capture_module(loaded: LoadedModel) -> Captured:
    """The program of a module, or the one that was saved, and what is known of its inputs.

    Raises:
        CaptureError: torch.export refused, or the program is not what the module computes, or not a function.
    """
    name = type(loaded.model).__name__ if loaded.program is None else loaded.source
    if loaded.program is None:
        sample = _at_least_two(loaded)
        program, metadata, notes = _traced(loaded.model, sample)
        run = module_run(loaded.model)
    else:
        from transformers.exporters.metadata import build_export_metadata

        program, sample, notes = loaded.program, dict(loaded.sample), ()
        metadata = build_export_metadata(loaded.model, sample, program, ["torch"])
        run = Execution(FxGraph(program)).outputs
    _refuse_state(program, name)
    graph = FxGraph(program).copy()
    inputs = _described(graph, sample)
    if loaded.program is None:
        _compare(graph, run, sample, inputs, name)
    else:
        _compare(graph, run, sample, ProgramInputs(inputs.specs), name)
    if inputs.batch and not samples_apart(run, sample, inputs):
        notes += ("the first axis of the inputs is no axis of samples: batches are kept whole",)
        inputs = ProgramInputs(inputs.specs, largest=inputs.largest)
    predicts = predicted_ids(graph, run, sample)
    return Captured(graph, sample, metadata, 0, 0, inputs=inputs, predicts=predicts, notes=notes)


def module_run(model: torch.nn.Module) -> Run:
    """A module as a function of inputs by name to tensors."""

    @torch.no_grad()
    def run(batch: Sample) -> Sequence[torch.Tensor]:
        with no_fast_path(), quiet_libraries():
            return output_tensors(model(**batch))

    return run


def _at_least_two(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """The sample with two rows, if the module takes them: of one alone torch.export cannot tell whether it is fixed."""
    sample = dict(loaded.sample)
    if _first_size(sample) != 1:
        return sample
    doubled = {name: torch.cat([v, v]) if v.ndim and len(v) == 1 else v for name, v in sample.items()}
    try:
        module_run(loaded.model)(doubled)
    except Exception:  # it takes one row alone
        return sample
    return doubled


def _first_size(sample: Sample) -> int:
    return next(len(value) for value in sample.values() if value.ndim)


# -- tracing -------------------------------------------------------------------------------------------


def _traced(model: torch.nn.Module, sample: Sample) -> tuple[torch.export.ExportedProgram, Any, tuple[str, ...]]:
    """The program with as many sizes free as torch.export leaves free, and why others are not.

    Tried are the first axis of inputs that are as long as the first one, and lengths: the other axes of integers and
    the second one of (batch, length, width).
    """
    rows = _first_size(sample)
    wanted: dict[str, list[int]] = {}
    for name, value in sample.items():
        plain = not value.is_floating_point()
        lengths = range(1, value.ndim if plain else 2 if value.ndim == 3 else 1)
        wanted[name] = [0] * (value.ndim > 0 and (len(value) == rows or plain)) + list(lengths)
    refusals: list[Exception] = []
    tried: tuple[dict[str, list[int]], ...] = (
        wanted,
        {name: [axis for axis in axes if axis == 0] for name, axes in wanted.items()},
        {},
    )
    for axes in tried:
        try:
            program, metadata = trace(model, sample, _shapes(sample, axes))
            free = _free(program, axes)
            if free != axes:  # what turned out to be fixed is a symbol still, which hides widths
                program, metadata = trace(model, sample, _shapes(sample, free))
        except Exception as error:  # torch.export raises whatever its parts raise
            refusals.append(error)
            continue
        fixed = {name: sorted({*wanted[name]} - {*free.get(name, ())}) for name in wanted}
        return program, metadata, tuple(_why_fixed(model, sample, fixed, refusals))
    said = what_it_said(refusals[-1])
    raise CaptureError(
        f"torch.export cannot capture {type(model).__name__}: {said} (a forward pass that branches on its data or on "
        "Python state has no one graph)"
    ) from refusals[-1]


def _shapes(sample: Sample, axes: Mapping[str, Sequence[int]], kind: Any = AUTO) -> dict[str, Any]:
    return {name: dict.fromkeys(axes.get(name, ()), kind) for name in sample}


def _free(program: torch.export.ExportedProgram, axes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Those of the axes whose size is a symbol still: no number, in whatever guise."""
    shapes = {node.name: node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"}
    return {name: [axis for axis in tried if not str(shapes[name][axis]).isdigit()] for name, tried in axes.items()}


def _why_fixed(
    model: torch.nn.Module, sample: Sample, fixed: Mapping[str, Sequence[int]], refusals: Sequence[Exception]
) -> list[str]:
    """Of the axes that one would have free, those that are fixed, with what torch.export says to freeing them."""
    fixed = {name: axes for name, axes in fixed.items() if axes}
    # Of (batch, width, length), a spectrogram, the second axis is no length, and nobody asks why.
    asked = {
        name: [axis for axis in axes if axis == 0 or not sample[name].is_floating_point()]
        for name, axes in fixed.items()
    }
    if not any(asked.values()):
        return []
    said = what_it_said(refusals[0]) if refusals else ""
    if not said:
        try:
            trace(model, sample, _shapes(sample, asked, DYNAMIC))
        except Exception as error:
            said = what_it_said(error)
    places = [f"axis {axis} of {name} is {sample[name].shape[axis]}" for name, axes in asked.items() for axis in axes]
    return [f"sizes that are fixed: {', '.join(places)}" + (f"; torch.export said: {said}" if said else "")]


def _refuse_state(program: torch.export.ExportedProgram, name: str) -> None:
    """A program that writes into its inputs or buffers is no function of its inputs."""
    written = [spec.target for spec in program.graph_signature.output_specs if spec.kind is not OutputKind.USER_OUTPUT]
    targets = {spec.arg.name: spec.target or spec.arg.name for spec in program.graph_signature.input_specs}
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable:
            sources = node.args[: len(schema.arguments)]
            written += [
                targets.get(source.name)
                for source, argument in zip(sources, schema.arguments, strict=False)
                if isinstance(source, torch.fx.Node)
                and argument.alias_info is not None
                and argument.alias_info.is_write
            ]
    if found := next((target for target in written if target), None):
        raise CaptureError(f"{name} writes into {found}: its answers depend on what came before")


# -- what is known of the program ----------------------------------------------------------------------


def _described(graph: FxGraph, sample: Sample) -> ProgramInputs:
    rows = _first_size(sample)
    tables = {
        op.inputs[0].name: len(graph.parameter(op.weight))
        for op in graph.ops
        if op.kind is Kind.EMBEDDING and op.weight is not None
    }
    specs, largest, batch = [], {}, set()
    for spec in graph.program.graph_signature.input_specs:
        if spec.kind is not InputKind.USER_INPUT or spec.arg.name not in sample:
            continue
        value = sample[spec.arg.name]
        sizes = tuple(plain_size(size) for size in graph.node(spec.arg.name).meta["val"].shape)
        specs.append(InputSpec(spec.arg.name, value.dtype, sizes, tables.get(spec.arg.name)))
        if value.ndim and len(value) == rows:
            batch.add(spec.arg.name)
    for symbol, bounds in graph.program.range_constraints.items():
        if bounds.upper < 2**31:
            largest[str(symbol)] = int(bounds.upper)
    first = next(spec for spec in specs if spec.name in batch).sizes[0]
    if isinstance(first, str):  # what only happens to be as long is no batch
        batch = {spec.name for spec in specs if spec.sizes[:1] == (first,)}
    return ProgramInputs(tuple(specs), frozenset(batch), first if isinstance(first, int) else None, largest)


def _compare(graph: FxGraph, run: Run, sample: Sample, inputs: ProgramInputs, name: str) -> None:
    """The sample, and sizes that were not traced where they are free, must come out as the module has them."""
    execution = Execution(graph)
    for batch in untraced_samples(sample, inputs):
        try:
            expected = run(batch)
        except Exception:  # a size that the module itself does not take
            continue
        try:
            found = execution.outputs(batch)
            same = len(found) == len(expected) and all(map(_alike, found, expected))
        except (RuntimeError, IndexError):
            same = False
        if not same:
            shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in batch.items())
            raise CaptureError(
                f"the program captured from {name} does not compute what its forward pass does on {shapes}: it depends "
                "on Python state, on sizes or on chance (is a dropout active?)"
            )


def untraced_samples(sample: Sample, inputs: ProgramInputs) -> list[dict[str, torch.Tensor]]:
    """The sample; its first row alone, and it with every other free size about halved, where a run takes these."""
    found = [dict(sample)]
    if inputs.batch and inputs.batch_size is None:
        found.append(inputs.part(sample, 0, 1))
    rows = {spec.sizes[0] for spec in inputs.specs if spec.name in inputs.batch}
    cropped = {}
    for spec in inputs.specs:
        value = sample[spec.name]
        for axis, size in enumerate(spec.sizes):
            if isinstance(size, str) and size not in rows:
                value = value.narrow(axis, 0, (value.shape[axis] + 1) // 2)
        cropped[spec.name] = value
    if any(cropped[name].shape != sample[name].shape for name in cropped):
        found.append(cropped)
    return found


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not other.is_floating_point():
        return torch.equal(one, other)
    return bool((one - other).abs().max() <= TOLERANCE * other.abs().max())


def samples_apart(run: Run, sample: Sample, inputs: ProgramInputs) -> bool:
    """Whether a sample's answer is the same without the others. Of a fixed batch the others are changed instead."""
    count = inputs.samples(sample)
    if inputs.batch_size is None:
        other = inputs.part(sample, 0, 1)
    else:
        first = torch.zeros(count, dtype=torch.int64)
        other = {name: value[first] if name in inputs.batch else value for name, value in sample.items()}
    try:
        whole, alone = run(sample), run(other)
    except Exception:  # it does not take one alone
        return False
    return all(
        len(one) == count and _alike(one[:1], two[:1]) for one, two in zip(whole, alone, strict=True) if one.ndim
    )


def predicted_ids(graph: Graph, run: Run, sample: Sample) -> str:
    """The input whose next token the first output predicts: its last id changes the last answer and no other."""
    answers = run(sample)[0]
    if answers.ndim != 3:
        return ""
    vocabularies = {len(graph.weight(op)) for op in graph.ops if op.kind is Kind.EMBEDDING and op.weight is not None}
    for name, ids in sample.items():
        if ids.is_floating_point() or ids.ndim != 2 or ids.shape != answers.shape[:2] or _NO_IDS.search(name):
            continue
        if ids.shape[1] < 2 or answers.shape[2] not in vocabularies or int(ids.max()) >= answers.shape[2]:
            continue
        changed = ids.clone()
        changed[:, -1] = (changed[:, -1] + 1) % answers.shape[2]
        moved = run({**sample, name: changed})[0]
        if _alike(moved[:, :-1], answers[:, :-1]) and not _alike(moved[:, -1], answers[:, -1]):
            return name
    return ""
