"""What is to be known of a model to convert it: its tensors and its config in every layout."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.hunyuan.state_dict import diffusers_config, hunyuan_links
from hunyuan_train.models.spec import KeyLink, identity_link
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.state_dict import config_to_released


class Layout(StrEnum):
    """Names and shapes that weights are stored under."""

    OFFICIAL = "official"
    """Released names."""
    OURS = "ours"
    """The same names, bare."""
    DIFFUSERS = "diffusers"
    PEFT = "peft"
    """The adapters of a run alone, for peft on our model; written, not read."""
    PIPELINE_LORA = "diffusers-lora"
    """The same for the pipelines of diffusers."""


ADAPTERS = (Layout.PEFT, Layout.PIPELINE_LORA)
"""Layouts of adapters alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Convertible:
    """A model whose weights can be converted."""

    links: Sequence[KeyLink]
    """Every tensor."""
    config: HunyuanConfig | VaeConfig
    """Our config, stored beside weights in our layout."""

    def stored_config(self, layout: Layout) -> dict[str, Any] | None:
        """Return what ``config.json`` says in a layout, None if it has none."""
        if layout is Layout.OURS:
            return dataclasses.asdict(self.config)
        if isinstance(self.config, VaeConfig):
            return _vae_config(self.config, layout)
        return diffusers_config(self.config) if layout is Layout.DIFFUSERS else None


# Class of each kind of VAE in diffusers and in the official code, and what the latter asks for
# besides the sizes: it is fixed in this architecture.
_VAE_CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vae_884": (
        "AutoencoderKLHunyuanVideo",
        "AutoencoderKLCausal3D",
        {
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlockCausal3D"] * 4,
            "up_block_types": ["UpDecoderBlockCausal3D"] * 4,
            "time_compression_ratio": 4,
        },
    ),
    "vae_hy15": ("AutoencoderKLHunyuanVideo15", "AutoencoderKLConv3D", {}),
}


def diffusers_vae_class(cfg: VaeConfig) -> str:
    """Return the name of the diffusers class of a VAE."""
    return _VAE_CLASSES[cfg.kind][0]


def _vae_config(cfg: VaeConfig, layout: Layout) -> dict[str, Any]:
    theirs, official, fixed = _VAE_CLASSES[cfg.kind]
    if layout is Layout.DIFFUSERS:
        return {"_class_name": theirs, **config_to_released(cfg)}
    tiles = {"sample_size": cfg.tile_size_px, "sample_tsize": cfg.tile_frames}
    return {"_class_name": official, **config_to_released(cfg), **fixed, **tiles}


def convertible(cfg: HunyuanConfig | VaeConfig) -> Convertible:
    """Return what is to be known of a model to convert it; nothing is allocated."""
    if isinstance(cfg, HunyuanConfig):
        return Convertible(links=hunyuan_links(cfg), config=cfg)
    with torch.device("meta"):
        state = build_vae(cfg).state_dict()
    # The VAE has one set of names everywhere.
    links = [identity_link(key, tuple(tensor.shape)) for key, tensor in state.items()]
    return Convertible(links=links, config=cfg)
