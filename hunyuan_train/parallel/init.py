"""First values of a laid-out model, the same in every layout."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hunyuan_train.models.spec import InitKind, InitRule
from hunyuan_train.parallel.view import WholeView, fill_part
from hunyuan_train.runtime.seed import keyed_torch_generator


@torch.no_grad()
def init_parameters(parts: Mapping[str, Tensor], rules: Mapping[str, InitRule], seed: int) -> None:
    """Fill every parameter from its rule, drawing from a generator keyed by its name.

    Each rank draws the whole of one parameter at a time on the CPU and keeps its part, so the
    weights depend neither on the layout nor on the device, and nothing is sent.

    Args:
        parts: What this rank stores of every parameter, by name, as a checkpoint sees it.
        rules: Rule of every parameter by name.
        seed: Seed of the run.
    """
    for name, part in parts.items():
        if isinstance(part, WholeView) and part.is_empty:
            continue
        rule = rules[name]
        if rule.kind in (InitKind.ZEROS, InitKind.ONES):
            whole = torch.full((), float(rule.kind is InitKind.ONES)).expand(part.shape)
        else:
            whole = torch.empty(part.shape, dtype=torch.float32)
            rule.fill(whole, keyed_torch_generator(seed, "init", name))
        fill_part(part, whole)
