"""What the numbers say, in sentences: the headline, notes on what is missing, units in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from advtransfer.report.summary import FEW_IMAGES, Pooled, Results, collect, pooled_deltas


def headline(rows: Iterable[Mapping[str, Any]] | Results, *, max_images: int = FEW_IMAGES) -> list[str]:
    """What the rows say about robust sources and few target images: one sentence per target.

    It speaks of the fewest unfrozen blocks, a choice made before seeing the results, and of every
    robust source: picking the best of several would need a correction.
    """
    results = rows if isinstance(rows, Results) else collect(rows)
    pooled = pooled_deltas(results, max_images=max_images)
    return [_sentence(results, target, pooled) for target in results.targets]


def _sentence(results: Results, target: str, pooled: list[Pooled]) -> str:
    here = [p for p in pooled if p.target == target]
    if not here:
        return f"On {target}, {why_no_delta(results, target)}."
    here = [p for p in here if p.num_unfrozen_blocks == here[0].num_unfrozen_blocks]
    blocks = blocks_text(here[0].num_unfrozen_blocks)
    largest = max(max(p.sizes) for p in here)
    at_most = "at most " if any(len(p.sizes) > 1 for p in here) else ""
    few = f"with {at_most}{count(largest, 'labelled image')}"
    if len(here) > 1:
        said = "; ".join(_verdict(p, count(p.num_seeds, "seed"), short=True) for p in here)
        said = f"On {target}, {few} ({blocks}), against the natural source: {said}."
    else:
        verdict = _verdict(here[0], f"{count(here[0].num_seeds, 'seed')}, {blocks}")
        said = f"On {target}, {few}, {verdict}."
    if all(math.isnan(p.ci95) for p in here):
        return said
    interval = "The intervals leave" if len(here) > 1 else "The interval leaves"
    return f"{said} {interval} out what training the sources again would change."


def _verdict(p: Pooled, settings: str, *, short: bool = False) -> str:
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
    tie = f"no difference can be told {pair}: {points(p.delta)} points"
    return f"{tie}, the {interval} includes zero ({settings})"


def why_no_delta(results: Results, target: str) -> str:
    """Why a target has no differences to report, as a clause."""
    natural = results.natural(target)
    if not results.robust(target):
        return "there is no robust source to compare with the natural one"
    if not natural:
        return "there is no natural source (source_norm = none) to compare the robust ones with"
    if len(natural) > 1:
        names = ", ".join(natural)
        return f"there is no single baseline among {len(natural)} natural sources ({names})"
    return "the robust and the natural source share no measured seed, so no difference can be paired"


def notes(results: Results) -> list[str]:
    """What is incomplete in the rows and how the numbers deal with it, one sentence each."""
    said = []
    final = {cell: results.final(cell) for cell in results.accuracies}
    lost = sum(len(results.accuracies[cell]) - len(final[cell]) for cell in final)
    if lost:
        said.append(
            f"{count(lost, 'trial')} without a test accuracy at the last epoch (empty or NaN) "
            f"{'is' if lost == 1 else 'are'} left out of every mean."
        )
    for target in results.targets:
        mine = [cell for cell in final if cell.target == target]
        sources = results.natural(target) + results.robust(target)
        whole = len(sources) * len(results.sizes(target)) * len(results.blocks(target))
        if len(mine) < whole:
            absent = count(whole - len(mine), "cell")
            said.append(f"{target}: {absent} of the grid (source × n × k) of {whole} have no rows.")
        if results.robust(target) and len(results.natural(target)) != 1:
            said.append(f"{target}: no differences, because {why_no_delta(results, target)}.")
    sizes = {len(seeds) for seeds in final.values()}
    if len(sizes) > 1:
        said.append(
            f"Cells have between {min(sizes)} and {max(sizes)} seeds; a difference uses only the "
            "seeds that both sources have, so it need not equal the difference of the two means."
        )
    if 1 in sizes:
        said.append("A single seed has no interval; cells with one seed show the value alone.")
    lengths = ({max(e) for e in seeds.values()} for seeds in results.accuracies.values())
    if any(len(last) > 1 for last in lengths):
        said.append("Trials of one cell end at different epochs; each counts with its own last one.")
    if results.repeated:
        said.append(
            "Some trials share source, target, n, k and seed with another "
            f"({count(results.repeated, 'row')}); a seed counts once, with its trials' mean."
        )
    return said


def ratio_notes(results: Results, ratios: Iterable[Mapping[str, Any]]) -> list[str]:
    """Why targets have no factors for images or epochs needed, one sentence each."""
    found = {(row["target"], row["quantity"]) for row in ratios}
    few = {"images": "two n", "epochs": "two evaluated epochs"}
    return [
        f"{target}: {quantity} needed cannot be computed, because it takes {few[quantity]} per source."
        for target in results.targets
        if results.robust(target) and len(results.natural(target)) == 1
        for quantity in few
        if (target, quantity) not in found
    ]


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


def points(fraction: float) -> str:
    """An accuracy difference in percentage points, signed: 0.031 -> "+3.1"; NaN -> "–"."""
    if math.isnan(fraction):
        return "–"
    value = 100 * fraction
    digits = 1 if abs(value) >= 0.05 or value == 0 else 2
    return f"{value:+.{digits}f}".replace("-", "−")


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
