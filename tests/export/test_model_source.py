"""Loading models by name, and refusing what cannot be loaded, on tiny real models."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dotresize_fx.errors import BadWeightsError, DotresizeError, ModelNotFoundError, UsageError
from dotresize_fx.export.model_source import load_model

SaveModel = Callable[..., Path]


def edit_config(folder: Path, **changes: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refusal(kind: type[DotresizeError], name: Path | str) -> str:
    with pytest.raises(kind) as caught:
        load_model(str(name))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "task"), [("llama", "decoder"), ("bert", "encoder")])
def test_a_folder_loads_with_its_own_class(
    tmp_path: Path, save_tiny_model: SaveModel, kind: str, task: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model(tmp_path / "tiny", kind)
    capfd.readouterr()
    loaded = load_model(str(folder))
    assert capfd.readouterr() == ("", "")
    assert type(loaded.model).__name__ == {"llama": "LlamaForCausalLM", "bert": "BertModel"}[kind]
    assert (loaded.task, loaded.source) == (task, "folder tiny")
    assert not loaded.model.training
    assert loaded.model.config.use_cache is False
    assert loaded.config.use_cache is True
    saved = load_file(folder / "model.safetensors")
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in loaded.model.parameters())
    assert loaded.tokenizer("ab", add_special_tokens=True)["attention_mask"] == [1] * 4
    assert loaded.sha256 == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("config.json", "model.safetensors")
    }


def test_transformers_warnings_are_held_back(
    tmp_path: Path,
    save_tiny_model: SaveModel,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # else caplog sees nothing
    folder = edit_weights(save_tiny_model(tmp_path), lambda w: w.update({"unused.weight": torch.ones(2)}))
    transformers.LlamaForCausalLM.from_pretrained(folder)
    assert "unused.weight" in caplog.text
    caplog.clear()
    load_model(str(folder))
    assert not caplog.records


def test_half_precision_becomes_float32(tmp_path: Path, save_tiny_model: SaveModel) -> None:
    folder = edit_weights(save_tiny_model(tmp_path), lambda w: w.update({k: v.bfloat16() for k, v in w.items()}))
    loaded = load_model(str(edit_config(folder, dtype="bfloat16")))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


def test_auxiliary_files_load_again(tmp_path: Path, save_tiny_model: SaveModel) -> None:
    loaded = load_model(str(save_tiny_model(tmp_path / "tiny")))
    out = tmp_path / "out"
    out.mkdir()
    loaded.write_auxiliary_files(out)
    assert (out / "config.json").read_text() == (tmp_path / "tiny" / "config.json").read_text()
    again = transformers.AutoTokenizer.from_pretrained(out)
    assert again("hello").input_ids == loaded.tokenizer("hello").input_ids
    assert not any(str(tmp_path) in file.read_text() for file in out.iterdir())


def test_a_folder_without_tokenizer_says_why(tmp_path: Path, save_tiny_model: SaveModel) -> None:
    folder = save_tiny_model(tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    loaded = load_model(str(folder))
    assert loaded.tokenizer is None
    assert loaded.tokenizer_problem is not None
    assert "no tokenizer could be loaded" in loaded.tokenizer_problem


def save_tiny_gguf(file: Path, spoil: str = "") -> Path:
    """A one-layer Llama as GGUF; ``spoil`` "missing" leaves a tensor out, "nan" puts a NaN in."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(300)
    square, rows = (
        ("blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v", "blk.0.attn_output"),
        ("token_embd", "output"),
    )
    shapes = {
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.ffn_down": (32, 64),
    }
    shapes |= dict.fromkeys(square, (32, 32)) | dict.fromkeys(rows, (300, 32))
    shapes |= dict.fromkeys(("blk.0.ffn_up", "blk.0.ffn_gate"), (64, 32))
    torch.manual_seed(0)
    for name, shape in shapes.items():
        if not (spoil == "missing" and name == "blk.0.ffn_up"):
            tensor = torch.randn(shape)
            if spoil == "nan" and name == "blk.0.ffn_up":
                tensor[0, 0] = torch.nan
            writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = save_tiny_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    loaded = load_model(str(file))
    assert capfd.readouterr() == ("", "")
    assert loaded.task == "decoder"
    assert loaded.source == "tiny.gguf, weights dequantised from GGUF"
    assert loaded.model.config.hidden_size == 32
    assert loaded.tokenizer is None
    assert list(loaded.sha256) == ["tiny.gguf"]
    out = tmp_path / "out"
    out.mkdir()
    loaded.write_auxiliary_files(out)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config


def test_bad_gguf_files(tmp_path: Path) -> None:
    whole = save_tiny_gguf(tmp_path / "tiny.gguf").read_bytes()
    for name, content in {
        "cut": whole[:-200],
        "half": whole[: len(whole) // 2],
        "junk": b"x" * 99,
        "nil": b"",
    }.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(content)
        assert "truncated or not a GGUF file" in refusal(BadWeightsError, file)
    assert "mlp.up_proj.weight" in refusal(BadWeightsError, save_tiny_gguf(tmp_path / "miss.gguf", "missing"))
    said = refusal(BadWeightsError, save_tiny_gguf(tmp_path / "nan.gguf", "nan"))
    assert "mlp.up_proj.weight holds NaN" in said
    assert "give the file" in refusal(ModelNotFoundError, tmp_path)


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "built-in are" in refusal(ModelNotFoundError, "no-such-model")
    assert "built-in are" in refusal(ModelNotFoundError, tmp_path / "gone")
    assert "no config.json" in refusal(ModelNotFoundError, tmp_path)
    (tmp_path / "model.txt").write_text("x")
    assert "not a model" in refusal(ModelNotFoundError, tmp_path / "model.txt")
    assert "ONNX files are not taken as input yet" in refusal(UsageError, tmp_path / "model.onnx")


def test_a_folder_with_an_onnx_alone(tmp_path: Path, save_tiny_model: SaveModel) -> None:
    """With and without a configuration; what is taken is said. Beside weights that are taken it does no harm."""
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    for _ in range(2):
        said = refusal(UsageError, tmp_path)
        assert "holds model.onnx and no other weights. ONNX files are not taken as input yet" in said
        assert "a Hugging Face folder (safetensors), a GGUF file, a hub id" in said
        (tmp_path / "config.json").write_text("{}")
    assert load_model(str(save_tiny_model(tmp_path))).task == "decoder"


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "check the name and the network" in refusal(ModelNotFoundError, "no-such-org/no-such-model")


def test_configurations_that_cannot_be_used(tmp_path: Path, save_tiny_model: SaveModel) -> None:
    folder = save_tiny_model(tmp_path)
    original = (folder / "config.json").read_text()
    for kind, said, changes in (
        (ModelNotFoundError, "nonesuch", {"model_type": "nonesuch"}),
        (ModelNotFoundError, "has no LlamaForDreaming", {"architectures": ["LlamaForDreaming"]}),
        (ModelNotFoundError, "names no class", {"architectures": []}),
        (UsageError, "does not read text", {"architectures": ["ViTModel"]}),
        (UsageError, "quantised", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ):
        edit_config(folder, **changes)
        assert said in refusal(kind, folder)
        (folder / "config.json").write_text(original)
    (folder / "config.json").write_text("{ not json")
    assert "config.json" in refusal(ModelNotFoundError, folder)


@pytest.mark.parametrize(("is_decoder", "task"), [(True, "decoder"), (False, "encoder")])
def test_a_bert_head_is_a_decoder_only_if_it_looks_back(tmp_path: Path, is_decoder: bool, task: str) -> None:
    config = transformers.BertConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    config.num_attention_heads, config.is_decoder = 4, is_decoder
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).task == task


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(vocab_size=96, decoder_start_token_id=0, **sizes)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert "encoder with a decoder" in refusal(UsageError, tmp_path)


def test_a_config_cannot_choose_another_weight_file(tmp_path: Path, save_tiny_model: SaveModel) -> None:
    folder = save_tiny_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(w) for name, w in weights.items()}, folder / "other.safetensors")
    loaded = load_model(str(edit_config(folder, transformers_weights="other.safetensors")))
    assert torch.equal(loaded.model.state_dict()["lm_head.weight"], weights["lm_head.weight"])
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter" in refusal(UsageError, folder)


def test_missing_misshapen_and_broken_tensors_are_named(tmp_path: Path, save_tiny_model: SaveModel) -> None:
    def drop(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.norm.weight"]

    def cut(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["lm_head.weight"][:50].contiguous()

    def spoil(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
        def change(weights: dict[str, torch.Tensor]) -> None:
            weights["model.layers.0.mlp.up_proj.weight"][3, 5] = value

        return change

    def load(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
        return refusal(BadWeightsError, edit_weights(save_tiny_model(tmp_path / name), change))

    assert "lacks model.norm.weight" in load("drop", drop)
    assert "lm_head.weight has shape [50, 32], the configuration says [300, 32]" in load("cut", cut)
    for value in (torch.nan, torch.inf, -torch.inf):
        assert "model.layers.0.mlp.up_proj.weight holds NaN or infinity" in load("spoil", spoil(value))


def test_tied_embeddings_need_no_head_in_the_file(tmp_path: Path, save_tiny_model: SaveModel) -> None:
    folder = save_tiny_model(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_model(str(folder)).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


_REMOTE = """
from pathlib import Path
import transformers

Path(__file__).with_name("ran").touch()

class DreamModel(transformers.LlamaForCausalLM):
    pass
"""


def test_remote_code_runs_only_if_asked_for(
    tmp_path: Path, save_tiny_model: SaveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    folder = save_tiny_model(tmp_path / "dream")
    (folder / "modeling_dream.py").write_text(_REMOTE)
    edit_config(folder, architectures=["DreamModel"], auto_map={"AutoModelForCausalLM": "modeling_dream.DreamModel"})
    assert "--trust-remote-code" in refusal(ModelNotFoundError, folder)
    assert list(tmp_path.rglob("ran")) == []
    loaded = load_model(str(folder), trust_remote_code=True)
    assert type(loaded.model).__name__ == "DreamModel"
    assert loaded.task == "decoder"
    assert list(tmp_path.rglob("ran")) != []
