"""The device mesh: which ranks hold replicas and which share one sharded copy."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hunyuan_train.parallel.config import ParallelConfig


def build_mesh(cfg: ParallelConfig, device_type: str, world_size: int) -> DeviceMesh:
    """Return the mesh ``dp_replicate x dp_shard`` over all ranks.

    Raises:
        ValueError: if ``dp_replicate`` does not divide the world size; lists the values that do.
    """
    if world_size % cfg.dp_replicate:
        legal = " ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ValueError(
            f"parallel.dp_replicate={cfg.dp_replicate} does not divide the world size "
            f"{world_size}; choose from {legal}"
        )
    shape = (cfg.dp_replicate, world_size // cfg.dp_replicate)
    return init_device_mesh(device_type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))
