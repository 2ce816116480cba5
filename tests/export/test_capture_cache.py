"""A decoder with its cache: matched as without, slimmed with it, and generating in ONNX Runtime as its program does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

from dotresize_fx.errors import CaptureError
from dotresize_fx.export.cached_runs import continued, onnx_inputs, prompt_inputs, splits
from dotresize_fx.export.capture import Captured
from dotresize_fx.export.capture_cache import capture_with_cache
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.greedy import greedy
from dotresize_fx.export.onnx_session import OnnxModel
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.hand_out import _with_weights, _without_weights
from dotresize_fx.options import Options
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress
from dotresize_fx.regions import RegionKind

KINDS = ["llama", "qwen3", "gpt2", "gemma"]
# The tiny models take 64 positions.
PROMPT, GENERATED = 8, 56
# Logits of these models are below 10; two float32 runtimes sum in other orders.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Slim:
    """One model: captured with its cache, slimmed, and the slim program in ONNX Runtime."""

    captured: Captured
    graph: FxGraph
    onnx: OnnxModel
    cut: frozenset[RegionKind]

    def logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The program's, in one go."""
        return Execution(self.graph).outputs(prompt_inputs(self.captured.cache, ids, mask))[0]


@pytest.fixture(scope="module", params=KINDS)
def slim(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., Any],
    tiny_graph: Callable[[str], tuple[Any, FxGraph]],
    tiny_batch: Callable[..., Mapping[str, torch.Tensor]],
) -> Slim:
    model = tiny_model(request.param)
    captured = capture_with_cache(model)
    canonicalise(captured.graph)
    matches = find_regions(captured.graph)
    without = find_regions(tiny_graph(request.param)[1])
    # The cache stands in the way of no width.
    assert {(r.name, r.width) for r in matches.regions} == {(r.name, r.width) for r in without.regions}
    batches = [tiny_batch(2, 32, seed=seed) for seed in range(3)]
    options = Options(ratio=0.3, multiple=2, allocation="uniform")
    done = slim_graph(captured.graph, matches, batches, options, Progress(quiet=True))
    path = emit_onnx(model, captured, done.graph, tmp_path_factory.mktemp(request.param))
    cut = {cut.region.kind for cut in done.swept if cut.width < cut.region.width}
    return Slim(captured, done.graph, OnnxModel(path, threads=1), frozenset(cut))


def test_the_cache_has_the_slim_heads(slim: Slim) -> None:
    assert slim.cut & {RegionKind.VALUE, RegionKind.HEADS, RegionKind.QUERY_KEY}
    model = onnx.load(slim.onnx.path, load_external_data=False)
    layers = [f"past_key_values.{layer}.{name}" for layer in range(2) for name in ("key", "value")]
    assert [value.name for value in model.graph.input] == ["input_ids", "attention_mask", "position_ids", *layers]
    presents = [name.replace("past_key_values", "present") for name in layers]
    assert [value.name for value in model.graph.output] == ["logits", *presents]
    sizes = {}
    for value in (*model.graph.input, *model.graph.output):
        sizes[value.name] = [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
    assert sizes["attention_mask"] == ["batch_size", "total_sequence_length"]
    narrow = 0
    for past, present in zip(layers, presents, strict=True):
        batch, heads, length, size = sizes[past]
        assert (batch, length) == ("batch_size", "past_sequence_length")
        assert sizes[present] == [batch, heads, "total_sequence_length", size]
        dense = slim.captured.cache
        assert dense is not None
        before = dense.sizes[int(past.split(".")[1])]
        narrow += heads * size < before[0] * before[1 + past.endswith("value")]
    assert narrow


@pytest.mark.parametrize(("rows", "length", "padding"), [(1, 1, 0), (3, 20, 7), (2, 33, 0)])
def test_a_prompt_in_one_go_and_in_two(
    slim: Slim, rows: int, length: int, padding: int, tiny_batch: Callable[..., Mapping[str, torch.Tensor]]
) -> None:
    batch = tiny_batch(rows, length, padding, seed=5)
    inputs = prompt_inputs(slim.captured.cache, batch["input_ids"], batch["attention_mask"])
    expected = Execution(slim.graph, caches=True).outputs(inputs)
    found = slim.onnx(onnx_inputs(slim.graph, inputs))
    real = batch["attention_mask"].bool().numpy()
    np.testing.assert_allclose(found[0][real], expected[0].numpy()[real], atol=TOLERANCE, rtol=0)
    for past in splits(batch["attention_mask"]):
        given = continued(slim.graph, inputs, [torch.from_numpy(each[:, :, :past]) for each in found[1:]], past)
        behind = slim.onnx(onnx_inputs(slim.graph, given))
        np.testing.assert_allclose(behind[0], expected[0][:, past:].numpy(), atol=TOLERANCE, rtol=0)
        for one, other in zip(behind[1:], found[1:], strict=True):
            assert one.shape == other.shape


@pytest.mark.parametrize("padding", [(0,), (0, 3, 1, 5)])
def test_greedy_tokens_are_the_programs(slim: Slim, padding: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 97, (len(padding), PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    tokens = greedy(slim.onnx, ids.numpy(), mask.numpy())
    found = torch.from_numpy(np.stack([next(tokens) for _ in range(GENERATED)], 1))
    # What the program would choose behind each of them, all in one run without a cache.
    whole = torch.cat([ids, found[:, :-1]], 1)
    logits = slim.logits(whole, torch.cat([mask, torch.ones_like(found[:, :-1])], 1))
    assert torch.equal(logits[:, PROMPT - 1 :].argmax(-1), found)


def test_without_its_own_inputs_a_program_starts_at_the_first_token(slim: Slim) -> None:
    ids = torch.arange(12)[None]
    plain = Execution(slim.graph).outputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert len(plain) == 1  # the cache is no result unless it is asked for
    torch.testing.assert_close(plain[0], slim.logits(ids, torch.ones_like(ids)))


def test_other_processes_get_the_slim_program(slim: Slim) -> None:
    stored = list(slim.graph.program.state_dict.items())
    keys = {key: place for place, (key, _) in enumerate(stored)}
    taken = _with_weights(_without_weights(slim.graph), keys, [tensor for _, tensor in stored], "cpu")
    taken.caches.update(slim.graph.caches)
    ids = torch.arange(12)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(Execution(taken).outputs(inputs)[0], Execution(slim.graph).outputs(inputs)[0])


def test_what_is_no_cache_of_keys_and_values_is_refused() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, state_size=4)).eval()
    with pytest.raises(CaptureError, match="takes no past_key_values"):
        capture_with_cache(mamba)
    config = transformers.Lfm2Config(
        **sizes, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, layer_types=["conv"]
    )
    with pytest.raises(CaptureError, match="LinearAttention"):
        capture_with_cache(transformers.Lfm2ForCausalLM(config).eval())


def test_where_the_prompt_is_split() -> None:
    assert splits(torch.ones(2, 1)) == []
    assert splits(torch.ones(2, 8)) == [4, 7]
    assert splits(torch.tensor([[1.0] * 8, [0] * 6 + [1] * 2])) == [7]
