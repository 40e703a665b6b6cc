"""Rules that span sections. Each returns a sentence naming the fields, their values and the fix."""

from collections.abc import Callable, Iterator

from hunyuan_train.config.curriculum import Carried
from hunyuan_train.config.root import RunConfig


def check_text_width(cfg: RunConfig) -> Iterator[str]:
    """The model must take the features the text encoder makes."""
    for field in ("text_dim", "pooled_dim"):
        model, text = getattr(cfg.model, field), getattr(cfg.text, field)
        if model != text:
            yield (
                f"model.{field}={model} does not match text.{field}={text}; "
                f"set both to the width of the text encoder ({text})"
            )


def check_latent_channels(cfg: RunConfig) -> Iterator[str]:
    """The model must take and give the latents the VAE makes."""
    for field in ("in_channels", "out_channels"):
        channels = getattr(cfg.model, field)
        if channels != cfg.vae.latent_channels:
            yield (
                f"model.{field}={channels} does not match "
                f"vae.latent_channels={cfg.vae.latent_channels}; set them to the same number"
            )


def check_warmup(cfg: RunConfig) -> Iterator[str]:
    """The warm-up must end before the stage does, unless it was in an earlier one."""
    if Carried.schedule not in cfg.stage.carry and cfg.optimizer.warmup_steps >= cfg.stage.steps:
        yield (
            f"optimizer.warmup_steps={cfg.optimizer.warmup_steps} does not end before "
            f"stage.steps={cfg.stage.steps}; lower the warm-up or train longer"
        )


def check_distillation(cfg: RunConfig) -> Iterator[str]:
    """A student must be told its scale."""
    if cfg.objective.distill and not cfg.model.guidance_embed:
        yield (
            "objective.distill=true teaches the model what a guidance scale does, but "
            "model.guidance_embed=false; set it to true"
        )


RULES: list[Callable[[RunConfig], Iterator[str]]] = [
    check_text_width,
    check_latent_channels,
    check_warmup,
    check_distillation,
]


def check_all(cfg: RunConfig) -> list[str]:
    """Return the sentences of every rule that ``cfg`` breaks."""
    return [message for rule in RULES for message in rule(cfg)]
