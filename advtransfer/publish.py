"""Models on the Hugging Face hub: uploaded with weights for PyTorch and a card written from what is known."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from advtransfer import hub
from advtransfer.intervals import wilson
from advtransfer.models import Model, ModelSpec, save_model
from advtransfer.norms import SYMBOLS
from advtransfer.torch_checkpoint import export_torch_state_dict

_WEIGHTS = "model.safetensors"


def push_to_hub(
    model: Model,
    repo: str,
    *,
    measured: Mapping[str, Any] | None = None,
    dataset: str = "",
    license: str = "",
    private: bool = False,
    message: str = "Upload a model",
) -> str:
    """Uploads a model to the Hugging Face hub, from which `load_model("hf:OWNER/NAME")` reads it.

    The repository holds the model folder, the same weights as `model.safetensors` under torchvision's names
    (see `export_torch_state_dict`), and README.md, the card. All go in one commit, and
    replace those of an earlier model there. Needs huggingface_hub and a token with the right to write
    (`hf auth login`, or HF_TOKEN).

    Args:
      model: a model.
      repo: OWNER/NAME, which is made if there is none.
      measured, dataset, license: for the card.
      private: whether a new repository is private.
      message: of the commit.

    Returns:
      The address of the commit.

    Raises:
      ValueError: no such name, no token, no right to write, no network, or a model that cannot be saved; a
        repository that was there is as it was, a new one may have been made, and is empty.
    """
    if repo.count("/") != 1:
        raise ValueError(f"{repo!r} is not of the form OWNER/NAME")
    card = model_card(model.spec, repo, measured=measured, dataset=dataset, license=license)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_model(model, folder)
        export_torch_state_dict(model, folder / _WEIGHTS)
        (folder / "README.md").write_text(card, encoding="utf-8")
        return hub.upload(folder, repo, message=message, replaced=("variables/*", _WEIGHTS), private=private)


def model_card(
    spec: ModelSpec,
    repo: str,
    *,
    measured: Mapping[str, Any] | None = None,
    dataset: str = "",
    license: str = "",
) -> str:
    """A card in the hub's format: what the model is, was made from and reaches, and how it is loaded.

    Nothing is guessed: what is not known is said not to be.

    Args:
      spec: of the model.
      repo: OWNER/NAME.
      measured: what `measure` returned, or the content of an evaluation.json.
      dataset: that it was measured on; "": the one that `measured` names.
      license: as the hub writes it, such as "mit"; "": that of the published checkpoint that the model was
        imported from or is fine-tuned from, if there is one.

    Raises:
      ValueError: `measured` without a dataset.
    """
    from huggingface_hub import ModelCardData

    dataset = dataset or str((measured or {}).get("dataset", ""))
    if measured and not dataset:
        raise ValueError("dataset: name the dataset that the model was measured on")
    published = _published(spec)
    license = license or str(published.get("licence", "")).lower()
    rows = _accuracies(measured, dataset)
    tags = ["jax", "flax", "image-classification", "adversarial-robustness"]
    data = ModelCardData(
        license=license or None,
        library_name="advtransfer",
        pipeline_tag="image-classification",
        tags=tags,
    )
    name = repo.partition("/")[2]
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"A {spec.architecture} with {spec.num_classes:,} classes, for images of {spec.image_size}² pixels. "
        f"{_training(spec)}",
        "## Accuracy",
        *(rows or ["It is not known: nothing was measured when the model was uploaded."]),
        "## Where it comes from",
        *_origin(spec),
        "## License",
        license or "Not given: ask the owner before you use the model.",
        "## How to load it",
        _LOADING.format(repo=repo, mean=list(spec.mean), std=list(spec.std)),
    ]
    if 0 < len(spec.class_names) <= 1000:
        lines += ["## Classes", ", ".join(spec.class_names)]
    return "\n\n".join(lines) + "\n"


_LOADING = """In JAX, with advtransfer; images are [N, H, H, 3], uint8 or in [0, 1]:

```python
import advtransfer as at

model = at.load_model("hf:{repo}")
logits = at.predict(model, images)
```

In PyTorch, `model.safetensors` has torchvision's names; normalise images in [0, 1] with the mean {mean} and
the standard deviation {std}."""


def _training(spec: ModelSpec) -> str:
    """Its threat model, and of a transferred one that of its source."""
    source = spec.provenance.get("source")
    if isinstance(source, dict) and {"norm", "eps"} <= source.keys():
        trained = _threat(source["norm"], source["eps"])
        return f"It was fine-tuned naturally from a source that was trained {trained}."
    if spec.provenance.get("threat_model") == "unknown":
        return "What it was trained against is not known."
    return f"It was trained {_threat(spec.norm, spec.eps)}."


def _threat(norm: str, eps: float) -> str:
    if norm == "none":
        return "naturally, without an attack"
    return f"adversarially against {SYMBOLS[norm]} attacks with ε = {eps:.4g} (pixels in [0, 1])"


def _accuracies(measured: Mapping[str, Any] | None, dataset: str) -> list[str]:
    if not measured:
        return []
    number = int(measured["num_images"])
    lines = [
        f"On {number:,} images of {dataset}, with Wilson’s 95 % intervals over images.",
        "| | accuracy | 95 % interval |\n|---|---|---|",
    ]
    for kind, name in (("natural", "natural"), ("adversarial", str(measured.get("attack", "")))):
        if (share := measured.get(f"{kind}_accuracy")) is not None:
            low, high = wilson(round(share * number), number)
            lines[-1] += f"\n| {name} | {share:.1%} | {low:.1%} … {high:.1%} |"
    return lines


def _published(spec: ModelSpec) -> Mapping[str, Any]:
    """What is known of the published checkpoint at the root of the model."""
    provenance = spec.provenance
    while "published" not in provenance and isinstance(provenance.get("source"), dict):
        provenance = provenance["source"].get("provenance", {})
    return provenance.get("published", {})


def _origin(spec: ModelSpec) -> list[str]:
    provenance, lines = spec.provenance, []
    if isinstance(source := provenance.get("source"), dict):
        blocks = provenance.get("num_unfrozen_blocks", 0)
        several = f"the last {blocks} blocks and the head"
        trained = {0: "the head alone", 1: "the last block and the head", -1: "everything"}.get(
            blocks, several
        )
        data = provenance.get("data", {}).get("name", "")
        images = f"{provenance.get('num_train_images', 0):,} labelled images{data and f' of {data}'}"
        lines.append(
            f"Fine-tuned on {images}: {trained}, of a {source.get('architecture', 'network')} with "
            f"{source.get('num_classes', 0):,} classes."
        )
    if published := _published(spec):
        accuracy = f", {published['accuracy']:.1%} by its publisher" if published.get("accuracy") else ""
        origin = f"{published['source']} ({published['dataset']}{accuracy})"
        lines.append(f"The weights of {origin} are its origin.")
    if "seed" in provenance:
        lines.append(f"Trained with advtransfer from seed {provenance['seed']}.")
    return [*(lines or ["It is not known."]), "`model.json` has all settings."]
