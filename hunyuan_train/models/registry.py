"""Construct a diffusion transformer from its config section."""

from collections.abc import Callable
from typing import Any

from torch import nn

from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.hunyuan.model import HunyuanVideo

BUILDERS: dict[str, Callable[[Any], nn.Module]] = {"hunyuan": HunyuanVideo}


def build_model(cfg: HunyuanConfig) -> nn.Module:
    """Build the model that ``cfg.kind`` names, on the current default device (``meta`` works).

    Raises:
        ValueError: no model is registered under ``cfg.kind``.
    """
    if cfg.kind not in BUILDERS:
        raise ValueError(f"model.kind={cfg.kind!r} is unknown; choose from {' '.join(BUILDERS)}")
    return BUILDERS[cfg.kind](cfg)
