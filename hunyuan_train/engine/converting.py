"""Where the parts of a whole model are that a run has made."""

from pathlib import Path

from hunyuan_train.checkpoint.convertible import Layout
from hunyuan_train.checkpoint.model_folder import Parts, Place
from hunyuan_train.config.compose import CONFIG_NAME, load_config
from hunyuan_train.engine.sampling import newest_weights
from hunyuan_train.evaluation.config import SampleConfig, Schedule
from hunyuan_train.evaluation.schedules import default_shift


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run or of a curriculum."""
    return (folder / CONFIG_NAME).is_file() or (folder / "stages").is_dir()


def parts_of_run(folder: Path, vae: Path | None, shift: float | None) -> Parts:
    """Find the newest checkpoint of a run, its VAE and the shift that it samples with.

    Args:
        folder: Of a run; of a curriculum, the newest stage counts.
        vae: Folder of the VAE in place of ``run.vae``.
        shift: Shift in place of that of ``sample``.

    Raises:
        ValueError: it has no checkpoint, no VAE, or samples by a schedule that has no shift.
    """
    run = newest_weights(folder)
    cfg = load_config(run.config)
    if vae is None and not cfg.run.vae:
        raise ValueError(f"{run.config}: run.vae is empty; name the VAE's folder with vae=FOLDER")
    vae = vae or Path(cfg.run.vae)
    if not vae.is_dir():
        raise ValueError(
            f"{vae}, the VAE of {run.config}, does not exist; start where the run was started, or "
            "name its folder with vae=FOLDER"
        )
    return Parts(
        layout=Layout.OURS,
        transformer=Place(run.checkpoint),
        average=Place(run.checkpoint, ema=True),
        vae=vae,
        shift=shift or _shift(cfg.sample, run.config),
    )


def _shift(cfg: SampleConfig, path: Path) -> float:
    match cfg.schedule:
        case Schedule.shifted:
            return cfg.shift or default_shift(cfg.steps)
        case Schedule.linear:
            return 1.0
        case _:
            raise ValueError(
                f"{path}: sample.schedule={cfg.schedule} is no shift of equal steps, which is all "
                "the scheduler of diffusers can say; name the shift to write with shift="
            )
