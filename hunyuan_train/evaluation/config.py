"""The `sample` section: what to sample and how."""

from dataclasses import dataclass, field
from enum import StrEnum

from hunyuan_train.data.buckets import Bucket


class SampleWeights(StrEnum):
    """Which weights of a run to sample from; all but `initial` are sections of its checkpoints."""

    ema = "ema"
    model = "model"
    initial = "initial"


@dataclass(kw_only=True, slots=True)
class SampleConfig:
    """Prompts, size and sampler settings of one sampling run."""

    prompts: list[str] = field(default_factory=list)
    """What to sample, one video per entry and repetition."""
    prompts_file: str = ""
    """Text file with further prompts, one a line."""
    output: str = ""
    """Folder for the videos and the contact sheet; empty is `samples` in the run's folder."""
    negative_prompt: str = ""
    """Text of the unconditional branch; used when `cfg_scale` is not 1."""
    steps: int = 50
    """Euler steps."""
    shift: float = 0.0
    """Shift of the sigmas towards noise; 0 chooses 7, or 17 below 20 steps."""
    cfg_scale: float = 1.0
    """Classifier-free guidance `uncond + cfg_scale * (cond - uncond)`; 1 runs the prompt alone.

    Use about 6 for a model without `guidance_embed`, 1 for a guidance-distilled one."""
    batched_cfg: bool = True
    """Run both guidance branches as one batch; false takes turns, in about half the memory."""
    guidance: float = 6.0
    """Guidance scale fed to a model with `guidance_embed`; other models ignore it.

    The released pipelines round scale * 1000 to bfloat16, so 6.016 here is their 6.0."""
    frames: int = 129
    """Frames in pixels, 4n + 1; 1 samples an image."""
    height: int = 720
    """Height in pixels, a multiple of 16."""
    width: int = 1280
    """Width in pixels, a multiple of 16."""
    fps: int = 24
    """Frame rate written into the mp4 files."""
    crf: int = 18
    """Quality of the mp4 files, 0 (best) to 51."""
    seed: int = 0
    """Seed of the initial noise."""
    num_per_prompt: int = 1
    """Videos per prompt, each from its own noise."""
    weights: SampleWeights = SampleWeights.ema
    """`ema`: averaged weights; `model`: the last ones; `initial`: untrained, for comparison."""
    batch_size: int = 1
    """Videos sampled at once; it does not change them."""

    @property
    def bucket(self) -> Bucket:
        """The size of one sample in pixels."""
        return Bucket(self.frames, self.height, self.width)

    def __post_init__(self) -> None:
        """Reject settings that no sampler can follow."""
        for name in ("steps", "fps", "num_per_prompt", "batch_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"sample.{name}={value} must be at least 1")
        if self.shift < 0:
            raise ValueError(f"sample.shift={self.shift} must be above 0, or 0 to choose by steps")
        if self.cfg_scale < 0:
            raise ValueError(f"sample.cfg_scale={self.cfg_scale} must not be negative; 1 is off")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"sample.crf={self.crf} must be from 0 (best) to 51")
        try:
            _ = self.bucket
        except ValueError as error:
            raise ValueError(f"sample.frames, sample.height, sample.width: {error}") from error
