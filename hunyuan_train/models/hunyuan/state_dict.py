"""Names and shapes of HunyuanVideo's tensors in the official, our and the diffusers layout.

Ours is the official layout once its wrappers are gone. The diffusers layout differs in names, keeps
q, k, v (and the MLP input of a single block) as separate linears, and has the modulation of the
final norm as (scale, shift) where ours is (shift, scale).
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hunyuan_train.models.hunyuan.config import HunyuanConfig, ImageCondition
from hunyuan_train.models.hunyuan.model import HunyuanVideo
from hunyuan_train.models.spec import KeyLink

_DOUBLE, _SINGLE = "double_blocks.{}.", "single_blocks.{}."
_THEIR_DOUBLE, _THEIR_SINGLE = "transformer_blocks.{}.", "single_transformer_blocks.{}."
_REFINER = "txt_in.individual_token_refiner.blocks.{}."
_THEIR_REFINER = "context_embedder.token_refiner.refiner_blocks.{}."
_CONTEXT_EMBED = "context_embedder.time_text_embed."

_THEIR_IMAGE_CONDITION = {
    ImageCondition.none: None,
    ImageCondition.concat: "latent_concat",
    ImageCondition.token_replace: "token_replace",
}

# Our fields and what diffusers calls them.
_SAME_FIELDS = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "num_heads": "num_attention_heads",
    "num_double_blocks": "num_layers",
    "num_single_blocks": "num_single_layers",
    "refiner_depth": "num_refiner_layers",
    "mlp_ratio": "mlp_ratio",
    "guidance_embed": "guidance_embeds",
    "text_dim": "text_embed_dim",
    "pooled_dim": "pooled_projection_dim",
    "rope_theta": "rope_theta",
}

# Channels of a head that the released models rotate by frame, row and column, by head size.
_RELEASED_AXES = {128: [16, 56, 56], 96: [12, 42, 42]}

# Our module path (block index as {}) -> the diffusers modules holding it, stacked in this order.
MODULES: dict[str, tuple[str, ...]] = {
    "img_in.proj": ("x_embedder.proj",),
    "txt_in.input_embedder": ("context_embedder.proj_in",),
    "txt_in.t_embedder.mlp.0": (_CONTEXT_EMBED + "timestep_embedder.linear_1",),
    "txt_in.t_embedder.mlp.2": (_CONTEXT_EMBED + "timestep_embedder.linear_2",),
    "txt_in.c_embedder.linear_1": (_CONTEXT_EMBED + "text_embedder.linear_1",),
    "txt_in.c_embedder.linear_2": (_CONTEXT_EMBED + "text_embedder.linear_2",),
    _REFINER + "norm1": (_THEIR_REFINER + "norm1",),
    _REFINER + "norm2": (_THEIR_REFINER + "norm2",),
    _REFINER + "self_attn_qkv": tuple(_THEIR_REFINER + f"attn.to_{c}" for c in "qkv"),
    _REFINER + "self_attn_proj": (_THEIR_REFINER + "attn.to_out.0",),
    _REFINER + "mlp.fc1": (_THEIR_REFINER + "ff.net.0.proj",),
    _REFINER + "mlp.fc2": (_THEIR_REFINER + "ff.net.2",),
    _REFINER + "adaLN_modulation.1": (_THEIR_REFINER + "norm_out.linear",),
    "time_in.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.mlp.0": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.mlp.2": ("time_text_embed.guidance_embedder.linear_2",),
    _DOUBLE + "img_mod.linear": (_THEIR_DOUBLE + "norm1.linear",),
    _DOUBLE + "txt_mod.linear": (_THEIR_DOUBLE + "norm1_context.linear",),
    _DOUBLE + "img_attn_qkv": tuple(_THEIR_DOUBLE + f"attn.to_{c}" for c in "qkv"),
    _DOUBLE + "txt_attn_qkv": tuple(_THEIR_DOUBLE + f"attn.add_{c}_proj" for c in "qkv"),
    _DOUBLE + "img_attn_q_norm": (_THEIR_DOUBLE + "attn.norm_q",),
    _DOUBLE + "img_attn_k_norm": (_THEIR_DOUBLE + "attn.norm_k",),
    _DOUBLE + "txt_attn_q_norm": (_THEIR_DOUBLE + "attn.norm_added_q",),
    _DOUBLE + "txt_attn_k_norm": (_THEIR_DOUBLE + "attn.norm_added_k",),
    _DOUBLE + "img_attn_proj": (_THEIR_DOUBLE + "attn.to_out.0",),
    _DOUBLE + "txt_attn_proj": (_THEIR_DOUBLE + "attn.to_add_out",),
    _DOUBLE + "img_mlp.fc1": (_THEIR_DOUBLE + "ff.net.0.proj",),
    _DOUBLE + "img_mlp.fc2": (_THEIR_DOUBLE + "ff.net.2",),
    _DOUBLE + "txt_mlp.fc1": (_THEIR_DOUBLE + "ff_context.net.0.proj",),
    _DOUBLE + "txt_mlp.fc2": (_THEIR_DOUBLE + "ff_context.net.2",),
    _SINGLE + "modulation.linear": (_THEIR_SINGLE + "norm.linear",),
    _SINGLE + "linear1": (
        *(_THEIR_SINGLE + f"attn.to_{c}" for c in "qkv"),
        _THEIR_SINGLE + "proj_mlp",
    ),
    _SINGLE + "linear2": (_THEIR_SINGLE + "proj_out",),
    _SINGLE + "q_norm": (_THEIR_SINGLE + "attn.norm_q",),
    _SINGLE + "k_norm": (_THEIR_SINGLE + "attn.norm_k",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
SWAPPED_HALVES = "final_layer.adaLN_modulation.1"

# Top-level entries of the released pickle, and prefixes some savers put before every key.
WRAPPERS = ("module", "ema", "state_dict")
PREFIXES = ("module.", "model.")


def hunyuan_links(cfg: HunyuanConfig) -> list[KeyLink]:
    """Return one link per tensor of the model of ``cfg``, in the order of its state dict."""
    with torch.device("meta"):
        model = HunyuanVideo(cfg)
    return [_link(key, tuple(t.shape), cfg) for key, t in model.state_dict().items()]


def _link(key: str, shape: tuple[int, ...], cfg: HunyuanConfig) -> KeyLink:
    module, _, leaf = key.rpartition(".")
    found = re.search(r"blocks\.(\d+)\.", module)
    index = found.group(1) if found else ""
    pattern = re.sub(r"blocks\.\d+\.", "blocks.{}.", module)
    theirs = tuple(f"{name.format(index)}.{leaf}" for name in MODULES[pattern])
    if len(theirs) == 1:
        rows = shape[:1]
    else:
        rows = (cfg.hidden_size,) * 3 + ((cfg.mlp_size,) if len(theirs) == 4 else ())
    return KeyLink(
        ours=key, shape=shape, diffusers=theirs, rows=rows, swap_halves=pattern == SWAPPED_HALVES
    )


def common_prefix(keys: Iterable[str], prefixes: tuple[str, ...] = PREFIXES) -> str:
    """Return the saver's prefix that every key carries, or the empty string."""
    keys = list(keys)
    for prefix in prefixes:
        if keys and all(key.startswith(prefix) for key in keys):
            return prefix
    return ""


def diffusers_config(cfg: HunyuanConfig) -> dict[str, Any]:
    """Return the ``config.json`` with which diffusers builds the same model.

    Raises:
        ValueError: diffusers has no such model: it knows one patch size for rows and columns, and
            its token refiner has an MLP ratio of 4 whatever ``mlp_ratio`` says.
    """
    if cfg.mlp_ratio != 4.0 and cfg.refiner_depth > 0:
        raise ValueError(
            f"model.mlp_ratio={cfg.mlp_ratio} with model.refiner_depth={cfg.refiner_depth} cannot "
            "be expressed by the diffusers class, whose refiner always has a ratio of 4"
        )
    frames, rows, columns = cfg.patch_size
    if rows != columns:
        raise ValueError(
            f"model.patch_size={cfg.patch_size} has different rows and columns, which the "
            "diffusers class cannot express"
        )
    return {
        "_class_name": "HunyuanVideoTransformer3DModel",
        "image_condition_type": _THEIR_IMAGE_CONDITION[cfg.image_condition],
        "attention_head_dim": cfg.head_dim,
        "patch_size": rows,
        "patch_size_t": frames,
        "qk_norm": "rms_norm",
        "rope_axes_dim": list(cfg.rope_axes),
        **{theirs: getattr(cfg, ours) for ours, theirs in _SAME_FIELDS.items()},
    }


def fields_from_diffusers(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of our config for a diffusers ``config.json``.

    Raises:
        ValueError: a field is missing, or is of a model that is not ours.
    """
    if stored.get("_class_name", "HunyuanVideoTransformer3DModel") != (
        "HunyuanVideoTransformer3DModel"
    ):
        raise ValueError(
            f"_class_name is {stored['_class_name']}, expected HunyuanVideoTransformer3DModel"
        )
    conditions = {theirs: ours for ours, theirs in _THEIR_IMAGE_CONDITION.items()}
    condition = stored.get("image_condition_type")
    if condition not in conditions:
        known = ", ".join(str(name) for name in conditions)
        raise ValueError(f"image_condition_type is {condition}; known are {known}")
    if stored.get("qk_norm", "rms_norm") != "rms_norm":
        raise ValueError(f"qk_norm is {stored['qk_norm']}; our model has rms_norm")
    try:
        rows = stored["patch_size"]
        return {
            "image_condition": conditions[condition].value,
            "hidden_size": stored["num_attention_heads"] * stored["attention_head_dim"],
            "patch_size": [stored["patch_size_t"], rows, rows],
            "rope_axes": list(stored["rope_axes_dim"]),
            **{ours: stored[theirs] for ours, theirs in _SAME_FIELDS.items()},
        }
    except KeyError as error:
        raise ValueError(f"the field {error.args[0]} is missing") from error


def fields_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the fields of our config that weights under the released names show.

    The rotary axes are those released for the head size, and left out for any other. Channels show
    that given frames are concatenated, and nothing that they replace noisy ones.

    Args:
        shapes: Shape of every tensor, without the saver's prefix.

    Raises:
        ValueError: a tensor that every model has is missing.
    """
    double, single = (_num_blocks(shapes, f"{kind}_blocks.") for kind in ("double", "single"))
    norm = "double_blocks.0.img_attn_q_norm" if double else "single_blocks.0.q_norm"
    try:
        hidden, channels, *patch = shapes["img_in.proj.weight"]
        (head,) = shapes[f"{norm}.weight"]
        out = shapes["final_layer.linear.weight"][0] // math.prod(patch)
        fields = {
            "hidden_size": hidden,
            "num_heads": hidden // head,
            "num_double_blocks": double,
            "num_single_blocks": single,
            "mlp_ratio": _mlp_size(shapes, double > 0) / hidden,
            "patch_size": patch,
            "in_channels": channels,
            "out_channels": out,
            "text_dim": shapes["txt_in.input_embedder.weight"][1],
            "pooled_dim": shapes["vector_in.in_layer.weight"][1],
            "refiner_depth": _num_blocks(shapes, _REFINER.removesuffix("{}.")),
            "guidance_embed": "guidance_in.mlp.0.weight" in shapes,
        }
    except KeyError as error:
        raise ValueError(f"the tensor {error.args[0]} is missing") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError("its tensors have other dimensions than those of the model") from error
    if head in _RELEASED_AXES:
        fields["rope_axes"] = _RELEASED_AXES[head]
    if channels == 2 * out + 1:
        fields["image_condition"] = ImageCondition.concat.value
    return fields


def _num_blocks(keys: Iterable[str], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in keys if key.startswith(prefix)})


def _mlp_size(shapes: Mapping[str, tuple[int, ...]], double: bool) -> int:
    if double:
        return shapes["double_blocks.0.img_mlp.fc1.weight"][0]
    rows, columns = shapes["single_blocks.0.linear1.weight"]
    return rows - 3 * columns
