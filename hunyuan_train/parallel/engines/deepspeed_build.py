"""Hands a model to DeepSpeed: its settings, and what it wants of its surroundings."""

import logging
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from hunyuan_train.parallel.config import Offload, ParallelConfig
from hunyuan_train.parallel.engines.deepspeed import DeepSpeedUpdates
from hunyuan_train.parallel.layout import Slices
from hunyuan_train.parallel.mesh import Axes
from hunyuan_train.runtime.env import set_default

_BUCKET = 100_000_000
"""Elements per reduction: the largest weight of the 13B model has 66 million."""


def build_deepspeed(
    module: nn.Module,
    optimizer_factory: Callable[[nn.Module], AdamW],
    cfg: ParallelConfig,
    axes: Axes,
    slices: Mapping[str, Slices],
    *,
    partial: Collection[str] = (),
    persistent_below: int = 100_000,
) -> DeepSpeedUpdates:
    """Hand ``module`` to DeepSpeed, which shards it over the ``grads`` axis.

    Give it on ``meta`` and call :meth:`DeepSpeedUpdates.fill` afterwards to save memory; a module
    with weights keeps them, unrounded in the master weights.

    Args:
        module: Cut for tensor parallelism already; its parameters are plain tensors.
        optimizer_factory: Makes the AdamW whose groups and settings count; state is dropped.
        cfg: Stage 1, 2 or 3, compute and reduce dtype, where the optimizer lives.
        axes: This rank's place.
        slices: Which part of the whole each cut parameter is; the others are whole.
        partial: Parameters whose gradient is still to be added up over tensor-parallel ranks.
        persistent_below: Smaller parameters stay gathered in stage 3.

    Raises:
        ValueError: DeepSpeed is not installed.
    """
    deepspeed = _import_deepspeed(axes)
    on_gpu = _device_type(axes) == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    # DeepSpeed insists on the variable even where a single process has no launcher.
    set_default("LOCAL_RANK", str(device.index or 0))
    optimizer = optimizer_factory(module)
    exact = _materialize(module, optimizer, getattr(torch, cfg.compute_dtype), device)
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters() if p.requires_grad}
    for name, param in module.named_parameters():
        param.tensor_model_parallel = name in slices  # pyright: ignore[reportAttributeAccessIssue]
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=_settings(cfg, on_gpu, persistent_below),
        mpu=_model_parallel_unit(axes),
        dist_init_required=False,
    )
    updates = DeepSpeedUpdates(engine, shapes, axes, slices, partial)
    if exact:
        updates.fill(exact.__getitem__)
    return updates


def _device_type(axes: Axes) -> str:
    assert axes.mesh is not None, "a process that works alone has no groups to shard over"
    return axes.mesh.device_type


def _import_deepspeed(axes: Axes) -> Any:
    """Import the package for the device of ``axes``.

    Raises:
        ValueError: it is not installed.
    """
    # Read at import: without it DeepSpeed takes a GPU whenever the machine has one.
    set_default("DS_ACCELERATOR", _device_type(axes))
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            "parallel.zero_engine=deepspeed needs a package that is not installed: "
            "`pip install hunyuan_train[deepspeed]`, or set parallel.zero_engine=torch"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On CPU it would compile an all-reduce for inference when the first engine is made.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _materialize(
    module: nn.Module, optimizer: AdamW, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Bring the parameters to ``dtype`` on ``device``, and the optimizer along, without its state.

    Returns:
        The values that lost digits, kept on the CPU.
    """
    exact, names = {}, {}
    for name, param in module.named_parameters():
        names[id(param)] = name
        if param.requires_grad and not param.is_meta and param.dtype != dtype:
            exact[name] = param.detach().to("cpu", copy=True)
        param.data = param.data.to(dtype)
    if any(param.is_meta for param in module.parameters()):
        module.to_empty(device=device)  # makes new parameters
    now = dict(module.named_parameters())
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.update(params=[now[names[id(p)]] for p in group["params"]], fused=True, foreach=False)
    return exact


def _settings(cfg: ParallelConfig, on_gpu: bool, persistent_below: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration: no averaging, no clipping, no accumulation count."""
    stage, narrow = cfg.zero_stage, cfg.compute_dtype == "bfloat16"
    offload = cfg.offload_optimizer is Offload.cpu
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": _BUCKET,
        "stage3_param_persistence_threshold": persistent_below,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    elif stage == 2 or (stage == 1 and not narrow):
        zero["compute_grad_norm"] = False  # Ours is used; the other cases cannot do without.
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # set_gradient_accumulation_boundary says where
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "communication_data_type": {"float32": "fp32", "bfloat16": "bf16"}[cfg.reduce_dtype],
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": narrow, "check_grad_overflow": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def _model_parallel_unit(axes: Axes) -> SimpleNamespace:
    """Return the six functions DeepSpeed asks for groups."""
    return SimpleNamespace(
        get_model_parallel_rank=lambda: axes.rank("tp"),
        get_model_parallel_world_size=lambda: axes.size("tp"),
        get_model_parallel_group=lambda: axes.group("tp"),
        get_data_parallel_rank=lambda: axes.rank("grads"),
        get_data_parallel_world_size=lambda: axes.size("grads"),
        get_data_parallel_group=lambda: axes.group("grads"),
    )
