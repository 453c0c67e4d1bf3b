"""What the numbers say, in sentences: the headline, notes on what is missing, units in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from advtransfer.report.statistics import POINT, PooledLead, Results, collect

if TYPE_CHECKING:
    from pandas import DataFrame


def headline(rows: DataFrame | Iterable[Mapping[str, Any]] | Results) -> list[str]:
    """What the rows say about robust sources and few target images: one sentence per target.

    It is about the fewest unfrozen blocks, a choice made before seeing the results, and about every
    robust source: picking the best of several would need a correction.
    """
    results = rows if isinstance(rows, Results) else collect(rows)
    return [_sentence(results, target) for target in results.targets]


def _sentence(results: Results, target: str) -> str:
    here = [p for p in results.pooled if p.target == target]
    if not here:
        return f"On {target}, {why_no_delta(results, target)}."
    here = [p for p in here if p.num_unfrozen_blocks == here[0].num_unfrozen_blocks]
    blocks = blocks_text(here[0].num_unfrozen_blocks)
    largest = max(max(p.sizes) for p in here)
    at_most = "at most " if any(len(p.sizes) > 1 for p in here) else ""
    few = f"with {at_most}{count(largest, 'labelled image')}"
    if len(here) > 1:
        clauses = "; ".join(_verdict(p, sample_text(p), short=True) for p in here)
        sentence = f"On {target}, {few} ({blocks}), against the natural source: {clauses}."
    else:
        verdict = _verdict(here[0], f"{sample_text(here[0])}, {blocks}")
        sentence = f"On {target}, {few}, {verdict}."
    once = ["the natural source"] if here[0].num_natural == 1 else []
    once += [f"the {p.source.constraint} source" for p in here if p.num_networks == 1]
    if not once or all(math.isnan(p.ci95) for p in here):
        return sentence
    trained = "the sources" if len(once) > len(here) else " and ".join(once)
    interval = "The intervals leave" if len(here) > 1 else "The interval leaves"
    return f"{sentence} {interval} out what training {trained} again would change."


def sample_text(p: PooledLead) -> str:
    """What a lead's interval is over: "20 seeds", "5 sources of each kind × 20 subsets"."""
    if p.num_networks == p.num_natural == 1:
        return count(p.num_seeds, "seed")
    networks = f"{p.num_networks} sources of each kind"
    if p.num_networks != p.num_natural:
        networks = f"{count(p.num_networks, 'robust source')} and {p.num_natural} natural"
    return f"{networks} × {count(p.num_seeds, 'subset')}"


def networks_text(results: Results) -> str:
    """What goes before a number of seeds: "5 networks × ", or nothing where sources were trained once."""
    return f"{span(results.num_networks.values())} networks × " if results.is_crossed else ""


def _verdict(p: PooledLead, settings: str, *, short: bool = False) -> str:
    """One source's lead as a clause; `short` where the sentence has named the natural source."""
    threat, _, radius = p.source.constraint.partition(" ")
    source = p.source.constraint if short else f"the {threat} source {radius}".rstrip()
    natural = "" if short else " the natural one"
    if p.delta < 0:
        lead = f"is behind{natural} by {points(-p.delta)[1:]} points"
    else:
        lead = f"is ahead{natural and ' of' + natural} by {points(p.delta)} points"
    if math.isnan(p.ci95):
        return f"{source} {lead}, with no interval to go by ({settings})"
    interval = f"95 % interval {points(p.delta - p.ci95)} … {points(p.delta + p.ci95)}"
    if is_clear(p.delta, p.ci95):
        return f"{source} {lead} ({interval}, {settings})"
    pair = f"for {source}" if short else f"between {source} and the natural one"
    tie = f"no difference can be shown {pair}: {points(p.delta)} points"
    return f"{tie}, the {interval} includes zero ({settings})"


def why_no_delta(results: Results, target: str) -> str:
    """Why a target has no differences to report, as a clause."""
    natural = results.natural(target)
    if not results.robust(target):
        return "there is no robust source to compare with the natural one"
    if not natural:
        return "there is no natural source (source_norm = none) to compare the robust ones with"
    if len(natural) > 1:
        return f"there are {len(natural)} natural sources ({', '.join(natural)}), so no single baseline"
    return "the robust and the natural source share no measured seed, so no difference can be paired"


def notes(results: Results, ratios: DataFrame) -> list[str]:
    """What is incomplete in the rows and how the numbers deal with it, one sentence each."""
    sentences = []
    points = results.last.groupby(list(POINT), sort=False)
    seeds, targets = results.summary["num_seeds"], results.last.drop_duplicates(POINT)["target"]
    if lost := int(results.last["accuracy"].isna().sum()):
        sentences.append(
            f"{count(lost, 'trial')} without a test accuracy at the last epoch (empty or NaN) "
            f"{'is' if lost == 1 else 'are'} left out of every mean."
        )
    for target in results.targets:
        sources = results.by_name(target)
        whole = len(sources) * len(results.sizes(target)) * len(results.blocks(target))
        if absent := whole - int((targets == target).sum()):
            cells = count(absent, "cell")
            sentences.append(f"{target}: {cells} of the grid (source × n × k) of {whole} have no rows.")
        if not results.robust(target):
            continue
        if len(results.natural(target)) != 1:
            sentences.append(f"{target}: no differences, because {why_no_delta(results, target)}.")
            continue
        for quantity, few in (("images", "two n"), ("epochs", "two evaluated epochs")):
            if not ((ratios["target"] == target) & (ratios["quantity"] == quantity)).any():
                sentences.append(
                    f"{target}: {quantity} needed cannot be computed, because it takes {few} per source."
                )
    if seeds.nunique() > 1:
        sentences.append(
            f"Cells have between {seeds.min()} and {seeds.max()} seeds; a difference uses only the "
            "seeds that both sources have, so it need not equal the difference of the two means."
        )
    networks = results.num_networks
    if len(set(networks.values())) > 1:
        numbers = ", ".join(f"{name} {number}" for name, number in networks.items())
        sentences.append(f"Sources were trained from different numbers of seeds: {numbers}.")
    if (seeds == 1).any():
        sentences.append("A single seed has no interval; cells with one seed show the value alone.")
    if (points["epoch"].nunique() > 1).any():
        sentences.append("Trials of one cell end at different epochs; each counts with its own last one.")
    if results.repeated:
        sentences.append(
            "Some trials share source, target, n, k and seed with another "
            f"({count(results.repeated, 'row')}); a seed counts once, with its trials' mean."
        )
    return sentences


def is_clear(delta: float, ci95: float) -> bool:
    """Whether the interval excludes zero."""
    return abs(delta) > ci95


def blocks_text(num_unfrozen_blocks: int) -> str:
    """What is trained, in words."""
    if num_unfrozen_blocks < 0:
        return "all blocks"
    if num_unfrozen_blocks == 0:
        return "head only"
    last = count(num_unfrozen_blocks, "block") if num_unfrozen_blocks > 1 else "block"
    return f"head + last {last}"


def k_text(num_unfrozen_blocks: int) -> str:
    return "all" if num_unfrozen_blocks < 0 else f"{num_unfrozen_blocks}"


def points(fraction: float) -> str:
    """An accuracy difference in percentage points, signed: 0.031 -> "+3.1"; NaN -> "–"."""
    if math.isnan(fraction):
        return "–"
    value = 100 * fraction
    digits = 1 if abs(value) >= 0.05 or value == 0 else 2
    return f"{value:+.{digits}f}".replace("-", "−")


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def span(values: Iterable[int]) -> str:
    """Numbers as "20" or "10–800"."""
    low, high = min(values, default=None), max(values, default=None)
    if low is None:
        return "no"
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def listing(values: Iterable[int]) -> str:
    """Numbers as "10, 20 and 50"."""
    texts = [f"{value:,}" for value in values]
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))
