"""The two kinds of transformer block: double-stream and single-stream.

Attribute names are the released checkpoint's keys, so a state dict needs no renaming.
"""

import torch
from torch import nn
from torch.nn import functional

from hunyuan_kernels import dispatch, qk_norm_rope
from hunyuan_train.models.attention import AttentionCore, SdpaCore
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.layers import (
    NORM_EPS,
    GeluLinear,
    GivenTokens,
    HeadNorm,
    Mlp,
    Modulation,
    modulations,
)
from hunyuan_train.models.rope import Rope, apply_rope
from hunyuan_train.models.shapes import (
    Heads,
    ImgTokens,
    JointTokens,
    KeyMask,
    TxtTokens,
    Vec,
)


def split_heads(qkv: JointTokens, head_dim: int) -> tuple[Heads, Heads, Heads]:
    """Cut [B, S, 3*A*E] into q, k, v [B, S, A, E]: all q rows first, head-major inside each.

    The number of heads is inferred, so a column shard of the projection works unchanged.
    """
    q, k, v = qkv.unflatten(-1, (3, -1, head_dim)).unbind(2)
    return q, k, v


def norm_and_rotate(
    q: Heads, k: Heads, q_norm: HeadNorm, k_norm: HeadNorm, rope: Rope
) -> tuple[Heads, Heads]:
    """Normalise the heads of q and k [B, S, A, E] and rotate them by the S rows of ``rope``."""
    if dispatch.enabled("qk_norm_rope", q):
        return qk_norm_rope(q, k, q_norm.weight, k_norm.weight, rope.cos, rope.sin, NORM_EPS)
    return apply_rope(q_norm(q), rope).to(q.dtype), apply_rope(k_norm(k), rope).to(k.dtype)


class DoubleStreamBlock(nn.Module):
    """Image and text tokens with their own weights, attending jointly (MM-DiT).

    Source: HunyuanVideo (arXiv 2412.03603), section 4.2; Esser et al. 2024, figure 2.
    """

    def __init__(self, cfg: HunyuanConfig) -> None:
        super().__init__()
        hidden, self.head_dim = cfg.hidden_size, cfg.head_dim
        self.img_mod = Modulation(hidden, triples=2)
        self.img_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.img_attn_q_norm = HeadNorm(self.head_dim)
        self.img_attn_k_norm = HeadNorm(self.head_dim)
        self.img_attn_proj = nn.Linear(hidden, hidden)
        self.img_mlp = Mlp(hidden, cfg.mlp_size, "gelu")
        self.txt_mod = Modulation(hidden, triples=2)
        self.txt_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.txt_attn_q_norm = HeadNorm(self.head_dim)
        self.txt_attn_k_norm = HeadNorm(self.head_dim)
        self.txt_attn_proj = nn.Linear(hidden, hidden)
        self.txt_mlp = Mlp(hidden, cfg.mlp_size, "gelu")
        self.core: AttentionCore = SdpaCore()

    def forward(
        self,
        img: ImgTokens,
        txt: TxtTokens,
        vec: Vec,
        rope: Rope,
        key_mask: KeyMask | None,
        given: GivenTokens | None = None,
    ) -> tuple[ImgTokens, TxtTokens]:
        """Update both streams.

        Args:
            img: [B, N, D].
            txt: [B, L, D].
            vec: conditioning [B, D].
            rope: table of N + L rows, the last L unrotated.
            key_mask: [B, N + L], True for real tokens, or None.
            given: which of the N image tokens are of given frames, if any are.

        Returns:
            Both streams, shapes unchanged.
        """
        img_attn_mod, img_mlp_mod = modulations(self.img_mod, vec, given)
        txt_attn_mod, txt_mlp_mod = self.txt_mod(vec)

        x = img_attn_mod.norm(img)
        img_q, img_k, img_v = split_heads(self.img_attn_qkv(x), self.head_dim)
        x = txt_attn_mod.norm(txt)
        txt_q, txt_k, txt_v = split_heads(self.txt_attn_qkv(x), self.head_dim)

        rows = [img_q.shape[1], txt_q.shape[1]]
        img_rope, txt_rope = map(Rope, rope.cos.split(rows), rope.sin.split(rows))
        img_q, img_k = norm_and_rotate(
            img_q, img_k, self.img_attn_q_norm, self.img_attn_k_norm, img_rope
        )
        txt_q, txt_k = norm_and_rotate(
            txt_q, txt_k, self.txt_attn_q_norm, self.txt_attn_k_norm, txt_rope
        )
        q = torch.cat([img_q, txt_q], dim=1)
        k = torch.cat([img_k, txt_k], dim=1)
        v = torch.cat([img_v, txt_v], dim=1)
        merged = self.core(q, k, v, key_mask)
        img_out, txt_out = merged.split(rows, dim=1)

        img = img_attn_mod.add(img, self.img_attn_proj(img_out))
        x = img_mlp_mod.norm(img)
        img = img_mlp_mod.add(img, self.img_mlp(x))

        txt = txt_attn_mod.add(txt, self.txt_attn_proj(txt_out))
        x = txt_mlp_mod.norm(txt)
        txt = txt_mlp_mod.add(txt, self.txt_mlp(x))
        return img, txt


class SingleStreamBlock(nn.Module):
    """One set of weights over the joint sequence; attention and MLP side by side.

    ``linear1`` makes q, k, v and the MLP input, ``linear2`` takes (attention, MLP) in that order.
    Source: HunyuanVideo (arXiv 2412.03603), section 4.2; parallel layers, Dehghani et al. 2023.
    """

    def __init__(self, cfg: HunyuanConfig) -> None:
        super().__init__()
        hidden, self.head_dim = cfg.hidden_size, cfg.head_dim
        self.qkv_share, self.mlp_share = 3 * hidden, cfg.mlp_size
        self.modulation = Modulation(hidden, triples=1)
        self.linear1 = nn.Linear(hidden, self.qkv_share + self.mlp_share)
        self.q_norm = HeadNorm(self.head_dim)
        self.k_norm = HeadNorm(self.head_dim)
        self.linear2 = GeluLinear(hidden + self.mlp_share, hidden)
        self.core: AttentionCore = SdpaCore()

    def forward(
        self,
        x: JointTokens,
        vec: Vec,
        rope: Rope,
        key_mask: KeyMask | None,
        given: GivenTokens | None = None,
    ) -> JointTokens:
        """Update the joint tokens [B, N + L, D], image tokens first; ``given`` covers them all."""
        (mod,) = modulations(self.modulation, vec, given)
        hidden = self.linear1(mod.norm(x))
        # By share, not by size: a column shard of linear1 holds a share of its heads and units.
        mlp_features = hidden.shape[-1] * self.mlp_share // (self.qkv_share + self.mlp_share)
        qkv, mlp = hidden.split([hidden.shape[-1] - mlp_features, mlp_features], dim=-1)
        q, k, v = split_heads(qkv, self.head_dim)
        q, k = norm_and_rotate(q, k, self.q_norm, self.k_norm, rope)
        merged = self.core(q, k, v, key_mask)
        return mod.add(x, self._project(merged, mlp))

    def _project(self, merged: JointTokens, mlp: JointTokens) -> JointTokens:
        if isinstance(self.linear2, GeluLinear):
            return self.linear2(merged, mlp)
        # What tensor parallelism or an adapter puts here takes one input.
        return self.linear2(torch.cat([merged, functional.gelu(mlp, approximate="tanh")], dim=-1))
