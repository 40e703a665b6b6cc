"""One folder per op: the op, the PyTorch it replaces, its kernels, and what they cost."""
