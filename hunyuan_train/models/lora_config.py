"""The `lora` section: low-rank adapters beside frozen weights."""

from dataclasses import dataclass, field


def _targets() -> list[str]:
    return ["*.linear1", "*.linear2", "*qkv", "*proj", "*.fc1", "*.fc2"]


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Adapters of `peft`: `W x + (alpha / rank) B A x`, of which A and B alone are trained."""

    rank: int = 0
    """Rows of A and columns of B; 0 trains the weights themselves."""
    alpha: float = 0.0
    """Strength of the adapters, over their rank; 0 takes the rank, which makes it 1."""
    targets: list[str] = field(default_factory=_targets)
    """Name patterns (`*` stands for anything) of the linears that get an adapter: by default those
    of attention and MLP in all blocks, as in the released recipe."""

    def __post_init__(self) -> None:
        """Check single fields.

        Raises:
            ValueError: naming the field and its value.
        """
        for name in ("rank", "alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"lora.{name}={getattr(self, name)} must not be negative")
        if self.rank and not self.targets:
            raise ValueError("lora.targets is empty; name the linears that get an adapter")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return (self.alpha or self.rank) / self.rank if self.rank else 0.0
