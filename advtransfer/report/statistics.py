"""Statistics of a study: means, intervals and differences to the natural source, paired by seed.

Every interval is Student's t at 95 % over seeds; one seed has none. Where a source was trained from several
seeds, it is over both (`intervals.crossed_mean_and_ci95`), and a difference pairs subset seeds alone. The
natural source is the one with `source_norm` "none"; where a target has several or none, there is nothing to
subtract and the differences stay NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Integer

from advtransfer.intervals import Crossed, crossed_mean_and_ci95, half_width, mean_and_ci95
from advtransfer.norms import NORMS
from advtransfer.report.reference import column_of
from advtransfer.report.sections import SourceInfo

if TYPE_CHECKING:
    from pandas import DataFrame

POINT = ("source", "target", "num_train_images", "num_unfrozen_blocks")  # trials there differ in seed
SUMMARY_COLUMNS = (*POINT, "mean", "ci95", "num_seeds", "delta", "delta_ci95")
CURVE_COLUMNS = (*POINT, "epoch", *SUMMARY_COLUMNS[4:])
BEST_COLUMNS = (*POINT[:3], "best", "mean", "ci95", "num_seeds", "second", "lead", "lead_ci95", "tied")
_MAX_CELLS = 20_000_000
FEW_IMAGES = 100  # what the headline calls few: the regime of the paper's title claim


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """The rows of a study, and what is computed of them.

    Attributes:
      sources: by name, natural ones first, then by norm, radius and name.
      trials: a row per `POINT`, source seed, seed and epoch: `accuracy` (NaN where it was not measured) and
        `lead`, that minus the natural source's of the same seed and epoch (the mean of its source seeds).
        By target, k, n and source; seeds of both kinds are numbered.
      last: the same at each seed's last epoch, where `lead` is over the natural source's last epoch.
      repeated: how many (`POINT`, source seed, seed, epoch) have more than one trial.
    """

    sources: dict[str, SourceInfo]
    trials: DataFrame
    last: DataFrame
    repeated: int

    @functools.cached_property
    def summary(self) -> DataFrame:
        """As `summarise` says."""
        return self._means(self.last, POINT)

    @functools.cached_property
    def curves(self) -> DataFrame:
        """As the summary, but at every epoch: `CURVE_COLUMNS`."""
        order = ("target", "num_unfrozen_blocks", "num_train_images", "source", "epoch")
        return in_order(self._means(self.trials, (*POINT, "epoch")), order, self.sources)

    @functools.cached_property
    def num_networks(self) -> dict[str, int]:
        """From how many seeds each source was trained."""
        return self.last.groupby("source")["source_seed"].nunique().to_dict()

    @property
    def is_crossed(self) -> bool:
        """Whether any source was trained from several seeds."""
        return max(self.num_networks.values(), default=1) > 1

    def _means(self, table: DataFrame, by: Sequence[str]) -> DataFrame:
        """Means, leads and their intervals of every group of `table`."""
        import pandas as pd

        if not self.is_crossed:
            return _over_seeds(table, by)
        names = ("accuracy", "source_seed", "seed")
        columns = Crossed(*(table[name].to_numpy() for name in names))
        known = np.isfinite(columns.values)
        groups: dict[Any, Crossed] = {
            key: Crossed(*(column[rows[known[rows]]] for column in columns))
            for key, rows in table.groupby(list(by), sort=False).indices.items()
        }
        base = {target: own[0] for target in self.targets if len(own := self.natural(target)) == 1}
        found = []
        for (source, target, *place), measured in groups.items():
            minus = groups.get((base.get(target), target, *place))
            is_led = minus is not None and source in self.robust(target)
            lead = crossed_mean_and_ci95(measured, minus)[:2] if is_led else (math.nan, math.nan)
            networks = len(np.unique(measured.source_seeds))
            found.append((source, target, *place, *crossed_mean_and_ci95(measured), *lead, networks))
        return pd.DataFrame(found, columns=(*by, *SUMMARY_COLUMNS[4:], "num_source_seeds"))

    @functools.cached_property
    def pooled(self) -> list[PooledLead]:
        """Of every target, k and robust source the lead, pooled over all n of at most `FEW_IMAGES`.

        Where a target has no such n, its smallest n is taken. Only seeds that both sources have at every
        pooled n count; where that leaves fewer than two, the smallest n with pairs is taken.
        """
        pooled = []
        by = ("target", "num_unfrozen_blocks", "source")
        tables = seed_tables(self.last.dropna(subset="lead"), by, "num_train_images", "lead")
        accuracies = seed_tables(self.last, by, "num_train_images") if self.is_crossed else {}
        for target in self.targets:
            sizes = [n for n in self.sizes(target) if n <= FEW_IMAGES] or self.sizes(target)[:1]
            for blocks, name in itertools.product(self.blocks(target), self.robust(target)):
                if (target, blocks, name) not in tables:
                    continue
                seeds, places, leads, _ = tables[target, blocks, name]
                known = np.isin(places, sizes) & np.isfinite(leads).any(axis=0)
                places, leads = places[known], leads[:, known]
                if not len(places):
                    continue
                paired = np.isfinite(leads).all(axis=1)
                if len(np.unique(seeds[paired])) < 2:
                    places, leads, paired = places[:1], leads[:, :1], np.isfinite(leads[:, 0])
                place = (self.sources[name], target, blocks, tuple(places.tolist()))
                if self.is_crossed:
                    names = (name, *self.natural(target))
                    both = [_mean_over(accuracies[target, blocks, each], places) for each in names]
                    networks = [len(np.unique(each.source_seeds)) for each in both]
                    pooled.append(PooledLead(*place, *crossed_mean_and_ci95(*both), *networks))
                else:
                    mean = leads[paired].mean(axis=1)
                    pooled.append(PooledLead(*place, *mean_and_ci95(mean), len(mean)))
        return pooled

    @functools.cached_property
    def best(self) -> DataFrame:
        """The table of `BEST_COLUMNS`, a row per source, target and n with at least two k.

        `best` is the k of the highest mean; `lead` its lead over the `second`, paired by seed; `tied` every
        other k, over which its lead has an interval that includes zero, or none. The best is picked after
        looking, so its lead is, if anything, too large; each interval stands alone. -1 is all blocks.
        """
        import pandas as pd

        found = []
        tables = seed_tables(self.last, ("target", "source", "num_train_images"), "num_unfrozen_blocks")
        for target in self.targets:
            for name, size in itertools.product(self.by_name(target), self.sizes(target)):
                if (target, name, size) not in tables:
                    continue
                seeds, blocks, table, networks = tables[target, name, size]
                scores = {k: y for k, y in zip(blocks.tolist(), table.T, strict=True) if np.isfinite(y).any()}
                if len(scores) < 2:
                    continue
                best, *others = sorted(scores, key=lambda k: (-np.nanmean(scores[k]), _blocks_order(k)))
                leads = {k: _interval(scores[best] - scores[k], networks, seeds) for k in others}
                tied = " ".join(str(k) for k in others if not leads[k][0] > leads[k][1])
                mine = _interval(scores[best], networks, seeds)
                found.append((name, target, size, best, *mine, others[0], *leads[others[0]][:2], tied))
        return pd.DataFrame(found, columns=BEST_COLUMNS)

    @functools.cached_property
    def targets(self) -> list[str]:
        return list(self.last["target"].unique())

    def blocks(self, target: str) -> list[int]:
        """The numbers of unfrozen blocks, fewest first; -1 means all of them."""
        return self._values(target, "num_unfrozen_blocks", key=_blocks_order)

    def sizes(self, target: str) -> list[int]:
        return self._values(target, "num_train_images")

    def epoch_size(self, target: str) -> int:
        """The n whose epochs are shown: of those with the most evaluated epochs the largest that is few."""
        trials = self.trials[self.trials["target"] == target]
        epochs = trials.groupby("num_train_images")["epoch"].nunique()
        sizes = epochs.index[epochs == epochs.max()].tolist()
        return max((size for size in sizes if size <= FEW_IMAGES), default=sizes[0])

    def by_name(self, target: str) -> list[str]:
        return self._values(target, "source", key=list(self.sources).index)

    def natural(self, target: str) -> list[str]:
        return [name for name in self.by_name(target) if self.sources[name].norm == "none"]

    def robust(self, target: str) -> list[str]:
        return [name for name in self.by_name(target) if self.sources[name].norm != "none"]

    def _values(self, target: str, column: str, key: Any = None) -> list[Any]:
        return sorted(self.last.loc[self.last["target"] == target, column].unique().tolist(), key=key)


class PooledLead(NamedTuple):
    """A robust source's lead over the natural one where images are few; accuracies in [0, 1].

    Per seed, the difference is averaged over `sizes` first (one seed's subsets may be nested, so
    the sizes are not independent); `delta` and `ci95` are then taken over seeds.
    """

    source: SourceInfo
    target: str
    num_unfrozen_blocks: int
    sizes: tuple[int, ...]
    delta: float
    ci95: float
    num_seeds: int
    num_networks: int = 1  # of this source
    num_natural: int = 1  # networks of the natural one


def collect(rows: DataFrame | Iterable[Mapping[str, Any]]) -> Results:
    """The rows that `read_rows` gives, as a list or a table, trial by trial."""
    import pandas as pd

    network, point = ["source", "source_norm", "source_eps"], list(POINT)
    columns = [*network, *point[1:], "source_seed", "seed", "epoch", "test_accuracy", "trial_id"]
    rows = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows), columns=columns)
    rows = rows.reindex(columns=columns).astype({"source_eps": float, "test_accuracy": float})
    rows["source_eps"] = rows["source_eps"].mask(rows["source_norm"] == "none", 0.0)
    which = rows.groupby(network, sort=False, dropna=False).ngroup()
    found = _distinct(map(SourceInfo._make, rows.loc[~which.duplicated(), network].itertuples(index=False)))
    rows["source"] = which.map(dict(enumerate(info.name for info in found)))
    rows["source_seed"] = rows["source_seed"].astype(object).where(rows["source_seed"].notna(), 0)
    for name in ("source_seed", "seed"):
        seeds = {seed: number for number, seed in enumerate(sorted(rows[name].unique(), key=str))}
        rows[name] = rows[name].map(seeds)
    sources = {info.name: info for info in sorted(found, key=_rank)}

    place = [*point[1:], "seed", "epoch"]
    trial = ["source", "source_seed", *place]
    rows = rows.drop_duplicates([*trial, "trial_id"], keep="last")
    trials = rows.groupby(trial, sort=False)["test_accuracy"].agg(["sum", "count", "size"])
    trials["accuracy"] = (trials["sum"] / trials["size"]).where(trials["count"] == trials["size"])
    order = ["target", "num_unfrozen_blocks", "num_train_images", "source", "source_seed", "seed", "epoch"]
    trials = in_order(trials.reset_index(), order, sources)
    last = trials.groupby([*point, "source_seed", "seed"], sort=False).tail(1)
    leads = [_with_leads(table, sources, on) for table, on in ((trials, place), (last, place[:-1]))]
    return Results(sources, *leads, repeated=int((trials["size"] > 1).sum()))


def _distinct(networks: Iterable[SourceInfo]) -> list[SourceInfo]:
    """Networks that share a name are told apart by the constraint, and by a number if that name is taken."""
    found = list(networks)
    times = Counter(info.name for info in found)
    taken = set(times)
    shared = [i for i, info in enumerate(found) if times[info.name] > 1]
    for i in sorted(shared, key=lambda i: tuple(map(str, found[i]))):
        name = f"{found[i].name}, {found[i].constraint}"
        numbered = (f"{name} ({number})" for number in itertools.count(2))
        name = next(each for each in itertools.chain([name], numbered) if each not in taken)
        taken.add(name)
        found[i] = found[i]._replace(name=name)
    return found


def _rank(info: SourceInfo) -> tuple[Any, ...]:
    place = NORMS.index(info.norm) if info.norm in NORMS else len(NORMS)
    return place, info.norm, math.isnan(info.eps), info.eps, info.name


def _with_leads(table: DataFrame, sources: Mapping[str, SourceInfo], on: list[str]) -> DataFrame:
    """`accuracy` minus that of the target's only natural source at the same place, mean over its seeds."""
    is_natural = table["source"].isin([name for name, info in sources.items() if info.norm == "none"])
    natural = table[is_natural]
    single = natural.groupby("target")["source"].transform("nunique") == 1
    base = natural[single].groupby(on, sort=False)["accuracy"].mean().rename("base")
    lead = (table["accuracy"] - table.join(base, on=on)["base"]).mask(is_natural)
    return table[[*POINT, "source_seed", "seed", "epoch", "accuracy"]].assign(lead=lead)


def summarise(rows: DataFrame | Iterable[Mapping[str, Any]] | Results) -> DataFrame:
    """A table with a row per source, target, n and k.

    `mean` and `ci95`, the half-width of its interval, are over the last epoch of `num_seeds` seeds; `delta`
    is this source minus the natural one, over the seeds that both have, and `delta_ci95` the half-width of
    its interval paired by seed. What cannot be computed is NaN (an empty cell in summary.csv). Where any
    source was trained from several seeds, a last column `num_source_seeds` says how many.
    """
    return (rows if isinstance(rows, Results) else collect(rows)).summary


def _over_seeds(table: DataFrame, by: Sequence[str]) -> DataFrame:
    groups = table.groupby(list(by), sort=False)
    found = groups["accuracy"].agg(mean="mean", ci95="std", num_seeds="count")
    leads = groups["lead"].agg(delta="mean", delta_ci95="std", number="count")
    found["ci95"] = half_width(found["ci95"], found["num_seeds"])
    leads["delta_ci95"] = half_width(leads["delta_ci95"], leads.pop("number"))
    return found.join(leads).reset_index()


def paper_tables(results: Results) -> dict[int, DataFrame]:
    """Per k a table as paper_summary_k3.csv: accuracies in %, one column per source.

    Sources of the paper's threats have its column names (0, 3, 4, 8) unless several have the same; the others
    have their own names, after "source " where that is another column's.
    """
    columns = {name: column_of(source) for name, source in results.sources.items()}
    times = Counter(columns.values())
    names = {name: column for name, column in columns.items() if column and times[column] == 1}
    place = {"num_train_images": "num_training_images", "target": "target_ds"}
    taken = {*place.values(), *names.values()}
    for name in [name for name in columns if name not in names]:
        names[name] = name
        while names[name] in taken:
            names[name] = f"source {names[name]}"
        taken.add(names[name])
    tables = {}
    summary = results.summary
    for blocks in sorted(summary["num_unfrozen_blocks"].unique().tolist(), key=_blocks_order):
        group = summary[summary["num_unfrozen_blocks"] == blocks]
        table = 100 * group.pivot(index=list(place), columns="source", values="mean").reindex(columns=columns)
        tables[blocks] = table.rename(columns=names).rename_axis(index=place, columns=None).reset_index()
    return tables


class SeedTable(NamedTuple):
    """Values by seed and n, k or epoch."""

    seeds: Integer[np.ndarray, " s"]  # rising; those of a source seed after those of the one before
    places: Integer[np.ndarray, " m"]  # rising
    values: Float64[np.ndarray, "s m"]  # NaN where missing
    source_seeds: Integer[np.ndarray, " s"] | None = None  # None: one


def seed_tables(
    table: DataFrame, by: Sequence[str], places: str, values: str = "accuracy"
) -> dict[Any, SeedTable]:
    """Those of every group.

    Raises:
      ValueError: one would have more than `_MAX_CELLS`.
    """
    number = table["seed"].max() + 1
    pairs = table["source_seed"].to_numpy() * number + table["seed"].to_numpy()
    columns = [pairs, *(table[name].to_numpy() for name in (places, values))]
    found = {}
    for key, rows in table.groupby(list(by), sort=False).indices.items():
        own, x, y = (column[rows] for column in columns)
        (own, i), (x, j) = (np.unique(column, return_inverse=True) for column in (own, x))
        networks, seeds = np.divmod(own, number)
        if len(seeds) * len(x) > _MAX_CELLS:
            raise ValueError(
                f"{key}: {len(seeds):,} seeds at {len(x):,} {places} are too many: leave some out"
            )
        cells = np.full((len(seeds), len(x)), np.nan)
        cells[i, j] = y
        found[key] = SeedTable(seeds, x, cells, networks if np.ptp(networks) else None)
    return found


def _interval(
    values: np.ndarray, source_seeds: np.ndarray | None, seeds: np.ndarray
) -> tuple[float, float, int]:
    """Of the finite values: mean, half-width of the interval, number of seeds."""
    known = np.isfinite(values)
    if source_seeds is None:
        return *mean_and_ci95(values[known]), int(known.sum())
    return crossed_mean_and_ci95(Crossed(values[known], source_seeds[known], seeds[known]))


def _mean_over(table: SeedTable, places: np.ndarray) -> Crossed:
    """Of each seed that has a value at all of these places their mean."""
    values = table.values[:, np.searchsorted(table.places, places)].mean(axis=1)
    networks = np.zeros_like(table.seeds) if table.source_seeds is None else table.source_seeds
    known = np.isfinite(values)
    return Crossed(values[known], networks[known], table.seeds[known])


def in_order(table: DataFrame, by: Iterable[str], sources: Mapping[str, SourceInfo]) -> DataFrame:
    """By these columns: sources as they are ranked, all blocks after the numbers of blocks."""
    orders: dict[Any, Callable[[Any], float]] = {
        "source": list(sources).index,
        "num_unfrozen_blocks": _blocks_order,
    }
    return table.sort_values(
        list(by), key=lambda column: column.map(orders[column.name]) if column.name in orders else column
    )


def _blocks_order(num_unfrozen_blocks: int) -> float:
    return math.inf if num_unfrozen_blocks < 0 else num_unfrozen_blocks
