"""Several runs one after the other in the same processes: what they import, they import once."""


def train_all(rank: int, world: int, runs: list[list[str]]) -> list[str]:
    """Train one config after the other; return how each ended, or what it said."""
    import torch

    from hunyuan_train.config.compose import compose_config
    from hunyuan_train.engine.loop import train
    from hunyuan_train.resilience.preemption import Preemption
    from hunyuan_train.runtime.dist import World

    here = World(rank=rank, local_rank=rank, size=world, device=torch.device("cpu"))
    ends = []
    for fields in runs:
        try:
            # A process that writes checkpoints takes longer to start than these to train.
            cfg = compose_config([*fields, "checkpoint.asynchronous=false"])
            with Preemption(cfg.resilience) as preemption:
                ends.append(train(cfg, here, preemption).value)
        except ValueError as error:
            ends.append(str(error))
    return ends
