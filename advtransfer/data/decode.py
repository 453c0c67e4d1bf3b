"""Decodes image files of any supported format to RGB arrays of one size."""

from __future__ import annotations

import functools
import io
import math
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

Encoded = Path | io.BytesIO | io.BufferedReader
# Only Pillow's readers of plain image formats: some of the others start programs (EPS) or open further files
# named in the file.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
MAX_BYTES = 1 << 30  # of an image file
_CHUNK = 64  # images per thread and task
# EXIF orientation (EXIF 2.3, section 4.6.4) -> the transposition that makes the image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(encoded: Encoded, *, upright: bool = False) -> Image.Image:
    """Decodes one image file to RGB, 8 bits per channel.

    Grey becomes three equal channels, 16-bit grey is divided by 257, transparent images are composited onto
    white, and CMYK is converted as Pillow does, without colour profiles. Of an animation, the first frame is
    used.

    Args:
      encoded: a path or an open binary file.
      upright: whether to apply the EXIF orientation, as viewers do; training pipelines ignore it.

    Raises:
      Exception: of any type that Pillow raises for damaged files or files that are not images; ValueError for
        pixels of unknown range (floating point, more than 16 bits), more pixels than Pillow's
        MAX_IMAGE_PIXELS, anything but a regular file, or more than MAX_BYTES.
    """
    with open_image(encoded) as image:
        return _to_rgb(image, upright)


def open_image(encoded: Encoded) -> Image.Image:
    """Reads the header of an image file and checks the size of the image; raises as `decode_image`."""
    if isinstance(encoded, Path):
        status = encoded.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"the file has {status.st_size:,} bytes, the limit is {MAX_BYTES:,}")
        encoded = io.BytesIO(encoded.read_bytes())  # one read; Pillow itself does dozens of small ones
    image = Image.open(encoded, formats=_formats())
    _check_area(*image.size)
    return image


@functools.cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this build of Pillow supports."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_area(width: int, height: int) -> None:
    most = Image.MAX_IMAGE_PIXELS
    if most and width * height > most:
        raise ValueError(
            f"{width:,} x {height:,} pixels, more than {most:,} (PIL.Image.MAX_IMAGE_PIXELS): scale it down"
        )


def _to_rgb(image: Image.Image, upright: bool) -> Image.Image:
    turn = _TURNS.get(_orientation(image)) if upright else None
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # Pillow's own conversion of 16 bits clips at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("grey values do not fit into 16 bits")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()  # before the file is closed
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation: 1 is upright, 5 to 8 are rotated by 90°; 1 if the EXIF data cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of any type, for damaged EXIF data; the pixels may be intact
        return 1
    return orientation if type(orientation) is int else 1


def reason(error: Exception) -> str:
    """Why an image could not be decoded: one line, the same in every run."""
    if isinstance(error, UnidentifiedImageError):  # its message contains a memory address
        return "not a known image format"
    if isinstance(error, OSError) and error.strerror:  # raised by the system
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def decode_crop(
    encoded: Encoded, size: int, rng: np.random.Generator, *, min_area: float, upright: bool = False
) -> Image.Image:
    """Decodes one image file and scales a random box of it to size × size pixels (see `random_box`).

    The box is cropped, then scaled, bilinear with antialias, as in torchvision's RandomResizedCrop. A JPEG
    whose box is at least four times as large as the result on each side is decoded, in a fraction of the
    time, at a half, a quarter or an eighth of its resolution; the box still has at least twice the size of
    the result. Raises as `decode_image`.
    """
    with open_image(encoded) as image:
        turned = upright and _orientation(image) in range(5, 9)
        width, height = image.size[::-1] if turned else image.size
        left, top, box_width, box_height = random_box(rng, width, height, min_area=min_area)
        spare = min(box_width, box_height) // (2 * size)
        if spare > 1:
            image.draft(None, (image.width // spare, image.height // spare))
        image = _to_rgb(image, upright)
    x, y = image.width / width, image.height / height
    right, bottom = left + box_width, top + box_height
    box = (round(left * x), round(top * y), round(right * x), round(bottom * y))
    return image.crop(box).resize((size, size), Image.Resampling.BILINEAR)


def random_box(
    rng: np.random.Generator, width: int, height: int, *, min_area: float
) -> tuple[int, int, int, int]:
    """Left, top, width and height of a box, drawn as in torchvision's RandomResizedCrop.

    Its fraction of the area is uniform in [min_area, 1] and the logarithm of its aspect ratio, width /
    height, uniform between log(3/4) and log(4/3). The first of ten tries that fits is used; if none does, the
    largest central box of an allowed aspect ratio.
    """
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        box = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box[0] <= width and 0 < box[1] <= height:
            return int(rng.integers(width - box[0] + 1)), int(rng.integers(height - box[1] + 1)), *box
    box = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - box[0]) // 2, (height - box[1]) // 2, *box


def fit_image(image: Image.Image, size: int, *, crop: bool) -> Image.Image:
    """Resizes an image to size × size pixels, bilinear with antialias.

    With `crop`, the shorter side is scaled to 8/7 × size and the centre is cropped: at 224 the Resize(256)
    and CenterCrop(224) of torchvision's and robustness's evaluation, with their rounding. Otherwise the
    central square is scaled.

    Raises:
      ValueError: the image is so elongated that it would exceed Pillow's MAX_IMAGE_PIXELS when scaled.
    """
    if not crop:
        side = min(image.size)
        left, top = ((whole - side) // 2 for whole in image.size)
        square = image if image.width == image.height else image.crop((left, top, left + side, top + side))
        return square if side == size else square.resize((size, size), Image.Resampling.BILINEAR)
    short = round(size * 8 / 7)
    width, height = (int(short * side / min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    _check_area(width, height)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))


def decode_images(
    read: Callable[[Integer[np.ndarray, " some"]], Sequence[Encoded]],
    indices: Integer[np.ndarray, " n"],
    size: int,
    *,
    crop: bool,
    upright: bool = False,
) -> tuple[UInt8[np.ndarray, "n size size 3"], dict[int, str]]:
    """Decodes and resizes images in one thread per core; Pillow releases the GIL.

    Args:
      read: returns the encoded images of some indices; called from several threads at once.
      size, crop: see `fit_image`.
      upright: see `decode_image`.

    Returns:
      The images, and by position the reason why one could not be decoded; its pixels are arbitrary.
    """
    images = np.empty((len(indices), size, size, 3), np.uint8)
    broken: dict[int, str] = {}

    def work(start: int) -> None:
        for place, encoded in enumerate(read(indices[start : start + _CHUNK]), start):
            try:
                images[place] = fit_image(decode_image(encoded, upright=upright), size, crop=crop)
            except Exception as error:  # Pillow's readers raise almost any type for damaged files
                broken[place] = reason(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(work, range(0, len(indices), _CHUNK)))
    return images, broken
