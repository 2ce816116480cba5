"""What tests share: small graphs from small modules, graphs as readable text, and tiny real models.

Everything here is a function that a fixture returns. They hold no state, so that property tests may use them.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from dotresize_fx.export.capture import Captured, capture
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind, Op, Value
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.prove_exactness import redraw_parameters


def pytest_collection_finish() -> None:
    """Spare every collection of garbage the imported modules, which are most of what it would walk through."""
    gc.collect()
    gc.freeze()


VOCAB = 300  # 256 bytes, three special tokens, and some that no text produces


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[[Path], Any]:
    """``tiny_tokenizer(folder)`` saves and returns a byte-level tokenizer (a token a byte)."""

    def save(folder: Path) -> Any:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: i for i, token in enumerate(["[PAD]", "[CLS]", "[SEP]", *alphabet])}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="[PAD]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            model_max_length=64,
        )
        fast.save_pretrained(folder)
        return fast

    return save


@pytest.fixture
def save_tiny_model(tiny_tokenizer: Callable[[Path], Any]) -> Callable[..., Path]:
    """``save_tiny_model(folder, kind="llama", **config)`` saves a one-layer model with its tokenizer.

    ``kind`` is ``llama`` (LlamaForCausalLM) or ``bert`` (BertModel); returns ``folder``.
    """

    def save(folder: Path, kind: str = "llama", **config: Any) -> Path:
        sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, **config}
        torch.manual_seed(0)
        model = (
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
            if kind == "llama"
            else transformers.BertModel(transformers.BertConfig(**sizes))
        )
        model.save_pretrained(folder)
        tiny_tokenizer(folder)
        return folder

    return save


# -- small graphs ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trace() -> Callable[..., FxGraph]:
    """``trace(forward, *shapes, dtype=float32, seed=0, **parts)``: a module made on the spot, as a graph.

    ``forward(module, *inputs)`` finds ``parts`` (modules and parameters, re-drawn) on the module. A shape stands
    for one input; its first dimension is dynamic.
    """

    def make(
        forward: Callable[..., Any],
        *shapes: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **parts: torch.nn.Module | torch.nn.Parameter,
    ) -> FxGraph:
        module = type("Traced", (torch.nn.Module,), {"forward": forward})()
        for name, part in parts.items():
            setattr(module, name, part)
        redraw_parameters(module.eval(), seed)
        inputs = tuple(torch.ones(shape, dtype=dtype) for shape in shapes)
        batch = torch.export.Dim("batch", min=1, max=64)
        return FxGraph(torch.export.export(module, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs)))

    return make


@pytest.fixture(scope="session")
def run() -> Callable[..., list[torch.Tensor]]:
    """``run(graph, **inputs)``: the graph's outputs, by the names of its inputs."""

    def outputs(graph: FxGraph, **inputs: torch.Tensor) -> list[torch.Tensor]:
        return list(Execution(graph).outputs(inputs))

    return outputs


@pytest.fixture(scope="session")
def difference() -> Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], float]:
    """``difference(found, expected)``: max abs difference / max abs expected, the worst of several outputs."""

    def worst(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
        pairs = [(a.detach(), b.detach()) for a, b in zip(found, expected, strict=True)]
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

    return worst


@pytest.fixture(scope="session")
def text() -> Callable[[FxGraph], str]:
    """``text(graph)``: one line an op, ``name: width = kind(inputs, parameters with shapes)``.

    Ops are numbered by kind in the order in which they stand; shape arithmetic is left out.
    """
    return _listing


def _listing(graph: FxGraph) -> str:
    graph.refresh_shapes()
    names: dict[Value, str] = {}
    counts: Counter[str] = Counter()
    lines = []

    def show(value: Value) -> str:
        if value.is_parameter:
            return f"{graph.parameter_name(value)}{list(value.shape)}".replace(" ", "")
        return names.get(value, value.name)

    for op in graph.ops:
        if not op.output.shape:
            continue
        word = _word(op)
        counts[word] += 1
        names[op.output] = f"{word}_{counts[word]}"
        owned = [value for value in (op.weight, op.bias) if value is not None]
        shown = [show(value) for value in (*op.inputs, *owned) if value.shape]
        if op.kind in (Kind.RMS_NORM, Kind.LAYER_NORM):
            shown.append(f"eps={op.attributes['epsilon']:g}")
        elif (number := op.attributes.get("number")) is not None:
            shown.append(f"{number:g}")
        lines.append(f"{names[op.output]}: {op.output.width} = {word}({', '.join(shown)})")
    results = sorted(graph.outputs, key=lambda value: graph.positions.get(value.name, -1))
    return "\n".join([*lines, "return " + ", ".join(show(value) for value in results)])


def _word(op: Op) -> str:
    """The kind's name; a pointwise op's function, and where the kind says too little, the form's own name."""
    if op.kind in (Kind.KEEP, Kind.RESHAPE, Kind.OTHER):
        return op.spelling.split(".")[0]
    return op.function or str(op.kind)


# -- tiny real models ------------------------------------------------------------------------------

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64}


def make_tiny_model(kind: str, seed: int = 0, layers: int = 2) -> Any:
    """A model of width 32, all parameters re-drawn; ``kind`` is its Hugging Face model type."""
    plain = {**SIZES, "num_hidden_layers": layers}
    grouped = {**plain, "num_key_value_heads": 2}
    if kind == "llama":
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**grouped, tie_word_embeddings=True))
    elif kind == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**grouped, tie_word_embeddings=False))
    elif kind == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**grouped, head_dim=8))
    elif kind == "mixtral":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**grouped, **experts))
    elif kind == "gemma":
        model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**grouped, head_dim=8))
    elif kind == "phi":
        model = transformers.PhiForCausalLM(transformers.PhiConfig(**grouped))
    elif kind == "phi3":
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # its own are beyond so few tokens
        model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**grouped, **special))
    elif kind == "neox":
        model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**plain))
    elif kind == "gpt2":
        config = {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": layers, "n_head": 4}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    elif kind == "opt":
        config = {name: size for name, size in plain.items() if name != "intermediate_size"}
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**config, ffn_dim=64, word_embed_proj_dim=32))
    else:
        model = transformers.BertModel(transformers.BertConfig(**plain))
    model.config.use_cache = False
    return redraw_parameters(model.eval(), seed)


@cache
def _captured(kind: str) -> tuple[Any, Captured]:
    model = make_tiny_model(kind)
    return model, capture(model)


@cache
def _canonical(kind: str) -> FxGraph:
    graph = _captured(kind)[1].graph.copy()
    canonicalise(graph, check=True)
    return graph


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """``tiny_model(kind, seed=0, layers=2)``: see :func:`make_tiny_model`."""
    return make_tiny_model


@pytest.fixture(scope="session")
def tiny_graph() -> Callable[[str], tuple[Any, FxGraph]]:
    """``tiny_graph(kind)``: (model, its canonicalised graph); captured once, every caller gets a copy."""

    def get(kind: str) -> tuple[Any, FxGraph]:
        return _captured(kind)[0], _canonical(kind).copy()

    return get


@pytest.fixture(scope="session")
def tiny_captured() -> Callable[[str], tuple[Any, Captured]]:
    """``tiny_captured(kind)``: (model, what capture made of it, to be read only), made once."""
    return _captured


@pytest.fixture(scope="session")
def tiny_batch() -> Callable[..., Mapping[str, torch.Tensor]]:
    """``tiny_batch(rows, length, padding=0, seed=0)``: random token ids, row 0 padded on the left."""

    def make(rows: int, length: int, padding: int = 0, seed: int = 0) -> Mapping[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, SIZES["vocab_size"], (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        return {"input_ids": ids, "attention_mask": mask}

    return make
