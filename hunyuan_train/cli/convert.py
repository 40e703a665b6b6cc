"""``hunyuan-train convert``: weights between the official, our and the diffusers layout."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hunyuan_train.checkpoint.convertible import Layout, convertible
from hunyuan_train.checkpoint.export import MAX_SHARD_BYTES, convert
from hunyuan_train.config.compose import conf_folder
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.state_dict import config_from_released, load_vae_config

USAGE = """\
usage: hunyuan-train convert from=LAYOUT to=LAYOUT model=NAME input=PATH output=FOLDER [option=.]

layouts: official (released names), ours (the same names, bare), diffusers; to=peft writes the
         adapters of a run with lora.rank alone, all others add them to the weights
model:   a name in conf/model; vae/NAME of conf/vae; or vae, which is what config.json in the input
         says, and the released one if there is none
input:   a .safetensors or .pt file, a folder of them, or a run's checkpoint (from=ours)
options: model.FIELD=value     changes a field of the model's config
         ema=true              the moving average, where the input has it too
         max_shard_gib=4       size at which a new file is begun"""
REQUIRED = ("from", "to", "model", "input", "output")
OPTIONAL = {"ema": "false", "max_shard_gib": str(MAX_SHARD_BYTES / (1 << 30))}


def main(argv: Sequence[str]) -> int:
    """Convert and print the files written.

    Raises:
        ValueError: an argument or a tensor that does not fit, in one line.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    arguments, changes = parse(argv)
    path, source = Path(arguments["input"]), _layout("from", arguments)
    if source is Layout.PEFT:
        raise ValueError("from=peft: adapters alone are no model; give the run that made them")
    config = model_config(arguments["model"], changes)
    if arguments["model"] == "vae" and (path / "config.json").is_file():
        config = vae_config_beside(path, source)
    files = convert(
        convertible(config),
        path,
        Path(arguments["output"]),
        source=source,
        target=_layout("to", arguments),
        ema=_flag("ema", arguments),
        max_shard_bytes=_gib("max_shard_gib", arguments),
    )
    for path in files:
        print(path)
    return 0


def parse(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the named arguments, and the ``field=value`` changes of the model's config.

    Raises:
        ValueError: an argument is unknown, repeated, missing or no ``key=value``.
    """
    given: dict[str, str] = {}
    changes: list[str] = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or not value:
            raise ValueError(f"{argument} is not key=value")
        if key.startswith("model."):
            changes.append(argument.removeprefix("model."))
        elif key not in (*REQUIRED, *OPTIONAL):
            known = " ".join((*REQUIRED, *OPTIONAL))
            raise ValueError(f"{key} is not an argument of convert; choose from {known}")
        elif key in given:
            raise ValueError(f"{key} is given twice")
        else:
            given[key] = value
    if missing := [key for key in REQUIRED if key not in given]:
        raise ValueError(f"{missing[0]}= is missing; see `hunyuan-train convert --help`")
    return OPTIONAL | given, changes


def model_config(name: str, changes: Sequence[str]) -> HunyuanConfig | VaeConfig:
    """Read a shipped model config and apply ``field=value`` changes.

    Raises:
        ValueError: no config of that name, an unknown field, or values that do not fit.
    """
    group, _, short = name.rpartition("/")
    if name == "vae":
        group, short = "vae", "hunyuan_884"
    schema = VaeConfig if group == "vae" else HunyuanConfig
    folder = conf_folder() / ("vae" if group == "vae" else "model")
    path = folder / f"{short}.yaml"
    if group not in ("", "vae") or not path.is_file():
        models = sorted(p.stem for p in (conf_folder() / "model").glob("*.yaml"))
        vaes = sorted(f"vae/{p.stem}" for p in (conf_folder() / "vae").glob("*.yaml"))
        names = " ".join([*models, "vae", *vaes])
        raise ValueError(f"model={name} is unknown; choose from {names}")
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(schema), OmegaConf.load(path), OmegaConf.from_dotlist([*changes])
        )
        return cast(HunyuanConfig | VaeConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ValueError(f"model={name}: {str(error).splitlines()[0]}") from error


def vae_config_beside(folder: Path, layout: Layout) -> VaeConfig:
    """Read the VAE's config that lies beside its weights in a layout."""
    path = folder / "config.json"
    if layout is Layout.OURS:
        return load_vae_config(path)
    return config_from_released(json.loads(path.read_text()))


def _layout(key: str, arguments: dict[str, str]) -> Layout:
    if arguments[key] not in list(Layout):
        raise ValueError(f"{key}={arguments[key]} is no layout; choose from {' '.join(Layout)}")
    return Layout(arguments[key])


def _flag(key: str, arguments: dict[str, str]) -> bool:
    if arguments[key] not in ("true", "false"):
        raise ValueError(f"{key}={arguments[key]} must be true or false")
    return arguments[key] == "true"


def _gib(key: str, arguments: dict[str, str]) -> int:
    try:
        size = float(arguments[key])
    except ValueError:
        size = 0.0
    if not size > 0:
        raise ValueError(f"{key}={arguments[key]} must be a positive number of GiB")
    return int(size * (1 << 30))
