"""Token refiner of the language model's states.

Source: HunyuanVideo (arXiv 2412.03603), section 4.3 (bidirectional refiner, after LI-DiT).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from hunyuan_kernels import gated_residual
from hunyuan_train.models.attention import AttentionCore, SdpaCore
from hunyuan_train.models.hunyuan.blocks import split_heads
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.layers import NORM_EPS, Mlp, ScalarEmbedder, widened
from hunyuan_train.models.shapes import PerSample, TextMask, TxtTokens, Vec
from hunyuan_train.models.tokens import TokenLayout, WholeTokens


def trim_text(text: Tensor, text_mask: TextMask) -> tuple[Tensor, Tensor | None]:
    """Cut padding that no sample needs, and drop the mask when nothing is left to mask.

    For the data edge, on the CPU. Padding never reaches the image tokens, so the model's output is
    the same up to rounding, with less to compute and, for a batch of one, no attention mask at all.

    Args:
        text: [B, L, text_dim].
        text_mask: [B, L], right padded, at least one valid token in every row.

    Returns:
        Text [B, L', text_dim] with L' the longest valid length, and its mask or None.
    """
    lengths = text_mask.sum(dim=1)
    longest = int(lengths.max())
    ragged = int(lengths.min()) < longest
    return text[:, :longest], text_mask[:, :longest] if ragged else None


def masked_mean(states: TxtTokens, text_mask: TextMask | None) -> Vec:
    """Average the valid tokens of [B, L, D] in float32 at least."""
    states = widened(states)
    if text_mask is None:
        return states.mean(dim=1)
    weights = text_mask.to(states.dtype)[:, None, :]  # [B, 1, L]
    total = torch.bmm(weights, states).squeeze(1)
    return total / weights.sum(dim=-1)


class ContextEmbedder(nn.Module):
    """Linear -> SiLU -> Linear for the mean text state."""

    def __init__(self, in_features: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, mean: Float[Tensor, "B text_dim"]) -> Vec:
        """Embed [B, text_dim] as [B, D]."""
        mean = mean.to(self.linear_1.weight.dtype)
        return self.linear_2(functional.silu(self.linear_1(mean)))


class RefinerBlock(nn.Module):
    """Self-attention and MLP with affine norms and gates from (time, mean text); no positions."""

    def __init__(self, cfg: HunyuanConfig) -> None:
        super().__init__()
        hidden, self.head_dim = cfg.hidden_size, cfg.head_dim
        self.norm1 = nn.LayerNorm(hidden, eps=NORM_EPS)
        self.self_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.self_attn_proj = nn.Linear(hidden, hidden)
        self.norm2 = nn.LayerNorm(hidden, eps=NORM_EPS)
        self.mlp = Mlp(hidden, cfg.mlp_size, "silu")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))
        self.core: AttentionCore = SdpaCore()

    def forward(self, txt: TxtTokens, c: Vec, text_mask: TextMask | None) -> TxtTokens:
        """Update text tokens [B, L, D]; rows of padding hold numbers nobody reads."""
        gate_attn, gate_mlp = self.adaLN_modulation(c).chunk(2, dim=-1)
        q, k, v = split_heads(self.self_attn_qkv(self.norm1(txt)), self.head_dim)
        txt = gated_residual(txt, gate_attn, self.self_attn_proj(self.core(q, k, v, text_mask)))
        return gated_residual(txt, gate_mlp, self.mlp(self.norm2(txt)))


class IndividualTokenRefiner(nn.Module):
    """The refiner blocks, in order."""

    def __init__(self, cfg: HunyuanConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RefinerBlock(cfg) for _ in range(cfg.refiner_depth))

    def forward(self, txt: TxtTokens, c: Vec, text_mask: TextMask | None) -> TxtTokens:
        """Map [B, L, D] to [B, L, D]."""
        for block in self.blocks:
            txt = block(txt, c, text_mask)
        return txt


class TextRefiner(nn.Module):
    """Project the language model's states to D and let them see each other in both directions."""

    def __init__(self, cfg: HunyuanConfig) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(cfg.text_dim, cfg.hidden_size)
        self.t_embedder = ScalarEmbedder(cfg.hidden_size)
        self.c_embedder = ContextEmbedder(cfg.text_dim, cfg.hidden_size)
        self.individual_token_refiner = IndividualTokenRefiner(cfg)
        self.tokens: TokenLayout = WholeTokens()

    def forward(self, text: Tensor, time: PerSample, text_mask: TextMask | None) -> TxtTokens:
        """Return text tokens [B, L, D].

        Args:
            text: states of the language model [B, L, text_dim].
            time: model time [B], float32, 0..1000.
            text_mask: [B, L], True for valid tokens, right padded; None when all are valid.
        """
        c = self.t_embedder(time) + self.c_embedder(masked_mean(text, text_mask))
        txt = self.input_embedder(text.to(self.input_embedder.weight.dtype))
        txt, key_mask = self.tokens.enter_refiner(txt, text_mask)
        return self.individual_token_refiner(txt, c, key_mask)
