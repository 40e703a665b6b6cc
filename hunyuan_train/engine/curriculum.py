"""Stages run one after the other, each from the weights and EMA of the one before."""

import json
import logging
from pathlib import Path

from hunyuan_train.config.root import RunConfig
from hunyuan_train.engine.build import build_checkpoints
from hunyuan_train.engine.loop import Outcome, train
from hunyuan_train.resilience.preemption import Preemption
from hunyuan_train.runtime.dist import World, barrier

log = logging.getLogger(__name__)

LEDGER_NAME = "curriculum.json"


def stage_folder(cfg: RunConfig, number: int) -> Path:
    """Return the folder of stage ``number`` (from 0) inside the curriculum's run folder."""
    return Path(cfg.run.dir) / "stages" / f"{number + 1:02d}-{cfg.curriculum.stages[number]}"


def stage_overrides(cfg: RunConfig, number: int) -> list[str]:
    """Return the overrides that make a curriculum's config the config of its stage ``number``."""
    return [
        f"stage={cfg.curriculum.stages[number]}",
        f"run.dir={stage_folder(cfg, number)}",
        f"run.name={cfg.run.name}-{cfg.curriculum.stages[number]}",
    ]


def read_ledger(folder: Path) -> dict[str, str]:
    """Return the final checkpoint of each finished stage, by stage folder name."""
    path = folder / LEDGER_NAME
    return json.loads(path.read_text()) if path.is_file() else {}


def write_ledger(folder: Path, ledger: dict[str, str]) -> None:
    """Write the ledger through a temporary file, so that a kill never leaves half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{LEDGER_NAME}.tmp"
    temporary.write_text(json.dumps(ledger, indent=2))
    temporary.replace(folder / LEDGER_NAME)


def run_curriculum(
    cfg: RunConfig, stages: list[RunConfig], world: World, preemption: Preemption
) -> Outcome:
    """Run every stage that the ledger does not call finished.

    Args:
        cfg: the curriculum's own config; ``run.dir`` holds the ledger and the stage folders.
        stages: the config of each stage, in order.
        world: this process's place.
        preemption: the signal flag that ends the run after a save.

    Raises:
        ValueError: if there are no stages, or a stage ends without a checkpoint to go on from.
    """
    if not stages:
        raise ValueError(
            "curriculum.stages is empty; name a curriculum, for example curriculum=demo"
        )
    folder = Path(cfg.run.dir)
    ledger = read_ledger(folder)
    previous = ""
    for number, stage in enumerate(stages):
        name = stage_folder(cfg, number).name
        if name not in ledger:
            stage.stage.init_from = previous
            log.info("stage %d of %d: %s", number + 1, len(stages), stage.stage.name)
            outcome = train(stage, world, preemption)
            if outcome is not Outcome.DONE:
                return outcome
            ledger[name] = str(final_checkpoint(stage).relative_to(folder))
            if world.rank == 0:
                write_ledger(folder, ledger)
            barrier()
        previous = str(folder / ledger[name])
    return Outcome.DONE


def final_checkpoint(cfg: RunConfig) -> Path:
    """Return the checkpoint at which a finished stage stopped.

    Raises:
        ValueError: if there is none, because the last save failed.
    """
    latest = build_checkpoints(cfg).latest()
    if latest is None:
        raise ValueError(
            f"{cfg.run.dir}: stage {cfg.stage.name} left no checkpoint; "
            "see the log for the save that failed, then run the same command again"
        )
    return latest
