"""The `vae_loss` section: what an autoencoder is trained to minimise."""

from dataclasses import dataclass, field
from math import isfinite

from hunyuan_train.models.vae.discriminator_config import DiscriminatorConfig


@dataclass(kw_only=True, slots=True)
class VaeLossConfig:
    """Terms and their weights.

    The defaults are the report's: L1 + 0.1 perceptual + 0.05 adversarial + 1e-6 KL.
    """

    absolute: float = 1.0
    """Weight of the mean absolute error of pixel values in [-1, 1]."""
    squared: float = 0.0
    """Weight of the mean squared error."""
    gradient: float = 0.0
    """Weight of the mean absolute error of differences between neighbouring pixels: sharp edges."""
    perceptual: float = 0.1
    """Weight of the perceptual distance; 0 does not compute it."""
    perceptual_folder: str = ""
    """Folder with the weights of LPIPS: a torchvision AlexNet or VGG16 and its lin layers. Empty
    takes the gabor-pyramid distance, which needs no weights and is not LPIPS."""
    kl: float = 1e-6
    """Nats per pixel value: the KL of a sample, summed over its latents, over its number of pixel
    values. Summing reconstruction and KL over a sample gives the same balance, so this is the
    weight of that convention too."""
    adversarial: float = 0.05
    """Weight of the discriminator's verdict; 0 trains none."""
    adversarial_start: int = 0
    """Updates before the verdict counts and the discriminator learns."""
    adaptive: bool = True
    """Whether the verdict is weighed by the ratio of the gradients that the other terms and it have
    in the reconstruction, over the update before (after arXiv 2012.09841), on top of
    ``adversarial``."""
    adaptive_most: float = 1e4
    """Largest such ratio."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """Sizes of the discriminator."""
    discriminator_lr: float = 1e-4
    """Learning rate of the discriminator, on the schedule of the VAE's."""
    discriminator_beta1: float = 0.5
    """Adam's decay of the discriminator's first moment: its target moves, so it forgets sooner."""
    gradient_penalty: float = 0.0
    """Weight of the squared gradient of the logits at recordings (R1); it keeps a discriminator
    from winning on few samples. 0 does not compute it."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range."""
        weights = ("absolute", "squared", "gradient", "perceptual", "kl", "adversarial")
        for name in (*weights, "gradient_penalty"):
            if not (getattr(self, name) >= 0 and isfinite(getattr(self, name))):
                raise ValueError(
                    f"vae_loss.{name}={getattr(self, name)} must be a number that is not negative"
                )
        if self.absolute == self.squared == 0:
            raise ValueError(
                "vae_loss.absolute and vae_loss.squared are both 0; without one of them the colour "
                "of flat areas is free"
            )
        if self.adversarial_start < 0:
            raise ValueError(
                f"vae_loss.adversarial_start={self.adversarial_start} must not be negative"
            )
        for name in ("adaptive_most", "discriminator_lr"):
            if not (getattr(self, name) > 0 and isfinite(getattr(self, name))):
                raise ValueError(f"vae_loss.{name}={getattr(self, name)} must be a number above 0")
        if not 0 <= self.discriminator_beta1 < 1:
            raise ValueError(
                f"vae_loss.discriminator_beta1={self.discriminator_beta1} must be in [0, 1)"
            )
        if self.perceptual_folder and not self.perceptual:
            raise ValueError(
                f"vae_loss.perceptual_folder={self.perceptual_folder} is given but "
                "vae_loss.perceptual=0 never uses it; set a weight or leave the folder out"
            )
