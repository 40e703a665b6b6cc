"""A gated branch added to the residual stream."""
