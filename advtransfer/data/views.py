"""Views of a target set: what is left of its images without their detail, colour, layout or texture.

A view shows all images of a set, for training and testing alike. It is a function of uint8 images
[N, H, W, 3] to images of the same shape, and the same on every machine. Copies of a set that have a view of
their own on disk, such as stylised ones (Geirhos et al., 2019) or recorded masks, are a dataset
`folder:/path` like any other, with the same classes and splits.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import chex
import numpy as np
from PIL import Image

LOW_PASS_SIDE = 32  # pixels
GRID = 4  # patches a side

_CHUNK = 64  # images that a thread takes at a time
_SILENT = 1e-6  # a Fourier coefficient of pixels from 0 to 255 below this is rounding, and has no phase


def low_pass(images: np.ndarray) -> np.ndarray:
    """Without fine detail: by way of 32² pixels (Utrera et al., ICLR 2021)."""

    def blur(image: np.ndarray) -> Image.Image:
        natural = Image.fromarray(image)
        small = natural.resize((LOW_PASS_SIDE, LOW_PASS_SIDE), Image.Resampling.BILINEAR)
        return small.resize(natural.size, Image.Resampling.BILINEAR)

    return _each(blur, images)


def grey(images: np.ndarray) -> np.ndarray:
    """Without colour: ITU-R 601 luma in all three channels."""
    return _each(lambda image: _luma(image).convert("RGB"), images)


def patch_shuffle(images: np.ndarray) -> np.ndarray:
    """Without layout: 4×4 patches in another order for every image (Zhang and Zhu, ICML 2019).

    Of sides that 4 does not divide the last pixels stay where they are.
    """

    def shuffle(image: np.ndarray) -> np.ndarray:
        height, width = (side // GRID for side in image.shape[:2])
        there = image[: GRID * height, : GRID * width]
        patches = there.reshape(GRID, height, GRID, width, 3).swapaxes(1, 2)
        mixed = patches.reshape(GRID**2, height, width, 3)[patch_order(image)].reshape(patches.shape)
        shown = image.copy()
        shown[: GRID * height, : GRID * width] = mixed.swapaxes(1, 2).reshape(there.shape)
        return shown

    return _each(shuffle, images)


def patch_order(image: np.ndarray) -> np.ndarray:
    """Which of the 16 patches, by rows, comes to each place: the order of the words in its SHA-256."""
    chex.assert_rank(image, 3)
    digest = hashlib.sha256(np.ascontiguousarray(image)).digest()
    return np.argsort(np.frombuffer(digest, "<u2"), kind="stable")


def amplitude_swap(images: np.ndarray) -> np.ndarray:
    """In another's style: each image's Fourier phases with the amplitudes of another image of the set.

    Piotrowski and Campbell (Perception, 1982); as a style without networks Xu et al. (CVPR 2021), whose
    amplitude mix this is at λ = 1. By channel, the mean colour included. Partners follow each other in one
    random cycle through the images of a split, whatever their classes.
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


def edges(images: np.ndarray) -> np.ndarray:
    """Without colour and shading: the length of luma's gradient by Sobel's operator, bright on black.

    Scaled so that a step is as bright as it is high, and cut off at 255; the border is repeated outwards.
    """
    from scipy import ndimage  # a quarter of a second, and this is its only use

    def slope(image: np.ndarray) -> np.ndarray:
        luma = np.asarray(_luma(image), np.float64)
        found = np.hypot(*(ndimage.sobel(luma, axis, mode="nearest") / 4 for axis in (0, 1)))
        return np.rint(np.minimum(found, 255))[..., None]

    return _each(slope, images)


def silhouette(images: np.ndarray) -> np.ndarray:
    """Without texture: a black figure on white, separated from the background by Otsu's threshold on luma
    (1979).

    The ground is what most of the border shows. A figure on a plain ground, as digits and letters are, comes
    out as its mask; of a photograph a picture in two tones is left, no silhouette.
    """

    def fill(image: np.ndarray) -> np.ndarray:
        luma = np.asarray(_luma(image))
        bright = luma > otsu_threshold(luma)
        border = np.concatenate([bright[0], bright[-1], bright[1:-1, 0], bright[1:-1, -1]])
        figure = bright != (border.mean() > 0.5)
        return np.where(figure, 0, 255)[..., None]

    return _each(fill, images)


def otsu_threshold(luma: np.ndarray) -> int:
    """The value that parts uint8 pixels, <= and >, with the largest variance between the parts; 0 if flat."""
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
    """Applies `show` to every image, with its partner if there are any, in one thread per core."""
    chex.assert_shape(images, (None, None, None, 3))
    chex.assert_type(images, np.uint8)
    shown = np.empty_like(images)

    def work(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(images))):
            shown[i] = show(images[i]) if partners is None else show(images[i], images[partners[i]])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(work, range(0, len(images), _CHUNK)))
    return shown


VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "natural": lambda images: images,
    "low_pass": low_pass,
    "grey": grey,
    "patch_shuffle": patch_shuffle,
    "amplitude_swap": amplitude_swap,
    "edges": edges,
    "silhouette": silhouette,
}
