"""The `vae_training` section: how an autoencoder is trained on pixels."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class VaeTrainingConfig:
    """Losses and optimizer of VAE training; the defaults suit conf/vae/tiny on plain shapes."""

    steps: int = 600
    """Optimizer updates."""
    kernel_lr: float = 4e-3
    """Muon's learning rate of kernels and projections, after the warm-up, falling on a cosine."""
    lr: float = 1e-3
    """Adam's learning rate of norms and biases, on the same schedule."""
    min_lr_ratio: float = 0.02
    """A rate at the last step over its highest."""
    warmup_steps: int = 20
    """Steps over which the rates rise linearly."""
    beta2: float = 0.98
    """Adam's decay of the second moment; the first has 0.9."""
    clip_norm: float = 1.0
    """Largest global gradient norm of an update; 0 only measures it."""
    ema_decay: float = 0.98
    """Decay of the averaged weights that are saved; 0 saves the last weights."""
    mse_weight: float = 5.0
    """Weight of the squared error beside the absolute error, which has weight 1."""
    gradient_weight: float = 1.0
    """Weight of the absolute error of differences between neighbouring pixels: sharp edges."""
    kl_weight: float = 1e-3
    """Nats per pixel value: the KL of a sample, summed over its latents, over its number of pixel
    values. This is the published convention of summing both terms over a sample, so 1e-6 here is
    the report's 1e-6."""
    measure_batches: int = 8
    """Batches after training over which the latents' standard deviation is measured."""
    batch_size: int = 16
    """Samples in one batch; all of one bucket."""
    batch_pixels: int = 40000
    """Pixels (frames x height x width) a batch is cut to by leaving out samples, down to two."""
    crop_frames: int = 17
    """Clips are cut at random to 5, 9, ... frames, at most these; 4n+1."""
    crop_px: int = 64
    """Frames are cut at random to at most this width and height; a multiple of 8."""
    files_per_media: int = 256
    """At most this many images and as many clips are decoded into memory."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range."""
        for name in ("steps", "measure_batches", "batch_size", "batch_pixels", "files_per_media"):
            if getattr(self, name) < 1:
                raise ValueError(f"vae_training.{name}={getattr(self, name)} must be at least 1")
        if self.crop_frames < 1 or self.crop_frames % 4 != 1:
            raise ValueError(f"vae_training.crop_frames={self.crop_frames} must be 4n+1, e.g. 17")
        if self.crop_px < 8 or self.crop_px % 8:
            raise ValueError(f"vae_training.crop_px={self.crop_px} must be a multiple of 8")
        for name in ("kernel_lr", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"vae_training.{name}={getattr(self, name)} must be above 0")
        for name in ("beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"vae_training.{name}={getattr(self, name)} must be in [0, 1)")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"vae_training.min_lr_ratio={self.min_lr_ratio} must be in [0, 1]")
        for name in (
            "warmup_steps",
            "clip_norm",
            "mse_weight",
            "gradient_weight",
            "kl_weight",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"vae_training.{name}={getattr(self, name)} must not be negative")
