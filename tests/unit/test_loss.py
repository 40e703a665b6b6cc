"""The loss as a sum and a count."""

import pytest
import torch
import torch.nn.functional as F

from hunyuan_train.objectives.loss import flow_matching_loss


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("shape", [(2, 16, 3, 8, 12), (1, 16, 1, 4, 4)])
def test_sum_over_count_is_the_plain_mean_squared_error(shape: tuple[int, ...]) -> None:
    pred, target = pair(*shape)
    loss = flow_matching_loss(pred, target)
    batch, _, frames, height, width = shape
    assert loss.count == batch * frames * (height // 2) * (width // 2)
    torch.testing.assert_close(loss.mean, F.mse_loss(pred, target))


def test_sum_adds_the_mean_error_of_each_token() -> None:
    pred, target = torch.zeros(1, 2, 1, 4, 4), torch.zeros(1, 2, 1, 4, 4)
    target[0, :, 0, 0:2, 2:4] = 3.0  # one whole token, error 9
    target[0, 1, 0, 3, 0] = 4.0  # one value of the 8 of another, error 16 / 8
    loss = flow_matching_loss(pred, target)
    assert loss.sum.item() == pytest.approx(9.0 + 2.0)
    assert loss.count == 4


def test_sums_over_unequal_buckets_weight_tokens_equally() -> None:
    small, large = pair(1, 4, 1, 4, 4), pair(2, 4, 3, 8, 8, seed=1)
    losses = [flow_matching_loss(*small), flow_matching_loss(*large)]
    together = sum(x.sum for x in losses) / sum(x.count for x in losses)
    flat = [torch.cat([small[i].flatten(), large[i].flatten()]) for i in (0, 1)]
    torch.testing.assert_close(together, F.mse_loss(*flat))


def test_half_precision_predictions_are_compared_in_float32() -> None:
    pred, target = pair(1, 4, 2, 4, 4)
    loss = flow_matching_loss(pred.bfloat16(), target)
    assert loss.sum.dtype == torch.float32
    expected = F.mse_loss(pred.bfloat16().float(), target)
    torch.testing.assert_close(loss.mean, expected)


def test_gradient_is_two_errors_over_the_values_of_a_token() -> None:
    pred, target = pair(1, 4, 1, 4, 4)
    pred.requires_grad_()
    flow_matching_loss(pred, target).sum.backward()
    torch.testing.assert_close(pred.grad, 2 * (pred.detach() - target) / 16)
