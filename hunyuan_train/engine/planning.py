"""What a run would train on, before it does: buckets, shares, predicted balance, what is left out.

Nothing is decoded, encoded or loaded onto a device. The draws are those of the real planner.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data import scan
from hunyuan_train.data.config import Encode
from hunyuan_train.data.cost import sample_cost
from hunyuan_train.data.index import Group, Index
from hunyuan_train.data.mixture import Cell
from hunyuan_train.data.planner import StepPlanner
from hunyuan_train.data.store import META, SampleStore
from hunyuan_train.data.table import BucketRow, bucket_rows, table_chart, table_text
from hunyuan_train.engine.data import build_planner, open_stores
from hunyuan_train.engine.precompute_merge import QUARANTINE

CHART_NAME = "data_plan.png"
JSON_NAME = "data_plan.json"
EXAMPLES = 5
"""Left-out files that are shown per reason."""
_STEPS = 50
_MOST_SHARES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What the first updates will be, on average."""

    ranks: int
    """Ranks with distinct data."""
    steps: int
    """Updates that were drawn for it."""
    samples: float
    tokens: float
    """Image tokens."""
    rounds: float
    """Micro-batches of each rank."""
    fillers: float
    """Share of the micro-batches that only keep ranks in step."""
    step: float
    """Mean over the largest predicted cost of a rank; 1 is even."""
    lockstep: float
    """The same if all ranks wait for the slowest in every round."""
    steps_per_epoch: float
    """Updates until as many samples are drawn as an epoch has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """Files of one source that are not trained on, for one reason."""

    reason: str
    count: int
    examples: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataPlan:
    """The answer of ``hunyuan-train plan data``."""

    origin: str
    """Where the samples were counted."""
    rows: list[BucketRow]
    shares: dict[str, dict[str, float]]
    """Shares of the samples drawn, by source, media, anchor and concept."""
    forecast: Forecast
    left_out: list[LeftOut]

    def to_json(self) -> dict[str, Any]:
        """Return the plan for a JSON file."""
        return {
            "origin": self.origin,
            "buckets": [row.to_json() for row in self.rows],
            "shares": self.shares,
            "forecast": asdict(self.forecast),
            "left_out": [asdict(item) for item in self.left_out],
        }

    def __str__(self) -> str:
        """Return the plan as text."""
        parts = [self.origin, table_text(self.rows), _shares_text(self.shares)]
        parts += [_forecast_text(self.forecast), _left_out_text(self.left_out)]
        return "\n\n".join(parts)

    def write(self, folder: Path) -> None:
        """Write the chart and the JSON file into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CHART_NAME).write_bytes(table_chart(self.rows))
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False)
        (folder / JSON_NAME).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Scanned:
    """Stands for a store where there is only an index."""

    name: str
    index: Index


def plan_data(cfg: RunConfig, ranks: int) -> DataPlan:
    """Plan the draws of a run from its stores, or from its clips where there is no store yet.

    Args:
        cfg: Config of the run.
        ranks: Ranks with distinct data (``dp`` of the layout).

    Raises:
        ValueError: Nothing is selected or usable, shares cannot be met, or a setting is missing.
    """
    if not cfg.data.max_tokens:
        raise ValueError(
            "data.max_tokens=0 leaves the batches to the memory of the training device; "
            "set data.max_tokens to plan elsewhere"
        )
    stores, origin, lists = _open(cfg)
    planner = build_planner(cfg, stores, ranks, cfg.data.max_tokens)
    groups = _groups(planner.cells, list(stores.values()))
    costs = [
        sample_cost(cell.bucket, group.tokens_of_text, cfg.model)
        for cell, group in zip(planner.cells, groups, strict=True)
    ]
    rows = bucket_rows(
        planner.cells,
        planner.shares.tolist(),
        costs,
        planner.unit_sizes,
        [group.crop_loss for group in groups],
    )
    return DataPlan(
        origin=origin,
        rows=rows,
        shares=_shares(planner),
        forecast=_forecast(planner, ranks),
        left_out=_left_out(lists),
    )


def _open(cfg: RunConfig) -> tuple[dict[str, SampleStore], str, list[Path]]:
    """Return the stores, where the samples were counted, and the lists of left-out files."""
    data = cfg.data
    online = data.encode != Encode.ahead
    if not data.sources and data.source and (online or not _has_store(data.latents)):
        index = Index.open(scan.index_sources(data, cfg.text.length))
        store = cast(SampleStore, _Scanned("", index))  # the planner reads name and index alone
        why = (
            f"data.encode={data.encode}"
            if online
            else f"no store in data.latents={data.latents} yet"
        )
        origin = f"{len(index)} samples in the clips of data.source={data.source} ({why})"
        return {"": store}, origin, [Path(data.latents) / scan.FOLDER / scan.QUARANTINE]
    stores = open_stores(cfg)
    folders = [source.latents for source in data.sources.values()] or [data.latents]
    total = sum(len(store.index) for store in stores.values())
    lists = [Path(folder) / QUARANTINE for folder in folders if "://" not in folder]
    return stores, f"{total} samples in {', '.join(folders)}", lists


def _has_store(latents: str) -> bool:
    return "://" in latents or (Path(latents) / META).is_file()


def _groups(cells: list[Cell], stores: list[SampleStore]) -> list[Group]:
    by_first = [{group.first: group for group in store.index.groups} for store in stores]
    return [by_first[cell.store][cell.first] for cell in cells]


def _shares(planner: StepPlanner) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name in ("source", "media", "anchor", "concept"):
        sums: dict[str, float] = defaultdict(float)
        for cell, share in zip(planner.cells, planner.shares, strict=True):
            sums[str(getattr(cell, name))] += float(share)
        if set(sums) != {""}:
            found[name] = dict(sums)
    return found


def _forecast(planner: StepPlanner, ranks: int) -> Forecast:
    """Draw some updates; fewer if the data end before."""
    tokens_of = np.array([cell.bucket.tokens for cell in planner.cells])
    drawn: list[tuple[float, ...]] = []
    for _ in range(_STEPS):
        try:
            plan = planner.next_step()
        except ValueError:
            if not drawn:
                raise
            break
        balance = plan.balance(ranks)
        assigned = [unit for rounds in plan.assign(ranks) for unit in rounds]
        fillers = sum(unit.weight == 0 for unit in assigned) / len(assigned)
        tokens = int((tokens_of[plan.table.cell] * plan.table.count).sum())
        rounds = len(assigned) / ranks
        drawn.append((plan.samples, tokens, rounds, fillers, balance.step, balance.lockstep))
    samples, tokens, rounds, fillers, step, lockstep = np.mean(drawn, axis=0).tolist()
    return Forecast(
        ranks=ranks,
        steps=len(drawn),
        samples=samples,
        tokens=tokens,
        rounds=rounds,
        fillers=fillers,
        step=step,
        lockstep=lockstep,
        steps_per_epoch=sum(cell.draws for cell in planner.cells) / samples,
    )


def _left_out(lists: list[Path]) -> list[LeftOut]:
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = defaultdict(list)
    for path in lists:
        if not path.is_file():
            continue
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                counts[row["reason"]] += 1
                if len(examples[row["reason"]]) < EXAMPLES:
                    examples[row["reason"]].append(f"{row['file']}: {row['detail']}")
    return [
        LeftOut(reason=reason, count=count, examples=examples[reason])
        for reason, count in counts.most_common()
    ]


def _shares_text(shares: Mapping[str, Mapping[str, float]]) -> str:
    lines = ["shares of the samples drawn"]
    for name, values in shares.items():
        largest = sorted(values.items(), key=lambda item: (-item[1], item[0]))
        shown = [f"{value or '(none)'} {share:.1%}" for value, share in largest[:_MOST_SHARES]]
        if len(largest) > _MOST_SHARES:
            rest = sum(share for _, share in largest[_MOST_SHARES:])
            shown.append(f"{len(largest) - _MOST_SHARES} more {rest:.1%}")
        lines.append(f"  {name:<8} {', '.join(shown)}")
    return "\n".join(lines)


def _forecast_text(forecast: Forecast) -> str:
    return "\n".join(
        [
            f"an update on {forecast.ranks} ranks, mean of the first {forecast.steps}",
            f"  {forecast.samples:.1f} samples, {forecast.tokens:.0f} image tokens, "
            f"{forecast.rounds:.1f} micro-batches per rank, {forecast.fillers:.1%} of them fillers",
            f"  predicted balance {forecast.step:.1%} over the update, "
            f"{forecast.lockstep:.1%} if ranks wait in every round",
            f"  {forecast.steps_per_epoch:.1f} updates for as many samples as an epoch has",
        ]
    )


def _left_out_text(left_out: list[LeftOut]) -> str:
    if not left_out:
        return "no file is left out"
    lines = [f"{sum(item.count for item in left_out)} files are left out"]
    for item in left_out:
        lines.append(f"  {item.count} {item.reason}")
        lines += [f"    {example}" for example in item.examples]
        if item.count > len(item.examples):
            lines.append(f"    and {item.count - len(item.examples)} more")
    return "\n".join(lines)
