"""Low-rank adapters by peft, under names that checkpoints and users see.

Source: LoRA, Hu et al. 2021 (arXiv 2106.09685). peft wraps a linear, which moves its weight: our
names leave the wrapper out, so a model has its weights under the same names with and without.

| parameter of the wrapped model | its name here |
|---|---|
| `X.base_layer.weight` | `X.weight` |
| `X.lora_A.default.weight` [rank, in] | `X.lora_A.weight` |
| `X.lora_B.default.weight` [out, rank] | `X.lora_B.weight` |
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_train.models.lora_config import LoraConfig
from hunyuan_train.models.spec import ZEROS, InitKind, InitRule

ADAPTER = "default"
"""Name that peft gives our adapter."""
PEFT_PREFIX = "base_model.model."
"""Begin of the keys in peft's files."""
_HALVES = (".lora_A.weight", ".lora_B.weight")


def add_adapters(model: nn.Module, cfg: LoraConfig) -> dict[str, InitRule]:
    """Wrap linears of ``model`` in place, freeze all else, and return the adapters' first values.

    A is drawn from N(0, 1 / rank^2) and B is zero, so that the model computes what it did.

    Args:
        model: On any device, ``meta`` included; its weights stay as they are.
        cfg: With a rank above 0.

    Raises:
        ValueError: peft is not installed, or no linear matches a pattern.
    """
    peft = _import_peft()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in cfg.targets:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(
                f"lora.targets has the pattern {pattern!r}, which is no linear of the model; names "
                f"are like {linears[0]} and {linears[-1]}"
            )
    targets = [n for n in linears if any(fnmatchcase(n, pattern) for pattern in cfg.targets)]
    device = next(model.parameters()).device
    with torch.device(device):
        peft.inject_adapter_in_model(peft.LoraConfig(**_settings(cfg, targets)), model, ADAPTER)
    return {
        name: InitRule(InitKind.NORMAL, 1 / cfg.rank) if ".lora_A." in name else ZEROS
        for name in map(saved_name, dict(model.named_parameters()))
        if is_adapter(name)
    }


def adapter_parameters(model: nn.Module, cfg: LoraConfig) -> int:
    """Return how many parameters the adapters of a model without them would have."""
    return sum(
        cfg.rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(fnmatchcase(name, p) for p in cfg.targets)
    )


def narrow_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep what is not trained in ``dtype``: nothing is ever added to it."""
    for param in model.parameters():
        if not param.requires_grad:
            param.data = param.data.to(dtype)


def saved_name(name: str) -> str:
    """Return a parameter's name as checkpoints have it: without the wrapper around its linear."""
    return name.replace(".base_layer.", ".").replace(f".{ADAPTER}.weight", ".weight")


def saved_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model by the names that checkpoints have."""
    return {saved_name(name): param for name, param in model.named_parameters()}


def is_adapter(name: str) -> bool:
    """Whether a saved name is that of an adapter's half."""
    return name.endswith(_HALVES)


def adapters_of(names: Iterable[str]) -> list[str]:
    """Return which of the saved names are adapters."""
    return [name for name in names if is_adapter(name)]


def merged(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return the weight of the linear that computes what weight and adapter do, in its own type.

    Args:
        weight: [out, in].
        down: A, [rank, in].
        up: B, [out, rank].
        scale: alpha over rank.
    """
    return (weight.double() + scale * (up.double() @ down.double())).to(weight.dtype)


def peft_settings(cfg: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the ``adapter_config.json`` of some saved adapters.

    Args:
        cfg: Section ``lora`` of their run.
        names: Their saved names.
    """
    halves = adapters_of(names)
    targets = sorted({name.removesuffix(end) for name in halves for end in _HALVES} - {*halves})
    return {"peft_type": "LORA", **_settings(LoraConfig(**cfg), targets)}


def _settings(cfg: LoraConfig, targets: list[str]) -> dict[str, Any]:
    return {
        "r": cfg.rank,
        "lora_alpha": cfg.alpha or cfg.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": "gaussian",
        "target_modules": targets,
    }


def _import_peft() -> Any:
    """Import the package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "lora.rank needs a package that is not installed: `pip install hunyuan_train[lora]`, "
            "or set lora.rank=0"
        ) from error
    return peft
