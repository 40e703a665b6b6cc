"""One optimizer update: micro-batches in, reduced numbers out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.collate import Batch
from hunyuan_train.engine.state import TrainState
from hunyuan_train.objectives.conditioning import text_drop_mask
from hunyuan_train.objectives.flow_matching import interpolate, model_time, velocity_target
from hunyuan_train.objectives.loss import flow_matching_loss
from hunyuan_train.objectives.timesteps import sample_sigmas
from hunyuan_train.optim.clip import clip_grad_norm
from hunyuan_train.optim.schedule import learning_rate, set_learning_rate
from hunyuan_train.parallel.zero import set_gradient_sync
from hunyuan_train.runtime.dist import World, sum_over_ranks
from hunyuan_train.runtime.seed import keyed_normal


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """Numbers of one update, over all ranks. Tensors are float32 scalars on the device."""

    loss: Tensor
    grad_norm: Tensor
    tokens: int
    samples: int
    flops: float
    learning_rate: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInputs:
    """One micro-batch as the model takes it, with the target of its prediction."""

    noisy: Tensor
    time: Tensor
    text: Tensor
    text_mask: Tensor
    pooled: Tensor
    guidance: Tensor | None
    target: Tensor


def build_inputs(batch: Batch, cfg: RunConfig, scaling_factor: float, device: torch.device) -> ModelInputs:
    """Draw posterior, noise, time and text drop, each keyed by its sample, and mix them.

    Latents are ``(mean + std * draw) * scaling_factor``; the draws do not depend on rank or order.
    """
    seed, ids, epochs = cfg.run.seed, batch.sample_ids, batch.epochs
    shape = tuple(batch.mean.shape[1:])

    def draw(purpose: str) -> Tensor:
        rows = zip(ids, epochs, strict=True)
        return torch.stack([keyed_normal(shape, seed, purpose, i, e) for i, e in rows])

    latents = (batch.mean + batch.std * draw("posterior")) * scaling_factor
    noise = draw("noise")
    sigma = sample_sigmas(cfg.objective, seed, ids, epochs)
    drop = text_drop_mask(seed, ids, epochs, cfg.objective.text_drop)
    text = torch.where(drop[:, None, None], batch.empty_text, batch.text)
    mask = torch.where(drop[:, None], batch.empty_mask, batch.text_mask)
    pooled = torch.where(drop[:, None], batch.empty_pooled, batch.pooled)
    guidance = None
    if cfg.model.guidance_embed:
        guidance = torch.full((len(ids),), 1000.0 * cfg.objective.train_guidance, device=device)
    dtype = getattr(torch, cfg.parallel.compute_dtype)
    return ModelInputs(
        noisy=interpolate(latents, noise, sigma).to(device, dtype),
        time=model_time(sigma).to(device),
        text=text.to(device, dtype),
        text_mask=mask.to(device),
        pooled=pooled.to(device, dtype),
        guidance=guidance,
        target=velocity_target(latents, noise).to(device),
    )


def train_step(state: TrainState, batches: list[Batch], cfg: RunConfig, world: World) -> StepMetrics:
    """Accumulate gradients over ``batches``, clip, update, follow with the EMA.

    The loss is the mean over the tokens of the global batch, whatever buckets the ranks hold: each
    rank back-propagates its loss sum over the global token count. Sharded gradients are averaged
    over ranks by the reduction, which the factor ``world.size`` undoes. An update whose gradient
    norm is not finite is skipped and counted.
    """
    counts = torch.tensor(
        [
            float(sum(len(b.sample_ids) * b.bucket.tokens for b in batches)),
            float(sum(len(b.sample_ids) for b in batches)),
            float(sum(state.loader.flops(b) for b in batches)),
        ],
        dtype=torch.float64,
    )
    tokens, samples, flops = sum_over_ranks(counts).tolist()
    lr = learning_rate(state.step, cfg.optimizer, cfg.stage.steps)
    set_learning_rate(state.optimizer, lr)
    total = torch.zeros((), device=world.device)
    for number, batch in enumerate(batches, start=1):
        set_gradient_sync(state.model, number == len(batches))
        x = build_inputs(batch, cfg, state.loader.scaling_factor, world.device)
        predicted = state.model(x.noisy, x.time, x.text, x.text_mask, x.pooled, x.guidance)
        loss = flow_matching_loss(predicted, x.target).sum
        (loss * (world.size / tokens)).backward()
        total += loss.detach()
    norm = clip_grad_norm(list(state.model.parameters()), cfg.optimizer.clip_norm)
    if bool(torch.isfinite(norm)):
        state.optimizer.step()
        state.ema.update(state.step)
    else:
        state.skipped_updates += 1
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.samples += int(samples)
    state.tokens += int(tokens)
    return StepMetrics(
        loss=sum_over_ranks(total) / tokens,
        grad_norm=norm,
        tokens=int(tokens),
        samples=int(samples),
        flops=flops,
        learning_rate=lr,
    )
