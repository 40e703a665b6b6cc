"""Stages of a graph, each from what it takes over of the one before; finished ones stay so."""

import gc
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hunyuan_train.checkpoint.load import read_manifest
from hunyuan_train.config.compose import compose_config, config_dict
from hunyuan_train.config.model_changes import model_identity, unexplained
from hunyuan_train.config.root import RunConfig
from hunyuan_train.config.run import Trains
from hunyuan_train.engine.build import build_checkpoints
from hunyuan_train.engine.ending import stage_end
from hunyuan_train.engine.ledger import (
    Ledger,
    StageRecord,
    Status,
    changing,
    stage_folder,
    write_json,
)
from hunyuan_train.engine.loop import Outcome, free_to_change, train
from hunyuan_train.resilience.preemption import Preemption
from hunyuan_train.runtime.dist import World, gather_objects

log = logging.getLogger(__name__)

T = TypeVar("T")

FIELDS_NAME = "curriculum_fields.json"
"""File that holds what the identity in the ledger is the digest of."""
_OWN = ("run.dir", "run.name", "stage.init_from")
"""Fields that the curriculum sets itself."""


def compose_stages(overrides: Sequence[str], cfg: RunConfig) -> dict[str, RunConfig]:
    """Return the config of every stage of a curriculum by name, in the order they run.

    Raises:
        ValueError: a stage does not compose, or cannot start from the one it comes after.
    """
    stages, ledger = {}, Ledger.read(Path(cfg.run.dir))
    for name in cfg.curriculum.order():
        node = cfg.curriculum.stages[name]
        own = [
            f"stage={node.stage or name}",
            f"run.dir={stage_folder(cfg, name, ledger)}",
            f"run.name={cfg.run.name}-{name}",
            f"stage.carry=[{','.join(node.carry)}]",
            f"stage.transform=[{','.join(node.transform)}]",
        ]
        try:
            stages[name] = compose_config([*overrides, *node.overrides, *own])
        except ValueError as error:
            raise ValueError(f"stage {name}: {error}") from error
    problems = []
    for name, stage in stages.items():
        if not (after := cfg.curriculum.stages[name].after):
            continue
        before, now = (comparable(one) for one in (stages[after], stage))
        reasons = unexplained(before, now, stage.stage.transform)
        problems += [f"stage {name} cannot start from {after}: {reason}" for reason in reasons]
    if problems:
        raise ValueError("\n".join(problems))
    return stages


def comparable(stage: RunConfig) -> dict[str, Any]:
    """Return what decides whether a stage can start from another, adapters aside."""
    if stage.stage.trains is Trains.vae:
        return model_identity(stage)
    return config_dict(stage.model)


def run_curriculum(
    cfg: RunConfig,
    stages: Mapping[str, RunConfig],
    world: World,
    preemption: Preemption,
    *,
    first: str = "",
    last: str = "",
) -> Outcome:
    """Run every stage that the ledger does not call finished.

    Args:
        cfg: The curriculum's own config; ``run.dir`` holds the ledger and the stage folders.
        stages: What :func:`compose_stages` returned.
        world: This process's place.
        preemption: The signal flag that ends the run after a save.
        first: Run this stage and what comes after it alone.
        last: Run this stage and what it needs alone.

    Raises:
        ValueError: there are no stages; the folder belongs to another curriculum; a stage comes
            after one that is not finished; or one ends without a checkpoint to go on from.
    """
    if not stages:
        raise ValueError(
            "curriculum.stages is empty; name a curriculum, for example curriculum=demo"
        )
    chosen = cfg.curriculum.selection(first, last)
    folder = Path(cfg.run.dir)
    ledger = _by_first(world, lambda: _claim(cfg, stages, world, chosen))
    for number, name in enumerate(chosen, start=1):
        if ledger.stages[name].state is Status.done:
            continue
        stage = stages[name]
        ledger = _by_first(world, lambda name=name: _begin(folder, name))
        stage.data.planned_ranks = ledger.stages[name].planned_ranks
        if after := ledger.stages[name].after:
            stage.stage.init_from = str(folder / ledger.stages[after].checkpoint)
        log.info("stage %d of %d: %s", number, len(chosen), name)
        outcome = train(stage, world, preemption)
        gc.collect()  # else the last cycles of its model go when the next one fills the device
        if outcome is not Outcome.DONE:
            _by_first(world, lambda name=name: _stop(folder, name))
            return outcome
        ledger = _by_first(world, lambda name=name, stage=stage: _finish(folder, name, stage))
    return Outcome.DONE


def _by_first(world: World, do: Callable[[], T]) -> T:
    """Return what the first rank does, on every rank; what is wrong is raised on every rank."""
    result, problem = None, ""
    if world.rank == 0:
        try:
            result = do()
        except ValueError as error:
            problem = str(error)
    result, problem = gather_objects((result, problem))[0]
    if problem:
        raise ValueError(problem)
    return result


def _claim(
    cfg: RunConfig, stages: Mapping[str, RunConfig], world: World, chosen: Sequence[str]
) -> Ledger:
    """Enter all stages at the first start; later, refuse a curriculum that has changed.

    The ranks that updates are planned for become those of the first start, for all stages.

    Raises:
        ValueError: what has changed, or that a stage is to start from one that is not finished.
    """
    folder = Path(cfg.run.dir)
    with changing(folder) as ledger:
        for name, stage in stages.items():
            ranks = world.size // (stage.parallel.tp * stage.parallel.cp)
            if name not in ledger.stages:
                place = stage_folder(cfg, name, ledger).relative_to(folder)
                ledger.stages[name] = StageRecord(
                    folder=str(place), planned_ranks=stage.data.planned_ranks or max(ranks, 1)
                )
            record = ledger.stages[name]
            record.after = cfg.curriculum.stages[name].after
            stage.data.planned_ranks = stage.data.planned_ranks or record.planned_ranks
        fields = identity_fields(cfg, stages)
        _compare(folder, ledger, fields, accept=cfg.run.accept_changes)
        for name, stage in stages.items():
            ledger.stages[name].planned_ranks = stage.data.planned_ranks
        for name in chosen:
            after = ledger.stages[name].after
            if after and after not in chosen and ledger.stages[after].state is not Status.done:
                raise ValueError(
                    f"stage {name} comes after {after}, which is not finished in {folder}; run "
                    f"it first, or leave out --from"
                )
    return ledger


def identity_fields(cfg: RunConfig, stages: Mapping[str, RunConfig]) -> dict[str, Any]:
    """Return all that decides the numbers of a curriculum: {stage: {section.field: value}}."""
    fields: dict[str, Any] = {}
    for name, stage in stages.items():
        free = (*free_to_change(stage), *_OWN)
        flat = {
            f"{section}.{field}": value
            for section, values in config_dict(stage).items()
            for field, value in values.items()
        }
        fields[name] = {key: value for key, value in flat.items() if not key.startswith(free)}
        fields[name]["after"] = cfg.curriculum.stages[name].after
    return json.loads(json.dumps(fields))


def _compare(folder: Path, ledger: Ledger, fields: dict[str, Any], *, accept: bool) -> None:
    """Take ``fields`` for the identity, or refuse them where another one is there already."""
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    if ledger.identity == digest:
        return
    path = folder / FIELDS_NAME
    then = json.loads(path.read_text()) if path.is_file() else {}
    changes = curriculum_changes(then, fields) if ledger.identity else []
    if changes and not accept:
        raise ValueError(
            f"{folder} belongs to a curriculum that differs from this one:\n  "
            + "\n  ".join(changes)
            + "\nuse a new run.dir, or run.accept_changes=true to go on with these changes; "
            "stages that are finished stay as they are"
        )
    if changes:
        log.warning("going on with a changed curriculum:\n  %s", "\n  ".join(changes))
    write_json(path, fields)
    ledger.identity = digest


def curriculum_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return one line per stage or field that differs; a field that one version lacks does not."""
    lines = [f"stage {name} is new" for name in now if name not in then]
    lines += [f"stage {name} is gone" for name in then if name not in now]
    for name in (name for name in now if name in then):
        lines += [
            f"stage {name}: {field}: {old} -> {now[name][field]}"
            for field, old in then[name].items()
            if field in now[name] and now[name][field] != old
        ]
    return lines


def _begin(folder: Path, name: str) -> Ledger:
    with changing(folder) as ledger:
        record, now = ledger.stages[name], time.time()
        if record.attempts:  # the last one was killed if it has no end
            begin, end = record.attempts[-1]
            if end <= begin:
                record.attempts[-1][1] = max(begin, _last_row(folder / record.folder))
        record.attempts.append([now, now])
        record.started = record.started or now
        record.state = Status.running
    return ledger


def _last_row(folder: Path) -> float:
    """Return when the last row of metrics was written; 0 if there is none."""
    path = folder / "metrics.jsonl"
    return path.stat().st_mtime if path.is_file() else 0.0


def _stop(folder: Path, name: str) -> Ledger:
    with changing(folder) as ledger:
        ledger.stages[name].attempts[-1][1] = time.time()
    return ledger


def _finish(folder: Path, name: str, stage: RunConfig) -> Ledger:
    """Enter a finished stage with what its last checkpoint says.

    Raises:
        ValueError: that checkpoint is not the one of its end, because the last save failed.
    """
    checkpoint = build_checkpoints(stage).latest()
    counters = read_manifest(checkpoint).extra if checkpoint is not None else {}
    steps, samples, tokens = (int(counters.get(key, 0)) for key in ("step", "samples", "tokens"))
    end = stage_end(stage.stage, steps, samples, tokens, counters.get("evaluations", []))
    if checkpoint is None or end is None:
        raise ValueError(
            f"{stage.run.dir}: stage {name} left no checkpoint of its end; "
            "see the log for the save that failed, then run the same command again"
        )
    with changing(folder) as ledger:
        record = ledger.stages[name]
        record.checkpoint = str(checkpoint.relative_to(folder))
        record.steps, record.samples, record.tokens = steps, samples, tokens
        record.ended_by, record.state = str(end), Status.done
        record.ended = record.attempts[-1][1] = time.time()
    return ledger
