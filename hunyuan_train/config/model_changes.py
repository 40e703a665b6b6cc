"""What may differ between a model and the one whose weights it starts from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hunyuan_train.config.curriculum import Transform
from hunyuan_train.config.root import RunConfig
from hunyuan_train.config.run import Trains
from hunyuan_train.models.hunyuan.config import HunyuanConfig, ImageCondition


def model_identity(cfg: RunConfig) -> dict[str, Any]:
    """Return what a checkpoint says of its model: its section, and that of its adapters if any.

    Of a VAE it is all that decides the weights; the scaling factor and tiles do not.
    """
    if cfg.stage.trains is Trains.vae:
        free = ("scaling_factor", "tile_")
        fields = {n: v for n, v in asdict(cfg.vae).items() if not n.startswith(free)}
        return {"trains": str(Trains.vae), **fields}
    return asdict(cfg.model) | ({"lora": asdict(cfg.lora)} if cfg.lora.rank else {})


def unexplained(
    then: Mapping[str, Any], now: Mapping[str, Any], transforms: Sequence[Transform]
) -> list[str]:
    """Return why a model cannot start from the weights of another, one clause per reason.

    That given frames replace noisy ones (``token_replace``) changes no weight, so it needs nothing.

    Args:
        then: The model section that the weights belong to; fields it lacks have their defaults.
        now: The model section of the stage.
        transforms: What is done to the weights.
    """
    kinds = [str(identity.get("trains", Trains.model)) for identity in (then, now)]
    if kinds[0] != kinds[1]:
        return [f"stage.trains is {kinds[0]} there and {kinds[1]} here"]
    if kinds[0] == Trains.vae:
        return [
            f"vae.{name} is {then.get(name)} there and {now.get(name)} here"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ] + [f"the transform {name} is not for a VAE; leave it out" for name in transforms]
    then = asdict(HunyuanConfig()) | dict(then)
    now = asdict(HunyuanConfig()) | dict(now)
    differing = {name for name in then.keys() | now.keys() if then.get(name) != now.get(name)}
    reasons = []
    needs = {
        Transform.input_channels: now["in_channels"] > then["in_channels"],
        Transform.guidance_embed: now["guidance_embed"] and not then["guidance_embed"],
    }
    fields = {"in_channels": Transform.input_channels, "guidance_embed": Transform.guidance_embed}
    for name, transform in fields.items():
        if needs[transform] and transform in transforms:
            differing.discard(name)
        elif transform in transforms:
            reasons.append(
                f"the transform {transform} has nothing to do: model.{name} is {then[name]} there "
                f"and {now[name]} here; leave it out"
            )
    if _same_input(then, now) or (
        now["image_condition"] == ImageCondition.concat and needs[Transform.input_channels]
    ):
        differing.discard("image_condition")
    for name in sorted(differing):
        reason = f"model.{name} is {then.get(name)} there and {now.get(name)} here"
        if name in fields and needs[fields[name]]:
            reason += f", which takes the transform {fields[name]}"
        reasons.append(reason)
    return reasons


def _same_input(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether both models take noisy latents alone."""
    return ImageCondition.concat not in (then["image_condition"], now["image_condition"])
