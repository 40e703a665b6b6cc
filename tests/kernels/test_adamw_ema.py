"""AdamW and moving average: against the reference, torch's own optimizer, and when skipped."""

import math

import pytest
import torch

from hunyuan_kernels import adamw_ema, dispatch
from hunyuan_kernels.ops.adamw_ema import reference
from hunyuan_kernels.testing import check

SHAPES = [(37, 61), (5,), (2, 3, 7)]
HYPER = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def inputs(grad_dtype=torch.float32, device="cpu", shapes=SHAPES, step=3.0):
    torch.manual_seed(0)

    def noise():
        return [torch.randn(shape, device=device) for shape in shapes]

    return {
        "params": noise(),
        "grads": [g.to(grad_dtype) for g in noise()],
        "exp_avgs": [m * (step > 0) for m in noise()],
        "exp_avg_sqs": [m.square() * (step > 0) for m in noise()],
        "steps": [torch.tensor(step, device=device) for _ in shapes],
        "emas": noise(),
        "copies": [p.bfloat16() for p in noise()],
    }


@pytest.mark.kernel
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [0.0, 900.0])
def test_kernel_is_no_worse_than_eager(grad_dtype, step):
    factor = torch.tensor(0.37)
    lists = inputs(grad_dtype, step=step)
    check("adamw_ema", *lists.values(), grad_factor=factor, ema_decay=0.9, **HYPER)


@pytest.mark.kernel
def test_without_average_copy_or_factor():
    lists = inputs()
    check("adamw_ema", *(lists | {"emas": [], "copies": []}).values(), **HYPER)


@pytest.mark.kernel
@pytest.mark.parametrize("fused", [True, False])
def test_five_updates_are_those_of_torch(fused):
    lists = inputs(step=0.0)
    params = [torch.nn.Parameter(p.clone()) for p in lists["params"]]
    averages = [e.clone() for e in lists["emas"]]
    optimizer = torch.optim.AdamW(
        params, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, fused=True
    )
    for update in range(5):
        factor, decay = torch.tensor(0.5), (1 + update) / (10 + update)
        for param, grad in zip(params, lists["grads"], strict=True):
            grad.normal_()
            param.grad = grad * factor
        optimizer.step()
        torch._foreach_lerp_(averages, [p.detach() for p in params], 1 - decay)
        if fused:
            with dispatch.also_on("cpu"):
                adamw_ema(**lists, grad_factor=factor, ema_decay=decay, **HYPER)
        else:
            reference.adamw_ema(**lists, grad_factor=factor, ema_decay=decay, **HYPER)
    close = {"rtol": 2e-6, "atol": 2e-6}
    for place, param in enumerate(params):
        state = optimizer.state[param]
        torch.testing.assert_close(lists["params"][place], param.detach(), **close)
        torch.testing.assert_close(lists["exp_avgs"][place], state["exp_avg"], **close)
        torch.testing.assert_close(lists["exp_avg_sqs"][place], state["exp_avg_sq"], **close)
        torch.testing.assert_close(lists["emas"][place], averages[place], **close)
        torch.testing.assert_close(lists["copies"][place], param.detach().bfloat16())
        assert lists["steps"][place] == 5


@pytest.mark.kernel
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("step", [0.0, 3.0])
def test_a_norm_that_is_not_finite_changes_nothing(fused, step):
    lists = inputs(step=step)
    lists["grads"][0][3, 4] = math.nan
    before = {name: [t.clone() for t in tensors] for name, tensors in lists.items()}
    norm = torch.tensor(math.nan)
    skip = (~norm.isfinite()).float()
    call = adamw_ema if fused else reference.adamw_ema
    with dispatch.also_on("cpu"):
        call(**lists, skip=skip, grad_factor=1 / norm, ema_decay=0.9, **HYPER)
    for name, tensors in lists.items():
        for after, kept in zip(tensors, before[name], strict=True):
            assert torch.equal(after, kept) or name == "grads", name
    lists["grads"][0][3, 4] = 0.0
    with dispatch.also_on("cpu"):
        call(**lists, skip=torch.zeros(()), ema_decay=0.9, **HYPER)
    assert lists["steps"][0] == step + 1
    assert not torch.equal(lists["params"][1], before["params"][1])


@pytest.mark.gpu
def test_real_sizes():
    lists = inputs(torch.bfloat16, "cuda", [(3072, 12_288), (3072,), (9216, 3072)])
    check("adamw_ema", *lists.values(), ema_decay=0.99, **HYPER)
