"""Every parameter's update inside the backward, as soon as its gradient is complete.

The gradient is freed at once, so at most those of one block exist at a time: 26 GB less for 12.8e9
parameters in bfloat16. The norm of all gradients is known only when it is over, therefore:

- there is no clipping by it; AdamW's update does not depend on the size of gradients that are all
  scaled alike, so ``clip_norm`` matters mostly for single outliers;
- from the first gradient that is not finite on, in the order of the backward, parameters are left
  alone. A loss that is not finite spoils the first gradient already, so that nothing changes; an
  overflow in the middle of the backward leaves the parameters behind it updated. The norm is not
  finite then, and the update is counted as skipped.
- a loss that the guard refuses has to be refused before the backward: :meth:`FusedBackward.refuse`.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hunyuan_train.optim.clip import local_part


class FusedBackward:
    """Calls an update from hooks on the parameters and measures the norm on the way."""

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        update: Callable[[str, Tensor, Tensor], None],
        frozen: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Install the hooks.

        Args:
            params: Trainable parameters by name.
            update: Called with name, gradient and a float32 scalar that is 1 to skip.
            frozen: Says by name which parameters this update leaves alone.
        """
        device = next(iter(params.values())).device
        self._update, self._frozen = update, frozen
        self._squares = torch.zeros((), device=device)
        self._refused = torch.zeros((), device=device)
        for name, param in params.items():
            param.register_post_accumulate_grad_hook(self._hook(name))

    def refuse(self, norm: Tensor) -> None:
        """Leave all parameters alone in the next backward where ``norm`` is not finite."""
        self._refused.copy_(~torch.isfinite(norm))

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def hook(param: Tensor) -> None:
            assert param.grad is not None
            if self._frozen(name):
                param.grad = None
                return
            norm = torch.linalg.vector_norm(local_part(param.grad), dtype=torch.float32)
            self._squares.add_(norm.square())
            spoilt = (~torch.isfinite(self._squares)).to(torch.float32)
            self._update(name, param.grad, torch.maximum(spoilt, self._refused))
            param.grad = None

        return hook

    def norm(self) -> Tensor:
        """Return the norm of the gradients since the last call, and start anew."""
        norm = self._squares.sqrt()
        self._squares.zero_()
        self._refused.zero_()
        return norm
