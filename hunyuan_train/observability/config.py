"""Options of logging, metrics and progress."""

from dataclasses import dataclass
from enum import StrEnum


class WandbMode(StrEnum):
    """Whether Weights & Biases is used."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


class ProgressKind(StrEnum):
    """How progress is shown on the first rank."""

    auto = "auto"
    bar = "bar"
    lines = "lines"
    off = "off"


class LogLevel(StrEnum):
    """Least severity that is shown."""

    debug = "debug"
    info = "info"
    warning = "warning"


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What a run tells while it runs. JSONL and TensorBoard files are always written."""

    every_steps: int = 10
    """Steps between two rows of metrics; reading them is the only wait for the device."""
    level: LogLevel = LogLevel.info
    """Least severity shown on the first rank; the others show warnings and errors."""
    progress: ProgressKind = ProgressKind.auto
    """A live bar, plain lines or nothing; auto takes the bar on a terminal."""
    wandb_mode: WandbMode = WandbMode.disabled
    """Also log to Weights & Biases; offline writes below the run folder and needs no network."""
    wandb_project: str = "hunyuan_train"
    """Project of the Weights & Biases run."""
    wandb_name: str = ""
    """Name of the Weights & Biases run; empty takes the name of the run folder."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a cadence below one step."""
        if self.every_steps < 1:
            raise ValueError(f"logging.every_steps={self.every_steps} must be at least 1")

    def due(self, step: int) -> bool:
        """Return whether a row is due after ``step`` updates."""
        return step % self.every_steps == 0
