"""Fused kernels of a video diffusion transformer, each beside the plain PyTorch it replaces."""
