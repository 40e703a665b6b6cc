"""The only code that knows Hydra and OmegaConf: overrides in, checked dataclasses out."""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hunyuan_train.config.checks import check_all
from hunyuan_train.config.root import RunConfig

CONFIG_NAME = "config.yaml"


def conf_folder() -> Path:
    """Return the folder of the shipped YAML files, in a checkout or in an installed package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_conf", package.parent / "conf"):
        if folder.is_dir():
            return folder
    raise ValueError(f"the conf folder is missing beside {package}; install hunyuan_train again")


def stage_names() -> list[str]:
    """Return the names of the shipped stages."""
    return sorted(path.stem for path in (conf_folder() / "stage").glob("*.yaml"))


def compose_config(overrides: Sequence[str] = (), config_name: str = "train") -> RunConfig:
    """Compose the shipped defaults with ``overrides`` (``section.field=value``, ``group=name``).

    Raises:
        ValueError: naming every problem found, one line each.
    """
    ConfigStore.instance().store(name="schema", node=RunConfig)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            composed = compose(config_name=config_name, overrides=_into_tables(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error)) from error
    return _to_dataclasses(composed)


_ENTRY = re.compile(r"\+{0,2}(\w+)\.(\w+)((?:\.[^.=]+)*)=(.*)", re.DOTALL)


def _into_tables(overrides: Sequence[str]) -> list[str]:
    """Return overrides as Hydra wants them for fields that map names to values.

    Hydra takes a new name below such a field only with ``++``, and a name that starts with a digit
    only inside braces: ``data.batches.17x64x64=2`` becomes ``++data.batches={17x64x64:2}``.
    """
    sections = {section.name: section.type for section in dataclasses.fields(RunConfig)}
    tables = {
        f"{name}.{field.name}"
        for name, owner in sections.items()
        for field in dataclasses.fields(owner)  # pyright: ignore[reportArgumentType]
        if str(field.type).startswith("dict")
    }
    rewritten = []
    for override in overrides:
        found = _ENTRY.fullmatch(override)
        if found is None or f"{found[1]}.{found[2]}" not in tables:
            rewritten.append(override)
            continue
        value = found[4]
        for name in reversed(found[3].split(".")[1:]):
            value = f"{{{name}:{value}}}"
        rewritten.append(f"++{found[1]}.{found[2]}={value}")
    return rewritten


def save_config(cfg: RunConfig, path: Path) -> None:
    """Write ``cfg`` as YAML, through a temporary file so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(config_text(cfg))
    temporary.replace(path)


def config_text(cfg: RunConfig) -> str:
    """Return ``cfg`` as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(config_dict(cfg)))


def config_dict(cfg: Any) -> dict[str, Any]:
    """Return ``cfg`` (a whole config or one section) as plain nested dictionaries."""
    return dataclasses.asdict(cfg)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config that :func:`save_config` wrote and change single fields of it.

    Args:
        path: The YAML file.
        overrides: ``section.field=value``; groups are fixed in a saved config.

    Raises:
        ValueError: if the file is missing or a field is unknown or ill-typed.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give run.dir the folder of a run")
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(RunConfig),
            OmegaConf.load(path),
            OmegaConf.from_dotlist(list(overrides)),
        )
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {_explain(error)}") from error
    assert isinstance(merged, DictConfig)
    return _to_dataclasses(merged)


def config_difference(old: RunConfig, new: RunConfig) -> list[str]:
    """Return one line ``path: old -> new`` per field in which two configs differ."""
    left, right = _flatten(config_dict(old)), _flatten(config_dict(new))
    return [
        f"{key}: {left.get(key)} -> {right.get(key)}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _to_dataclasses(composed: DictConfig) -> RunConfig:
    """Build every section, collecting the complaints of all of them before raising."""
    sections: dict[str, Any] = {}
    problems: list[str] = []
    owners = {section.name: section.type for section in dataclasses.fields(RunConfig)}
    for name in composed:
        if name not in owners:
            problems.append(_unknown_key(str(name)))
            continue
        # `+section.field=value` gets past the schema.
        known = {field.name for field in dataclasses.fields(owners[str(name)])}  # pyright: ignore[reportArgumentType]
        if extra := [key for key in composed[name] if key not in known]:
            problems += [_unknown_key(f"{name}.{key}") for key in extra]
            continue
        try:
            sections[str(name)] = OmegaConf.to_object(composed[name])
        except (ValueError, OmegaConfBaseException) as error:
            problems.append(_explain(error))
    if not problems:
        cfg = RunConfig(**sections)
        problems = check_all(cfg)
        if not problems:
            return cfg
    raise ValueError("\n".join(problems))


def _explain(error: BaseException) -> str:
    """Turn a Hydra or OmegaConf error into one sentence that names the field and the fix."""
    text = str(error)
    if error.__cause__ is not None and "\n" not in text:
        text = f"{text}\n{error.__cause__}"
    key = re.search(r"full_key: (\S+)", text)
    if re.search(r"Key '\S+' (?:is )?not in|Could not override '(\S+)'", text):
        override = re.search(r"Could not override '(\S+)'", text)
        return _unknown_key(key.group(1) if key else override.group(1) if override else text)
    if found := re.search(r"Error parsing override '([^']*)'", text):
        return f"{found.group(1)!r} is not an override; write section.field=value or group=name"
    if found := re.search(r"Could not find '([^']+)'", text):
        group, _, name = found.group(1).rpartition("/")
        options = sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))
        return f"{group}={name} does not exist; choose from {' '.join(options)}"
    lines = [line for line in text.strip().splitlines() if "raised while composing" not in line]
    lines = [re.sub(r"^Error merging override .*$", "", line).strip() for line in lines]
    first = next((line for line in lines if line), text)
    return f"{key.group(1)}: {first}" if key else first


def _unknown_key(path: str) -> str:
    close = difflib.get_close_matches(path, sorted(_known_paths()), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "see conf/ for the known fields"
    return f"{path} is not a field of the config; {hint}"


def _known_paths() -> list[str]:
    paths = []
    for section in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(section.type):
            paths += [f"{section.name}.{field.name}" for field in dataclasses.fields(section.type)]
    return paths
