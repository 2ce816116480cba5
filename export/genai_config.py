"""genai_config.json: what ONNX Runtime GenAI is told of a decoder, where it can run the graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dotresize_fx.cache_names import PAST, POSITIONS
from dotresize_fx.export.onnx_file import ONNX_FILE
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind

GENAI_FILE = "genai_config.json"
UNEQUAL_HEADS = (
    f"no {GENAI_FILE}: ONNX Runtime GenAI wants keys and values of one size, and as many heads, in all layers; "
    "--head-sizes equal --uniform, or --regions ffn, leave that"
)


def write_genai_config(graph: FxGraph, config: Any, longest: int, folder: Path) -> str:
    """Write it into ``folder``; why not, else empty. ``config`` is the dense model's.

    GenAI makes the empty past itself, of one shape for keys and values of all layers.
    """
    shapes = {tuple(graph.node(name).meta["val"].shape)[1::2] for name in graph.caches.values()}
    if len(shapes) > 1:
        return UNEQUAL_HEADS
    ((heads, size),) = shapes
    text = config.get_text_config()
    try:
        query_heads = int(text.num_attention_heads)
        groups = query_heads // int(getattr(text, "num_key_value_heads", None) or query_heads)
        vocabulary = int(text.vocab_size)
    except Exception as error:  # configurations that say it layer by layer raise classes of their own
        return f"no {GENAI_FILE}: the model's configuration does not say its heads ({type(error).__name__})"
    ends = getattr(text, "eos_token_id", None)
    first = ends[0] if isinstance(ends, list) else ends
    if first is None:
        return f"no {GENAI_FILE}: the model's configuration names no token that ends a text"
    padding = getattr(text, "pad_token_id", None)
    inputs = {name: name for name in ("input_ids", "attention_mask", POSITIONS) if _reads(graph, name)}
    inputs |= {"past_key_names": f"{PAST}.%d.key", "past_value_names": f"{PAST}.%d.value"}
    content = {
        "model": {
            "type": "decoder",
            "vocab_size": vocabulary,
            "context_length": longest,
            "bos_token_id": first if getattr(text, "bos_token_id", None) is None else text.bos_token_id,
            "eos_token_id": ends,
            "pad_token_id": first if padding is None else padding,
            "decoder": {
                "filename": ONNX_FILE,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": _stream_width(graph),
                "num_hidden_layers": len(graph.caches) // 2,
                "num_attention_heads": int(heads) * groups,
                "num_key_value_heads": int(heads),
                "head_size": int(size),
                "inputs": inputs,
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": longest,
            "past_present_share_buffer": False,
        },
    }
    (folder / GENAI_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return ""


def follow_heads(config: Path, heads: set[tuple[int, int]], folder: Path, gone: int = 0) -> str:
    """Copy a model's genai_config.json into ``folder`` with the heads, (number, size), that its caches have now, and
    without so many layers.

    Returns why not, else empty.
    """
    if len(heads) > 1:
        return UNEQUAL_HEADS
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        decoder = content["model"]["decoder"]
        groups = decoder["num_attention_heads"] // decoder["num_key_value_heads"]
        decoder["num_hidden_layers"] -= gone
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return f"no {GENAI_FILE}: what lies beside the model does not say its heads"
    for count, size in heads:
        decoder |= {"num_attention_heads": count * groups, "num_key_value_heads": count, "head_size": size}
    (folder / GENAI_FILE).write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    return ""


def _reads(graph: FxGraph, name: str) -> bool:
    return any(node.op == "placeholder" and node.name == name for node in graph.nodes.nodes)


def _stream_width(graph: FxGraph) -> int:
    """What the head reads."""
    head = [op for op in graph.ops if op.kind is Kind.LINEAR][-1]
    return int(graph.weight(head).shape[1])
