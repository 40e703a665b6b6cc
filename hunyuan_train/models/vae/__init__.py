"""The causal 3-D variational autoencoder between pixels and the transformer's latents."""
