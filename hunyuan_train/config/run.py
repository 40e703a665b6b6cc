"""Sections that belong to the run as a whole: where it lives, its stage, its proof, its demo."""

from dataclasses import dataclass, field
from enum import StrEnum

from hunyuan_train.config.curriculum import Carried, Transform, check_carry, default_carry


@dataclass(kw_only=True, slots=True)
class RunSection:
    """Identity and place of a run."""

    name: str = "run"
    """Name shown in logs and trackers."""

    dir: str = "runs/default"
    """Folder of everything the run writes: config, metrics, checkpoints, samples, report."""

    seed: int = 0
    """Seed of every keyed random draw."""

    device: str = "auto"
    """auto, cpu or cuda."""

    vae: str = ""
    """Folder of the VAE: config.json and model.safetensors. Needed to precompute and to sample."""

    threads: int = 0
    """Threads torch may use in this process; 0 keeps torch's own choice."""

    accept_changes: bool = False
    """Go on in run.dir although its config differs from this one."""


class Trains(StrEnum):
    """Which network a stage trains."""

    model = "model"
    """The diffusion transformer, on latents and text."""
    vae = "vae"
    """The autoencoder, on pixels."""


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """One training stage: how long, on how much at once, and from where."""

    name: str = "stage"
    """Name of the stage, for logs and charts."""

    trains: Trains = Trains.model
    """model: the diffusion transformer; vae: the autoencoder of `vae`, on the clips of
    `data.source`, written to `run.vae` at the end."""

    steps: int = 1000
    """Most optimizer updates of the stage."""

    samples: int = 0
    """The stage ends with the update that brings it to so many samples; 0 does not count them."""

    tokens: int = 0
    """The stage ends with the update that brings it to so many image tokens; 0 does not count."""

    plateau: int = 0
    """The stage ends after so many evaluations in turn whose held-out loss did not fall; 0 goes on.
    Needs `evaluation.every_steps`."""

    plateau_gain: float = 0.002
    """Share by which the held-out loss has to fall below the lowest before to count as falling."""

    schedule_steps: int = 0
    """Updates over which the learning rate falls, with those of earlier stages where `carry` has
    schedule; 0 is up to the last update of this stage."""

    micro_steps: int = 1
    """Micro-batches each rank accumulates into one update."""

    init_from: str = ""
    """Run or checkpoint that the stage starts from, or a folder of weights that ``convert`` wrote;
    empty starts from scratch."""

    carry: list[Carried] = field(default_factory=default_carry)
    """What is taken over from there: weights, ema, optimizer, schedule, loader."""

    transform: list[Transform] = field(default_factory=list)
    """How those weights are made to fit a larger model: input_channels, guidance_embed."""

    def __post_init__(self) -> None:
        """Check single fields.

        Raises:
            ValueError: naming the field and the value.
        """
        for name in ("steps", "micro_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"stage.{name}={getattr(self, name)} must be at least 1")
        for name in ("samples", "tokens", "plateau", "schedule_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"stage.{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.plateau_gain < 1:
            raise ValueError(f"stage.plateau_gain={self.plateau_gain} must be from 0 to below 1")
        check_carry("stage", self.carry)


class CertifyWidth(StrEnum):
    """How wide the model of a certificate is."""

    full = "full"
    small = "small"


@dataclass(kw_only=True, slots=True)
class CertifyConfig:
    """The proof that a layout computes what one process computes."""

    at_start: bool = True
    """Whether ``train`` on several ranks proves its layout with a small model before it starts."""

    width: CertifyWidth = CertifyWidth.full
    """full keeps the model's widths; small keeps its heads and divides the rest, as the proof at
    the start of ``train`` does."""

    blocks: int = 2
    """Double blocks and single blocks of the thin slice, each at most what the model has."""

    steps: int = 1
    """Updates to compare."""

    tolerance: float = 1e-4
    """Largest error of loss, output, gradient or weight, relative to the tensor's largest value, in
    float32."""

    tolerance_bf16: float = 0.1
    """The same for a layout that computes in bfloat16, whose rounding hides small errors."""

    def __post_init__(self) -> None:
        """Check single fields.

        Raises:
            ValueError: naming the field and the value.
        """
        for name in ("blocks", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"certify.{name}={getattr(self, name)} must be at least 1")
        for name in ("tolerance", "tolerance_bf16"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"certify.{name}={getattr(self, name)} must be between 0 and 1")


@dataclass(kw_only=True, slots=True)
class DemoConfig:
    """Sizes of the demo: its generated data and how it is run."""

    num_clips: int = 384
    """Moving-shapes clips to draw."""

    num_images: int = 192
    """Still images to draw."""

    num_prompts: int = 32
    """Held-out prompts to sample and score, at most 32."""

    ranks: int = 2
    """Processes that precompute, train and sample, one thread each."""

    every_stage: bool = False
    """Whether every stage is measured on held-out clips and samples the held-out prompts."""

    num_held_out: int = 48
    """Held-out clips for that, and half as many held-out images."""

    def __post_init__(self) -> None:
        """Check single fields.

        Raises:
            ValueError: naming the field and the value.
        """
        for name in ("num_clips", "num_images", "num_prompts", "ranks", "num_held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"demo.{name}={getattr(self, name)} must be at least 1")
