"""The `objective` section: flow matching, its time distribution and its conditioning."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class FlowMatchingConfig:
    """Flow matching as released: path, target, training times, caption dropout."""

    time_mean: float = 0.0
    """Mean of the normal whose sigmoid is the training sigma (logit-normal)."""
    time_std: float = 1.0
    """Standard deviation of that normal."""
    shift: float = 1.0
    """Moves training sigmas towards noise, `s t / (1 + (s - 1) t)`: adds ln(s) to the mean."""
    text_drop: float = 0.1
    """Share of samples that train on the empty caption, for classifier-free guidance."""
    train_guidance: float = 6.0
    """Guidance scale fed while training a model with `guidance_embed`, as scale * 1000 in float32.

    The released guidance-distilled weights were run with this product rounded to bfloat16: there
    6.0 is 6016, not 6000. Use 6.016 when training on from those weights."""

    def __post_init__(self) -> None:
        """Reject values that define no distribution."""
        if self.time_std <= 0:
            raise ValueError(f"objective.time_std={self.time_std} must be above 0")
        if self.shift <= 0:
            raise ValueError(f"objective.shift={self.shift} must be above 0; 1 is no shift")
        if not 0 <= self.text_drop <= 1:
            raise ValueError(f"objective.text_drop={self.text_drop} must be from 0 to 1")
        if self.train_guidance < 0:
            raise ValueError(f"objective.train_guidance={self.train_guidance} must not be negative")
