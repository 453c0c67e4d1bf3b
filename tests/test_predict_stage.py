"""stage=predict: new images are seen as those that the model was trained on, and nothing is guessed."""

import base64
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from pages import read_csv, read_page
from PIL import Image

import advtransfer as at
from advtransfer import config as base
from advtransfer import tasks
from advtransfer.calibration import calibrate, probabilities
from advtransfer.config import ConfigError
from advtransfer.data import image_hashes, load_dataset
from advtransfer.data.unlabelled import open_unlabelled
from advtransfer.evaluate import predict
from advtransfer.models import Model, ModelSpec, create_module, init_variables, load_model, save_model
from advtransfer.report.prediction_page import Predicted, prediction_sections, shown

pytestmark = pytest.mark.usefixtures("two_blocks", "unoptimised")
SIZE = 12


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Rectangular photos of two classes that overlap, dark and bright: 200 of each."""
    root, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for name, mean in (("dark", 90), ("bright", 150)):
        for i in range(200):
            photo = np.clip(rng.normal(rng.normal(mean, 30), 40, (20, 30, 3)), 0, 255).astype(np.uint8)
            write(root / name / f"{i}.png", photo)
    return root


@pytest.fixture(scope="module")
def model(labelled, tmp_path_factory):
    """Fine-tuned on them with stage=transfer."""
    root, module = tmp_path_factory.mktemp("models"), create_module("resnet_tiny", num_classes=10)
    spec = ModelSpec("resnet_tiny", 10, SIZE, module.mean, module.std)
    save_model(Model(module, init_variables(module, jax.random.key(0), SIZE), spec), root / "source")
    config = base.default()
    config.update(stage="transfer", source=str(root / "source"))
    config.transfer.update(target=f"folder:{labelled}", num_train_images=40, num_epochs=10, batch_size=20)
    tasks.run(config, root / "tuned")
    return root / "tuned"


@pytest.fixture
def photos(labelled, tmp_path):
    """Nine new ones in a tree, and a file that is none."""
    rng = np.random.default_rng(1)
    for i in range(9):
        photo = np.clip(rng.normal(80 + 15 * (i % 6), 40, (25, 20 + i, 3)), 0, 255).astype(np.uint8)
        write(tmp_path / "photos" / f"day {i % 2}" / f"{i}.png", photo)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "photos" / "notes.txt").write_text("")
    return tmp_path / "photos"


def configured(model, photos, **predict):
    config = base.default()
    config.stage = "predict"
    config.predict.update(model=str(model), images=str(photos), batch_size=16, **predict)
    return config


def test_rows_are_the_scaled_probabilities_of_each_file(model, photos, labelled, tmp_path, capsys):
    config = configured(model, photos, abstain_below=0.6)
    assert "on 112 images of folder:" in tasks.plan(config, tmp_path / "out")
    tasks.run(config, tmp_path / "out")
    rows, loaded = read_csv(tmp_path / "out" / "predictions.csv"), load_model(model)
    assert [row["file"] for row in rows] == [
        "broken.jpg",
        *(f"day {i % 2}/{i}.png" for i in (*range(0, 9, 2), *range(1, 9, 2))),
    ]
    assert list(rows[0].values()) == ["broken.jpg", *[""] * 5, "not a known image format"]

    # The same images, read and cropped by another path: as a labelled dataset.
    for row in rows[1:]:
        (tmp_path / "again" / "bright").mkdir(parents=True, exist_ok=True)
        (tmp_path / "again" / "bright" / row["file"][-5:]).symlink_to(photos / row["file"])
    again = load_dataset(f"folder:{tmp_path / 'again'}:train", image_size=SIZE, set_aside=False)
    images = {x.tobytes(): x for x in np.concatenate([again.train.images, again.test.images])}
    held_out = load_dataset(f"folder:{labelled}", image_size=SIZE)
    parts = [held_out.validation, held_out.test]
    logits = np.concatenate([predict(loaded, part.images) for part in parts])
    found = calibrate(logits, np.concatenate([part.labels for part in parts]))
    assert not found.temperature.problem
    expected = np.sort(
        probabilities(predict(loaded, np.stack([*images.values()])), found.temperature.value).max(1)
    )
    np.testing.assert_allclose(np.sort([float(row["probability"]) for row in rows[1:]]), expected, atol=1e-6)
    for row in rows[1:]:
        share = float(row["probability"])
        assert float(row["probability_2"]) == pytest.approx(1 - share)
        assert {row["class"], row["class_2"]} == {"bright", "dark"}
        assert row["abstain"] == str(int(share < 0.6))
    mistakes = read_csv(model / "mistakes.csv")
    assert mistakes and all((labelled / row["file"]).parent.name == row["label"] for row in mistakes)
    page = read_page(tmp_path / "out" / "report.html")
    answered = sum(row["abstain"] == "0" for row in rows)
    assert f"{answered} of 9 images classified" in capsys.readouterr().out
    assert "broken.jpg: not a known image format" in page.text and "1 with suffix .txt" in page.text
    assert ["Abstain below, %", "Answered, %", "Right, %", "95 % interval"] in page.rows
    assert len(page.images) == 9 + 1  # the pictures, each once, and the figure


@pytest.mark.parametrize(("crop", "expected"), [(True, True), (False, False), (None, True)])
def test_new_images_are_cropped_as_the_training_images_were(photos, crop, expected):
    found = open_unlabelled(photos, SIZE, crop=crop)
    assert found.crop is expected
    whole = np.asarray(Image.open(photos / "day 0/8.png"))  # 25 × 28
    if expected:
        short = Image.fromarray(whole).resize((15, 14), Image.Resampling.BILINEAR)
        truth = np.asarray(short)[1:13, 2:14]
    else:
        truth = np.asarray(Image.fromarray(whole[:, 1:26]).resize((12, 12), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(found.read(np.array([5])).pixels[0], truth)


def test_squares_of_one_size_are_not_cropped(tmp_path):
    write(tmp_path / "a.png", np.zeros((30, 30, 3), np.uint8))
    assert open_unlabelled(tmp_path, SIZE).crop is False
    assert open_unlabelled(tmp_path / "a.png", SIZE).names == ("a.png",)


def test_images_for_a_notebook(photos):
    with pytest.raises(ValueError, match="broken.jpg cannot be decoded .*: fix or remove it"):
        at.read_images(photos, SIZE)
    (photos / "broken.jpg").unlink()
    names, images = at.read_images(photos, SIZE)
    np.testing.assert_array_equal(images, open_unlabelled(photos, SIZE).read(np.arange(9)).pixels)
    assert names[0] == "day 0/0.png" and images.shape == (9, SIZE, SIZE, 3)


def test_images_in_several_chunks(photos, monkeypatch):
    whole = np.concatenate([chunk.pixels for chunk in open_unlabelled(photos, SIZE).chunks()])
    monkeypatch.setattr("advtransfer.data.unlabelled._CHUNK", 4)
    images = open_unlabelled(photos, SIZE)
    chunks = [*images.chunks()]
    assert [len(chunk.pixels) for chunk in chunks] == [4, 4, 2] and images.num_chunks == 3
    np.testing.assert_array_equal(np.concatenate([chunk.pixels for chunk in chunks])[1:], whole[1:])


def test_the_view_that_the_model_was_trained_on(photos):
    grey = open_unlabelled(photos, SIZE, view="grey").read(np.array([1])).pixels
    assert np.ptp(grey, axis=-1).max() == 0


def described(model, folder, **data):
    """The same model with another account of the images that it was trained on."""
    loaded = load_model(model)
    known = loaded.spec.provenance["data"] | data
    spec = dataclasses.replace(loaded.spec, provenance=loaded.spec.provenance | {"data": known})
    save_model(loaded._replace(spec=spec), folder)
    return folder


def test_validation_images_that_were_trained_on_are_left_out(model, photos, tmp_path):
    every = described(model, tmp_path / "every", set_aside=False)
    assert "on 80 images" in tasks.plan(configured(every, photos), tmp_path / "out")
    with pytest.raises(ConfigError, match="trained on these images: set test"):
        tasks.plan(configured(every, photos, splits=("validation",)), tmp_path / "out")


def test_held_out_images_that_are_gone(model, photos, tmp_path):
    gone = described(model, tmp_path / "gone", name=f"folder:{tmp_path}/nowhere")
    message = "config.predict.held_out: .* there is no folder .*; the model was fine-tuned on it: start"
    with pytest.raises(ConfigError, match=message):
        tasks.run(configured(gone, photos), tmp_path / "out")
    with pytest.raises(ConfigError, match="there is no folder [^:]*nowhere$"):
        tasks.run(configured(gone, photos, held_out=f"folder:{tmp_path}/nowhere"), tmp_path / "out")


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("change", ["added", "removed", "renamed"])
def test_images_that_it_was_fine_tuned_on_are_not_held_out(
    model, photos, labelled, tmp_path, capsys, change, named
):
    """What is set aside of a folder that has changed, under whatever name, is drawn anew."""
    folder, place = tmp_path / "labelled", f"folder:{tmp_path}/labelled"
    shutil.copytree(labelled, folder)
    if change == "added":
        shutil.copy(photos / "day 0/0.png", folder / "dark/00.png")
    elif change == "removed":
        (folder / "dark/0.png").unlink()
    else:
        (folder / "dark/0.png").rename(folder / "dark/zzz.png")
    before = load_dataset(f"folder:{labelled}", image_size=SIZE).train
    subset = json.loads((model / "config.json").read_text())["transfer"]["num_train_images"]
    trained = at.subset_indices(before.labels, subset, dataset=f"folder:{labelled}", seed=0)
    trained = {before.images[i].tobytes() for i in trained}
    after = load_dataset(place, image_size=SIZE)
    parts = (after.validation, after.test)
    is_new = [np.array([x.tobytes() not in trained for x in part.images]) for part in parts]
    assert 0 < sum(map(np.sum, is_new)) < sum(map(len, is_new))
    moved = described(model, tmp_path / "moved", name=place)
    config = configured(model if named else moved, photos, held_out=place if named else "")
    tasks.run(config, tmp_path / "out")
    left = sum(map(len, is_new)) - sum(map(np.sum, is_new))
    assert f"without {left} that the model was fine-tuned on" in capsys.readouterr().out
    logits = [predict(load_model(model), x.images[keep]) for x, keep in zip(parts, is_new, strict=True)]
    labels = [x.labels[keep] for x, keep in zip(parts, is_new, strict=True)]
    expected = calibrate(np.concatenate(logits), np.concatenate(labels)).temperature
    page = read_page(tmp_path / "out" / "report.html").text
    assert (f"temperature of {expected.value:.4g}" in page) == (not expected.problem)


def test_images_that_it_was_fine_tuned_on_alone(model, photos, labelled, tmp_path):
    loaded, whole = load_model(model), load_dataset(f"folder:{labelled}", image_size=SIZE, set_aside=False)
    every = np.concatenate([whole.train.images, whole.test.images])
    source = {"provenance": {"image_hashes": base64.b64encode(image_hashes(every).tobytes()).decode()}}
    provenance = loaded.spec.provenance | {"source": source}  # of the training before this one
    save_model(
        loaded._replace(spec=dataclasses.replace(loaded.spec, provenance=provenance)), tmp_path / "all"
    )
    with pytest.raises(ConfigError, match="was fine-tuned on all images of folder:.* or none"):
        tasks.run(configured(tmp_path / "all", photos), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_held_out_images_are_cropped_as_those_that_it_was_fine_tuned_on(model, photos, tmp_path):
    rng = np.random.default_rng(2)
    for i in range(40):
        square = rng.integers(0, 256, (20, 20, 3), np.uint8)
        write(tmp_path / "squares" / ("dark", "bright")[i % 2] / f"{i}.png", square)
    config = configured(model, photos, held_out=f"folder:{tmp_path}/squares")
    with pytest.raises(ConfigError, match="are squares of one size, those .* cropped, as photographs are"):
        tasks.plan(config, tmp_path / "out")


def test_without_held_out_images_the_page_says_so(model, photos, tmp_path):
    tasks.run(configured(model, photos, held_out="none"), tmp_path / "out")
    assert "how often it is right is not known" in read_page(tmp_path / "out" / "report.html").text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, "config.predict.model: name a model"),
        ({"images": ""}, "config.predict.images: name a folder"),
        ({"images": "nowhere"}, "there is no folder or file nowhere$"),
        ({"images": "folder:nowhere"}, "there is no folder or file folder:nowhere: write nowhere"),
        ({"held_out": "builtin:digits"}, "config.predict.held_out: .* which the model does not know"),
        ({"abstain_below": 1.5}, "config.predict.abstain_below=1.5"),
    ],
)
def test_one_line_for_each_mistake(model, photos, tmp_path, change, message):
    config = configured(model, photos)
    config.predict.update(change)
    with pytest.raises(ConfigError, match=message) as error:
        tasks.run(config, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_folders_without_a_readable_image(model, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="contains no images"):
        tasks.run(configured(model, tmp_path / "empty"), tmp_path / "out")
    with pytest.raises(ConfigError, match="no suffix of an image"):
        tasks.run(configured(model, photos / "notes.txt"), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"no image can be decoded, such as broken.jpg \(not a known"):
        tasks.run(configured(model, photos / "broken.jpg"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_surest_and_the_least_sure_are_different_pictures():
    share = np.linspace(0.3, 0.9, 40)[:, None]
    predicted = Predicted([*map(str, range(40))], ("a", "b"), np.zeros((40, 1), int), share, {39: "broken"})
    chosen = shown(predicted)
    assert chosen.tolist() == [*range(38, 22, -1), *range(16)]
    pictures = np.zeros((len(chosen), 4, 4, 3), np.uint8)
    _, section, *_ = prediction_sections(predicted, pictures, None, "", abstain_below=0.5)
    assert [part.groups[0][0].labels[0].small for part in section.parts] == ["88.5 %, 38", "30.0 %, 0"]
