"""FLOPs of the diffusion transformer in closed form, and the peaks they are compared with.

A matrix product of [m, k] with [k, n] counts 2·m·k·n. Elementwise work, norms, softmax and rotary
embedding are left out, as in torch's own counter. The attention is counted over all image and text
tokens, padded text included.
"""

import time
from dataclasses import dataclass

import torch

_SINUSOID_DIM = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardFlops:
    """FLOPs of one forward pass."""

    linear: int
    """Linear layers and the patch convolution."""
    attention: int
    """Products of queries with keys and of probabilities with values."""
    of_data: int
    """Those of ``linear`` whose input is data, which needs no gradient."""
    of_mask: int
    """Those of ``linear`` with no weight and no gradient at all: the mean over valid text."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.linear + self.attention

    @property
    def training(self) -> int:
        """Model FLOPs of forward and backward.

        The backward has two products for each of the forward, less the gradients of data.
        """
        return 3 * self.total - self.of_data - 2 * self.of_mask

    def computed(self, *, linear_again: bool, attention_again: bool) -> int:
        """Return all FLOPs of forward and backward, repeated ones included.

        The backward of a flash kernel computes the scores again, half of a forward. Recompute
        computes linears, or linears and attention, once more.
        """
        linear = self.linear * linear_again
        attention = self.attention // 2 + self.attention * attention_again
        return self.training + linear + attention


def dit_forward_flops(
    *,
    batch: int,
    img_tokens: int,
    txt_tokens: int,
    hidden_size: int,
    double_blocks: int,
    single_blocks: int,
    mlp_ratio: float,
    patch_in: int,
    patch_out: int,
    text_dim: int,
    pooled_dim: int,
    refiner_depth: int,
    guidance_embed: bool,
) -> ForwardFlops:
    """Count the forward pass of the dual-stream then single-stream transformer of HunyuanVideo.

    The number of heads does not matter: it splits the same products.

    Args:
        batch: Samples.
        img_tokens: Latent patches per sample, T * (H / 2) * (W / 2).
        txt_tokens: Padded text length.
        hidden_size: Width D.
        double_blocks: Blocks with separate image and text weights.
        single_blocks: Blocks over the joined sequence.
        mlp_ratio: Width of the MLP over D.
        patch_in: Values per input patch, channels times patch volume (64 in the released model).
        patch_out: Values per output patch.
        text_dim: Width of the text states.
        pooled_dim: Width of the pooled text.
        refiner_depth: Blocks of the text refiner.
        guidance_embed: Whether the guidance scale is embedded.
    """
    d, mlp = hidden_size, int(hidden_size * mlp_ratio)
    joint = img_tokens + txt_tokens

    def two_layers(width: int) -> int:
        return width * d + d * d

    # Multiply-accumulates per sample; doubled at the end.
    vec = two_layers(_SINUSOID_DIM) * (2 if guidance_embed else 1) + two_layers(pooled_dim)
    refiner = (
        txt_tokens * text_dim * d
        + txt_tokens * text_dim  # The mean over valid tokens is a product with the mask.
        + two_layers(_SINUSOID_DIM)
        + two_layers(text_dim)
        + refiner_depth * (txt_tokens * (4 * d * d + 2 * d * mlp) + 2 * d * d)
    )
    double = joint * (4 * d * d + 2 * d * mlp) + 2 * 6 * d * d
    single = joint * (d * (3 * d + mlp) + (d + mlp) * d) + 3 * d * d
    ends = img_tokens * d * (patch_in + patch_out) + 2 * d * d
    linear = vec + refiner + double_blocks * double + single_blocks * single + ends
    attention = 2 * d * ((double_blocks + single_blocks) * joint**2 + refiner_depth * txt_tokens**2)
    scalars = 3 if guidance_embed else 2  # time, guidance, and the refiner's own time
    of_data = (scalars * _SINUSOID_DIM + pooled_dim + text_dim) * d
    of_data += (img_tokens * patch_in + txt_tokens * text_dim) * d
    return ForwardFlops(
        linear=2 * batch * linear,
        attention=2 * batch * attention,
        of_data=2 * batch * of_data,
        of_mask=2 * batch * txt_tokens * text_dim,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """Highest matrix throughput of one device."""

    tflops: float
    """10^12 FLOPs per second, dense; of the data sheet where the device has one."""
    measured_tflops: float
    """What a large square matrix product reaches here."""
    source: str
    """"data sheet" or "measured"."""
    device: str
    """Name of the device."""


# Dense bf16 tensor-core TFLOP/s from NVIDIA's data sheets; the first entry found in the device name
# counts.
_DATA_SHEET_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200 NVL", 835.0),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("A100", 312.0),
)


def peak_tflops(device: torch.device | str) -> Peak:
    """Return the dense bf16 peak of a device: of a known GPU from its data sheet, and measured.

    What is measured is a square matrix product, in bf16 on an unknown GPU and in float32 on the CPU
    with the threads torch has now; it takes about 0.1 s.
    """
    device = torch.device(device)
    if device.type == "cuda":
        name, measured = torch.cuda.get_device_name(device), _measure(device, 8192, torch.bfloat16)
        for part, tflops in _DATA_SHEET_TFLOPS:
            if part.lower() in name.lower():
                return Peak(
                    tflops=tflops, measured_tflops=measured, source="data sheet", device=name
                )
    else:
        name, measured = device.type, _measure(device, 1024, torch.float32)
    return Peak(tflops=measured, measured_tflops=measured, source="measured", device=name)


def _measure(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """Return the best TFLOP/s of a few products of two [size, size] matrices."""
    left = torch.ones(size, size, device=device, dtype=dtype)
    best_s = float("inf")
    for _ in range(6):
        start_s = time.perf_counter()
        result = left @ left
        if device.type != "cpu":
            result[0, 0].item()
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size**3 / best_s / 1e12
