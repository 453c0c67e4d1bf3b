"""The report itself: one HTML file that needs nothing beside it, and the numbers as CSV."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from advtransfer.report import figures
from advtransfer.report.evidence import Evidence, pictures_section, source_of, sources_section
from advtransfer.report.markup import span
from advtransfer.report.rows import coerce_rows, csv_text, drop_duplicates, write_atomically
from advtransfer.report.sections import Material, transfer_section
from advtransfer.report.summary import SUMMARY_COLUMNS, Results, collect, pooled_deltas, summarise
from advtransfer.report.words import count, headline, notes

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
) -> Path:
    """Writes summary.csv, figures/ (CSV and SVG) and report.html into `workdir`; returns the last.

    The same arguments give the same bytes. Each file appears whole, report.html last.

    Raises:
      ValueError: in one line: a row lacks a column or holds a value of the wrong kind, or the
        shapes of the pictures do not match.
    """
    rows = coerce_rows((f"rows[{index}]", row) for index, row in enumerate(rows))
    kept = drop_duplicates(rows)
    results = collect(kept)
    known = {source.name: source for source in map(source_of, evidence.sources)} | results.sources
    material = Material(
        results=results,
        summary=summarise(results),
        pooled=pooled_deltas(results),
        styles=figures.styles(known.values()),
        files={},
    )
    material.files["summary.csv"] = csv_text(material.summary, SUMMARY_COLUMNS)
    body = [
        _opening(material, title),
        *(transfer_section(material, target) for target in results.targets),
        sources_section(material, known, evidence),
        pictures_section(material, evidence),
        _limits(results, evidence, num_repeats=len(rows) - len(kept)),
        _reproduction(evidence),
    ]
    template = Template(resources.files(__package__).joinpath("template.html").read_text("utf-8"))
    page = template.substitute(title=escape(title), body="\n".join(filter(None, body)))
    for name, content in material.files.items():
        write_atomically(Path(workdir, name), content)
    path = Path(workdir, "report.html")
    write_atomically(path, page)
    return path


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
    return "\n".join(parts)


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


def _limits(results: Results, evidence: Evidence, *, num_repeats: int) -> str:
    """What the reader must know before trusting the numbers: choices made, what is incomplete."""
    said = [*map(str, evidence.remarks), *notes(results)]
    if num_repeats:
        said.append(f"{count(num_repeats, 'duplicate row')} dropped: same trial and epoch, last one kept.")
    if results.accuracies:
        said.append(
            "Intervals are Student’s t at 95 % over seeds, each on its own; they are not corrected "
            "for looking at several cells at once."
        )
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in said)
    return f"<h2>Limits and choices</h2>\n<ul>{items}</ul>" if said else ""


def _reproduction(evidence: Evidence) -> str:
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
    parts.append(
        "<p>The table behind every number above: <a href='summary.csv'>summary.csv</a> "
        "(accuracies as fractions).</p>"
    )
    return "\n".join(parts)
