"""Rules that span sections. Each returns a sentence naming the fields, their values and the fix."""

from collections.abc import Callable, Iterator

from hunyuan_train.config.curriculum import Carried
from hunyuan_train.config.root import RunConfig
from hunyuan_train.config.run import Trains
from hunyuan_train.data.config import Encode
from hunyuan_train.models.hunyuan.config import ImageCondition
from hunyuan_train.parallel.config import ZeroEngine


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
    latent = cfg.vae.latent_channels
    concat = cfg.model.image_condition is ImageCondition.concat
    for field, wanted in (("in_channels", 2 * latent + 1 if concat else latent),
                          ("out_channels", latent)):  # fmt: skip
        channels = getattr(cfg.model, field)
        if channels != wanted:
            yield (
                f"model.{field}={channels} does not match vae.latent_channels={latent}; set it to "
                f"{wanted}"
            )


def check_tasks(cfg: RunConfig) -> Iterator[str]:
    """The model must take the frames that tasks give, and on-line encoding must make them."""
    needed = cfg.objective.given_frames
    if needed and cfg.model.image_condition is ImageCondition.none:
        yield (
            f"objective.tasks={cfg.objective.tasks} gives frames to a model that takes none "
            "(model.image_condition=none); set it to token_replace or concat"
        )
    online = cfg.data.encode is not Encode.ahead
    if online and not set(needed) <= set(cfg.data.condition_frames):
        yield (
            f"objective.tasks={cfg.objective.tasks} gives the frames {', '.join(needed)}, but "
            f"data.condition_frames={cfg.data.condition_frames}; set it to [{','.join(needed)}]"
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


def check_lora(cfg: RunConfig) -> Iterator[str]:
    """Adapters wrap whole linears, and nothing else is trained."""
    rank, parallel = f"lora.rank={cfg.lora.rank}", cfg.parallel
    if not cfg.lora.rank:
        return
    if parallel.tp > 1:
        yield (
            f"{rank} wraps whole linears, and parallel.tp={parallel.tp} cuts them; set "
            "parallel.tp=1 and spread the model with parallel.zero_stage=3 and parallel.cp_ring"
        )
    if parallel.zero_engine is ZeroEngine.deepspeed:
        yield (
            f"{rank} freezes the weights, and DeepSpeed keeps only what it trains; set "
            "parallel.zero_engine=torch"
        )
    if cfg.memory.compile:
        yield f"{rank} cannot be compiled; set memory.compile=false"
    if cfg.optimizer.trainable:
        yield f"{rank} trains adapters alone; leave optimizer.trainable empty"
    if cfg.objective.distill:
        yield (
            f"{rank} would not train the embedder of the guidance scale, which objective.distill="
            "true is about; set lora.rank=0"
        )


RULES: list[Callable[[RunConfig], Iterator[str]]] = [
    check_text_width,
    check_latent_channels,
    check_tasks,
    check_warmup,
    check_distillation,
    check_lora,
]


def check_all(cfg: RunConfig) -> list[str]:
    """Return the sentences of every rule that ``cfg`` breaks.

    Of a stage that trains the VAE those about the diffusion model do not count.
    """
    rules = RULES if cfg.stage.trains is Trains.model else [check_warmup]
    return [message for rule in rules for message in rule(cfg)]
