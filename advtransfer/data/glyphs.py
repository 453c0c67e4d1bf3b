"""Letters on textured backgrounds: a source task with a shape cue and a texture cue.

Each image shows one of 23 capital letters in one of 14 typefaces, slightly rotated, scaled, sheared and
shifted, in a random colour on a background of another random colour. A faint grating covers the background.
Its orientation and frequency also encode a class, which in nine of ten images is that of the letter. A
network can therefore read the label from a strong cue (the shape) or a weak one (the texture), and
`render_glyphs` can put the two in conflict.

A small target task goes with it: lower-case letters whose shapes differ from those of the capitals, on
gratings that are independent of the class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import chex
import numpy as np
from jaxtyping import Float32, Int32, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont, features

from advtransfer.arrays import AnyArray

# Without I, O and Q: at 16² an I is a mere stroke, and O and Q differ by a pixel. I and O also look like the
# digits 1 and 0, and no class of a target task should be a source class.
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"

# Letters whose shape differs from that of every capital.
LOWERCASE = "abdefghmnqrt"

# Only fonts that ship with matplotlib, so that images do not depend on the machine's fonts.
_FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)

DEFAULT_SIZE = 16
MIN_SIZE = 13  # at fewer pixels the finest grating (6 cycles) would alias

CUE_AGREEMENT = 0.9  # fraction of images whose texture matches their letter

# Lengths are fractions of the image's side, so that an image looks the same at every size.
_LETTER_HEIGHT, _LETTER_WIDTH = 0.72, 0.76  # bounding box of an untransformed letter
_ROTATION = np.deg2rad(12.0)
_SCALE = (0.85, 1.15)
_SHEAR = 0.15
_TRANSLATION = 0.07
_GRATING_CYCLES = (2.5, 4.0, 6.0)  # times eight orientations: 24 textures for 23 classes
_GRATING_AMPLITUDE = (0.02, 0.06)  # of pixels in [0, 1]: at 16² an ℓ2 norm of 0.4 to 1.2

_OVERSAMPLING = 4
_CHUNK = 1024  # images rendered at once; bounds the float32 working memory


def draw_labelled(
    num_images: int, *, image_size: int, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "{num_images} {image_size} {image_size} 3"], Int32[np.ndarray, " {num_images}"]]:
    """Images and labels of balanced classes, whose texture matches the letter 9 times in 10."""
    labels = rng.permutation(np.arange(num_images, dtype=np.int32) % len(LETTERS))
    others = (labels + rng.integers(1, len(LETTERS), num_images)) % len(LETTERS)
    textures = np.where(rng.random(num_images) < CUE_AGREEMENT, labels, others)
    return render_glyphs(labels, textures, image_size=image_size, rng=rng), labels


def draw_lowercase(
    num_images: int, *, image_size: int, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "{num_images} {image_size} {image_size} 3"], Int32[np.ndarray, " {num_images}"]]:
    """Images and labels of balanced classes, indices into `LOWERCASE`, on gratings of any class."""
    labels = rng.permutation(np.arange(num_images, dtype=np.int32) % len(LOWERCASE))
    textures = rng.integers(len(LETTERS), size=num_images)
    return render_glyphs(labels, textures, image_size=image_size, rng=rng, alphabet=LOWERCASE), labels


def render_glyphs(
    letters: Integer[AnyArray, " n"] | Sequence[int],
    textures: Integer[AnyArray, " n"] | Sequence[int],
    *,
    image_size: int,
    rng: np.random.Generator,
    alphabet: str = LETTERS,
    amplitude: tuple[float, float] = _GRATING_AMPLITUDE,
    opacity: float = 1.0,
) -> UInt8[np.ndarray, "n {image_size} {image_size} 3"]:
    """Draws images with the letter of one class and the texture of another.

    Args:
      letters: classes whose letter is drawn (indices into `alphabet`).
      textures: classes whose grating is drawn.
      image_size: side in pixels, at least 13.
      rng: for typefaces, geometry, colours and phases; the same draws at every size.
      alphabet: the letters.
      amplitude: smallest and largest amplitude of the gratings, for pixels in [0, 1]. From 0.15 on, colours
        are clipped.
      opacity: of the letters, in [0, 1]. Like `amplitude`, it does not affect the other random draws.

    Raises:
      ValueError: the image is too small for the finest grating, a class does not exist, or an invalid
        amplitude or opacity.
    """
    letters, textures = np.asarray(letters), np.asarray(textures)
    chex.assert_rank(letters, 1)
    if image_size < MIN_SIZE:
        raise ValueError(f"glyphs need at least {MIN_SIZE} pixels per side, got image_size {image_size}")
    for name, classes, number in (("letters", letters, len(alphabet)), ("textures", textures, len(LETTERS))):
        if classes.shape != letters.shape or not np.all((classes >= 0) & (classes < number)):
            raise ValueError(
                f"{name} must be [N] class indices from 0 to {number - 1}; their shape is {classes.shape}"
            )
    if not 0 <= amplitude[0] <= amplitude[1] < np.inf:
        raise ValueError(f"amplitude must be two non-negative numbers in ascending order, got {amplitude}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must be in [0, 1], got {opacity}")

    num_images = len(letters)
    faces = rng.integers(len(_FACES), size=num_images)
    transforms = _draw_transforms(num_images, rng)
    ink, paper = _draw_colours(num_images, rng)
    amplitudes = rng.uniform(*amplitude, num_images).astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, num_images).astype(np.float32)

    images = np.empty((num_images, image_size, image_size, 3), np.uint8)
    masters = _letter_masters(alphabet, image_size * _OVERSAMPLING)
    for start in range(0, num_images, _CHUNK):
        part = slice(start, start + _CHUNK)
        chosen = [masters[pair] for pair in zip(letters[part], faces[part], strict=True)]
        coverage = _warp(chosen, transforms[part], image_size)[..., None]
        grating = _gratings(textures[part], amplitudes[part], phase[part], image_size)[..., None]
        background = paper[part, None, None] + grating
        blended = background + np.float32(opacity) * coverage * (ink[part, None, None] - background)
        images[part] = np.rint(255 * np.clip(blended, 0, 1))
    return images


def versions() -> dict[str, object]:
    """Everything that the drawn pixels depend on, apart from the arguments."""
    import matplotlib  # takes half a second

    return {
        "generator": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "matplotlib": matplotlib.__version__,
        "pillow": Image.__version__,
        "freetype": features.version("freetype2"),
        "numpy": np.__version__,
    }


def texture_of(
    classes: Integer[AnyArray, " n"],
) -> tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Orientation in radians and cycles per side of each class's grating, both float32 [N]."""
    turn, pitch = np.divmod(np.asarray(classes), len(_GRATING_CYCLES))
    angle = turn * (np.pi / 8)
    cycles = np.asarray(_GRATING_CYCLES)[pitch]
    return angle.astype(np.float32), cycles.astype(np.float32)


def _draw_transforms(num_images: int, rng: np.random.Generator) -> np.ndarray:
    """Affine maps [N, 2, 3] from image to letter coordinates, with the origin at the centre."""
    angle = rng.uniform(-_ROTATION, _ROTATION, num_images)
    scale = rng.uniform(*_SCALE, num_images)
    shear = rng.uniform(-_SHEAR, _SHEAR, num_images)
    shift = rng.uniform(-_TRANSLATION, _TRANSLATION, (num_images, 2))
    cos, sin = np.cos(angle), np.sin(angle)
    forward = np.stack([cos, shear * cos - sin, sin, shear * sin + cos], axis=-1)
    inverse = np.linalg.inv(forward.reshape(-1, 2, 2) * scale[:, None, None])
    return np.concatenate([inverse, -inverse @ shift[..., None]], axis=-1)


def _draw_colours(num_images: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Colours [N, 3] of letter and background, with enough contrast in brightness to be legible."""
    paper = rng.uniform(0.15, 0.85, (num_images, 3)).astype(np.float32)
    candidates = rng.uniform(0.0, 1.0, (num_images, 8, 3)).astype(np.float32)
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    contrast = np.abs((candidates - paper[:, None]) @ luma)
    return candidates[np.arange(num_images), contrast.argmax(axis=1)], paper


def _gratings(textures: np.ndarray, amplitude: np.ndarray, phase: np.ndarray, image_size: int) -> np.ndarray:
    """Sinusoids, float32 [N, image_size, image_size]."""
    angle, cycles = texture_of(textures)
    centre = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    wave_x = (2 * np.pi * cycles * np.cos(angle))[:, None, None] * centre[None, None, :]
    wave_y = (2 * np.pi * cycles * np.sin(angle))[:, None, None] * centre[None, :, None]
    return amplitude[:, None, None] * np.sin(wave_x + wave_y + phase[:, None, None])


def _letter_masters(alphabet: str, side: int) -> dict[tuple[int, int], Image.Image]:
    """Every letter in every typeface, as coverage (mode L), centred on a canvas of `side` pixels."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    masters = {}
    for face, file in enumerate(_FACES):
        large = _open_face(folder / f"{file}.ttf", side)
        for letter, text in enumerate(alphabet):
            left, top, right, bottom = large.getbbox(text)
            fit = min(_LETTER_WIDTH / (right - left), _LETTER_HEIGHT / (bottom - top)) * side
            font = _open_face(folder / f"{file}.ttf", fit * side)
            left, top, right, bottom = font.getbbox(text)
            canvas = Image.new("L", (side, side))
            corner = ((side - left - right) / 2, (side - top - bottom) / 2)
            ImageDraw.Draw(canvas).text(corner, text, fill=255, font=font)
            masters[letter, face] = canvas
    return masters


def _open_face(path: Path, size: float) -> ImageFont.FreeTypeFont:
    # Every build of Pillow has the basic layout engine, but not every one has the other.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _warp(masters: list[Image.Image], transforms: np.ndarray, image_size: int) -> np.ndarray:
    """Coverage of the transformed letters, float32 [N, image_size, image_size] in [0, 1]."""
    side = image_size * _OVERSAMPLING
    # Pillow maps pixel centres (x + 1/2, y + 1/2), with the origin in the corner of the canvas.
    middle = np.full(2, side / 2)
    linear = transforms[:, :, :2]
    offset = transforms[:, :, 2] * side + middle - linear @ middle
    data = np.concatenate([linear, offset[..., None]], axis=-1).reshape(-1, 6).tolist()
    warped = [
        master.transform((side, side), Image.Transform.AFFINE, six, Image.Resampling.BILINEAR)
        for master, six in zip(masters, data, strict=True)
    ]
    return np.stack([np.asarray(image.reduce(_OVERSAMPLING)) for image in warped]).astype(np.float32) / 255
