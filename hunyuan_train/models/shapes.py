"""Axis legend of every model, as jaxtyping aliases.

| letter | axis |
|---|---|
| B | samples of the micro-batch |
| C | latent channels |
| T H W | latent frames, rows, columns (before patching) |
| N | image (video) tokens: T/pt * H/ph * W/pw, T slowest, W fastest |
| L | text tokens, right padded |
| S | joint tokens: N image tokens first, then L text tokens |
| D | hidden size |
| A E | attention heads, size of a head (A * E = D) |
| R | rotated channel pairs of a head (E / 2) |
| P | size of the pooled text vector |
| F | values in one output patch: out_channels * pt * ph * pw |
"""

from typing import TypeAlias

from jaxtyping import Bool, Float
from torch import Tensor

Latents: TypeAlias = Float[Tensor, "B C T H W"]
Velocity: TypeAlias = Float[Tensor, "B C_out T H W"]
ImgTokens: TypeAlias = Float[Tensor, "B N D"]
Patches: TypeAlias = Float[Tensor, "B N F"]
TxtTokens: TypeAlias = Float[Tensor, "B L D"]
JointTokens: TypeAlias = Float[Tensor, "B S D"]
Vec: TypeAlias = Float[Tensor, "B D"]
Pooled: TypeAlias = Float[Tensor, "B P"]
PerSample: TypeAlias = Float[Tensor, "B"]
Heads: TypeAlias = Float[Tensor, "B S A E"]
TextMask: TypeAlias = Bool[Tensor, "B L"]
KeyMask: TypeAlias = Bool[Tensor, "B S"]
FrameMask: TypeAlias = Bool[Tensor, "B T"]
TokenMask: TypeAlias = Bool[Tensor, "B S"]
RopeAngles: TypeAlias = Float[Tensor, "S R"]
