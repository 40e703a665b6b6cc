"""``hunyuan-train convert``: weights between the official, our and the diffusers layout."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hunyuan_train.checkpoint.convertible import ADAPTERS, Layout, convertible
from hunyuan_train.checkpoint.export import MAX_SHARD_BYTES, convert
from hunyuan_train.checkpoint.found_config import transformer_fields, vae_config
from hunyuan_train.checkpoint.model_folder import FolderOptions, Sets, convert_folder, find_parts
from hunyuan_train.config.compose import conf_folder
from hunyuan_train.engine.converting import is_run, parts_of_run
from hunyuan_train.evaluation.schedules import default_shift
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.vae.config import VaeConfig

USAGE = """\
usage: hunyuan-train convert from=LAYOUT to=LAYOUT model=NAME input=PATH output=FOLDER [option=.]

layouts: official (released names), ours (the same names, bare), diffusers; to=peft and
         to=diffusers-lora write the adapters of a run with lora.rank alone, all others add them to
         the weights
model:   pipeline, the whole folder of a model or run: transformer, VAE and sampler;
         transformer or vae, whose sizes the input says;
         or a name in conf/model, or vae/NAME of conf/vae
input:   a .safetensors or .pt file, a folder of them, or a run's checkpoint (from=ours);
         for model=pipeline the folder of a model, or that of a run (from=ours)
options: model.FIELD=value     changes a field of the model's config
         ema=true              the moving average, where the input has it too; both writes both
                               (model=pipeline)
         dtype=keep            or bfloat16, float16, float32
         max_shard_gib=4       size at which a new file is begun
with model=pipeline:
         vae=FOLDER            the VAE, in place of that of the input
         vae_dtype=keep        type of the VAE
         shift=NUMBER          of the sampler, in place of that of the input"""
REQUIRED = ("from", "to", "model", "input", "output")
OPTIONAL = {
    "ema": Sets.LAST.value,
    "dtype": "keep",
    "max_shard_gib": str(MAX_SHARD_BYTES / (1 << 30)),
}
OF_A_PIPELINE = {"vae": "", "vae_dtype": "keep", "shift": ""}
Config = TypeVar("Config", bound=HunyuanConfig | VaeConfig)
PIPELINE, TRANSFORMER, VAE = "pipeline", "transformer", "vae"
WRITTEN_TYPES = (torch.bfloat16, torch.float16, torch.float32)
RELEASED_STEPS = 50
"""Steps of the released sampler, whose shift a model without one is given."""


def main(argv: Sequence[str]) -> int:
    """Convert and print the files written.

    Raises:
        ValueError: an argument or a tensor that does not fit, in one line.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    arguments, changes = parse(argv)
    if (source := _layout("from", arguments)) in ADAPTERS:
        raise ValueError(f"from={source}: adapters alone are no model; give the run that made them")
    one_or_all = _convert_pipeline if arguments["model"] == PIPELINE else _convert_one
    for path in one_or_all(arguments, changes):
        print(path)
    return 0


def _convert_one(arguments: dict[str, str], changes: Sequence[str]) -> list[Path]:
    """Convert one set of weights."""
    path, source, name = Path(arguments["input"]), _layout("from", arguments), arguments["model"]
    if arguments["ema"] == Sets.BOTH:
        raise ValueError("ema=both writes a folder of both sets; give model=pipeline")
    config = None
    if name == TRANSFORMER:
        config = _with_changes(HunyuanConfig, transformer_fields(path, source), changes, str(path))
    elif name == VAE and (found := vae_config(path, source)) is not None:
        config = _with_changes(VaeConfig, asdict(found), changes, str(path))
    return convert(
        convertible(config or model_config(name, changes)),
        path,
        Path(arguments["output"]),
        source=source,
        target=_layout("to", arguments),
        ema=_sets(arguments) is Sets.AVERAGE,
        dtype=_dtype("dtype", arguments),
        max_shard_bytes=_gib("max_shard_gib", arguments),
    )


def _convert_pipeline(arguments: dict[str, str], changes: Sequence[str]) -> list[Path]:
    """Convert a whole model, and say what its files do not."""
    folder, source = Path(arguments["input"]), _layout("from", arguments)
    options = FolderOptions(
        target=_layout("to", arguments),
        shift=_shift(arguments),
        sets=_sets(arguments),
        dtype=_dtype("dtype", arguments),
        vae_dtype=_dtype("vae_dtype", arguments),
        max_shard_bytes=_gib("max_shard_gib", arguments),
    )
    vae = Path(arguments["vae"]) if arguments["vae"] else None
    if source is Layout.OURS and is_run(folder):
        parts = parts_of_run(folder, vae, options.shift)
    else:
        parts = find_parts(folder, source, vae, options.shift)
    if parts.shift is None:
        print("the input says no shift, so it is the released one; shift=NUMBER gives another")
    options = replace(options, shift=parts.shift or default_shift(RELEASED_STEPS))
    fields = transformer_fields(parts.transformer.path, source)
    config = _with_changes(HunyuanConfig, fields, changes, str(folder))
    files = convert_folder(
        parts,
        convertible(config),
        convertible(vae_config(parts.vae, source) or VaeConfig()),
        Path(arguments["output"]),
        options,
    )
    print(f"image_condition {config.image_condition.value}, shift {options.shift:g}")
    if options.target is Layout.OFFICIAL:
        print(f"the official layout has no sampler: start it with --flow-shift {options.shift:g}")
    return files


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
        elif key not in (*REQUIRED, *OPTIONAL, *OF_A_PIPELINE):
            known = " ".join((*REQUIRED, *OPTIONAL, *OF_A_PIPELINE))
            raise ValueError(f"{key} is not an argument of convert; choose from {known}")
        elif key in given:
            raise ValueError(f"{key} is given twice")
        else:
            given[key] = value
    if missing := [key for key in REQUIRED if key not in given]:
        raise ValueError(f"{missing[0]}= is missing; see `hunyuan-train convert --help`")
    if given["model"] != PIPELINE and (alien := [key for key in OF_A_PIPELINE if key in given]):
        raise ValueError(f"{alien[0]}= belongs to model=pipeline; leave it out")
    return OPTIONAL | OF_A_PIPELINE | given, changes


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
        names = " ".join([PIPELINE, TRANSFORMER, VAE, *models, *vaes])
        raise ValueError(f"model={name} is unknown; choose from {names}")
    return _with_changes(schema, cast(dict[str, Any], OmegaConf.load(path)), changes, name)


def _with_changes(
    schema: type[Config], fields: dict[str, Any], changes: Sequence[str], name: str
) -> Config:
    """Build a config from its fields and ``field=value`` changes.

    Raises:
        ValueError: an unknown field, or values that do not fit.
    """
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(schema), fields, OmegaConf.from_dotlist([*changes])
        )
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ValueError(f"model={name}: {str(error).splitlines()[0]}") from error


def _layout(key: str, arguments: dict[str, str]) -> Layout:
    if arguments[key] not in list(Layout):
        raise ValueError(f"{key}={arguments[key]} is no layout; choose from {' '.join(Layout)}")
    return Layout(arguments[key])


def _sets(arguments: dict[str, str]) -> Sets:
    if arguments["ema"] not in list(Sets):
        raise ValueError(f"ema={arguments['ema']} is unknown; choose from {' '.join(Sets)}")
    return Sets(arguments["ema"])


def _dtype(key: str, arguments: dict[str, str]) -> torch.dtype | None:
    known = {"keep": None, **{str(t).removeprefix("torch."): t for t in WRITTEN_TYPES}}
    if arguments[key] not in known:
        raise ValueError(f"{key}={arguments[key]} is unknown; choose from {' '.join(known)}")
    return known[arguments[key]]


def _shift(arguments: dict[str, str]) -> float | None:
    return _positive("shift", arguments, "number") if arguments["shift"] else None


def _gib(key: str, arguments: dict[str, str]) -> int:
    return int(_positive(key, arguments, "number of GiB") * (1 << 30))


def _positive(key: str, arguments: dict[str, str], what: str) -> float:
    try:
        number = float(arguments[key])
    except ValueError:
        number = 0.0
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{key}={arguments[key]} must be a positive {what}")
    return number
