"""A few blocks of the 13B model, laid out as in training, and the same ones of diffusers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hunyuan_train.memory.config import MemoryConfig, Recompute
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.hunyuan.model import HunyuanVideo
from hunyuan_train.models.hunyuan.state_dict import diffusers_config, hunyuan_links
from hunyuan_train.models.registry import sharding_plan
from hunyuan_train.models.rope import Rope
from hunyuan_train.observability.flops import ForwardFlops, dit_forward_flops
from hunyuan_train.parallel.apply import parallelize
from hunyuan_train.parallel.config import ParallelConfig
from hunyuan_train.parallel.mesh import Axes

REAL = HunyuanConfig(
    num_double_blocks=1, num_single_blocks=2, refiner_depth=1, text_dim=64, pooled_dim=64
)
TINY = replace(REAL, hidden_size=192, num_heads=4, rope_axes=[12, 18, 18])
SEQUENCES = (4608, 17_792, 30_616, 67_576, 119_056)
"""Image and text tokens of one sample; the last three are 360p, 540p and 720p of 129 frames."""
TEXT, TINY_TEXT = 256, 16


def seeded_weights(cfg: HunyuanConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a model without zeros, which would hide what is behind a gate."""
    with torch.device("meta"):
        model = HunyuanVideo(cfg)
    model = model.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    return model


def our_stack(
    cfg: HunyuanConfig, device: torch.device, dtype: torch.dtype, memory: MemoryConfig
) -> nn.Module:
    """Return our model as one GPU of a run has it."""
    model = seeded_weights(cfg, device, dtype)
    layout = ParallelConfig(zero_stage=0)
    parallelize(model, sharding_plan(cfg), Axes.alone(), layout, memory)
    return model


def their_stack(cfg: HunyuanConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return diffusers' model with the same weights.

    Raises:
        ImportError: diffusers is not installed.
    """
    from diffusers import HunyuanVideoTransformer3DModel

    arguments = {k: v for k, v in diffusers_config(cfg).items() if not k.startswith("_")}
    with torch.device("meta"):
        theirs = HunyuanVideoTransformer3DModel(**arguments)
    ours = seeded_weights(cfg, device, dtype).state_dict()
    state: dict[str, Tensor] = {}
    for link in hunyuan_links(cfg):
        parts = link.to_diffusers(ours.pop(link.ours))
        state |= dict(zip(link.diffusers, parts, strict=True))
    theirs.load_state_dict(state, strict=True, assign=True)
    return theirs.requires_grad_()


@dataclass(frozen=True)
class Rows:
    """What goes into the first block, and the gradient of what comes out of the last."""

    img: Tensor
    txt: Tensor
    vec: Tensor
    rope: Rope
    gradient: Tensor

    @classmethod
    def random(
        cls, cfg: HunyuanConfig, tokens: int, txt: int, device: torch.device, dtype: torch.dtype
    ) -> "Rows":
        """Return one sample of ``tokens`` image and text tokens."""
        torch.manual_seed(1)

        def noise(*shape: int) -> Tensor:
            return torch.randn(1, *shape, device=device, dtype=dtype)

        angles = torch.rand(tokens, cfg.head_dim // 2, device=device) * 6
        angles[tokens - txt :] = 0
        d = cfg.hidden_size
        img, text = noise(tokens - txt, d).requires_grad_(), noise(txt, d).requires_grad_()
        vec = noise(d).requires_grad_()
        return cls(img, text, vec, Rope(angles.cos(), angles.sin()), noise(tokens, d))


def run_ours(model: Any, rows: Rows) -> Tensor:
    """Return what the blocks make of the rows."""
    img, txt = rows.img, rows.txt
    for block in model.double_blocks:
        img, txt = block(img, txt, rows.vec, rows.rope, None)
    x = torch.cat([img, txt], dim=1)
    for block in model.single_blocks:
        x = block(x, rows.vec, rows.rope, None)
    return x


def run_theirs(model: Any, rows: Rows, again: bool) -> Tensor:
    """Return the same by diffusers' blocks, run again in the backward if ``again``."""
    img, txt = rows.img, rows.txt
    table = tuple(t[: img.shape[1]].repeat_interleave(2, dim=1) for t in rows.rope)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        arguments = (img, txt, rows.vec, None, table)
        img, txt = (
            checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)
        )
    return torch.cat([img, txt], dim=1)


def train(model: nn.Module, rows: Rows, forward: Callable[[], Tensor]) -> None:
    """Run forward and backward with fresh gradients."""
    model.zero_grad(set_to_none=True)
    for leaf in (rows.img, rows.txt, rows.vec):
        leaf.grad = None
    forward().backward(rows.gradient)


def stack_flops(cfg: HunyuanConfig, tokens: int, txt: int) -> ForwardFlops:
    """Return the FLOPs of the blocks alone, for one sample."""

    def count(doubles: int, singles: int) -> ForwardFlops:
        return dit_forward_flops(
            batch=1, img_tokens=tokens - txt, txt_tokens=txt, hidden_size=cfg.hidden_size,
            double_blocks=doubles, single_blocks=singles, mlp_ratio=cfg.mlp_ratio, patch_in=64,
            patch_out=64, text_dim=cfg.text_dim, pooled_dim=cfg.pooled_dim, refiner_depth=0,
            guidance_embed=False,
        )  # fmt: skip

    whole, ends = count(cfg.num_double_blocks, cfg.num_single_blocks), count(0, 0)
    return ForwardFlops(
        linear=whole.linear - ends.linear, attention=whole.attention, of_data=0, of_mask=0
    )


def computed_flops(flops: ForwardFlops, mode: Recompute) -> int:
    """Return the FLOPs of forward and backward that a recompute mode makes of them."""
    again = mode is not Recompute.none
    return flops.computed(linear_again=again, attention_again=mode is Recompute.full)
