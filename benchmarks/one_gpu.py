"""Train the 12.82B model on one GPU: ten full-parameter updates on one fixed batch.

Weights are random and the batch is made up, all else is the trainer's: layout, memory section
(conf/memory/one_h200.yaml by default), updates, guard and moving average. Figures:

- step: seconds of an update, the median without the first, and its MFU
- loss: the first and the last; noise and time of the batch are the same every time, so it falls
- memory: most GiB of tensors on the device beside what the estimate says, and of the host

On a CPU the same code trains a small model.

    python benchmarks/one_gpu.py
    python benchmarks/one_gpu.py --steps 3 --set memory.ema=host
    python benchmarks/one_gpu.py --quick
"""

import argparse
import resource
import statistics
import time

import torch
from _measure import Report, at_most, is_full, peak_gib, pick_device, reset_peak, sheet_tflops

from hunyuan_train.config.compose import compose_config
from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.engine.build import lay_out
from hunyuan_train.engine.state import TrainState
from hunyuan_train.engine.step import train_step
from hunyuan_train.engine.trial import MicroBatch, make_batch
from hunyuan_train.memory.estimate import Layout, Work, estimate
from hunyuan_train.memory.states import state_bytes
from hunyuan_train.models.spec import InitKind
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.updates import build_updates
from hunyuan_train.parallel.mesh import Axes
from hunyuan_train.resilience.guard import Guard
from hunyuan_train.runtime.device import synchronize
from hunyuan_train.runtime.dist import World

REAL = ("model=hunyuan_video_13b_cfg", "stage=hunyuan_video_low_short", "optimizer.lr=2e-5")
TINY = ("model=tiny", "optimizer.lr=2e-3")
STD = 0.02


def build_state(cfg: RunConfig, world: World) -> TrainState:
    """Return a training state with random weights, drawn on the device."""
    model, rules = lay_out(cfg, Axes.alone(), world.device)
    updates = build_updates(model, cfg.parallel, cfg.optimizer, cfg.memory, cfg.run.seed)
    weights = updates.local_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in weights.items():
            one = rules[name].kind is InitKind.ONES
            weight.fill_(1.0) if one else weight.normal_(0.0, STD)
    return TrainState(
        model=model,
        updates=updates,
        ema=Ema(model.module, cfg.optimizer, weights, cfg.memory.ema),
        loader=None,  # pyright: ignore[reportArgumentType]  # the batch is made here
        guard=Guard(cfg.resilience),
        skipped_updates=torch.zeros((), device=world.device),
    )


def planned_gib(cfg: RunConfig, bucket: Bucket, text: int) -> float:
    """Return what the estimate says of the device's memory."""
    memory = cfg.memory
    states = state_bytes(memory)
    work = Work(img_tokens=bucket.tokens, txt_tokens=text, recompute=memory.recompute)
    layout = Layout(weight_bytes=int(states.weight), compute_bytes=2)
    return estimate(cfg.model, layout, work, states).total / 2**30


def train(cfg: RunConfig, device: torch.device, shape: MicroBatch, steps: int, out: Report) -> None:
    """Train on one batch and report."""
    world = World(rank=0, local_rank=0, size=1, device=device)
    reset_peak(device)
    state = build_state(cfg, world)
    text = shape.text_lengths[0]
    batch = make_batch(cfg, shape, 0, text)
    losses, seconds, flops = [], [], 0.0
    for _ in range(steps):
        synchronize(device)
        started = time.perf_counter()
        metrics = train_step(state, [batch], cfg, world, 1.0)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        losses.append(metrics.loss.item())
        flops = metrics.flops
        print(f"step {state.step}: loss {losses[-1]:.4f}", flush=True)
    step = statistics.median(seconds[1:] or seconds)
    figure = {
        "value": step,
        "parameters": sum(w.numel() for w in state.weights()["model"].values()),
    }
    if peak := sheet_tflops(device):
        figure["mfu"] = flops / step / (peak * 1e12)
    out.add("step_s", figure)
    fell = losses[-1] < losses[0]
    out.add("loss", {"value": losses[-1], "target": "falls", "holds": fell, "losses": losses})
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    planned = planned_gib(cfg, shape.bucket, text)
    if (most := peak_gib(device)) is not None:
        out.add("device_gib", at_most(most, planned))
    out.add("host_gib", {"value": host, "planned_device_gib": planned})


def main() -> None:
    """Train; print every figure, and all of them last."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--memory", default="one_h200", help="a file of conf/memory")
    parser.add_argument("--set", nargs="*", default=[], help="more fields of the config")
    parser.add_argument("--quick", action="store_true", help="four updates of a small model")
    options = parser.parse_args()
    device = pick_device(options.device)
    small = options.quick or device.type == "cpu"
    fixed = [f"memory={options.memory}", "optimizer.warmup_steps=0", f"run.device={device.type}"]
    cfg = compose_config([*(TINY if small else REAL), *fixed, *options.set])
    bucket = Bucket(9, 64, 64) if small else Bucket(65, 256, 256)
    steps = min(options.steps, 4) if options.quick else options.steps
    report = Report("one_gpu", device)
    try:
        train(cfg, device, MicroBatch(bucket, (16 if small else 256,)), steps, report)
    except RuntimeError as error:
        if not is_full(error):
            raise
        report.add("step_s", {"out_of_memory": True})
    report.finish()


if __name__ == "__main__":
    main()
