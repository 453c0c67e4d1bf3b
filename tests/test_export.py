"""Exported files against the model: in a process that cannot import this package, and of every shape."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export
from PIL import Image

import advtransfer as at
from advtransfer.calibration import probabilities

pytestmark = pytest.mark.usefixtures("two_blocks")
SIZE, MEAN, STD = 12, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
RUN = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("advtransfer", "flax", "orbax", "chex"):
            raise SystemExit(name + " is imported")
sys.meta_path.insert(0, Finder())
import jax, numpy as np
run = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read())).call
np.save(sys.argv[3], run(np.load(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def model():
    module = at.create_module("resnet_tiny", num_classes=3, mean=MEAN, std=STD)
    variables = at.init_variables(module, jax.random.key(0), SIZE)
    stats = jax.tree.map(lambda x: x + 0.1, variables["batch_stats"])  # not what a new network has
    spec = at.ModelSpec("resnet_tiny", 3, SIZE, MEAN, STD, class_names=("cat", "dog", "owl"))
    return at.Model(module, variables | {"batch_stats": stats}, spec)


def pixels(number, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, side, side, 3), np.uint8)


def load(path):
    return jax_export.deserialize(bytearray(path.read_bytes()))


def test_a_fresh_process_without_this_package(model, tmp_path):
    """Any batch, any size of images: pixels, resizing and normalisation are inside."""
    path = at.export(model, tmp_path / "new" / "model.stablehlo", temperature=1.7)
    for number, side in ((3, SIZE), (5, 17), (1, 8)):
        images = pixels(number, side)
        np.save(tmp_path / "in.npy", images)
        command = [sys.executable, "-c", RUN, path, tmp_path / "in.npy", tmp_path / "out.npy"]
        subprocess.run(command, check=True, cwd=tmp_path)
        expected = probabilities(at.predict(model, images), 1.7)
        np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)
    described = json.loads((tmp_path / "new" / "model.stablehlo.json").read_text())
    assert described["class_names"] == ["cat", "dog", "owl"]
    assert described["images"] == "uint8 [N, S, S, 3], 0 to 255"
    assert described["output"] == "float32 [N, 3], probabilities, with a temperature of 1.7"
    assert described["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (
        described["load"]
        == "jax.export.deserialize(bytearray(open('model.stablehlo', 'rb').read())).call(images)"
    )


def photos(folder):
    """Rectangular, transparent, turned, grey and 16-bit images, and a square."""
    rng = np.random.default_rng(5)
    folder.mkdir()
    colour = rng.integers(0, 256, (30, 41, 4), np.uint8)
    turned = Image.Exif()
    turned[274] = 6
    Image.fromarray(colour[..., :3]).save(folder / "wide.png")
    Image.fromarray(colour[:, :20, :3]).save(folder / "turned.jpg", exif=turned, quality=95)
    Image.fromarray(colour).save(folder / "clear.png")
    Image.fromarray(colour[:, :30, 0]).save(folder / "grey.png")
    Image.fromarray(rng.integers(0, 65536, (30, 25), np.uint16)).save(folder / "deep.png")
    return folder


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("inputs", ["uint8", "normalised"])
def test_the_program_reads_files_as_stage_predict(model, crop, inputs, tmp_path):
    spec = dataclasses.replace(model.spec, provenance={"data": {"crop": crop}})
    options = {"temperature": 1.7} if inputs == "uint8" else {"batch_size": 2}
    path = at.export(model._replace(spec=spec), tmp_path / "m", inputs=inputs, **options)
    names, images = at.read_images(photos(tmp_path / "photos"), SIZE, crop=crop)
    files = [str(tmp_path / "photos" / name) for name in names]
    done = subprocess.run([sys.executable, f"{path}.py", *files], capture_output=True, text=True, check=True)
    expected = probabilities(at.predict(model, images), options.get("temperature", 1.0))
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == files and len(files) == 5
    assert [line[1] for line in lines] == [spec.class_names[i] for i in expected.argmax(1)]
    np.testing.assert_allclose([float(line[2]) for line in lines], expected.max(1), atol=1e-4)


def test_the_program_goes_on_after_a_file_that_is_no_image(model, tmp_path):
    path, folder = at.export(model, tmp_path / "m", platforms=("cpu",)), photos(tmp_path / "photos")
    (folder / "broken.jpg").write_bytes((folder / "turned.jpg").read_bytes()[:300])
    (folder / "notes.txt").write_text("")
    command = [sys.executable, f"{path}.py", str(folder), str(tmp_path / "gone.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    names = [Path(line.split("\t")[0]).name for line in done.stdout.splitlines()]
    assert done.returncode == 1 and names == ["clear.png", "deep.png", "grey.png", "turned.jpg", "wide.png"]
    first, *problems = done.stderr.splitlines()
    assert "not calibrated" in first
    assert [Path(line.partition(":")[0]).name for line in problems] == ["broken.jpg", "gone.png"]
    asked = subprocess.run([sys.executable, f"{path}.py", "--help"], capture_output=True, text=True)
    assert asked.returncode == 0 and "python model.stablehlo.py photo.jpg folder" in asked.stdout


def test_the_program_refuses_a_view_that_it_cannot_make(model, tmp_path):
    spec = dataclasses.replace(model.spec, provenance={"data": {"crop": True, "view": "edges"}})
    path = at.export(model._replace(spec=spec), tmp_path / "m")
    done = subprocess.run([sys.executable, f"{path}.py", "x.png"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("this network was trained on the view edges")


@pytest.mark.parametrize("inputs", ["uint8", "float", "normalised"])
def test_logits_of_each_kind_of_images(model, inputs, tmp_path):
    made = load(at.export(model, tmp_path / "m", inputs=inputs))
    images = pixels(4, SIZE)
    given = images if inputs == "uint8" else images.astype(np.float32) / 255
    if inputs == "normalised":
        given = (given - np.float32(MEAN)) / np.float32(STD)
    np.testing.assert_allclose(made.call(given), at.predict(model, images), atol=1e-5)
    assert made.platforms == ("cpu", "cuda", "tpu")


def test_one_shape(model, tmp_path):
    made = load(at.export(model, tmp_path / "m", inputs="float", image_size=20, batch_size=2))
    assert made.in_avals[0].shape == (2, 20, 20, 3) and made.in_avals[0].dtype == jnp.float32
    images = pixels(2, 20)
    np.testing.assert_allclose(
        made.call(images.astype(np.float32) / 255), at.predict(model, images), atol=1e-5
    )
    with pytest.raises(ValueError, match="shape"):
        made.call(np.zeros((3, 20, 20, 3), np.float32))


def test_platforms(model, tmp_path):
    made = load(at.export(model, tmp_path / "m", platforms=["tpu"]))
    assert made.platforms == ("tpu",)
    with pytest.raises(ValueError, match="not what it was exported for|platform"):
        made.call(pixels(1, SIZE))


def test_in_bfloat16(model, tmp_path):
    half = model._replace(module=model.module.clone(dtype=jnp.bfloat16))
    images = pixels(4, SIZE)
    found = load(at.export(half, tmp_path / "m")).call(images)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, at.predict(half, images), atol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": "int8"}, "inputs='int8' is not one of uint8, float, normalised"),
        ({"inputs": "normalised", "image_size": 20}, "not resized in the file: leave it away, or pass 12"),
        ({"batch_size": -1}, "numbers of pixels and images, or 0: any"),
        ({"temperature": -1.0}, "pass a positive number, or 0"),
        ({"temperature": float("nan")}, "pass a positive number, or 0"),
        ({"platforms": ("gpu",)}, "not some of cpu, cuda, rocm, tpu"),
        ({"platforms": ()}, "not some of"),
    ],
)
def test_bad_options_are_refused(model, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        at.export(model, tmp_path / "m", **options)
    assert not [*tmp_path.iterdir()]


def test_no_folder_and_no_headless_model(model, tmp_path):
    with pytest.raises(ValueError, match="is a folder: name a file, such as"):
        at.export(model, tmp_path)
    headless = model._replace(
        spec=at.ModelSpec("resnet_tiny", 3, SIZE, MEAN, STD, provenance={"head": "new"})
    )
    with pytest.raises(ValueError, match="imported without a head"):
        at.export(headless, tmp_path / "m")


def test_from_the_command_line(model, tmp_path, capsys):
    at.save_model(model, tmp_path / "model")
    config = at.config.default()
    config.stage = "export"
    config.export.update(model=str(tmp_path / "model"), temperature=2.0, platforms=("cpu",))
    assert at.tasks.plan(config, tmp_path / "out") == "export resnet_tiny for cpu"
    at.tasks.run(config, tmp_path / "out")
    assert "model.stablehlo.py FILE classifies images with it" in capsys.readouterr().out
    images = pixels(2, SIZE)
    expected = probabilities(at.predict(model, images), 2.0)
    np.testing.assert_allclose(load(tmp_path / "out" / "model.stablehlo").call(images), expected, atol=1e-5)
    config.export.update(model="")
    with pytest.raises(at.config.ConfigError, match=r"config\.export\.model: name a model"):
        at.tasks.run(config, tmp_path / "other")
