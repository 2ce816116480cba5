"""Text that the dense model writes itself: what healing and calibration can have beyond the user's own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GenerationConfig

from dotresize_fx.errors import UsageError
from dotresize_fx.export.model_source import LoadedModel
from dotresize_fx.export.quiet import quiet_libraries

# Sequences at once: a step takes about as long for 64 as for one, and their cache still fits beside the model. On CUDA
# that goes on to a thousand, as far as there is memory for their cache.
SEQUENCES_AT_ONCE = 64
CUDA_SEQUENCES = 1024
CUDA_PARAMETERS = 1_000_000_000
# Tokens of one sampled text: every token is a step of its own, so many short texts cost less than few long ones.
TEXT_LENGTH = 256


def sample_rows(loaded: LoadedModel, *, rows: int, length: int, seed: int, device: str) -> torch.Tensor:
    """int64 (rows, length) on the CPU: sampled texts of TEXT_LENGTH tokens, one behind the other.

    Raises:
        UsageError: as :func:`sample_tokens`.
    """
    piece = min(length, TEXT_LENGTH)
    count = -(-rows * length // piece)
    small = sum(parameter.numel() for parameter in loaded.model.parameters()) < CUDA_PARAMETERS
    batch = CUDA_SEQUENCES if torch.device(device).type == "cuda" and small else SEQUENCES_AT_ONCE
    ids = sample_tokens(loaded, sequences=count, length=piece, seed=seed, device=device, batch=batch)
    return ids.flatten()[: rows * length].view(rows, length)


def sample_tokens(
    loaded: LoadedModel, *, sequences: int, length: int, seed: int, device: str, batch: int = SEQUENCES_AT_ONCE
) -> torch.Tensor:
    """int64 (sequences, length) on the CPU: random first tokens, and the model's own distribution from there on.

    Nothing is cut off or sharpened (temperature 1, no top-k, no top-p), nothing ends early, and no special token and
    no id that the tokenizer lacks occurs; what the model's ``generation_config`` says does not count. The same seed,
    device and ``batch`` give the same ids on one machine. On CUDA it runs in bfloat16. The loaded model and torch's
    random state stay as they are.

    Raises:
        UsageError: the model is an encoder or cannot generate, or sequences are none or longer than it takes.
    """
    model = _generator(loaded, sequences, length, batch)
    allowed, suppressed = _ids(loaded)
    where = torch.device(device)
    draw = torch.Generator().manual_seed(seed)
    first = allowed[torch.randint(len(allowed), (sequences, 1), generator=draw)]
    if length == 1:
        return first
    # Of the copy both are its own: generate takes from a model's own settings what it is not told.
    with torch.no_grad():
        writer = _like(model, where)
    writer.config.use_cache = True
    writer.generation_config = GenerationConfig()
    settings = GenerationConfig(
        max_new_tokens=length - 1,
        min_new_tokens=length - 1,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        use_cache=True,
        suppress_tokens=suppressed or None,
        pad_token_id=int(allowed[0]),  # asked for, and never used
    )
    gpus = [where.index if where.index is not None else torch.cuda.current_device()] if where.type == "cuda" else []
    written = []
    with torch.random.fork_rng(gpus), quiet_libraries(), torch.inference_mode():
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        for start in torch.split(first, batch):
            ids = start.to(where)
            found = writer.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            written.append(found.to("cpu", torch.int64))
    # Cloned outside: what is made in inference mode is no use to autograd.
    return torch.cat(written).clone()


def _generator(loaded: LoadedModel, sequences: int, length: int, batch: int) -> Any:
    model: Any = loaded.model
    if loaded.task == "encoder" or not hasattr(model, "generate"):
        raise UsageError(f"{type(model).__name__} cannot write text, only read it: give text files instead")
    for name, value in (("sequences", sequences), ("length", length), ("batch", batch)):
        if value < 1:
            raise UsageError(f"{name} is {value}: text is sampled in at least one of them")
    longest = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise UsageError(f"text of {length} tokens was asked for: {type(model).__name__} takes {longest} at most")
    return model


def _ids(loaded: LoadedModel) -> tuple[torch.Tensor, list[int]]:
    """The ids that stand for text, int64, and those that do not: special ones, and ones the tokenizer lacks."""
    text_config = loaded.config.get_text_config()
    every = range(int(text_config.vocab_size))
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        named = (getattr(text_config, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
        special = {i for found in named for i in (found if isinstance(found, list) else [found])}
        text = set(every) - special
    else:
        special = set(tokenizer.all_special_ids)
        special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        text = set(tokenizer.get_vocab().values()).intersection(every) - special
    if not text:
        raise UsageError(f"the tokenizer of {loaded.source} holds nothing but special tokens: no text can be sampled")
    return torch.tensor(sorted(text)), sorted(set(every) - text)


def _like(model: Any, device: torch.device) -> Any:
    """A copy on ``device``: it shares what already is as it should be, so that a copy on the CPU costs no memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        half = device.type == "cuda" and parameter.is_floating_point()
        moved = parameter.to(device, torch.bfloat16 if half else parameter.dtype)
        memo[id(parameter)] = torch.nn.Parameter(moved, requires_grad=False)
    # Position tables keep their precision.
    memo |= {id(buffer): buffer.to(device) for buffer in model.buffers()}
    return copy.deepcopy(model, memo)
