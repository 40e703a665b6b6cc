"""RMSNorm over the channels of a head, then 3-D rotary positions, for q and k."""
