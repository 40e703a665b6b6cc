"""From a config to the VAE of its kind."""

from hunyuan_train.models.vae.base import Vae
from hunyuan_train.models.vae.config import VAE_HY15, VaeConfig
from hunyuan_train.models.vae.hy15 import StrictlyCausalVae
from hunyuan_train.models.vae.model import CausalVae3D


def build_vae(cfg: VaeConfig) -> Vae:
    """Return a VAE with initial weights, or on the meta device none."""
    return StrictlyCausalVae(cfg) if cfg.kind == VAE_HY15 else CausalVae3D(cfg)
