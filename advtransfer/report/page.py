"""The report itself: one HTML file that needs nothing beside it, and the numbers as CSV."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from advtransfer.report import figures
from advtransfer.report.cells import clean_rows
from advtransfer.report.choices import BEST_COLUMNS, best_blocks, paper_tables
from advtransfer.report.evidence import Evidence, pictures_section, source_of, sources_section
from advtransfer.report.interpretation import section_html
from advtransfer.report.markup import page, span, table
from advtransfer.report.plots import Material
from advtransfer.report.ratios import RATIO_COLUMNS, ratios
from advtransfer.report.rows import add_files, csv_text, drop_duplicates, write_files
from advtransfer.report.sections import NEEDED, needed_rows, transfer_section
from advtransfer.report.summary import SUMMARY_COLUMNS, Results, collect, curves, pooled_deltas, summarise
from advtransfer.report.words import blocks_text, count, headline, notes, ratio_notes

_INTERVAL = (
    "Each seed’s difference is averaged over the numbers of images first; the interval is "
    "Student’s t over seeds. It covers the choice of target images and the new layers’ "
    "initialisation, not the training seed of the source networks: there is one network per "
    "source. Differences are in percentage points of test accuracy."
)
_ONE_SEED = (
    "One seed says nothing about the spread over target images and initialisations, and one "
    "network per source nothing about the source’s own training seed. Differences are in "
    "percentage points of test accuracy."
)


def write_report(
    rows: Iterable[Mapping[str, Any]],
    workdir: str | os.PathLike[str],
    *,
    evidence: Evidence = Evidence(),
    title: str = "Robust and natural sources, transferred",
    reference: str = "none",
) -> Path:
    """Writes the report into `workdir`, a local or any other path object; returns that of report.html.

    Beside it: `summary.csv`; `ratios.csv`, images and epochs needed; `best_k.csv`; `table_kK.csv`, accuracies
    in the layout of the paper's table; `figures/` (CSV and SVG). The same arguments give the same bytes. Each
    file appears whole, report.html last. What the rows cannot tell is said in the report.

    Args:
      reference: "paper" draws the paper's published accuracies behind the figures against n.

    Raises:
      ValueError: in one line: no row can be used, or the shapes of the pictures do not match.
    """
    rows, problems = clean_rows((f"rows[{index}]", row) for index, row in enumerate(rows))
    if problems and not rows:
        raise ValueError(problems[0].first)
    kept = drop_duplicates(rows)
    results = collect(kept)
    known = {source.name: source for source in map(source_of, evidence.sources)} | results.sources
    summary = summarise(results)
    material = Material(
        results=results,
        summary=summary,
        curves=curves(results),
        pooled=pooled_deltas(results),
        ratios=ratios(results),
        best=best_blocks(results),
        styles=figures.styles(known.values()),
        reference=reference,
        files={"summary.csv": csv_text(summary, SUMMARY_COLUMNS)},
    )
    material.files["ratios.csv"] = csv_text(material.ratios, RATIO_COLUMNS)
    material.files["best_k.csv"] = csv_text(material.best, BEST_COLUMNS)
    for blocks, records in paper_tables(results, summary).items():
        name = f"table_k{'all' if blocks < 0 else blocks}.csv"
        material.files[name] = csv_text(records, list(records[0]))
    body = [
        _opening(material, title),
        *(transfer_section(material, target) for target in results.targets),
        sources_section(material, known, evidence),
        pictures_section(material, evidence),
        _sections(material, evidence),
        _limits(material, evidence, [problem.sentence for problem in problems], len(rows) - len(kept)),
        _reproduction(evidence, material.files),
    ]
    return write_files(workdir, material.files | {"report.html": page(title, body)})


def _opening(material: Material, title: str) -> str:
    sentences = headline(material.results) or [
        "There are no result rows, so nothing can be said about transfer."
    ]
    several = " several" if len(sentences) > 1 else ""
    told = "".join(f"<p>{_unbroken(escape(sentence))}</p>" for sentence in sentences)
    parts = [f"<h1>{escape(title)}</h1>", f'<div class="headline{several}">{told}</div>']
    if material.pooled:
        single = all(math.isnan(p.ci95) for p in material.pooled)
        parts.append(f"<p class=caveat>{_ONE_SEED if single else _INTERVAL}</p>")
    if material.results.accuracies:
        facts = "".join(
            f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(material.results)
        )
        parts.append(f"<dl class=facts>{facts}</dl>")
    parts.append(_needed(material))
    return "\n".join(parts)


def _needed(material: Material) -> str:
    """Images and epochs needed on every target, for the fewest trained layers as in the headline."""
    groups = []
    for target in material.results.targets:
        rows = [
            next(iter(needed_rows(material, target, quantity, f"{target}, {quantity}").values()), None)
            for quantity in ("images", "epochs")
        ]
        groups.append([row for row in rows if row])
    if not any(groups):
        return ""
    names = [name for name, source in material.results.sources.items() if source.norm != "none"]
    heads = ["", *(material.styles[name].label for name in names)]
    blocks = sorted({blocks_text(material.results.blocks(target)[0]) for target in material.results.targets})
    caption = (
        "How many times fewer images and epochs than from the natural source, for the same accuracy "
        f"({', '.join(blocks)}; epochs at the n of the figures against epochs; below 1 it is more). {NEEDED}"
    )
    return table(heads, [group for group in groups if group], caption, numbers="../ratios")


def _unbroken(text: str) -> str:
    """Keeps signs, units and ranges on one line with their numbers."""
    text = re.sub(r" (?=[…=])|(?<=\d) (?=(%|points|seeds?)\b|%)", "&nbsp;", text)
    return re.sub(r"(…|=) ", r"\1&nbsp;", text)


def _facts(results: Results) -> list[tuple[str, str]]:
    cells = results.accuracies
    sizes = sorted({cell.num_train_images for cell in cells})
    blocks = {k: None for target in results.targets for k in results.blocks(target)}
    return [
        ("Sources", f"{len(results.sources)}"),
        ("Targets", f"{len(results.targets)}"),
        ("Labelled images", span(sizes)),
        ("Unfrozen blocks", ", ".join("all" if k < 0 else str(k) for k in blocks)),
        ("Seeds", span(sorted({len(seeds) for seeds in cells.values()}))),
        ("Fine-tuned models", f"{sum(map(len, cells.values())):,}"),
    ]


def _sections(material: Material, evidence: Evidence) -> str:
    for section in evidence.sections:
        add_files(material.files, {f"figures/{name}": text for name, text in section.files.items()})
    drawn = "\n".join(section_html(section, level=3) for section in evidence.sections)
    return f"<h2>What the networks look at</h2>\n{drawn}" if drawn else ""


def _limits(material: Material, evidence: Evidence, problems: list[str], num_repeats: int) -> str:
    """What the reader must know before trusting the numbers: choices made, what is incomplete."""
    results = material.results
    said = [*map(str, evidence.remarks), *problems, *notes(results), *ratio_notes(results, material.ratios)]
    if num_repeats:
        said.append(f"{count(num_repeats, 'duplicate row')} dropped: same trial and epoch, last one kept.")
    if material.reference == "paper" and "figures/reference.csv" not in material.files:
        said.append(
            "No published numbers are drawn: no rows have the paper’s k = 3, a target and a source of it."
        )
    if results.accuracies:
        said.append(
            "Intervals are Student’s t, 95 % over seeds (of factors, a bootstrap), each alone: not corrected "
            "for looking at several cells at once."
        )
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in said)
    return f"<h2>Limits and choices</h2>\n<ul>{items}</ul>" if said else ""


def _reproduction(evidence: Evidence, files: Iterable[str]) -> str:
    parts = ["<h2>Reproduce</h2>"]
    if evidence.command:
        words = (f"<span>{escape(word)}</span>" for word in evidence.command.split(" "))
        parts.append(f"<pre class=command><code>{' '.join(words)}</code></pre>")
    if evidence.versions:
        items = sorted(evidence.versions.items())
        listed = ", ".join(f"{name} {version}" for name, version in items)
        parts.append(f"<p>Made with {escape(listed)}.</p>")
    if evidence.config:
        text = json.dumps(dict(evidence.config), indent=2, sort_keys=True, default=str)
        parts.append(f"<details><summary>Full configuration</summary><pre>{escape(text)}</pre></details>")
    if len(parts) == 1:
        parts.append("<p class=caveat>No command, versions or configuration were handed over.</p>")
    tables = [f"<a href='{name}'>{name}</a>" for name in files if name.startswith("table_")]
    layout = f" In the layout of the paper’s table, in %: {', '.join(tables)}." if tables else ""
    parts.append(
        "<p>The table behind every number above: <a href='summary.csv'>summary.csv</a> (accuracies as "
        f"fractions).{layout}</p>"
    )
    return "\n".join(parts)
