"""Measure one block here and compare it with what a plan predicts."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hunyuan_train.config.root import RunConfig
from hunyuan_train.engine.planning_run import layout_of, planned_buckets, search_options
from hunyuan_train.memory.estimate import Layout, Work, estimate, kept_bytes
from hunyuan_train.memory.step_time import TimeModel
from hunyuan_train.memory.tracing import SavedBytes
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.hunyuan.model import HunyuanVideo
from hunyuan_train.models.registry import build_model
from hunyuan_train.models.rope import Rope
from hunyuan_train.runtime.device import Stopwatch, resolve_device, synchronize

CPU_TOKENS = 512
"""Image tokens of the largest bucket that is measured on a CPU."""
_REPEATS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One number, predicted and measured."""

    name: str
    predicted: float
    measured: float
    unit: str

    @property
    def error(self) -> float:
        """Prediction over measurement, less 1."""
        return self.predicted / self.measured - 1

    def __str__(self) -> str:
        """Return the figure as a line."""
        return (
            f"  {self.name:<38} predicted {self.predicted:9.3f} {self.unit}, measured "
            f"{self.measured:9.3f} {self.unit}, error {self.error:+.1%}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The answer of ``hunyuan-train plan verify``."""

    title: str
    figures: list[Figure]

    def __str__(self) -> str:
        """Return the figures as text."""
        return "\n".join([self.title, *map(str, self.figures)])


def verify_plan(cfg: RunConfig) -> Verification:
    """Run one double and one single block forward and backward on this device.

    On CUDA in the run's compute dtype with the largest bucket that the prediction says fits; on a
    CPU in float32 with at most ``CPU_TOKENS`` image tokens, where only what autograd keeps is
    compared: a CPU's memory holds more than tensors, and a plan predicts no CPU times.

    Raises:
        ValueError: no bucket is small enough for this device.
    """
    device = resolve_device(cfg.run.device)
    cuda = device.type == "cuda"
    dtype = getattr(torch, cfg.parallel.compute_dtype) if cuda else torch.float32
    layout = replace(
        layout_of(cfg, cfg.parallel.tp * cfg.parallel.cp * cfg.parallel.dp_replicate),
        world=1, tp=1, sp=False, cp_ring=1, cp_ulysses=1, dp_replicate=1, zero_stage=0,
        compute_bytes=dtype.itemsize,
    )  # fmt: skip
    work = _work(cfg, device, layout)
    figures: list[Figure] = []
    for doubles, singles in ((1, 0), (0, 1)):
        model = replace(cfg.model, num_double_blocks=doubles, num_single_blocks=singles)
        name = "double block" if doubles else "single block"
        figures += _measure(cfg, model, name, layout, work, device, dtype)
    where = torch.cuda.get_device_name(device) if cuda else "CPU"
    title = f"{where}, {dtype}, {work.img_tokens} image and {work.txt_tokens} text tokens"
    return Verification(title=title, figures=figures)


def _work(cfg: RunConfig, device: torch.device, layout: Layout) -> Work:
    """Return the largest micro-batch of one sample that is tried here."""
    tokens = sorted({bucket.tokens for bucket in planned_buckets(cfg)[1]}, reverse=True)
    one = replace(cfg.model, num_double_blocks=1, num_single_blocks=0)
    for count in tokens:
        work = Work(img_tokens=count, txt_tokens=cfg.text.length)
        if device.type != "cuda":
            return replace(work, img_tokens=min(tokens[0], CPU_TOKENS))
        room = torch.cuda.mem_get_info(device)[0] * 0.9
        if estimate(one, layout, work).total < room:
            return work
    raise ValueError(
        f"no bucket fits {torch.cuda.get_device_name(device)} with a single block; choose a stage "
        "of smaller buckets"
    )


def _measure(
    cfg: RunConfig,
    model: HunyuanConfig,
    name: str,
    layout: Layout,
    work: Work,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Figure]:
    block, inputs = _block(model, work, device, dtype)
    saved = SavedBytes(lambda: [*block.parameters(), *inputs[-1:]])
    with saved:
        out = _run(block, inputs)
    figures = [
        Figure(
            name=f"{name}, kept for the backward",
            predicted=kept_bytes(model, layout, work) / 2**30,
            measured=saved.take() / 2**30,
            unit="GiB",
        )
    ]
    del out
    if device.type != "cuda":
        return figures
    parts = estimate(model, layout, work)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _run(block, inputs).sum().backward()
    gradients = sum(parameter.nbytes for parameter in block.parameters())
    peak = torch.cuda.max_memory_allocated(device) - held
    needed = parts.activations + parts.working + parts.attention + gradients
    figures.append(
        Figure(
            name=f"{name}, most at a time",
            predicted=needed / 2**30,
            measured=peak / 2**30,
            unit="GiB",
        )
    )
    figures.append(_time(cfg, model, name, layout, work, (block, inputs), device))
    return figures


def _time(
    cfg: RunConfig,
    model: HunyuanConfig,
    name: str,
    layout: Layout,
    work: Work,
    run: tuple[nn.Module, list[Tensor]],
    device: torch.device,
) -> Figure:
    watch = Stopwatch(device)
    for _ in range(_REPEATS + 1):
        watch.mark()
        _run(*run).sum().backward()
    watch.mark()
    synchronize(device)
    options = search_options(cfg, 1)
    bare = replace(model, refiner_depth=0)
    time = TimeModel(bare, cfg.cluster, options.kernel, options.fused).predict(layout, work)
    parts = time.parts
    seconds = parts.linear + parts.attention + parts.elementwise
    return Figure(
        name=f"{name}, forward and backward",
        predicted=1000 * seconds,
        measured=1000 * min(watch.seconds()[1:]),
        unit="ms",
    )


def _block(
    model: HunyuanConfig, work: Work, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, list[Tensor]]:
    """Return the only block of a model and its inputs: tokens, then the conditioning vector."""
    with torch.device("meta"):
        whole = build_model(model)
    assert isinstance(whole, HunyuanVideo)
    block = next(iter([*whole.double_blocks, *whole.single_blocks])).to(dtype)
    block = block.to_empty(device=device)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)

    def tokens(rows: int) -> Tensor:
        return torch.randn(1, rows, model.hidden_size, device=device, dtype=dtype).requires_grad_()

    streams = [tokens(work.img_tokens), tokens(work.txt_tokens)]
    if model.num_single_blocks:
        streams = [tokens(work.img_tokens + work.txt_tokens)]
    return block, [*streams, tokens(1)[:, 0].detach().requires_grad_()]


def _run(block: nn.Module, inputs: list[Tensor]) -> Tensor:
    """Return what a block makes of its inputs, joined."""
    rows = sum(stream.shape[1] for stream in inputs[:-1])
    angles = torch.zeros(rows, block.head_dim // 2, device=inputs[0].device)  # pyright: ignore[reportOperatorIssue, reportArgumentType]
    out = block(*inputs, Rope(angles.cos(), angles.sin()), None)
    return torch.cat(out, dim=1) if isinstance(out, tuple) else out
