"""Encoded images to RGB arrays of one size: what every kind of picture file becomes."""

from __future__ import annotations

import functools
import io
import math
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

Encoded = Path | BinaryIO
# Of Pillow's readers those of photographs and drawings: some of the others start programs (EPS), or follow
# what a file says into other files.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
MAX_BYTES = 1 << 30  # of a picture file
_CHUNK = 64  # images that a thread takes at a time
# EXIF orientation (EXIF 2.3, section 4.6.4) -> what turns the stored pixels upright.
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
    """Decodes one picture file to RGB, 8 bits a channel.

    Grey becomes three equal channels, 16-bit grey is divided by 257, transparency is laid over white,
    and CMYK is converted as Pillow does, without colour profiles. Of an animation the first frame counts.

    Args:
      encoded: a path or an open binary file.
      upright: whether the EXIF orientation is applied, as viewers do; training pipelines leave it out.

    Raises:
      Exception: of many types, whatever Pillow raises for files that are damaged or no pictures;
        ValueError for pixels whose range is unknown (floating point, more than 16 bits), for more pixels
        than Pillow's MAX_IMAGE_PIXELS, and for what is no regular file or has more than MAX_BYTES.
    """
    with open_image(encoded) as image:
        return _to_rgb(image, upright)


def open_image(encoded: Encoded) -> Image.Image:
    """Reads the header of a picture file whose size can be decoded.

    Raises:
      Exception: as `decode_image`.
    """
    if isinstance(encoded, Path):
        status = encoded.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"a file of {status.st_size:,} bytes; at most {MAX_BYTES:,} are read")
        encoded = io.BytesIO(encoded.read_bytes())  # one read: Pillow itself takes dozens of small ones
    image = Image.open(encoded, formats=_formats())
    _check_area(*image.size)
    return image


@functools.cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this build of Pillow reads."""
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
    image.load()  # before its file is closed
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """How the camera was held, by EXIF: 1 upright, 5 to 8 on its side; 1 where EXIF cannot be read."""
    try:
        held = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of damaged EXIF data, of many types; the pixels may be whole
        return 1
    return held if type(held) is int else 1


def reason(error: Exception) -> str:
    """Why an image could not be decoded, in one line and always the same."""
    if isinstance(error, UnidentifiedImageError):  # its message is the address of an object
        return "no image file that is known"
    if isinstance(error, OSError) and error.strerror:  # of the system
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def decode_crop(
    encoded: Encoded, size: int, rng: np.random.Generator, *, min_area: float, upright: bool = False
) -> Image.Image:
    """Decodes one picture file and scales a random box of it to size × size pixels (see `random_box`).

    The box is cut out, then scaled, bilinear with antialias, as torchvision's RandomResizedCrop does. A JPEG
    whose box has four times the asked pixels or more on each side is decoded at a half, a quarter or an
    eighth of its resolution, which leaves the box twice the asked pixels and takes a fraction of the time.

    Args:
      encoded, upright: see `decode_image`.
      size: side of the result in pixels.
      rng: what the box is drawn from, and nothing else.
      min_area: see `random_box`.

    Raises:
      Exception: as `decode_image`.
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
    box = (left * x, top * y, (left + box_width) * x, (top + box_height) * y)
    return image.crop(tuple(map(round, box))).resize((size, size), Image.Resampling.BILINEAR)


def random_box(
    rng: np.random.Generator, width: int, height: int, *, min_area: float
) -> tuple[int, int, int, int]:
    """Left, top, width and height of a box, drawn as torchvision's RandomResizedCrop draws it.

    Its share of the area is uniform in [min_area, 1], the logarithm of its width / height uniform between
    those of 3/4 and 4/3. Of ten tries the first that fits is taken; if none does, the largest box in the
    middle whose ratio is allowed.
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
    """Brings an image to size × size pixels, bilinear with antialias.

    With `crop` it is scaled until its shorter side is 8/7 × size and its middle is cut out, at 224 the
    Resize(256) and CenterCrop(224) of torchvision's and robustness' evaluation, with their rounding.
    Otherwise it is scaled as a whole.

    Raises:
      ValueError: so thin that it would have more than Pillow's MAX_IMAGE_PIXELS, scaled.
    """
    if not crop:
        return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)
    short = round(size * 8 / 7)
    width, height = (int(short * side / min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    _check_area(width, height)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))


def decode_images(
    read: Callable[[Sequence[int]], Sequence[Encoded]],
    indices: np.ndarray,
    size: int,
    *,
    crop: bool,
    upright: bool = False,
) -> tuple[np.ndarray, dict[int, str]]:
    """Decodes and fits images in one thread per core; Pillow works outside Python's lock.

    Args:
      read: encoded images by index, called from several threads at once.
      indices: integers [N].
      size: side of the results in pixels.
      crop: see `fit_image`.
      upright: see `decode_image`.

    Returns:
      Images uint8 [N, size, size, 3], and the reason for each place that could not be decoded, whose
      pixels are arbitrary.
    """
    images = np.empty((len(indices), size, size, 3), np.uint8)
    broken = {}

    def work(start: int) -> None:
        for place, encoded in enumerate(read(indices[start : start + _CHUNK]), start):
            try:
                images[place] = fit_image(decode_image(encoded, upright=upright), size, crop=crop)
            except Exception as error:  # Pillow's readers raise almost anything for a damaged file
                broken[place] = reason(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(work, range(0, len(indices), _CHUNK)))
    return images, broken
