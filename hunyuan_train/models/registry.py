"""Find a diffusion transformer by the ``kind`` of its config section."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

from torch import nn

from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.hunyuan.model import HunyuanVideo
from hunyuan_train.models.hunyuan.sharding import hunyuan_sharding_plan
from hunyuan_train.models.spec import InitRule, ShardingPlan


class ModelEntry(NamedTuple):
    """What the registry knows of a model: functions of its config section."""

    build: Callable[[Any], nn.Module]
    sharding_plan: Callable[[Any], ShardingPlan]


MODELS = {"hunyuan": ModelEntry(HunyuanVideo, hunyuan_sharding_plan)}


def build_model(cfg: HunyuanConfig) -> nn.Module:
    """Build the model that ``cfg.kind`` names, on the current default device (``meta`` works).

    Raises:
        ValueError: no model is registered under ``cfg.kind``.
    """
    return _entry(cfg.kind).build(cfg)


def sharding_plan(cfg: HunyuanConfig) -> ShardingPlan:
    """Return how the model of ``cfg`` may be spread over devices.

    Raises:
        ValueError: no model is registered under ``cfg.kind``.
    """
    return _entry(cfg.kind).sharding_plan(cfg)


def init_rules(model: nn.Module) -> dict[str, InitRule]:
    """Return the initial value of every parameter of a registered model, by name."""
    return cast(HunyuanVideo, model).init_rules()


def _entry(kind: str) -> ModelEntry:
    if kind not in MODELS:
        raise ValueError(f"model.kind={kind!r} is unknown; choose from {' '.join(MODELS)}")
    return MODELS[kind]
