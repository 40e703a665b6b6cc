"""Engines of other projects in place of our own: DeepSpeed for ZeRO, Megatron-Core for linears.

Nothing here is imported unless the config asks for it; both packages are optional extras.
"""
