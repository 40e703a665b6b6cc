"""Time our transformer's forward + backward against diffusers' class at the same config.

Both models get the same weights and the same inputs in one process, interleaved; the figure is the
median of the per-pair ratios, so a machine that slows down during the run slows both.

    python benchmarks/vs_diffusers.py
    python benchmarks/vs_diffusers.py --device cuda --dtype bfloat16
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor, nn

from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.hunyuan.model import HunyuanVideo
from hunyuan_train.models.hunyuan.state_dict import diffusers_config, hunyuan_links

TARGET = 1.0


@dataclass(frozen=True)
class Case:
    """One batch: samples, latent (T, H, W), text tokens, and whether their masks are ragged."""

    name: str
    samples: int
    latent: tuple[int, int, int]
    text_tokens: int
    ragged: bool


CPU_CONFIG = HunyuanConfig(
    hidden_size=192,
    num_heads=4,
    num_double_blocks=4,
    num_single_blocks=8,
    rope_axes=[12, 18, 18],
    text_dim=64,
    pooled_dim=64,
    refiner_depth=1,
)
CPU_CASES = [
    Case("image_batch", 8, (1, 8, 8), 16, ragged=True),
    Case("video_batch", 4, (5, 8, 12), 16, ragged=True),
    Case("video_one", 1, (9, 16, 16), 16, ragged=True),
]
CUDA_CONFIG = HunyuanConfig(num_double_blocks=2, num_single_blocks=4, guidance_embed=True)
CUDA_CASES = [
    Case("image_batch", 16, (1, 32, 32), 256, ragged=True),
    Case("video_batch", 2, (17, 32, 32), 256, ragged=True),
    Case("video_one", 1, (33, 44, 80), 256, ragged=True),
]


def build_pair(
    cfg: HunyuanConfig, device: str, dtype: torch.dtype
) -> tuple[HunyuanVideo, HunyuanVideoTransformer3DModel]:
    """Return our model and diffusers' with the same random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        ours = HunyuanVideo(cfg)
        arguments = {k: v for k, v in diffusers_config(cfg).items() if not k.startswith("_")}
        theirs = HunyuanVideoTransformer3DModel(**arguments)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0.0, 0.02)
    state: dict[str, Tensor] = {}
    for link in hunyuan_links(cfg):
        parts = link.to_diffusers(ours.state_dict()[link.ours])
        state |= dict(zip(link.diffusers, parts, strict=True))
    theirs.load_state_dict(state, strict=True)
    return ours.to(dtype), theirs.to(dtype)


def build_inputs(cfg: HunyuanConfig, case: Case, device: str, dtype: torch.dtype) -> dict:
    """Return random inputs, keyed as our forward names them."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    longest = case.text_tokens
    lengths = torch.arange(case.samples, device=device) * (longest // 2) // max(case.samples, 1)
    lengths = longest - lengths - (1 if case.ragged else 0)
    return {
        "latents": normal(case.samples, cfg.in_channels, *case.latent),
        "time": torch.linspace(50, 950, case.samples, device=device),
        "text": normal(case.samples, longest, cfg.text_dim),
        "text_mask": torch.arange(longest, device=device)[None] < lengths[:, None],
        "pooled": normal(case.samples, cfg.pooled_dim),
        "guidance": torch.full((case.samples,), 6000.0, device=device)
        if cfg.guidance_embed
        else None,
    }


def timed_step(model: nn.Module, forward: Callable[[], Tensor], device: str) -> float:
    """Return the seconds of one forward and backward with fresh gradients."""
    model.zero_grad(set_to_none=True)
    synchronise(device)
    start = time.perf_counter()
    forward().float().square().mean().backward()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: str) -> None:
    """Wait for the device, so that the clock measures work and not its submission."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(cfg: HunyuanConfig, case: Case, device: str, dtype: torch.dtype, repeats: int) -> dict:
    """Return median seconds of both models and the median ratio ours / theirs."""
    ours, theirs = build_pair(cfg, device, dtype)
    batch = build_inputs(cfg, case, device, dtype)

    def run_ours() -> Tensor:
        return ours(**batch)

    def run_theirs() -> Tensor:
        return theirs(
            hidden_states=batch["latents"],
            timestep=batch["time"],
            encoder_hidden_states=batch["text"],
            encoder_attention_mask=batch["text_mask"],
            pooled_projections=batch["pooled"],
            guidance=batch["guidance"],
            return_dict=False,
        )[0]

    timed_step(ours, run_ours, device)
    timed_step(theirs, run_theirs, device)
    pairs = []
    for repeat in range(repeats):
        if repeat % 2:
            second = timed_step(theirs, run_theirs, device)
            first = timed_step(ours, run_ours, device)
        else:
            first = timed_step(ours, run_ours, device)
            second = timed_step(theirs, run_theirs, device)
        pairs.append((first, second))
    return {
        "ours_s": statistics.median(p[0] for p in pairs),
        "diffusers_s": statistics.median(p[1] for p in pairs),
        "ratio": statistics.median(p[0] / p[1] for p in pairs),
    }


def machine(device: str) -> dict:
    """Describe where the figures come from."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def main() -> None:
    """Measure every case and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--case", default="", help="measure only this case")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    cfg, cases = (CUDA_CONFIG, CUDA_CASES) if on_gpu else (CPU_CONFIG, CPU_CASES)
    figures = {}
    for case in cases:
        if args.case and case.name != args.case:
            continue
        repeats = 1 if args.quick else args.repeats
        found = measure(cfg, case, args.device, getattr(torch, args.dtype), repeats)
        print(f"{case.name}: ours {found['ours_s']:.4f} s, diffusers {found['diffusers_s']:.4f} s")
        figures[f"ratio_{case.name}"] = {
            "value": round(found["ratio"], 4),
            "target": f"<= {TARGET}",
            "holds": found["ratio"] <= TARGET,
        }
    line = {"benchmark": "vs_diffusers", "machine": machine(args.device), "figures": figures}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
