"""A run's folder takes other numbers of ranks, and no other updates."""

from pathlib import Path

import pytest
import torch

from hunyuan_train.config.compose import compose_config
from hunyuan_train.engine.loop import claim_folder
from hunyuan_train.runtime.dist import World


def claim(folder: Path, ranks: int, *overrides: str) -> int:
    """Return the ranks that updates are planned for."""
    cfg = compose_config([f"run.dir={folder}", *overrides])
    world = World(rank=0, local_rank=0, size=ranks, device=torch.device("cpu"))
    claim_folder(cfg, world)
    return cfg.data.planned_ranks


def test_updates_stay_planned_for_the_ranks_of_the_first_start(tmp_path: Path) -> None:
    assert claim(tmp_path, 8, "parallel.tp=2") == 4
    assert claim(tmp_path, 4, "parallel.tp=2") == 4
    assert claim(tmp_path, 3, "data.planned_ranks=4") == 4
    assert claim(tmp_path, 16) == 4


@pytest.mark.parametrize("change", ["stage.micro_steps=2", "data.planned_ranks=8", "run.seed=1"])
def test_a_change_of_the_updates_is_refused_whatever_the_ranks(tmp_path: Path, change: str) -> None:
    claim(tmp_path, 4)
    for ranks in (2, 4, 8):
        with pytest.raises(ValueError, match=change.split("=")[0]):
            claim(tmp_path, ranks, change)
    claim(tmp_path, 4, change, "run.accept_changes=true")


def test_how_the_held_out_loss_is_measured_may_change_unless_it_ends_the_stage(
    tmp_path: Path,
) -> None:
    measured = ("evaluation.latents=held-out", "evaluation.every_steps=10")
    shown = "evaluation.max_pending=3"
    claim(tmp_path / "steps", 1, *measured)
    claim(tmp_path / "steps", 1, "evaluation.every_steps=20", measured[0], shown)
    claim(tmp_path / "plateau", 1, *measured, "stage.plateau=3")
    claim(tmp_path / "plateau", 1, *measured, "stage.plateau=3", shown)
    for change in ("every_steps=20", "samples_per_bucket=9"):
        with pytest.raises(ValueError, match=f"evaluation.{change.split('=')[0]}"):
            claim(tmp_path / "plateau", 1, *measured, "stage.plateau=3", f"evaluation.{change}")
