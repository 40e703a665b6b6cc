"""The whole model computes the same through the fused kernels as without them."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hunyuan_kernels import dispatch
from hunyuan_train.memory.tracing import SavedBytes
from hunyuan_train.models.hunyuan.config import HunyuanConfig, ImageCondition
from hunyuan_train.models.registry import build_model

USED = {"norm_modulate", "gated_residual", "qk_norm_rope", "gelu_linear2"}


class _Names(TorchDispatchMode):
    """Notes the fused ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "hunyuan_kernels":
            self.seen.add(func._opname)
        return func(*args, **(kwargs or {}))


def tiny_model(form: ImageCondition = ImageCondition.none) -> nn.Module:
    torch.manual_seed(0)
    cfg = HunyuanConfig(
        hidden_size=32, num_heads=2, num_double_blocks=1, num_single_blocks=2,
        rope_axes=[4, 6, 6], text_dim=24, pooled_dim=8, in_channels=4, out_channels=4,
        image_condition=form,
    )  # fmt: skip
    model = build_model(cfg)
    for p in model.parameters():  # zero gates would hide what is behind them
        nn.init.normal_(p, std=0.2)
    return model


def predict(model: nn.Module, mode: str, given: torch.Tensor | None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 2, 4, 6, generator=generator)
    text = torch.randn(2, 5, 24, generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 3])[:, None]
    pooled = torch.randn(2, 8, generator=generator)
    dispatch.set_mode(mode)
    try:
        return model(latents, torch.tensor([300.0, 900.0]), text, mask, pooled, None, given)
    finally:
        dispatch.set_mode("auto")


def results(
    model: nn.Module, mode: str, given: torch.Tensor | None = None
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Return the output and every gradient, and which fused ops ran."""
    model.zero_grad()
    with dispatch.also_on("cpu"), _Names() as names:
        out = predict(model, mode, given)
        out.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **grads}, names.seen


GIVEN = torch.tensor([[True, False], [False, False]])


@pytest.mark.kernel
@pytest.mark.parametrize("given", [None, GIVEN], ids=["text", "given frames"])
def test_output_and_gradients_through_the_kernels_are_those_without(given) -> None:
    model = tiny_model(ImageCondition.none if given is None else ImageCondition.token_replace)
    plain, none = results(model, "off", given)
    fused, used = results(model, "on", given)
    assert not none
    assert {name.removesuffix("_backward") for name in used} >= USED
    assert plain.keys() == fused.keys()
    for name, wanted in plain.items():
        error = (fused[name] - wanted).norm() / wanted.norm().clamp_min(1e-12)
        assert error < 3e-5, name


@pytest.mark.kernel
def test_given_frames_keep_no_more_tensors_of_tokens_for_the_backward() -> None:
    model, kept = tiny_model(ImageCondition.token_replace), []
    for given in (None, GIVEN):
        saved = SavedBytes(model.parameters)
        with dispatch.also_on("cpu"), saved:
            predict(model, "on", given)
        kept.append(saved.take())
    tokens = 2 * (2 * 2 * 3 + 5) * 32 * 4  # of one tensor of all tokens, in bytes
    assert kept[0] > 40 * tokens
    assert kept[1] - kept[0] < 5 * tokens  # 3 blocks with two sets of modulations for 2 samples
