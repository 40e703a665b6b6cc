"""The `objective` section: flow matching, its time distribution and its conditioning."""

from dataclasses import dataclass, field
from enum import StrEnum


class Task(StrEnum):
    """What a sample is trained to do: which of its latent frames are given, beside its caption."""

    text = "text"
    """None: text to video."""
    first = "first"
    """The first: image to video."""
    first_last = "first_last"
    """The first and the last: interpolation."""

    @property
    def frames(self) -> tuple[str, ...]:
        """Names of the given frames, in the order of a video."""
        return {Task.text: (), Task.first: ("first",)}.get(self, ("first", "last"))


class Weighting(StrEnum):
    """How the loss of a sample depends on its sigma."""

    none = "none"
    """1 everywhere, as released."""
    cosmap = "cosmap"
    """`2 / (pi (1 - 2 sigma + 2 sigma^2))` (Stable Diffusion 3, arXiv 2403.03206, section 3.1)."""
    sigma_sqrt = "sigma_sqrt"
    """`1 / sigma^2`, at most 25: every noise level counts by its signal."""


@dataclass(kw_only=True, slots=True)
class FlowMatchingConfig:
    """Flow matching as released: path, target, training times, caption dropout."""

    time_mean: float = 0.0
    """Mean of the normal whose sigmoid is the training sigma (logit-normal)."""
    time_std: float = 1.0
    """Standard deviation of that normal."""
    shift: float = 1.0
    """Moves training sigmas towards noise, `s t / (1 + (s - 1) t)`: adds ln(s) to the mean."""
    shift_tokens: int = 0
    """Image tokens of a sample at which `shift` holds; others get `shift * sqrt(tokens /
    shift_tokens)` (arXiv 2403.03206, section 5.3.2). 0 gives all samples the same."""
    weighting: Weighting = Weighting.none
    """How the loss depends on sigma."""
    tasks: dict[str, float] = field(default_factory=dict)
    """Share of the samples per task: text, first, first_last; drawn per sample and epoch. Empty is
    text for all. Images are always text. Others than text need `model.image_condition`."""
    text_drop: float = 0.1
    """Share of samples that train on the empty caption, for classifier-free guidance."""
    train_guidance: float = 6.0
    """Guidance scale fed while training a model with `guidance_embed`, as scale * 1000 in float32.

    The released guidance-distilled weights were run with this product rounded to bfloat16: there
    6.0 is 6016, not 6000. Use 6.016 when training on from those weights."""
    distill: bool = False
    """Learn the guided output of a frozen teacher instead of the data's velocity: `uncond + w *
    (cond - uncond)` with w drawn per sample, which the model is told (`model.guidance_embed`)."""
    teacher: str = ""
    """Run, checkpoint or folder of weights of the teacher, which has no `guidance_embed` and whose
    moving average is taken; empty takes what the stage starts from."""
    guidance_min: float = 1.0
    """Smallest scale w of a distillation, and 8 the largest published (arXiv 2412.03603, 5.3)."""
    guidance_max: float = 8.0
    """Largest scale w of a distillation; w is uniform between the two."""

    @property
    def wanted_tasks(self) -> list[Task]:
        """The tasks with a share; text alone without any."""
        return [task for task in Task if self.tasks.get(task, 0.0) > 0] or [Task.text]

    @property
    def given_frames(self) -> list[str]:
        """Names of the frames that any task gives: those to be encoded alone."""
        return list(max((task.frames for task in self.wanted_tasks), key=len))

    def __post_init__(self) -> None:
        """Reject values that define no distribution."""
        for name, share in self.tasks.items():
            if name not in set(Task):
                raise ValueError(
                    f"objective.tasks.{name} is unknown; choose from {', '.join(Task)}"
                )
            if share < 0:
                raise ValueError(f"objective.tasks.{name}={share} must not be negative")
        if self.tasks and not sum(self.tasks.values()):
            raise ValueError("objective.tasks are all 0; give one of them a share")
        if self.shift_tokens < 0:
            raise ValueError(f"objective.shift_tokens={self.shift_tokens} must not be negative")
        if not 0 <= self.guidance_min <= self.guidance_max:
            raise ValueError(
                f"objective.guidance_min={self.guidance_min} must be from 0 to "
                f"objective.guidance_max={self.guidance_max}"
            )
        if self.time_std <= 0:
            raise ValueError(f"objective.time_std={self.time_std} must be above 0")
        if self.shift <= 0:
            raise ValueError(f"objective.shift={self.shift} must be above 0; 1 is no shift")
        if not 0 <= self.text_drop <= 1:
            raise ValueError(f"objective.text_drop={self.text_drop} must be from 0 to 1")
        if self.train_guidance < 0:
            raise ValueError(f"objective.train_guidance={self.train_guidance} must not be negative")
