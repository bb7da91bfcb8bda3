"""Tiny models of every architecture of `transformers` that has text embeddings.

Each is made from the default configuration of its class: whatever is large there is made small, by the
name of the attribute and in every sub-configuration. What no rule by name can know (two sizes that have
to agree, a list with one entry for each stage) stands in `_OVERRIDES`, by model type. A class that does
not build or does not run over token ids is left out, with the reason: see `NotInZoo`.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import re
import warnings
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto

VOCAB = 103  # a prime that no other size of these models is equal to
FIRST_TEXT_ID = 48  # ids below are left to the configs, for images, padding and the like
MAX_BYTES = 50_000_000

# In the order of interest: the first mapping that names a class decides its place.
MAPPINGS = [
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
    "MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
]


class NotInZoo(Exception):
    """A class that is left out, and why."""


def _classes() -> dict[str, str]:
    found: dict[str, str] = {}
    for mapping in MAPPINGS:
        for model_type, classes in getattr(modeling_auto, mapping).items():
            for name in [classes] if isinstance(classes, str) else classes:
                found.setdefault(name, model_type)
    return found


_CLASSES = _classes()


def names() -> list[str]:
    """Every class of the Auto mappings that may have text embeddings; `build` says which of them do."""
    return list(_CLASSES)


# --- configurations ---------------------------------------------------------------------------------

_SIZES: list[tuple[str, int]] = [
    # Kept: no size, or one of a list's length.
    (r"type_vocab_size|num_labels|num_channels|.*_range|num_feat_extract_layers|num_adapter_layers", 10**9),
    (r"num_kv_shared_layers|max_window_layers", 0),
    (r"encoder_hash_byte_group_vocab", VOCAB),
    (r"upsample_initial_channel", 64),
    (r"(.*_)?vocab_size(_.*)?", VOCAB),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|.*_num_key_value_heads|num_query_groups|multi_query_group_num", 2),
    (r"linear_num_key_heads", 2),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r".*(attention_heads|num_heads|n_heads?|_heads)|num_attention_heads.*|attention_heads", 4),
    (r"true_hidden_size|intra_bottleneck_size|embedding_size|emb_size", 16),
    (r"(qk_head_dim)", 16),
    (r"(kv|q|o)_lora_rank|.*_lora_(dim|rank)|lora_rank.*", 16),
    (r".*(head_dim|head_size|d_head|dim_head)|qk_.*_dim|d_kv|rotary_dim|index_head_dim|query_pre_attn_scalar", 8),
    (r".*(moe|expert)s?_(intermediate|inter|hidden|shared).*size.*|moe_ffn_hidden_size|moe_dim", 32),
    (r".*(intermediate|ffn|mlp|inner|feed_forward|d_ff).*|ff_expansion_size|block_ff_dim", 64),
    (r".*num_hidden_layers|n_layers?|num_layers|.*_layers|depth|num_blocks|num_encoder_blocks|layers", 2),
    (r"num_experts_per_tok.*|moe_topk|moe_k|top_k_experts|num_selected_experts|topk|.*_top_?k", 2),
    (r".*(num|n)_(routed_|local_|real_)?experts|moe_num_experts|.*_num_experts|zero_expert_num", 4),
    (r"n_group|topk_group|num_expert_groups?", 1),
    (r"max_(target_|source_|2d_|sequence_)?(position|length|pos)\w*|n_positions|n_ctx", 64),
    (r"seq_len(gth)?|context_length", 64),
    (r"num_position_embeddings|position_embedding_size", 16),
    (r"sliding_window(_size)?|local_attention|window_size|block_size|.*chunk_size", 16),
    (r".*image_size|img_size|pretrain_image_size|max_img_size|crop_size", 32),
    (r".*patch_size", 8),
    (r"state_size|mamba_d_state|ssm_state_size|time_step_rank|mamba_dt_rank", 8),
    (r"codebook_size|num_embeddings", 32),
    (r"num_query_tokens|image_seq_length|num_image_tokens|mm_tokens_per_image|resampler_n_latents|.*_latents", 4),
    (r".*(d_model|n_embd|_dim|_width)|d_.*|dim|dim_model", 32),
    (r".*hidden_size.*|pooler_output_size|projection_size", 32),
    (r"conv_channels|.*_channels|num_filters", 32),
]
_RULES = [(re.compile(pattern), size) for pattern, size in _SIZES]

# Per model type (of the configuration or sub-configuration): what must agree with something else.
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_HALF_MROPE = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5
    }
}  # fmt: skip
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 10},
    "chameleon": {"vocabulary_map": {"<image>": 10}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2, "topk_method": "greedy"},
    "dia_decoder": {"vocab_size": 29},
    "diffusion_gemma": {"canvas_length": 8},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 10}},
    "ernie4_5_vl_moe_text": {"moe_num_experts": 4},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 4},
    "flava_image_codebook": {"vocab_size": 29},
    "flava_image_model": {"vocab_size": 29},
    "florence_vision": {
        "embed_dim": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1), "num_groups": (1, 1, 1, 1), "depths": (1, 1, 1, 1),
        "projection_dim": 32,
    },
    "glm4v_moe_text": _HALF_MROPE,
    "glm4v_text": _MROPE,
    "glm_image_text": _MROPE,
    "glm_ocr_text": _MROPE,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "granite_speech_encoder": {"context_size": 16, "max_pos_emb": 64},
    "instructblip": {"image_token_index": 10},
    "instructblipvideo": {"video_token_index": 10},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 8},
    "mimi": {"upsample_groups": 32},
    "mistral_large4_text": {"kv_source_layers": [0, 1]},
    "mistral_large4": {"kv_source_layers": [0, 1]},
    "paddleocr_vl_text": _MROPE,
    "qwen2_5_omni_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "qwen2_vl_text": _MROPE,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8), "is_decoder": True},
    "rwkv": {"rescale_every": 0},  # else a forward in eval mode rewrites the weights in place
    "squeezebert": {"embedding_size": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": None, "attn_layer_period": 3, "attn_layer_offset": 1},
}  # fmt: skip


def _small(name: str, value: int) -> int:
    for pattern, size in _RULES:
        if pattern.fullmatch(name):
            return min(value, size)
    return value


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_diff_dict")


def _special_ids(config: Any, counter: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name == "pad_token_id" and value is None and "vocab_size" in vars(config):
            found[name] = 1  # classification heads look for the last token that is no padding
        if not re.fullmatch(r".*(token_id|token_index|_token_ids)", name) or value is None:
            continue
        if name == "pad_token_id":
            found[name] = 1
        elif type(value) is int and value >= 0:
            fixed = {"bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
            found[name] = fixed.get(name) or next(counter)
        elif isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
            found[name] = type(value)([3] if name == "eos_token_id" else [next(counter) for _ in value])
    return found


def shrink(config: Any, tied: bool | None = None, counter: Any = None) -> Any:
    """A small configuration like `config`."""
    counter = counter or itertools.count(5)
    overrides = _OVERRIDES.get(config.model_type, {})
    values: dict[str, Any] = _special_ids(config, counter)
    counts = [vars(config).get(name) for name in ("num_hidden_layers", "n_layer", "num_layers")]
    layers = next((count for count in counts if type(count) is int), 0)
    per_layer = {
        name: value
        for name, value in vars(config).items()
        if layers > 2 and isinstance(value, (list, tuple)) and len(value) == layers
    }
    picked = [0, 1]
    for value in per_layer.values():
        other = next((i for i, item in enumerate(value) if item != value[0]), 1)
        picked = sorted({0, other})
        if other != 1:
            break
    for name, value in vars(config).items():
        if _is_config(value):
            values[name] = shrink(value, tied, counter)
        elif name in values or name.startswith("_") or name in ("id2label", "label2id"):
            continue
        elif type(value) is int:
            small = _small(name, value)
            if "key_value_heads" in name and value == vars(config).get("num_attention_heads"):
                small = 4  # latent attention has no groups
            if small != value:
                values[name] = small
        elif name == "head_dim" and value is None:
            values[name] = 8
        elif name == "num_key_value_heads" and value is None:
            values[name] = 4
        elif name in per_layer:
            values[name] = [_small(name, value[i]) if type(value[i]) is int else value[i] for i in picked]
        elif isinstance(value, dict) and re.fullmatch(r"rope_(parameters|scaling)", name):
            values[name] = _small_rope(value)
    if tied is not None and hasattr(config, "tie_word_embeddings"):
        values["tie_word_embeddings"] = tied
    values.update(overrides)
    return type(config)(**{name: copy.deepcopy(value) for name, value in values.items()})


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            value = _small_rope(value)
        elif name == "mrope_section":
            value = [2, 1, 1]
        elif name == "original_max_position_embeddings":
            value = 32
        small[name] = value
    if small.get("rope_type") == "longrope":  # it has a factor for each frequency
        return {"rope_type": "default", "rope_theta": small.get("rope_theta", 10000.0)}
    return small


def config_for(name: str, tied: bool | None = None) -> Any:
    """The small configuration of a model class."""
    # Some mappings name the composite's type for a class that takes its text configuration.
    config_class = getattr(transformers, name).config_class or CONFIG_MAPPING[_CLASSES[name]]
    made = _MADE.get(_CLASSES[name])
    return made(tied) if made else shrink(config_class(), tied)


def _wrapper(encoder: str, decoder: str, kind: str):
    def make(tied: bool | None) -> Any:
        outer = shrink(CONFIG_MAPPING[encoder](), tied)
        inner = shrink(CONFIG_MAPPING[decoder](), tied)
        config_class = CONFIG_MAPPING[kind]
        config = config_class.from_encoder_decoder_configs(outer, inner)
        config.pad_token_id, config.decoder_start_token_id = 1, 2
        return config

    return make


_MADE = {
    "encoder-decoder": _wrapper("bert", "bert", "encoder-decoder"),
    "vision-encoder-decoder": _wrapper("vit", "gpt2", "vision-encoder-decoder"),
    "speech-encoder-decoder": _wrapper("wav2vec2", "bert", "speech-encoder-decoder"),
}


# --- models -----------------------------------------------------------------------------------------


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".replace("\n", " ")[:300]


_BYTES: dict[str, int] = {}


def _bytes_of(cls: Any, config: Any) -> int:
    try:
        with torch.device("meta"):
            return sum(p.numel() * p.element_size() for p in cls(config).parameters())
    except Exception:  # noqa: BLE001  # some towers compute with values when they are made
        return 0


def build(name: str, tied: bool | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A tiny model in eval mode, all of whose weights are random.

    Args:
        name: of the model class.
        tied: what `tie_word_embeddings` is set to, everywhere in the config; the default's, if `None`.
        dtype: of the weights.
        seed: of the weights.

    Raises:
        `NotInZoo`: says why not.
    """
    cls = getattr(transformers, name, None)
    if cls is None or not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise NotInZoo("no such class here (an optional dependency)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if name not in _BYTES:
                _BYTES[name] = _bytes_of(cls, config_for(name, tied))
            if _BYTES[name] > MAX_BYTES:
                raise NotInZoo(f"{_BYTES[name] / 1e6:.0f} MB")
            torch.manual_seed(seed)
            config = config_for(name, tied)
            model = cls(config).eval()
    except NotInZoo:
        raise
    except Exception as error:
        raise NotInZoo(f"does not build: {_reason(error)}") from error
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms too: a gradient or a row that is lost must show in the values.
            if parameter.is_floating_point() and (parameter.dim() == 1 or not parameter.any()):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.to(dtype)
    text_table(model)
    with contextlib.suppress(Exception):
        model.config.use_cache = False  # caches of some kinds refuse a gradient
    return model


def text_table(model: Any) -> torch.Tensor:
    """The input embeddings of the text: what `get_input_embeddings()` has, or else the first that looks like it.

    Raises:
        `NotInZoo`: there is none.
    """
    try:
        weight = model.get_input_embeddings().weight
        if isinstance(weight, torch.Tensor) and weight.dim() == 2 and VOCAB <= weight.shape[0] <= VOCAB + 3000:
            return weight
    except (AttributeError, NotImplementedError, TypeError):
        pass
    for module in model.modules():
        if isinstance(module, nn.Embedding) and VOCAB <= module.num_embeddings <= VOCAB + 3:
            return module._parameters["weight"]
    raise NotInZoo("no table of text embeddings")


def rows_of(model: Any) -> int:
    """Number of rows of the input embeddings."""
    return text_table(model).shape[0]


def head_of(model: Any) -> Any:
    """What `get_output_embeddings` gives; `None` where it gives nothing or raises."""
    try:
        return model.get_output_embeddings()
    except Exception:  # noqa: BLE001
        return None


def head_is_tied(model: Any) -> bool | None:
    """Whether the head has the input embeddings' weight; `None` where there is no head."""
    weight = getattr(head_of(model), "weight", None)
    if weight is None:
        return None
    return weight is text_table(model)


# --- running ----------------------------------------------------------------------------------------

_RECIPES: dict[tuple[str, bool], dict[str, Any]] = {}


def _vision(config: Any) -> Any:
    for attribute in ("vision_config", "vision_tower_config", "image_encoder_config", "encoder", "backbone_config"):
        if _is_config(getattr(config, attribute, None)):
            return getattr(config, attribute)
    return config


def _dummies(model: Any, accepted: set[str]) -> list[dict[str, tuple[int, ...]]]:
    config = model.config
    vision = _vision(config)
    size = getattr(vision, "image_size", 32)
    size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    pixels = (getattr(vision, "num_channels", 3), *size)
    mel = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 80
    positions = getattr(config, "max_source_positions", 32)
    width = getattr(config, "feature_projection_input_dim", 160)
    choices: list[dict[str, tuple[int, ...]]] = [{}]
    if "bbox" in accepted:
        choices += [{"bbox": (8, 4)}]
    for name, shapes in {
        "pixel_values": [pixels, (1, *pixels)],
        "input_features": [(mel, 2 * positions), (2 * positions, mel), (16, width), (mel, 64)],
        "input_values": [(2000,), (64, mel)],
        "flattened_patches": [(8, 2 + getattr(vision, "patch_embed_hidden_size", 768))],
    }.items():
        if name in accepted:
            choices += [{name: shape} for shape in shapes]
    if "qformer_input_ids" in accepted:
        choices += [{"pixel_values": shape, "qformer_input_ids": (8,)} for shape in (pixels, (1, *pixels))]
    if "visual_feats" in accepted:
        choices += [{"visual_feats": (4, getattr(config, "visual_feat_dim", 32)), "visual_pos": (4, 4)}]
    if "pixel_values_videos" in accepted:
        choices += [{"pixel_values_videos": (2, *pixels)}]
    return choices


def _arguments(model: Any, ids: torch.Tensor, recipe: dict[str, Any]) -> dict[str, Any]:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if recipe["end"]:
        ids = ids.clone()
        ids[:, -1] = 3  # some classification heads read the state of the end token
    if recipe["images"]:
        ids = torch.cat([torch.full((len(ids), recipe["images"]), _image_id(model.config)), ids], 1)
    arguments: dict[str, Any] = dict.fromkeys(recipe["ids"], ids)
    generator = torch.Generator().manual_seed(1)
    for name, shape in recipe["dummies"].items():
        if name == "qformer_input_ids":
            arguments[name] = torch.ones(len(ids), *shape, dtype=torch.int64)
        elif name == "bbox":
            arguments[name] = torch.zeros(len(ids), *shape, dtype=torch.int64)
        else:
            arguments[name] = torch.randn(len(ids), *shape, generator=generator).to(dtype)
    return arguments


def _image_id(config: Any) -> int:
    for name in ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index"):
        if type(value := getattr(config, name, None)) is int:
            return value
    return 10


def _main(out: Any) -> torch.Tensor:
    """The tensor that depends on the embeddings: logits, or else hidden states."""
    for name in ("logits", "prediction_logits", "text_embeds", "last_hidden_state", "logits_per_text"):
        value = getattr(out, name, None)
        if isinstance(value, torch.Tensor):
            return value
    values = out.values() if hasattr(out, "values") else out if isinstance(out, (list, tuple)) else [out]
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim():
            return value
    raise TypeError(f"{type(out).__name__} has no logits and no hidden states")


def _forward(model: Any, ids: torch.Tensor, recipe: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    # Some models draw random numbers also in eval mode (hashing, masks).
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        out = model(**_arguments(model, ids, recipe))
    main = _main(out)
    weights = torch.randn(main.shape, generator=torch.Generator().manual_seed(2))
    loss = (main.float() * weights).nan_to_num(0.0, 0.0, 0.0).mean()
    if recipe["labels"]:
        if not isinstance(out.loss, torch.Tensor) or (not out.loss.requires_grad and torch.is_grad_enabled()):
            raise TypeError("labels gave no loss")
        loss = loss + out.loss.float().mean()
    return loss, main


def _recipe(model: Any) -> dict[str, Any]:
    key = (type(model).__name__, bool(head_is_tied(model)))
    if key in _RECIPES:
        return _RECIPES[key]
    accepted = set(inspect.signature(model.forward).parameters)
    ids = torch.arange(FIRST_TEXT_ID, FIRST_TEXT_ID + 16).view(2, 8)
    texts = [name for name in ("input_ids", "decoder_input_ids") if name in accepted]
    if not texts:
        raise NotInZoo("its forward takes no token ids")
    variants = [texts] if len(texts) == 1 else [texts, texts[:1], texts[1:]]
    reasons = []
    second_best: dict[str, Any] | None = None
    # Beside the table that a model names there may be the one that it reads, in an encoder of its own.
    shape = text_table(model).shape
    holders = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    weights = {id(m.weight): m.weight for m in holders if m.weight.shape == shape} | {0: text_table(model)}
    were = {id(weight): weight.requires_grad for weight in weights.values()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for dummies in _dummies(model, accepted):
            # Two towers whose forwards take the place of each token of an image in the text.
            images = getattr(model.config, "num_query_tokens", 0) if "pixel_values" in dummies else 0
            end = False
            for chosen in variants:
                for labels in ([True] if "labels" in accepted else []) + [False, False]:
                    recipe = {
                        "ids": [*chosen, *(["labels"] if labels else [])],
                        "dummies": dummies, "labels": labels, "images": images, "end": end,
                    }  # fmt: skip
                    try:
                        loss, _ = _forward(model, ids, recipe)
                        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                        gradient = next((g for g in reversed(gradients) if g is not None and g.any()), None)
                    except Exception as error:  # noqa: BLE001
                        reasons.append(_reason(error))
                        # The error says what the ids have to contain.
                        if match := re.search(r"tokens: 0, features:? (\d+)", str(error)):
                            images = int(match[1]) // len(ids)
                        end = end or "<eos> token" in str(error)
                        continue
                    if gradient is None or not gradient.isfinite().all():
                        reasons.append("its input embeddings get no gradient")
                        continue
                    _RECIPES[key] = recipe
                    if gradient[ids[:, :-1]].any(-1).all():
                        return recipe
                    # Some read the state of the end token, and then nothing behind it.
                    end = True
                    if gradient[ids[:, 1:]].any():
                        second_best = second_best or recipe
                    reasons.append("it reads nothing but the first token of so short a text")
    finally:
        for weight in weights.values():
            weight.requires_grad_(were[id(weight)])
    if second_best is not None:
        _RECIPES[key] = second_best
        return second_best
    raise NotInZoo(f"does not run over token ids: {reasons[0]}; {reasons[-1]}")


def run(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A scalar loss, and the logits or hidden states, over `ids` (`[2, n]`).

    Raises:
        `NotInZoo`: at the first call for a class, where no set of arguments works.
    """
    return _forward(model, ids, _recipe(model))


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with `size` entries, each of which is a word."""
    special = ["<unk>", "<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *(f"w{i}" for i in range(len(special), size))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def build_runnable(name: str, tied: bool | None = None) -> Any:
    """`build`, for a class of which `run` is known to work.

    Raises:
        `NotInZoo`: says why not.
    """
    model = build(name, tied)
    _recipe(model)
    return model
