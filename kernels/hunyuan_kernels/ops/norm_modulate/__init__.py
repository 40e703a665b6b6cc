"""LayerNorm without affine, modulated by a shift and a scale per sample."""
