"""The `scaling` section: which runs a scaling law is fitted to, and what a law is asked."""

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class ScalingConfig:
    """Runs of several model sizes, and the budget that a law divides."""

    runs: list[str] = field(default_factory=list)
    """Folders of runs that differ in the size of their model, trained on the same data at a
    constant learning rate."""

    points: str = ""
    """JSON file of rows {compute, size, tokens} (petaFLOP, billions, billions) to fit instead of
    runs: optima that were read off elsewhere."""

    skip: float = 0.1
    """Share of each run's tokens that is left out at its start, where the warm-up is."""

    repetitions: int = 200
    """Of the bootstrap that says how sure the exponents are."""

    widths: list[int] = field(default_factory=lambda: [64, 96, 128, 192])
    """Hidden sizes of the models that `scaling sweep` trains."""

    sweep_pflop: float = 0.005
    """Compute of every run of `scaling sweep`, petaFLOP by `6 N D`."""

    law: str = "video"
    """Law that `plan budget` asks: image or video, which are published, or a scaling.json."""

    budget: float = 0.0
    """PetaFLOP that `plan budget` divides; 0 takes the budget at which the model of `model=` is
    best."""

    mfu: float = 0.4
    """Share of the cluster's peak at which `plan budget` counts GPU-days."""

    def __post_init__(self) -> None:
        """Check single fields.

        Raises:
            ValueError: naming the field and its value.
        """
        if not 0 <= self.skip < 1:
            raise ValueError(f"scaling.skip={self.skip} must be from 0 to below 1")
        if self.repetitions < 0 or self.budget < 0:
            raise ValueError(
                f"scaling.repetitions={self.repetitions} and scaling.budget={self.budget} must not "
                "be negative"
            )
        if not 0 < self.mfu <= 1:
            raise ValueError(f"scaling.mfu={self.mfu} must be above 0 and at most 1")
        if not self.sweep_pflop > 0:
            raise ValueError(f"scaling.sweep_pflop={self.sweep_pflop} must be above 0")
        if len(set(self.widths)) < 3:
            raise ValueError(
                f"scaling.widths={self.widths}: a law needs at least 3 sizes of model, better 5"
            )
