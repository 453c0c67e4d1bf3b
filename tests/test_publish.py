"""A model goes to a hub and comes back, by the real huggingface_hub; and the card says what is known."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from hub_server import Server
from huggingface_hub import ModelCard

import advtransfer as at
from advtransfer.publish import model_card

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("two_blocks")
MEASURED = {
    "natural_accuracy": 0.9,
    "adversarial_accuracy": 0.5,
    "num_images": 200,
    "attack": "ℓ2 PGD-20, ε = 0.5",
}


def tiny(seed=0, **fields):
    module = at.create_module("resnet_tiny", num_classes=3)
    variables = at.init_variables(module, jax.random.key(seed), 8)
    fields = {"norm": "l2", "eps": 0.5, "class_names": ("cat", "dog", "owl")} | fields
    return at.Model(module, variables, at.ModelSpec("resnet_tiny", 3, 8, module.mean, module.std, **fields))


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def run(server, home, code, *arguments, **environment):
    """In a process of its own, as huggingface_hub reads the variables when it is imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    kept |= {"HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": str(ROOT)}
    kept |= {"HF_ENDPOINT": server.address, "HF_HUB_DISABLE_XET": "1"} | environment
    program = f"""
import sys
import advtransfer as at
from advtransfer.models import ARCHITECTURES
ARCHITECTURES["resnet_tiny"] |= {{"stage_sizes": (1, 1), "width": 8}}
try:
    {code}
except ValueError as error:
    print("refused:", error)
"""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PUSH = "print(at.push_to_hub(at.load_model(sys.argv[1]), sys.argv[2]))"
LOAD = "at.save_model(at.load_model(sys.argv[1]), sys.argv[2], overwrite=True)"


@pytest.mark.process
def test_there_and_back(server, tmp_path):
    """A second model takes the place of the first, and both formats of the weights are the model's."""
    earlier = set()
    for seed in (0, 1):
        model = tiny(seed)
        at.save_model(model, tmp_path / "model", overwrite=True)
        url = run(server, tmp_path, PUSH, tmp_path / "model", "owner/net", HF_TOKEN="hf_owner")
        assert url == f"{server.address}/owner/net/commit/{server.commit('owner/net')}"
        assert run(server, tmp_path, LOAD, "hf:owner/net", tmp_path / "back") == ""
        back = at.load_model(tmp_path / "back")
        jax.tree.map(np.testing.assert_array_equal, back.variables, model.variables)
        assert dataclasses.replace(back.spec, versions={}) == model.spec
        files = server.repos["owner/net"]
        tensors = safetensors.numpy.load(files["model.safetensors"])
        for name, array in at.export_torch_state_dict(model).items():
            np.testing.assert_array_equal(tensors[name], array)
        assert {name for name in files if "/" not in name} == {"model.json", "model.safetensors", "README.md"}
        arrays = {name for name in files if name.startswith("variables/") and "/d/" in name}
        assert arrays and not arrays & earlier  # Orbax names them by chance
        earlier = arrays
    assert server.messages == ["Upload a model"] * 2

    # Offline the copy in the cache serves; elsewhere one that was fetched by hand.
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert run(server, tmp_path, LOAD, "hf:owner/net", tmp_path / "back", **gone) == ""
    by_hand = tmp_path / "cache/advtransfer/checkpoints/by/hand"
    at.save_model(tiny(7), by_hand)
    assert run(server, tmp_path, LOAD, "hf:by/hand", tmp_path / "back", **gone) == ""


@pytest.mark.process
def test_what_the_hub_refuses_is_one_line(server, tmp_path):
    at.save_model(tiny(), tmp_path / "model")
    server.repos["owner/torch"] = {"weights.pth": b"?"}
    damaged = dict(server.repos["owner/torch"]) | {"model.json": b"{}"}
    server.repos["owner/damaged"] = damaged
    before = dict(server.repos)
    owner, reader = {"HF_TOKEN": "hf_owner"}, {"HF_TOKEN": "hf_reader"}
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for code, name, environment, message in (
        (
            PUSH,
            "owner/new",
            {},
            "owner/new cannot be written without a valid token: log in with `hf auth login`",
        ),
        (PUSH, "owner/new", {"HF_TOKEN": "hf_wrong"}, "cannot be written without a valid token"),
        (PUSH, "owner/new", reader, "owner/new cannot be written with this token"),
        (PUSH, "other/new", owner, "other/new cannot be written with this token"),
        (PUSH, "owner/ne--w", owner, "owner/ne--w is not a valid name on the hub"),
        (PUSH, "net", owner, "'net' is not of the form OWNER/NAME"),
        (PUSH, "owner/new", owner | gone, "owner/new was not written (ConnectError"),
        (PUSH, "owner/new", owner | {"HF_HUB_OFFLINE": "1"}, "as HF_HUB_OFFLINE is set: unset it"),
        (LOAD, "hf:owner/none", {}, "hf:owner/none is not in a public repository: check the name"),
        (
            LOAD,
            "hf:owner/torch",
            {},
            "has no model.json, so it is not a model folder: to import one of its files",
        ),
        (LOAD, "hf:owner/damaged", {}, "is not a model description"),
        (LOAD, "hf:owner/new", gone, "hf:owner/new cannot be downloaded"),
        (LOAD, "hf:owner", {}, "'hf:owner' is not of the form hf:OWNER/NAME[@REVISION]"),
    ):
        arguments = [tmp_path / "model", name] if code == PUSH else [name, tmp_path / "back"]
        said = run(server, tmp_path, code, *arguments, **environment)
        assert said.startswith("refused: ") and message in said and "\n" not in said, said
    assert server.repos == before and not (tmp_path / "back").exists()


def front_matter(card):
    return ModelCard(card).data.to_dict()


def test_the_card_of_a_robust_source():
    card = model_card(tiny().spec, "me/net", measured=MEASURED, dataset="builtin:digits", license="mit")
    assert front_matter(card)["license"] == "mit" and front_matter(card)["library_name"] == "advtransfer"
    assert "adversarially against ℓ2 attacks with ε = 0.5" in card
    assert "| natural | 90.0% | 85.1% … 93.4% |" in card  # Wilson's of 180 in 200
    assert "| ℓ2 PGD-20, ε = 0.5 | 50.0% | 43.1% … 56.9% |" in card
    assert 'at.load_model("hf:me/net")' in card and "cat, dog, owl" in card


def test_the_card_says_what_is_not_known():
    card = model_card(tiny(norm="none", eps=0.0).spec, "me/net")
    assert "license" not in front_matter(card)
    for said in ("nothing was measured", "Not given: ask the owner", "It is not known."):
        assert said in card
    unknown = tiny(norm="none", eps=0.0, provenance={"threat_model": "unknown"})
    assert "What it was trained against is not known." in model_card(unknown.spec, "me/net")
    with pytest.raises(ValueError, match="name the dataset"):
        model_card(tiny().spec, "me/net", measured=MEASURED)


def test_the_card_of_a_transferred_model():
    """The license and the threat model are those of the source that it was fine-tuned from."""
    published = {"dataset": "ImageNet", "accuracy": 0.5790, "licence": "MIT", "source": "Salman et al., 2020"}
    source = dataclasses.asdict(tiny(provenance={"published": published}).spec)
    provenance = {"source": json.loads(json.dumps(source)), "num_train_images": 200, "num_unfrozen_blocks": 1}
    spec = tiny(norm="none", eps=0.0, provenance=provenance | {"data": {"name": "folder:/photos"}}).spec
    card = model_card(spec, "me/net", measured=MEASURED | {"dataset": "folder:/photos"})
    assert front_matter(card)["license"] == "mit"
    assert "fine-tuned naturally from a source that was trained adversarially against ℓ2" in card
    assert "200 labelled images of folder:/photos: the last block and the head" in card
    assert "Salman et al., 2020 (ImageNet, 57.9% by its publisher)" in card
    assert "On 200 images of folder:/photos" in card
