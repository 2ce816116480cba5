"""A tiny model with random weights for every architecture that transformers has for text and images."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.models.auto import configuration_auto, modeling_auto

from dotresize_fx.passes.prove_exactness import redraw_parameters

# By the task's name: what transformers calls the models for it.
TASKS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
WIDTH, FFN, HEADS, SHARED, SIZE, LAYERS, VOCABULARY, LONGEST = 32, 64, 4, 2, 8, 2, 97, 64

LARGEST = 5_000_000  # parameters
# Where an image stands in token ids, and how many of them.
IMAGE_TOKEN, IMAGE_TOKENS = VOCABULARY - 1, 4
# Sizes that default to None where the constructor wants one.
WANTED = ("n_shared_experts", "n_group", "topk_group", "num_key_value_heads", "head_dim", "num_experts_per_tok")
WANTED += ("n_routed_experts", "vocab_size")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

# What configurations call these, whatever the model.
NAMES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "n_embed", "emb_dim", "embedding_size", "d_embed"),
        WIDTH,
    ),
    **dict.fromkeys(("entity_emb_size", "pronunciation_embed_dim", "shape_embed_dim", "intra_bottleneck_size"), WIDTH),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "router_hidden_size", "d_latents"), WIDTH),
    **dict.fromkeys(("hidden_size_global", "hc_lowrank", "laurel_rank", "adapter_rank"), WIDTH),
    **dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "word_embed_dim", "attention_hidden_size", "d_inner_hid"), WIDTH),
    **dict.fromkeys(("embedding_dim", "kv_channels_total", "target_hidden_size", "proj_hidden_size"), WIDTH),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "dense_ffn_hidden_size"), FFN
    ),
    **dict.fromkeys(("hidden_dim", "dff", "dim_ff", "d_inner", "dense_intermediate_size", "feed_forward_size"), FFN),
    **dict.fromkeys(
        ("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "mlp_dim", "ffn_intermediate_size"), FFN
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), FFN // 2),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size", "expert_dim"), FFN // 2),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"), LAYERS
    ),
    **dict.fromkeys(
        ("num_encoder_layers", "num_decoder_layers", "num_block_layers", "num_blocks", "num_layers_per_stack"), LAYERS
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
        HEADS,
    ),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("num_self_attention_heads", "num_cross_attention_heads", "n_mamba_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "n_head_kv", "num_query_groups"), SHARED),
    **dict.fromkeys(("head_dim", "attention_head_size", "d_kv", "d_head", "size_per_head", "kv_channels"), SIZE),
    **dict.fromkeys(("dim_head", "linear_head_dim"), SIZE),
    **dict.fromkeys(("vocab_size", "text_vocab_size", "n_vocab", "entity_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_seq_length"), LONGEST),
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), VOCABULARY),
    "max_2d_position_embeddings": LONGEST,
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "zero_expert_num"), 2
    ),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), SIZE),
    "qk_head_dim": 2 * SIZE,
    **dict.fromkeys(("global_head_dim", "swa_head_dim", "linear_key_head_dim", "linear_value_head_dim"), SIZE),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), HEADS),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("lru_width", "time_step_rank", "mamba_dt_rank"), WIDTH),
    **dict.fromkeys(("image_size", "crop_size"), 32),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id"), 1),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), 8),
    "n_shared_experts": 1,
    "rotary_dim": 4,
    "num_labels": 5,
    "chunk_size": 8,
    "type_vocab_size": 2,
    "sub_layers": LAYERS,
    "index_topk": 4,
    "index_n_heads": HEADS,
    "index_head_dim": SIZE,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_latents": SIZE,
    "num_self_attends_per_block": LAYERS,
    "hidden_size_per_layer_input": SIZE,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
}

# Keyword arguments of the constructor that no rule gives, by the model's type; those of sub-configurations nested.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_WINDOWS = {"patch_size": 4, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
_RESIDUAL_BLOCKS = {"hidden_sizes": [WIDTH, FFN], "depths": [2, 2]}
_PYRAMID = {
    "num_encoder_blocks": 2,
    "depths": (1, 1),
    "hidden_sizes": (16, WIDTH),
    "num_attention_heads": (1, 2),
    "mlp_ratios": (2, 2),
}
_SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
_WIDER_HEADS = {"global_head_dim": 2 * SIZE}
_CONVOLVED = {"layer_types": ["conv", "full_attention"]}
_SOME_ROTATED = {"no_rope_layers": [1, 0]}
_DOTS3_NOTE = {
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 2 * SIZE,
    "swa_qk_nope_head_dim": SIZE,
    "swa_v_head_dim": SIZE,
    "shared_experts_intermediate_size": FFN // 2,
}
_TWICE_AS_WIDE = {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * SIZE}
_QWEN4_EXP = {
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": SIZE,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
# What no model of its own is.
NOT_ALONE = {
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "it reads the states, keys and values of the model that it assists, and no token ids",
    )
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "cohere_compass_text": _SLIDING_AND_FULL
    | {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": None}},
    # Its attention reads both and defaults neither.
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": _SLIDING_AND_FULL,
    "dots3_note": _DOTS3_NOTE,
    "dots3_note_text": _DOTS3_NOTE,
    "esm": {"mask_token_id": 2, "pad_token_id": 1},
    "esmc": {"num_key_value_heads": HEADS},
    "falcon_h1": {"mamba_d_ssm": 2 * WIDTH},
    "funnel": {"block_sizes": (1, 1)},
    "gemma3n_text": {"intermediate_size": [FFN, FFN], "activation_sparsity_pattern": [0.95, 0.0]},
    "gemma4": {"text_config": _WIDER_HEADS},
    "gemma4_text": _WIDER_HEADS,
    "gemma4_unified": {"text_config": _WIDER_HEADS},
    "gemma4_unified_text": _WIDER_HEADS,
    "got_ocr2": {"vision_config": {"output_channels": WIDTH}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": _SLIDING_AND_FULL,
    "lfm2": _CONVOLVED | {"block_multiple_of": 8},
    "lfm2_moe": _CONVOLVED,
    "llama4": _SOME_ROTATED | {"moe_layers": [1]},
    "llama4_text": _SOME_ROTATED | {"moe_layers": [1]},
    "longformer": {"attention_window": 8},
    "mamba2": {"head_dim": 2 * SIZE},
    "mellum": _SLIDING_AND_FULL,
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    # Rows of token ids are as many as the batch times these.
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "neomme": {"head_dim": 2 * SIZE},
    "qwen4_exp": _QWEN4_EXP,
    "qwen4_exp_text": _QWEN4_EXP,
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16)},
    "smollm3": _SOME_ROTATED,
    "xmod": {"default_language": "en_XX"},
    # Its layers behind the first hybrid one share that one's weights.
    "zamba": _TWICE_AS_WIDE | {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": _TWICE_AS_WIDE | {"mamba_headdim": 2 * SIZE},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": SIZE},
    # Images, whose sizes go by stages.
    "bit": _RESIDUAL_BLOCKS | {"num_groups": 8},
    "convnext": {"num_stages": 2, "hidden_sizes": (16, WIDTH), "depths": (1, 1), "patch_size": 4},
    "convnextv2": {"num_stages": 2, "hidden_sizes": (16, WIDTH), "depths": (1, 1), "patch_size": 4},
    "cvt": {"embed_dim": (16, WIDTH), "num_heads": (1, 2), "depth": (1, 2), "cls_token": (False, True)},
    "donut-swin": _WINDOWS,
    "efficientnet": {
        "width_coefficient": 0.05,  # of 1280, which must be hidden_dim
        "depth_coefficient": 1.0,
        "kernel_sizes": (3, 5),
        "in_channels": (32, 480),
        "out_channels": (480, 640),
        "strides": (1, 2),
        "num_block_repeats": (1, 2),
        "expand_ratios": (1, 6),
    },
    "focalnet": {"patch_size": 4, "hidden_sizes": [WIDTH, FFN], "depths": [1, 1]},
    "hgnet_v2": {
        "hidden_sizes": [WIDTH, FFN],
        "depths": (1, 1),
        "stem_channels": (3, 16, 16),
        "stage_in_channels": (16, WIDTH),
        "stage_mid_channels": (16, 16),
        "stage_out_channels": (WIDTH, FFN),
        "stage_num_blocks": (1, 1),
        "stage_downsample": (False, True),
        "stage_light_block": (False, True),
        "stage_kernel_size": (3, 5),
        "stage_numb_of_layers": (2, 2),
    },
    "hiera": {
        "image_size": (32, 32),
        "depths": (1, 1),
        "num_heads": (1, 2),
        "num_query_pool": 1,
        "masked_unit_size": (4, 4),
        "masked_unit_attention": (True, False),
    },
    "levit": {
        "patch_size": 16,  # what the strides of its stem come to
        "hidden_sizes": (16, WIDTH, WIDTH),
        "num_attention_heads": (2, 4, 4),
        "depths": (1, 1, 1),
        "key_dim": (SIZE, SIZE, SIZE),
    },
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {
        "patch_size": 2,
        "output_stride": 8,
        "hidden_sizes": (16, 24, WIDTH),
        "neck_hidden_sizes": (8, 8, 16, 16, 24, WIDTH, FFN),
    },
    "mobilevitv2": {"patch_size": 2, "output_stride": 8, "width_multiplier": 0.25, "n_attn_blocks": (1, 1, 1)},
    "poolformer": {"num_encoder_blocks": 2, "depths": (1, 1), "hidden_sizes": (16, WIDTH)},
    "pp_lcnet": {
        "class_expand": FFN,
        "block_configs": [
            [[3, 16, 16, 1, False]],
            [[3, 16, 16, 2, False]],
            [[3, 16, WIDTH, 2, False]],
            [[5, WIDTH, WIDTH, 1, False]],
            [[5, WIDTH, FFN, 1, True]],
        ],
    },
    "pvt": _PYRAMID | {"sequence_reduction_ratios": (2, 1)},
    "pvt_v2": _PYRAMID | {"sr_ratios": (2, 1)},
    "regnet": _RESIDUAL_BLOCKS | {"groups_width": SIZE},
    "resnet": _RESIDUAL_BLOCKS,
    "segformer": _PYRAMID | {"sr_ratios": (2, 1)},
    "shieldgemma2": {
        "mm_tokens_per_image": IMAGE_TOKENS,
        "image_token_index": IMAGE_TOKEN,
        "yes_token_index": 3,
        "no_token_index": 4,
    },
    "siglip2": {"vision_config": {"num_patches": 16}},
    "swiftformer": {"embed_dims": (16, WIDTH), "depths": (2, 2), "downsamples": (True, True), "mlp_ratio": 2},
    "swin": _WINDOWS,
    "swinv2": _WINDOWS | {"pretrained_window_sizes": (0, 0)},
    "textnet": {
        "stem_out_channels": 16,
        "hidden_sizes": (16, 16, WIDTH),
        "conv_layer_strides": [[1, 2], [2, 1]],
        "conv_layer_kernel_sizes": [[[3, 3], [1, 3]], [[3, 3], [3, 1]]],
    },
}


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers with the class that does ``task``."""

    task: str
    model_type: str
    class_name: str

    @property
    def key(self) -> str:
        return f"{self.task}:{self.model_type}"


def architectures(tasks: tuple[str, ...] = tuple(TASKS)) -> Iterator[Architecture]:
    """All of them, sorted."""
    for task in tasks:
        for model_type, names in sorted(TASKS[task].items()):
            name = names if isinstance(names, str) else names[0]
            yield Architecture(task, model_type, name)


def tiny_model(architecture: Architecture, seed: int = 0) -> Any:
    """It with every parameter re-drawn, in float32 and without a cache.

    Raises:
        Exception: whatever its configuration or its constructor says against these sizes.
    """
    if architecture.model_type in NOT_ALONE:
        raise ValueError(NOT_ALONE[architecture.model_type])
    model_class = getattr(transformers, architecture.class_name)
    config_class = configuration_auto.CONFIG_MAPPING[architecture.model_type]
    if model_class.config_class and not issubclass(config_class, model_class.config_class):
        config_class = model_class.config_class  # for text alone, a part of the type's
    config = tiny_config(config_class, OVERRIDES.get(architecture.model_type, {}))
    if architecture.task == "causal" and "is_decoder" in vars(config):
        config.is_decoder = True  # otherwise BERT and its like attend both ways
    config._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"not tiny: {size} parameters")
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    try:
        model = model_class(config)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error) and "attn_implementation" not in str(error):
            raise
        config._attn_implementation = "eager"
        model = model_class(config)
    model = model.eval().float()
    model.config.use_cache = False
    redraw_parameters(model, seed)
    _redraw_convolutions(model, seed)
    return model


@torch.no_grad()
def _redraw_convolutions(model: torch.nn.Module, seed: int) -> None:
    """Kernels as small as their inputs are many, without which deep ones overflow, and normalisation's statistics."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
            module.weight.normal_(0, module.weight[0].numel() ** -0.5, generator=generator)
        elif isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)


def tiny_config(config_class: type[Any], overrides: Mapping[str, Any]) -> Any:
    """Its defaults with every size that NAMES knows, sub-configurations included, and ``overrides`` over these."""
    default = config_class()
    known = _sizes(default) | overrides
    for name in getattr(config_class, "sub_configs", {}):
        sub = getattr(default, name, None)
        if sub is not None:
            known[name] = tiny_config(type(sub), overrides.get(name, {}))
    return config_class(**known)


def _sizes(default: Any) -> dict[str, Any]:
    """What of NAMES this configuration has as whole numbers; properties, of which some cannot be set, are left out."""
    aliases: Mapping[str, str] = getattr(default, "attribute_map", {})
    found: dict[str, Any] = {}
    for name, size in NAMES.items():
        own = inspect.getattr_static(type(default), name, None)
        if name in aliases or (isinstance(own, property) and name != "num_labels"):
            continue
        try:
            value = getattr(default, name, None)
        except Exception:  # it differs from layer to layer: what holds for the others
            value = vars(default).get(name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole or (value is None and name in WANTED and name in vars(default)):
            found[name] = size
    if "kv_lora_rank" in found and "num_key_value_heads" in found:
        found["num_key_value_heads"] = HEADS  # latent attention makes as many keys as queries
    layers = next((found[name] for name in LAYER_COUNTS if name in found), None)
    for name in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types"):
        own = inspect.getattr_static(type(default), name, None)
        if name in aliases or (isinstance(own, property) and own.fset is None):
            continue
        value = getattr(default, name, None)
        if layers is not None and isinstance(value, (list, tuple)) and value:
            kinds = list(dict.fromkeys(value))
            found[name] = (kinds * layers)[: max(layers, min(len(kinds), 4))]
            for other in LAYER_COUNTS:
                if other in found:
                    found[other] = len(found[name])
    return found
