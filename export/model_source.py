"""From what the user calls a model to a loaded one: a folder, a GGUF file, a hub id or a built-in name.

Everything is checked before and after transformers loads it, because transformers re-initialises missing
weights with a log line at most, and follows file names that a ``config.json`` chooses. Weights come from
safetensors or GGUF files only; nothing here unpickles.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from dotresize_fx.errors import BadWeightsError, ModelNotFoundError, UsageError
from dotresize_fx.export.builtin_models import BUILTIN_MODELS, fetch_builtin
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.export.weight_files import files_sha256, first_line, float32_bytes, lazy_state, weight_files
from dotresize_fx.memory import WHAT_IS_FREE, Memory
from dotresize_fx.offload.lazy_tensor import LazyTensor, in_memory, no_reading
from dotresize_fx.task import Task

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_NO_ONNX = (
    "ONNX files are not taken as input yet: give the model that it was made from, a Hugging Face folder (safetensors), "
    "a GGUF file, a hub id or a program that torch.export saved (.pt2)"
)
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for capture, with what the report and OUT need to know about where it came from.

    ``model`` is float32 on the CPU, in eval mode, frozen, with ``use_cache`` off. ``config`` is a copy of its
    configuration as it was in the input (``use_cache`` included, quantisation dropped). ``tokenizer`` is None
    when ``tokenizer_problem`` says why. ``sha256`` maps the names of the input's config and weight files to
    their hashes.

    A module or a saved program has neither config nor tokenizer, and ``sample``, inputs by name that it was tried with;
    ``program`` is the saved one, for which ``model`` stands in.

    Where ``lazy``, the parameters are :class:`dotresize_fx.offload.lazy_tensor.LazyTensor`. ``stored`` is the dtype
    that a folder's configuration says its weights are stored in.
    """

    model: torch.nn.Module
    tokenizer: Any | None
    tokenizer_problem: str | None
    config: Any
    task: Task
    source: str
    sha256: dict[str, str]
    sample: Mapping[str, torch.Tensor] = field(default_factory=dict)
    program: torch.export.ExportedProgram | None = None
    lazy: bool = False
    stored: torch.dtype | None = None

    def write_auxiliary_files(self, folder: Path, config: Any | None = None) -> None:
        """Write ``config.json``, of another ``config`` if one is given, and the tokenizer's files, as far as there are
        any, into the existing ``folder``.
        """
        config = self.config if config is None else config
        with quiet_libraries():
            if config is not None:
                config.save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)


def load_model(
    name: str, *, trust_remote_code: bool = False, memory: Memory = WHAT_IS_FREE, reads: bool = True
) -> LoadedModel:
    """Load ``name``: a Hugging Face folder, a ``.gguf`` file, a hub id ``org/name``, or a built-in name.

    Built-in names win over the hub, existing paths win over both. Code that comes with a model runs only with
    ``trust_remote_code``. Where ``memory`` has no room for a folder's weights, or without ``reads``, they stay in its
    files until they are needed (``lazy``).

    Raises:
        ModelNotFoundError: nothing of that name, hub out of reach, or not a model that can be loaded.
        BadWeightsError: weights are truncated, missing, not finite, or do not fit the configuration.
        UsageError: a kind of model that is not supported (ONNX, adapters, quantised or not for text).
    """
    path = Path(name)
    if name.lower().endswith(".onnx"):
        raise UsageError(f"{name}: {_NO_ONNX}")
    if path.is_dir():
        return _load_folder(path, f"folder {path.resolve().name}", trust_remote_code, memory, reads)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelNotFoundError(f"{name}: not a model: give a Hugging Face folder or a .gguf file")
        return _load_gguf(path, f"{path.name}, weights dequantised from GGUF")
    if name in BUILTIN_MODELS:
        builtin = BUILTIN_MODELS[name]
        place = fetch_builtin(builtin)
        if place.is_dir():
            return _load_folder(place, builtin.description, False, memory, reads)
        return _load_gguf(place, builtin.description)
    if _HUB_ID.fullmatch(name) and path.suffix.lower() != ".gguf":
        fetched = _fetch_from_hub(name, trust_remote_code)
        return _load_folder(fetched, f"hub model {name}", trust_remote_code, memory, reads)
    raise ModelNotFoundError(
        f"{name}: no such folder or file; a hub id is org/name, built-in are {', '.join(BUILTIN_MODELS)}"
    )


def _fetch_from_hub(name: str, trust_remote_code: bool) -> Path:
    import huggingface_hub

    files = [*_HUB_FILES, "*.py"] if trust_remote_code else _HUB_FILES
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=files, ignore_patterns=["*/*", "consolidated*"])
    except Exception as error:  # its own, the HTTP client's and the system's
        raise ModelNotFoundError(
            f"{name}: no such folder, and the hub did not give it ({first_line(error)}): check the name and the network"
        ) from error
    return Path(folder)


def _load_folder(folder: Path, source: str, trust_remote_code: bool, memory: Memory, reads: bool) -> LoadedModel:
    config_file = folder / "config.json"
    onnx = sorted(file.name for file in folder.glob("*.onnx"))
    if onnx and not any(folder.glob("*.safetensors*")) and not any(folder.glob("*.gguf")):
        raise UsageError(f"{folder}: holds {onnx[0]} and no other weights. {_NO_ONNX}")
    if not config_file.is_file():
        gguf = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"give the file, {folder / gguf[0]}" if gguf else "give a folder that save_pretrained wrote"
        raise ModelNotFoundError(f"{folder}: not a model, it holds no config.json: {hint}")
    if (folder / "adapter_config.json").is_file():
        raise UsageError(f"{folder}: holds an adapter: merge it into its base model (PEFT's merge_and_unload) first")
    weights = weight_files(folder)
    with quiet_libraries():
        try:
            config = transformers.AutoConfig.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:  # transformers raises whatever its parsers raise
            raise ModelNotFoundError(f"{config_file}: transformers cannot read it: {first_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"{folder}: its weights are quantised, which is not supported: give the float model or a GGUF")
    config.transformers_weights = None  # else config.json chooses the weight file, past the checks above
    model_class, task = _model_class(config, folder, trust_remote_code)
    files = [config_file, *weights]
    extra = {"config": config, "trust_remote_code": trust_remote_code}
    known, stored = lazy_state(weights), config.dtype
    own_code = not issubclass(model_class, transformers.PreTrainedModel)
    if own_code and not reads:
        raise UsageError(f"{folder}: a model of its own code is made in memory: leave out --dry-run")
    if not own_code and (not reads or memory.is_short_of(float32_bytes(known))):
        model = _load_lazily(model_class, known, folder, **extra)
        hashed = files if reads else []
        return _finish(model, task, source, hashed, folder, True, stored, trust_remote_code=trust_remote_code)
    model = _load_weights(model_class, folder, str(folder), use_safetensors=True, **extra)
    return _finish(model, task, source, files, folder, stored=stored, trust_remote_code=trust_remote_code)


def _load_gguf(file: Path, source: str) -> LoadedModel:
    import gguf

    from dotresize_fx.export.gguf_header import parsed_once

    with parsed_once():
        try:
            gguf.GGUFReader(file)  # maps the file and every tensor in it, so it fails on a truncated one
        except Exception as error:
            why = f"truncated or not a GGUF file ({first_line(error)})"
            raise BadWeightsError(f"{file}: {why}: fetch it again") from error
        model = _load_weights(transformers.AutoModelForCausalLM, file.parent, str(file), gguf_file=file.name)
        return _finish(model, "decoder", source, [file], file.parent, gguf_file=file.name)


def _model_class(config: Any, folder: Path, trust_remote_code: bool) -> tuple[Any, Task]:
    name = (getattr(config, "architectures", None) or [None])[0]
    if name is None:
        raise ModelNotFoundError(f'{folder / "config.json"}: names no class under "architectures": add it')
    model_class = getattr(transformers, name, None)
    own_code = getattr(config, "auto_map", None) or {}
    if model_class is None and trust_remote_code and "AutoModelForCausalLM" in own_code:
        return transformers.AutoModelForCausalLM, "decoder"
    if model_class is None and trust_remote_code and "AutoModel" in own_code:
        return transformers.AutoModel, "encoder"
    if model_class is None:
        hint = "--trust-remote-code runs the code that comes with it" if own_code else "is its name right?"
        raise ModelNotFoundError(f"{folder}: transformers {transformers.__version__} has no {name}: {hint}")
    if getattr(model_class, "main_input_name", None) != "input_ids":
        raise UsageError(f"{folder}: {name} does not read text, which is all that is supported so far")
    # BERT's causal class without is_decoder attends both ways; GPT-NeoX says is_decoder false and is causal.
    both_ways = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", True) is False
    causal = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if causal and not both_ways and name not in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return model_class, "decoder"
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"{folder}: {name} is an encoder with a decoder, which is not supported yet")
    return model_class, "encoder"


def _load_lazily(model_class: Any, stored: Mapping[str, LazyTensor], folder: Path, **extra: Any) -> Any:
    """The model with parameters that are read when they are needed.

    Raises:
        UsageError: they are not those that the files hold, one by one.
    """
    others = (
        f"{folder}: its weights do not stand in the files as the model has them (experts of their own, say), which "
        "cannot be read as needed: leave out --memory-budget and --dry-run, on a machine with more memory"
    )
    try:
        with no_reading(others) as refused:
            model = _load_weights(model_class, None, str(folder), state_dict=dict(stored), **extra)
    except ModelNotFoundError as error:
        raise (UsageError(others) if refused() else error) from error
    if not all(isinstance(parameter, LazyTensor) for parameter in model.parameters()):
        raise UsageError(others)
    for module in model.modules():
        module._buffers.update({name: in_memory(value) for name, value in module._buffers.items() if value is not None})
    model.config.name_or_path = model.name_or_path = str(folder)
    return model


def _load_weights(model_class: Any, folder: Path | None, where: str, **extra: Any) -> Any:
    """The model in float32, with every tensor of it in the checkpoint, in its shape and finite.

    Lazy ones are looked at when they are first read.
    """
    with quiet_libraries():
        try:
            model, info = model_class.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, in one line
                **extra,
            )
        except Exception as error:
            raise ModelNotFoundError(f"{where}: transformers cannot load it: {first_line(error)}") from error
    if mismatched := sorted(info["mismatched_keys"], key=str):
        key, found, expected = mismatched[0]
        raise BadWeightsError(
            f"{where}: {key} has shape {list(found)}, the configuration says {list(expected)} "
            f"({len(mismatched)} such): config.json and weights do not belong together"
        )
    if missing := sorted(info["missing_keys"]):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise BadWeightsError(f"{where}: the checkpoint lacks {shown}: fetch it again, or correct architectures")
    if info["error_msgs"]:
        raise BadWeightsError(f"{where}: {' '.join(str(info['error_msgs'][0]).split())}")
    for key, tensor in model.state_dict().items():
        if isinstance(tensor, LazyTensor):
            continue
        # The extremes carry any NaN or infinity, without a mask as large as the tensor.
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise BadWeightsError(f"{where}: {key} holds NaN or infinity: the model is broken, fetch it again")
    return model


def _finish(
    model: Any,
    task: Task,
    source: str,
    files: list[Path],
    folder: Path,
    lazy: bool = False,
    stored: torch.dtype | None = None,
    **extra: Any,
) -> LoadedModel:
    tokenizer, problem = None, None
    with quiet_libraries():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **extra)
        except Exception as error:
            there = any(any(folder.glob(name)) for name in ("*token*", "vocab*", "*.model"))
            problem = f"no tokenizer could be loaded: {first_line(error) if there else 'there is no tokenizer.json'}"
    model.eval().requires_grad_(False)
    if hasattr(model.config, "quantization_config"):  # a dequantised GGUF still says it is quantised
        del model.config.quantization_config
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    model.config.use_cache = False
    hashed = files_sha256(files)
    return LoadedModel(model, tokenizer, problem, config, task, source, hashed, lazy=lazy, stored=stored)
