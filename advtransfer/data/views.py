"""Views of a target dataset: its images without their detail, colour, layout or texture.

A view is a function of uint8 images [N, H, W, 3] to images of the same shape. It is applied to training and
test images alike, and gives the same result on every machine. Views that are files, such as stylised images
(Geirhos et al., 2019) or recorded masks, are datasets `folder:/path` with the same classes and splits.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import chex
import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

Images = UInt8[np.ndarray, "n h w 3"]

LOW_PASS_SIDE = 32  # pixels
GRID = 4  # patches a side

_CHUNK = 64  # images per thread and task
_SILENT = 1e-6  # smaller Fourier coefficients of pixels from 0 to 255 are rounding errors and have no phase


def low_pass(images: Images) -> Images:
    """Without fine detail: downscaled to 32² pixels and back (Utrera et al., ICLR 2021)."""

    def blur(image: np.ndarray) -> Image.Image:
        natural = Image.fromarray(image)
        small = natural.resize((LOW_PASS_SIDE, LOW_PASS_SIDE), Image.Resampling.BILINEAR)
        return small.resize(natural.size, Image.Resampling.BILINEAR)

    return _each(blur, images)


def grey(images: Images) -> Images:
    """Without colour: ITU-R 601 luma in all three channels."""
    return _each(lambda image: _luma(image).convert("RGB"), images)


def patch_shuffle(images: Images) -> Images:
    """Without layout: 4×4 patches in a different order for every image (Zhang and Zhu, ICML 2019).

    If a side is not divisible by 4, its last pixels stay in place.
    """

    def shuffle(image: np.ndarray) -> np.ndarray:
        height, width = (side // GRID for side in image.shape[:2])
        whole = image[: GRID * height, : GRID * width]
        patches = whole.reshape(GRID, height, GRID, width, 3).swapaxes(1, 2)
        mixed = patches.reshape(GRID**2, height, width, 3)[patch_order(image)].reshape(patches.shape)
        shown = image.copy()
        shown[: GRID * height, : GRID * width] = mixed.swapaxes(1, 2).reshape(whole.shape)
        return shown

    return _each(shuffle, images)


def patch_order(image: UInt8[np.ndarray, "h w 3"]) -> Integer[np.ndarray, " 16"]:
    """Which of the 16 patches, by rows, goes to each position: the rank order of the words of its SHA-256."""
    chex.assert_rank(image, 3)
    digest = hashlib.sha256(np.ascontiguousarray(image).data).digest()
    return np.argsort(np.frombuffer(digest, "<u2"), kind="stable")


def amplitude_swap(images: Images) -> Images:
    """In another style: each image's Fourier phases with the amplitudes of another image of the split.

    Piotrowski and Campbell (Perception, 1982); used as a network-free style transfer by Xu et al. (CVPR
    2021), whose amplitude mix this is at λ = 1. Applied per channel, including the mean colour. The
    amplitudes are those of the next image in a random cycle through all images of a split, whatever their
    classes.
    """
    order = np.random.default_rng(0).permutation(len(images))
    partners = np.empty_like(order)
    partners[order] = np.roll(order, -1)

    def swap(image: np.ndarray, partner: np.ndarray) -> np.ndarray:
        own, other = (np.fft.rfft2(x.astype(np.float64), axes=(0, 1)) for x in (image, partner))
        size = np.abs(own)
        phase = np.where(size > _SILENT, own / np.maximum(size, _SILENT), 1)
        shown = np.fft.irfft2(phase * np.abs(other), s=image.shape[:2], axes=(0, 1))
        return np.rint(np.clip(shown, 0, 255))

    return _each(swap, images, partners)


def edges(images: Images) -> Images:
    """Without colour and shading: the magnitude of the Sobel gradient of luma, bright on black.

    Scaled so that an edge is as bright as the step in luma, and clipped at 255; borders are padded by
    replication.
    """
    from scipy import ndimage  # takes a quarter of a second; only used here

    def slope(image: np.ndarray) -> np.ndarray:
        luma = np.asarray(_luma(image), np.float64)
        found = np.hypot(*(ndimage.sobel(luma, axis, mode="nearest") / 4 for axis in (0, 1)))
        return np.rint(np.minimum(found, 255))[..., None]

    return _each(slope, images)


def silhouette(images: Images) -> Images:
    """Without texture: a black figure on white, separated by Otsu's threshold on luma (1979).

    The background is the side of the threshold that most of the border is on. A figure on a plain background,
    such as a digit or letter, becomes its mask; a photograph becomes a two-tone image, not a silhouette.
    """

    def fill(image: np.ndarray) -> np.ndarray:
        luma = np.asarray(_luma(image))
        bright = luma > otsu_threshold(luma)
        border = np.concatenate([bright[0], bright[-1], bright[1:-1, 0], bright[1:-1, -1]])
        figure = bright != (border.mean() > 0.5)
        return np.where(figure, 0, 255)[..., None]

    return _each(fill, images)


def otsu_threshold(luma: UInt8[np.ndarray, " ..."]) -> int:
    """The value that splits pixels into <= and > with maximal between-class variance; 0 if constant."""
    counts = np.bincount(luma.reshape(-1), minlength=256).astype(np.float64)
    below, mass = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    weight = below * (below[-1] - below)
    apart = (mass[-1] * below - mass * below[-1]) ** 2
    return int(np.argmax(np.divide(apart, weight, out=np.zeros(256), where=weight > 0)))


def _luma(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image).convert("L")


def _each(
    show: Callable[..., np.ndarray | Image.Image], images: np.ndarray, partners: np.ndarray | None = None
) -> np.ndarray:
    """Applies `show` to every image, and its partner if given, in one thread per core."""
    chex.assert_shape(images, (None, None, None, 3))
    chex.assert_type(images, np.uint8)
    shown = np.empty_like(images)

    def work(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(images))):
            shown[i] = show(images[i]) if partners is None else show(images[i], images[partners[i]])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(work, range(0, len(images), _CHUNK)))
    return shown


#: Name -> what it makes of images, uint8 [N, H, W, 3].
VIEWS: dict[str, Callable[[Images], Images]] = {
    "natural": lambda images: images,
    "low_pass": low_pass,
    "grey": grey,
    "patch_shuffle": patch_shuffle,
    "amplitude_swap": amplitude_swap,
    "edges": edges,
    "silhouette": silhouette,
}
