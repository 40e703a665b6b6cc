"""Time a full train step against bare forward + backward + optimizer on the same batches.

The full step adds what training needs: reading ahead, keyed noise, times and caption dropout,
global counts, clipping, EMA and metrics. Both run in turn in one process on the same model; the
figure is the median of the per-pair ratios. Most of the addition is per parameter, so its share
falls with the tokens of a step; the default, 4320, is that of one 256-pixel clip of 65 frames.

    python benchmarks/loop_overhead.py
    python benchmarks/loop_overhead.py --device cuda
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hunyuan_train.config.compose import compose_config
from hunyuan_train.data.shapes import write_shapes_dataset
from hunyuan_train.encoders.latents import LatentEncoder
from hunyuan_train.encoders.text import build_text_encoder
from hunyuan_train.engine.build import TrainRun, build_run
from hunyuan_train.engine.inputs import build_inputs
from hunyuan_train.engine.meter import StepMeter
from hunyuan_train.engine.precompute import precompute
from hunyuan_train.engine.step import train_step
from hunyuan_train.engine.supervision import open_clock
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.objectives.loss import flow_matching_loss
from hunyuan_train.optim.groups import build_optimizer
from hunyuan_train.runtime.device import synchronize
from hunyuan_train.runtime.dist import close_world, init_world

TARGET = 1.05


def prepare(folder: Path, device: str, tokens: int, clips: int) -> TrainRun:
    """Make a latent store of generated clips and build a run on it."""
    write_shapes_dataset(folder / "clips", clips, 1, 0, frame_sizes=[(96, 96)], clip_frames=[17])
    cfg = compose_config(
        [
            "data=shapes",
            f"data.source={folder / 'clips'}",
            f"data.latents={folder / 'latents'}",
            f"run.dir={folder / 'run'}",
            f"run.device={device}",
            "run.threads=1",
            "data.anchors=[96]",
            "data.durations=[17]",
            f"data.max_tokens={tokens}",
            "vae.block_channels=[4,8,8,8]",
            "optimizer=tiny",
            "logging.progress=off",
        ]
    )
    torch.set_num_threads(cfg.run.threads)
    torch.manual_seed(0)
    precompute(cfg.data, LatentEncoder(build_vae(cfg.vae)), build_text_encoder(cfg.text))
    return build_run(cfg, init_world(device))


def timed(run: TrainRun, step: Callable[[], None]) -> float:
    """Return the seconds of one call."""
    synchronize(run.world.device)
    started = time.perf_counter()
    step()
    synchronize(run.world.device)
    return time.perf_counter() - started


def measure(run: TrainRun, repeats: int) -> list[tuple[float, float]]:
    """Return (full, bare) seconds of ``repeats`` steps, in turn, the order swapped every time."""
    cfg, state, scale = run.cfg, run.state, run.scaling_factor
    kept = build_inputs(state.loader.next_step()[0], cfg, scale, run.world.device)
    model = state.updates.module
    optimizer = build_optimizer(model, cfg.optimizer)

    def bare() -> None:
        x = kept
        predicted = model(*x.arguments())
        loss = flow_matching_loss(predicted, x.target)
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    clock = open_clock(cfg, run.world)
    with StepMeter(run) as meter:

        def full() -> None:
            batches = state.loader.next_step()
            meter.add(train_step(state, batches, cfg, run.world, scale), 0.0)
            if cfg.logging.due(state.step):
                meter.emit(clock)

        for _ in range(3):
            full()
            bare()
        pairs = []
        for repeat in range(repeats):
            first, second = (full, bare) if repeat % 2 else (bare, full)
            one, two = timed(run, first), timed(run, second)
            pairs.append((one, two) if repeat % 2 else (two, one))
    state.loader.close()
    return pairs


def main() -> None:
    """Measure and print one JSON object last."""
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=4320, help="image tokens in a step")
    parser.add_argument("--quick", action="store_true", help="one short clip, two repeats")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokens, clips, repeats = arguments.tokens, 48, 30
        if arguments.quick:
            tokens, clips, repeats = 180, 2, 2
        run = prepare(Path(folder), arguments.device, tokens, clips)
        pairs = measure(run, repeats)
        close_world()
    ratio = statistics.median(full / bare for full, bare in pairs)
    figures = {
        "full_over_bare": {"value": ratio, "target": f"<= {TARGET}", "holds": ratio <= TARGET},
        "full_s": {"value": statistics.median(full for full, _ in pairs)},
        "bare_s": {"value": statistics.median(bare for _, bare in pairs)},
    }
    machine = {
        "device": torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps({"benchmark": "loop_overhead", "machine": machine, "figures": figures}))


if __name__ == "__main__":
    main()
