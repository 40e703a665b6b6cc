"""Bytes that weights, gradients, moments and their average take between updates."""

from dataclasses import dataclass

from hunyuan_train.memory.config import (
    AveragePlace,
    MemoryConfig,
    Place,
    StateType,
    WeightType,
)

PIECE = 2**24
"""Values that an update works on at a time where it widens or moves them; see ``optim.lean``."""
CODE_BLOCK = 256
"""Values of an 8-bit moment that share a float32 scale; see ``optim.low_bit``."""
_PIECE_BYTES = 48
"""Bytes per value of a piece: weight, gradient and both moments in float32, the new codes and what
finds them, random numbers; and three pieces of moments on their way from and to the host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StateBytes:
    """Bytes per parameter that stay on the device between updates, and what goes with them."""

    weight: float = 4.0
    gradient: float = 4.0
    """None where it is freed inside the backward."""
    moments: float = 8.0
    average: float = 4.0
    host: float = 0.0
    """Bytes per parameter on the host instead."""
    teacher: float = 0.0
    """Of a frozen model of the same size that says what to predict."""
    update: float = 0.0
    """Bytes, not per parameter, that an update works in beside all gradients; or, where it runs
    inside the backward, beside everything."""

    @property
    def total(self) -> float:
        """All that is on the device per parameter."""
        return self.weight + self.gradient + self.moments + self.average + self.teacher


FLOAT32_STATES = StateBytes()
"""AdamW with an average, all in float32."""


def state_bytes(
    memory: MemoryConfig, *, trained: float = 1.0, averaged: float = 1.0, teacher: float = 0.0
) -> StateBytes:
    """Return what the choices of ``memory`` take.

    Vectors, one parameter in 5,000 of the 13B model, keep float32 moments and are not told apart.

    Args:
        memory: The choices.
        trained: Share of the parameters that have a gradient and moments.
        averaged: Share of them that has an average.
        teacher: Bytes per parameter of a frozen model beside.
    """
    narrow = memory.weights is WeightType.bfloat16
    int8 = memory.optimizer_states is StateType.int8
    moments = trained * (2 * (1 + 4 / CODE_BLOCK) if int8 else 8.0)
    weight = 2.0 if narrow else 4.0
    moved = memory.optimizer_device is Place.host
    kept = 4.0 * averaged
    average = {AveragePlace.device: (kept, 0.0), AveragePlace.host: (0.0, kept)}
    on_device, on_host = average.get(memory.ema, (0.0, 0.0))
    return StateBytes(
        weight=weight,
        gradient=0.0 if memory.fused_backward else trained * weight,
        moments=0.0 if moved else moments,
        average=on_device,
        host=on_host + (moments if moved else 0.0),
        teacher=teacher,
        update=_PIECE_BYTES * PIECE if narrow or int8 or moved or memory.ema.value == "host" else 0,
    )
