"""The report of a study: what its rows say, target by target, and what else is known of the sources."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from advtransfer.foreign import AnyPath
from advtransfer.report import figures
from advtransfer.report.files import csv_text
from advtransfer.report.ratios import ratios
from advtransfer.report.render import write_page
from advtransfer.report.rows import clean
from advtransfer.report.sections import (
    EMPTY,
    Dumbbell,
    Entry,
    Page,
    Part,
    PictureRow,
    Pictures,
    Plot,
    Section,
    SourceInfo,
    Table,
    Text,
)
from advtransfer.report.statistics import POINT, Results, collect, paper_tables
from advtransfer.report.target_figures import target_figures
from advtransfer.report.target_tables import Material, all_numbers, best_k, few_images, needed, overview
from advtransfer.report.words import headline, k_text, notes, span

if TYPE_CHECKING:
    from pandas import DataFrame

MAX_PICTURES = 8
_INTERVAL = (
    "Each seed’s difference is averaged over the numbers of images first; the interval is Student’s t over "
    "seeds. It covers the choice of target images and the new layers’ initialisation, but not the training "
    "of the sources: there is one network per source. Differences are in percentage points of test accuracy."
)
_CROSSED = (
    "Each seed’s difference is averaged over the numbers of images first; the interval is Student’s t over "
    "networks and seeds. It covers the choice of target images, the new layers’ initialisation and the "
    "training of every source that has several networks. Differences are in percentage points of test "
    "accuracy."
)
_ONE_SEED = (
    "One seed says nothing about the spread over target images and initialisations{}. Differences are in "
    "percentage points of test accuracy."
)
_ONE_NETWORK = ", and one network per source nothing about the training of the sources"


class Evidence(NamedTuple):
    """What a report shows beside the rows; any part may be empty.

    Attributes:
      sources: one dict per source network: its `name` (as in the rows) and any of `seed`, `norm`, `eps`,
        `natural_accuracy` and `adversarial_accuracy` (in [0, 1]), `num_images` (measured on),
        `attack` (in words).
      pictures: `source_images` [M, H, W, 3] in [0, 1]; `adversarial/NAME` [M, H, W, 3], the same images
        attacked against the source NAME; `target_images` [L, h, w, 3]. The first eight of each are shown.
      captions: lists of str that go with them: `source_labels`, `natural_predictions/NAME`,
        `adversarial_predictions/NAME`, `target_labels`.
      config: the run's configuration; `versions`: package -> version.
      command: what to type to get this report again.
      remarks: sentences that the reader should know, such as how ε and the epochs were chosen.
      sections: what the source networks look at.
    """

    sources: Sequence[Mapping[str, Any]] = ()
    pictures: Mapping[str, np.ndarray] = EMPTY
    captions: Mapping[str, Sequence[str]] = EMPTY
    config: Mapping[str, Any] = EMPTY
    versions: Mapping[str, str] = EMPTY
    command: str = ""
    remarks: Sequence[str] = ()
    sections: Sequence[Section] = ()


def write_report(
    rows: DataFrame | Iterable[Mapping[str, Any]] | Results,
    workdir: str | AnyPath,
    *,
    evidence: Evidence = Evidence(),
    title: str = "Robust and natural sources, transferred",
    reference: str = "none",
) -> AnyPath:
    """Writes the report into `workdir`, a local or any other path object; returns that of report.html.

    Beside it: `summary.csv`; `ratios.csv`, images and epochs needed; `best_k.csv`; `table_kK.csv`, accuracies
    in the layout of the paper's table; `figures/` (CSV and SVG). The same arguments give the same bytes. Each
    file appears whole, report.html last. The report says what is missing in the rows.

    Args:
      rows: as `run_study`, `read_rows` or `read_foreign_rows` gives them.
      reference: "paper" draws the paper's published accuracies behind the figures against n.

    Raises:
      ValueError: in one line: no row can be used, or the shapes of the pictures do not match.
    """
    import pandas as pd

    if isinstance(rows, Results):
        results, problems = rows, []
    else:
        table, problems = clean(rows)
        results = collect(table)
    known = {info.name: info for info in map(_source, evidence.sources)} | results.sources
    material = Material(results, ratios(results), figures.styles(known.values()), reference, shown={})
    sections = [
        Section("", parts=overview(material)),
        *(_transfer(material, target) for target in results.targets),
        Section("The source networks", parts=_sources(material, known, evidence) if known else ()),
        Section("Pictures", parts=_pictures(material, evidence) or [Text("There are no pictures.", "muted")]),
        _looked_at(evidence.sections),
        Section("Limits and choices", parts=[Text("\n".join(_limits(material, evidence, problems)), "list")]),
    ]
    beside = {
        "summary.csv": ("accuracies, as fractions, with their intervals and leads", results.summary),
        "ratios.csv": ("images and epochs needed", material.ratios),
        "best_k.csv": ("the best number of trained blocks", results.best),
    }
    for blocks, table in paper_tables(results).items():
        what = "accuracies in the layout of the paper’s table, in %"
        beside[f"table_k{k_text(blocks)}.csv"] = (what, table)
    files = {path: csv_text(table) for path, (_, table) in beside.items()}
    files |= {path: csv_text(pd.concat(tables)) for path, tables in material.shown.items()}
    page = Page(
        title,
        sections=[section for section in sections if section.parts],
        headline=headline(results) or ["There are no result rows, so nothing can be said about transfer."],
        note=_note(results),
        facts=_facts(results),
        command=evidence.command,
        versions=evidence.versions,
        config=evidence.config,
        files={path: what for path, (what, _) in beside.items()},
        folder="figures/",
    )
    return write_page(page, workdir, files)


def _note(results: Results) -> str:
    if not results.pooled:
        return ""
    if all(math.isnan(p.ci95) for p in results.pooled):
        return _ONE_SEED.format("" if results.is_crossed else _ONE_NETWORK)
    return _CROSSED if results.is_crossed else _INTERVAL


def _facts(results: Results) -> list[tuple[str, str]]:
    last = results.last
    if last.empty:
        return []
    blocks = dict.fromkeys(k for target in results.targets for k in results.blocks(target))
    return [
        ("Sources", f"{len(results.sources)}"),
        ("Targets", f"{len(results.targets)}"),
        ("Labelled images", span(last["num_train_images"])),
        ("Unfrozen blocks", ", ".join(map(k_text, blocks))),
        *([("Networks of a source", span(results.num_networks.values()))] if results.is_crossed else []),
        ("Seeds", span(last.groupby(list(POINT))["seed"].nunique())),
        ("Fine-tuned models", f"{len(last):,}"),
    ]


def _limits(material: Material, evidence: Evidence, problems: list[str]) -> list[str]:
    """What the reader must know before trusting the numbers: choices made, what is incomplete."""
    sentences = [*map(str, evidence.remarks), *problems, *notes(material.results, material.ratios)]
    if material.reference == "paper" and "figures/reference.csv" not in material.shown:
        sentences.append("No published numbers are drawn: no rows have the paper’s k = 3, target and source.")
    if not material.results.last.empty:
        sentences.append(
            f"Intervals are Student’s t, 95 % over {'networks and ' * material.results.is_crossed}seeds "
            "(of factors, a bootstrap), each alone: not corrected for looking at several cells at once."
        )
    return sentences


def _transfer(material: Material, target: str) -> Section:
    parts = [
        *few_images(material, target),
        *needed(material, target, "images"),
        *needed(material, target, "epochs"),
        *target_figures(material, target),
        *best_k(material, target),
        *all_numbers(material, target),
    ]
    return Section(f"Transfer to {target}", parts=parts)


def _source(entry: Mapping[str, Any]) -> SourceInfo:
    name, norm = str(entry.get("name", "unnamed")), str(entry.get("norm") or "none")
    return SourceInfo(name, norm, _number(entry.get("eps")))


def _sources(material: Material, known: Mapping[str, SourceInfo], evidence: Evidence) -> list[Part]:
    import pandas as pd

    entries: dict[str, list[Mapping[str, Any]]] = {}
    for entry in evidence.sources:
        entries.setdefault(str(entry.get("name", "unnamed")), []).append(entry)
    kinds = ("natural_accuracy", "adversarial_accuracy")
    measured, rows = [], []
    for name, source, entry in ((n, x, entry) for n, x in known.items() for entry in entries.get(n, [{}])):
        seed = f", seed {entry.get('seed', '?')}" if len(entries.get(name, ())) > 1 else ""
        natural, adversarial = (_number(entry.get(kind)) for kind in kinds)
        if not (math.isnan(natural) and math.isnan(adversarial)):
            measured.append((f"{material.styles[name].label}{seed}", natural, adversarial))
        accuracies = ("–" if math.isnan(share) else f"{100 * share:.1f}" for share in (natural, adversarial))
        images = f"{entry['num_images']:,}" if entry.get("num_images") else "–"
        threat = "nothing" if source.norm == "none" else source.constraint
        rows.append([f"{name}{seed}", threat, *accuracies, images, str(entry.get("attack") or "–")])
    parts: list[Part] = [Text("The sources’ own accuracies were not measured in this run.", "muted")]
    if measured:
        path = material.add("source_accuracy", pd.DataFrame(measured, columns=("source", *kinds)))
        panel = Dumbbell("Natural and adversarial accuracy", measured, "figures/source_accuracy.svg")
        caption = "Accuracy on the sources’ own task: circle, clean test images; diamond, adversarial ones."
        parts = [Plot(caption, [panel], path)]
    heads = ["Source", "Trained against", "Natural, %", "Adversarial, %", "Images", "Attack"]
    return [*parts, Table("The source networks.", heads, rows, words=True)]


def _pictures(material: Material, evidence: Evidence) -> list[Part]:
    clean, targets = _images(evidence, "source_images"), _images(evidence, "target_images")
    parts: list[Part] = []
    if len(clean):
        parts += [Text("Adversarial examples", "heading"), _adversarial(material, evidence, clean)]
    if len(targets):
        labels = _texts(evidence, "target_labels", len(targets))
        alts = [f"Target image of class {label}" if label else "Target image" for label in labels]
        row = PictureRow("", targets, labels, alts)
        parts += [
            Text("Target images", "heading"),
            Pictures("Images of the target task with their labels.", [[row]]),
        ]
    return parts


def _adversarial(material: Material, evidence: Evidence, clean: np.ndarray) -> Pictures:
    """Source images above adversarial examples of them and the magnified differences, image by image."""
    attacked = {}
    for key in evidence.pictures:
        if key.startswith("adversarial/"):
            images = attacked[key.removeprefix("adversarial/")] = _images(evidence, key)
            if images.shape != clean.shape:
                raise ValueError(
                    f"pictures[{key!r}] has shape {images.shape}, but source_images has {clean.shape}"
                )
    gain = figures.difference_gain((images, clean) for images in attacked.values())
    labels = _texts(evidence, "source_labels", len(clean))
    groups = [[PictureRow("Source image", clean, labels)]]
    for name, images in attacked.items():
        label = material.styles[name].label if name in material.styles else name
        before = _texts(evidence, f"natural_predictions/{name}", len(clean))
        after = _texts(evidence, f"adversarial_predictions/{name}", len(clean))
        entries = [_prediction(*words) for words in zip(labels, before, after, strict=True)]
        difference = 0.5 + gain * (images - clean)
        groups.append(
            [
                PictureRow(f"{label}: adversarial", images, entries),
                PictureRow(f"{label}: difference × {gain}", difference),
            ]
        )
    caption = "Images of the source task, as the networks see them."
    if attacked:
        attacks = sorted({str(entry["attack"]) for entry in evidence.sources if entry.get("attack")})
        caption = (
            "Images of the source task, adversarial examples against each source, and what the attack added, "
            f"magnified {gain} times around grey. Under each: the prediction for the clean image → for the "
            "adversarial one (✓ the label, ✗ another class)."
            + (f" Attack: {'; '.join(attacks)}." if attacks else "")
        )
    return Pictures(caption, groups)


def _prediction(label: str, before: str, after: str) -> Entry:
    if not after:
        return Entry()
    mark = ("✓" if after == label else "✗") if label else ""
    return Entry(f"{mark} {before} → " if before else f"{mark} ", after)


def _images(evidence: Evidence, name: str) -> np.ndarray:
    images = np.asarray(evidence.pictures.get(name, ()), float)[:MAX_PICTURES]
    if len(images) and (images.ndim != 4 or images.shape[-1] != 3):
        raise ValueError(f"pictures[{name!r}] has shape {images.shape}; pictures are [M, H, W, 3]")
    return images


def _texts(evidence: Evidence, name: str, number: int) -> list[str]:
    """The first captions of that name, empty ones where there are fewer than pictures."""
    texts = [str(text) for text in evidence.captions.get(name, ())][:number]
    return texts + [""] * (number - len(texts))


def _looked_at(sections: Sequence[Section]) -> Section:
    """Sections below headings of one."""
    parts = [
        part
        for section in sections
        for part in (Text(section.title, "heading"), Text(section.finding), *section.parts)
    ]
    files = {name: rows for section in sections for name, rows in section.files.items()}
    return Section("What the networks look at", parts=parts, files=files)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
