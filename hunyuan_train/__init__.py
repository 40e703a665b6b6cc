"""The training system of HunyuanVideo: from clips to a trained model and sampled videos."""

__version__ = "0.1.0"
