"""ZeRO by DeepSpeed: the same updates as ours, on DeepSpeed's flat partitions.

DeepSpeed runs forward, backward, the reduction over data- and context-parallel ranks, the update
and the gathering of updated weights. Norm, clipping and the decision to skip stay ours, so that
they mean the same with every engine.

DeepSpeed keeps the float32 master weights of many parameters in one flat tensor and cuts that
evenly over ranks (stages 1 and 2), or cuts each parameter by itself (stage 3). Either way a rank
owns at most one range of each flattened parameter, its :class:`Fragment`.

Source: ZeRO (arXiv 1910.02054).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from hunyuan_train.parallel.gradients import sum_in_place
from hunyuan_train.parallel.layout import Slices, whole_slices
from hunyuan_train.parallel.mesh import Axes
from hunyuan_train.parallel.view import WholeView


@dataclass(frozen=True, slots=True)
class Fragment:
    """The range of one flattened tensor-parallel-local parameter that this rank owns."""

    start: int
    """First element, in the parameter."""
    count: int
    offset: int
    """First element, in the flat tensors that hold it."""
    flat: Tensor
    """The flat float32 master weights the optimizer updates."""

    def of(self, flat: Tensor) -> Tensor:
        """Return the fragment of a tensor that is laid out like :attr:`flat`, as a view."""
        return flat.detach().narrow(0, self.offset, self.count)


class DeepSpeedUpdates:
    """Backward, clipping and update of a model whose state DeepSpeed shards.

    Build it with ``deepspeed_build.build_deepspeed``.
    """

    def __init__(
        self,
        engine: Any,
        shapes: Mapping[str, tuple[int, ...]],
        axes: Axes,
        slices: Mapping[str, Slices],
        partial: Collection[str],
    ) -> None:
        """Find this rank's fragments and allocate their moments."""
        self.module: nn.Module = engine
        """What the forward calls."""
        self._engine, self._zero = engine, engine.optimizer
        self._adam: AdamW = engine.basic_optimizer
        self._axes, self._slices, self._shapes = axes, slices, shapes
        self._params = {n: p for n, p in engine.module.named_parameters() if n in shapes}
        self._sharded = engine.zero_optimization_stage() == 3
        self._places = _stage_three_places(self._zero) if self._sharded else {}
        found = {name: self._locate(param) for name, param in self._params.items()}
        self.fragments = {name: f for name, f in found.items() if f is not None}
        """What this rank owns, by name."""
        self._partial = [name for name in self.fragments if name in partial]
        # DeepSpeed averages in stage 3 whatever it is told; before, it can be told to sum.
        self._scale = axes.size("grads") if self._sharded else 1
        # For the parameters this rank owns nothing of: a checkpoint wants an entry for each.
        self._step_count = torch.zeros((), device=engine.device)
        self._nothing = torch.zeros(0, device=engine.device)
        for flat in {id(f.flat): f.flat for f in self.fragments.values()}.values():
            self._adam.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                "exp_avg": torch.zeros_like(flat.detach()),
                "exp_avg_sq": torch.zeros_like(flat.detach()),
            }

    def start_update(self, done: int) -> None:
        """Do nothing: every update trains everything."""

    def start_micro_step(self, *, last: bool) -> None:
        """Prepare a forward; ``last`` says that the update follows its backward."""
        self._engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients: after the last call they are sums over calls and ranks.

        Args:
            loss: this rank's part of the loss, which is a sum over ranks and calls.
            last: as in :meth:`start_micro_step`.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._scale, scale_wrt_gas=False)
        if last and self._partial and self._axes.size("tp") > 1:
            # Ranks of a tensor-parallel group own the same ranges, so the sum is elementwise.
            sum_in_place([self._gradient(n) for n in self._partial], self._axes.group("tp"))

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients to a global norm of at most ``max_norm``; 0 measures only.

        Returns:
            The 2-norm before, over the whole model: a scalar that is equal on every rank.
        """
        grads = {name: self._gradient(name) for name in self.fragments}
        norm = self._global_norm(grads)
        if max_norm > 0 and grads:
            parts = list(grads.values())
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(parts, factor.to(parts[0].device))
        return norm

    def step(self, norm: Tensor) -> Tensor:
        """Update unless ``norm`` is NaN or infinite, and drop the gradients.

        Returns:
            1.0 if the update was skipped, else 0.0: a float32 scalar.
        """
        skipped = (~torch.isfinite(norm)).to(torch.float32)
        # The hooks torch.amp.GradScaler uses: the fused kernel reads the flag on the device.
        self._adam.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
        self._adam.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]
        self._engine.step()
        self._step_count += 1.0 - skipped.to(self._step_count.device)
        return skipped

    def carry(self, ema: object, number: int) -> bool:
        """Leave the moving average to the caller."""
        return False

    def refuse(self, norm: Tensor) -> None:
        """Do nothing: no backward updates."""

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next updates."""
        for group in self._adam.param_groups:
            group["lr"] = lr

    def local_weights(self) -> dict[str, Tensor]:
        """Return this rank's live float32 master weights by name: flat, empty if it has none."""
        return {
            name: fragment.of(fragment.flat) if fragment else self._nothing
            for name, fragment in self._every_fragment()
        }

    def local_moments(self) -> dict[str, dict[str, Tensor]]:
        """Return the live state of AdamW: ``step``, and the moments laid out like the weights.

        Parameters in one flat tensor share one ``step``.
        """
        nothing = {"step": self._step_count, "exp_avg": self._nothing, "exp_avg_sq": self._nothing}
        moments = {}
        for name, fragment in self._every_fragment():
            state = self._adam.state[fragment.flat] if fragment else nothing
            moments[name] = {
                key: fragment.of(value) if fragment and value.ndim else value
                for key, value in state.items()
            }
        return moments

    def view(self, name: str, tensor: Tensor) -> Tensor:
        """Return a fragment of parameter ``name`` as a checkpoint sees it: part of the whole."""
        if tensor.dim() == 0:
            return tensor
        slices = self._slices.get(name) or whole_slices(self._shapes[name])
        fragment = self.fragments.get(name)
        return WholeView.of(tensor, slices, flat_start=fragment.start if fragment else 0)

    def _every_fragment(self) -> list[tuple[str, Fragment | None]]:
        return [(name, self.fragments.get(name)) for name in self._shapes]

    @torch.no_grad()
    def fill(self, read: Callable[[str], Tensor]) -> None:
        """Overwrite all weights, on all ranks.

        Master weights take the values unrounded, whatever the compute dtype.

        Args:
            read: Gives a tensor-parallel-local parameter by name; only asked for those of which
                this rank owns something.
        """
        for name, fragment in self.fragments.items():
            part = read(name).reshape(-1).narrow(0, fragment.start, fragment.count)
            fragment.of(fragment.flat).copy_(part)
        self.weights_changed()

    @torch.no_grad()
    def weights_changed(self) -> None:
        """Bring the model's parameters in line with overwritten master weights, on all ranks."""
        if not self._sharded:
            self._zero.update_lp_params()
            return
        # What the end of DeepSpeed's own step does.
        self._zero._partition_all_parameters()
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def local_gradients(self) -> dict[str, Tensor]:
        """Return the live gradients of the fragments, between the last backward and the step."""
        return {
            name: self._gradient(name) if fragment else self._nothing
            for name, fragment in self._every_fragment()
        }

    @torch.no_grad()
    def whole_gradients(self) -> dict[str, Tensor]:
        """Return every gradient whole (tensor-parallel-local), for tests and certification.

        Call it on all ranks between the last :meth:`backward` and :meth:`step`.
        """
        grads = {}
        for name, shape in self._shapes.items():
            flat = torch.zeros(torch.Size(shape).numel(), device=self._engine.device)
            if (fragment := self.fragments.get(name)) is not None:
                flat.narrow(0, fragment.start, fragment.count).copy_(self._gradient(name))
            dist.all_reduce(flat, group=self._axes.group("grads"))
            grads[name] = flat.view(shape)
        return grads

    def _global_norm(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Return the 2-norm over all ranks, counting what every tp rank holds once."""
        total = torch.zeros((), device=self._engine.device)
        if grads:
            norms = torch.stack(torch._foreach_norm(list(grads.values()), 2))
            copies = [1 if name in self._slices else self._axes.size("tp") for name in grads]
            total += (norms.square() / norms.new_tensor(copies)).sum()
        dist.all_reduce(total)
        return total.sqrt()

    def _locate(self, param: Tensor) -> Fragment | None:
        """Return this rank's fragment of a parameter, None if it has none."""
        if self._sharded:
            group, _ = self._places[id(param)]
            _, offset, size = self._zero.grad_position[self._zero.get_param_id(param)]
            start = self._axes.rank("grads") * size
            count = max(min(size, param.ds_numel - start), 0)  # pyright: ignore[reportAttributeAccessIssue]
            flat = self._zero.fp32_partitioned_groups_flat[group]
        else:
            mapping = param._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
            if mapping is None:
                return None
            start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            offset = mapping.hp_fragment_address.start
            flat = self._adam.param_groups[mapping.param_group_index]["params"][0]
        return Fragment(start, count, offset, flat) if count else None

    def _gradient(self, name: str) -> Tensor:
        """Return the live float32 gradient of this rank's fragment, after the last backward."""
        param, fragment = self._params[name], self.fragments[name]
        if not self._sharded:
            mapping = param._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
            grad = mapping.get_lp_grad_fragment(param._index_in_param_group).view(-1)  # pyright: ignore[reportAttributeAccessIssue]
            # Stage 1 in bfloat16 keeps whole gradients, of which the update takes the fragment.
            whole = grad.numel() != fragment.count
            return grad.narrow(0, fragment.start, fragment.count) if whole else grad
        if fragment.flat.grad is not None:  # offloaded
            return fragment.of(fragment.flat.grad)
        group, position = self._places[id(param)]
        return self._zero.averaged_gradients[group][position].narrow(0, 0, fragment.count)


def _stage_three_places(zero: Any) -> dict[int, tuple[int, int]]:
    """Return sub-group and position in it of every parameter, by id."""
    return {
        id(param): (group, position)
        for group, members in enumerate(zero.fp16_groups)
        for position, param in enumerate(members)
    }
