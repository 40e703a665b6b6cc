"""Which stages there are, what each comes after and what it takes over."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum


class Carried(StrEnum):
    """What a stage may take over from the one it comes after."""

    weights = "weights"
    """The weights."""
    ema = "ema"
    """Their moving average, which goes on; without `weights` it becomes the weights too."""
    optimizer = "optimizer"
    """The moments of the optimizer; they begin at zero otherwise."""
    schedule = "schedule"
    """The place in the learning-rate schedule: no second warm-up, and a decay spans both stages."""
    loader = "loader"
    """The place in the data, which have to be the same."""


class Transform(StrEnum):
    """How weights of one model become those of a larger one."""

    input_channels = "input_channels"
    """The first input channels are copied, the others start at zero and change nothing yet."""
    guidance_embed = "guidance_embed"
    """A new embedder of the guidance scale, its last projection zero: outputs stay the same."""


def default_carry() -> list[Carried]:
    """Return what a stage takes over where nothing else is said."""
    return [Carried.weights, Carried.ema]


def check_carry(where: str, carry: list[Carried]) -> None:
    """Check what is carried by itself.

    Raises:
        ValueError: nothing would be, or moments without their weights.
    """
    if not {Carried.weights, Carried.ema} & set(carry):
        raise ValueError(
            f"{where}.carry={[str(part) for part in carry]} has neither weights nor ema; add one "
            "of them, or start from nothing"
        )
    if Carried.optimizer in carry and Carried.weights not in carry:
        raise ValueError(
            f"{where}.carry has optimizer without weights, and moments belong to their weights; "
            "add weights"
        )


@dataclass(kw_only=True, slots=True)
class CurriculumStage:
    """One node of the graph."""

    stage: str = ""
    """File in conf/stage; empty is the one with the node's own name."""

    after: str = ""
    """The stage it starts from; empty starts from nothing."""

    carry: list[Carried] = field(default_factory=default_carry)
    """What it takes over from that: weights, ema, optimizer, schedule, loader."""

    transform: list[Transform] = field(default_factory=list)
    """How those weights are made to fit a larger model: input_channels, guidance_embed."""

    overrides: list[str] = field(default_factory=list)
    """Fields of this stage alone, like data.latents=FOLDER; they win over those of the command."""


@dataclass(kw_only=True, slots=True)
class CurriculumConfig:
    """A graph of stages: a tree, or several, whose edges say what is carried over."""

    name: str = ""
    """Name of the curriculum; empty when there is none."""

    stages: dict[str, CurriculumStage] = field(default_factory=dict)
    """Its stages by name. They run in this order, save that each waits for the one before it."""

    def __post_init__(self) -> None:
        """Check the graph.

        Raises:
            ValueError: naming the stage and what is wrong with it.
        """
        for name, node in self.stages.items():
            where = f"curriculum.stages.{name}"
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"{where}: a name is made of letters, digits, - and _")
            if node.after and node.after not in self.stages:
                raise ValueError(
                    f"{where}.after={node.after} is not a stage of the curriculum; choose from "
                    f"{', '.join(self.stages)}"
                )
            if node.transform and not node.after:
                raise ValueError(f"{where}.transform needs weights to change; set {where}.after")
            check_carry(where, node.carry)
        for name in self.stages:
            if name in list(self._before(name)):
                raise ValueError(
                    f"curriculum.stages.{name} comes after itself, by way of "
                    f"{', '.join(self._before(name))}; one of them has to start from nothing"
                )

    def _before(self, name: str) -> Iterator[str]:
        """Yield what comes before a stage, nearest first, once around a circle."""
        seen = set()
        while (name := self.stages[name].after) and name not in seen:
            seen.add(name)
            yield name

    def order(self) -> list[str]:
        """Return the names in the order they run: that of the file, each after what it needs."""
        placed: list[str] = []
        for name in self.stages:
            line = [name, *self._before(name)]
            placed += [stage for stage in reversed(line) if stage not in placed]
        return placed

    def selection(self, first: str = "", last: str = "") -> list[str]:
        """Return, in order, ``first`` and what comes after it, up to ``last``.

        Args:
            first: A stage; it and its descendants are meant. Empty means all.
            last: A stage; it and what it needs are meant. Empty means all.

        Raises:
            ValueError: a name is unknown, or nothing lies between the two.
        """
        for option, name in (("--from", first), ("--until", last)):
            if name and name not in self.stages:
                raise ValueError(
                    f"{option} {name} is not a stage of the curriculum; choose from "
                    f"{', '.join(self.stages) or '(none)'}"
                )
        needed = {last, *self._before(last)} if last else set(self.stages)
        found = [
            name
            for name in self.order()
            if name in needed and (not first or first in (name, *self._before(name)))
        ]
        if self.stages and not found:
            raise ValueError(f"--from {first} --until {last}: {last} does not come after {first}")
        return found
