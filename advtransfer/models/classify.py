"""Classifies image files with the exported network beside this program: pip install jax flatbuffers pillow

python model.stablehlo.py photo.jpg folder

prints a line for each file: its name, its most probable class, the probability. Of a folder it takes the
images in it and in its subfolders. A file that cannot be read has a line on stderr, and the exit code is 1.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageOps


def read(file, size, crop):
    """uint8 [size, size, 3], as in training: upright, on white, in colour, made a square."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image, short = image.convert("RGB"), min(image.size)
    if crop is None:
        crop = image.width != image.height
    if crop:  # the shorter side to 8/7 of the size, then the centre
        width, height = (int(round(size * 8 / 7) * side / short) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image.crop((left, top, left + size, top + size)))
    left, top = ((side - short) // 2 for side in image.size)
    image = image.crop((left, top, left + short, top + short))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def files(place):
    """The file, or the images in the folder."""
    known = Image.registered_extensions()
    return sorted(x for x in place.rglob("*") if x.suffix.lower() in known) if place.is_dir() else [place]


def main(places):
    if not places or {"-h", "--help"} & set(places):
        print(__doc__)
        sys.exit(0 if places else 1)
    model = Path(__file__).with_suffix("")  # without .py
    about = json.loads(Path(f"{model}.json").read_text(encoding="utf-8"))
    if about["view"] != "natural":
        sys.exit(f"this network was trained on the view {about['view']} of images, which is not made here")
    if not about["temperature"]:
        print("exported without a temperature: the probabilities are not calibrated", file=sys.stderr)
    call = jax.export.deserialize(bytearray(model.read_bytes())).call
    names = about["class_names"] or [str(i) for i in range(about["num_classes"])]
    failed = False
    for file in (file for place in map(Path, places) for file in files(place)):
        try:
            images = read(file, about["image_size"], about["crop"])[None]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            print(f"{file}: cannot be read: {error}", file=sys.stderr)
            failed = True
            continue
        if about["inputs"] != "uint8":
            images = images.astype(np.float32) / np.float32(255)
        if about["inputs"] == "normalised":
            images = (images - np.float32(about["mean"])) / np.float32(about["std"])
        output = np.asarray(call(np.repeat(images, about["batch_size"] or 1, axis=0)))[0]
        if not about["temperature"]:  # logits
            output = np.exp(output - output.max())
        print(f"{file}\t{names[output.argmax()]}\t{output.max() / output.sum():.4f}")
    sys.exit(int(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
