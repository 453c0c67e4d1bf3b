"""Image transforms on the device: pure functions of float32 [N, H, W, 3] in [0, 1].

Random transforms take one key per image and consist of a random draw and a deterministic core (`random_crop`
draws the offsets of `crop_at`, ...), so the result for an image does not depend on its batch or device.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Integer, Key, UInt8

from advtransfer.arrays import AnyArray
from advtransfer.options import option, options

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow and torchvision
# Principal components of ImageNet's pixels in [0, 1]: eigenvalues, and eigenvectors in columns.
_PCA_VALUES = np.array([0.2175, 0.0188, 0.0045], np.float32)
_PCA_VECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]], np.float32
)
_ORDERS = np.array(list(itertools.permutations(range(3))), np.int32)


@options
class Augmentation:
    """Transforms of training images, in the order resized crop, crop, flip, jitter, rotation, lighting.

    The default is none. A preset is a published augmentation (`AUGMENTATIONS`) and replaces the other fields;
    "utrera" is "utrera_color", or "none" for grey images.
    """

    preset: str = option(
        "", "a published augmentation", choices=("", "none", "utrera", "utrera_color", "salman", "robustness")
    )
    crop_padding: int = option(0, "pixels of padding before a random crop of the original size", low=0)
    flip: bool = option(False, "horizontal flip with probability 1/2")
    jitter: float = option(
        0.0, "brightness, contrast and saturation factors are in 1 ± jitter", low=0, below=1
    )
    rotation: float = option(0.0, "degrees, uniform in ± rotation", low=0)
    lighting: float = option(0.0, "standard deviation of AlexNet's colour noise", low=0)
    resized_crop: float = option(
        0.0,
        "smallest area fraction of a random box that is scaled to the image's size; 0: none",
        low=0,
        below=1,
    )

    def check(self) -> None:
        if self.preset and replace(self, preset="") != Augmentation():
            raise ValueError(
                f"preset={self.preset} cannot be combined with other fields: set either the preset or those"
            )


#: Published augmentations. Utrera et al. do not augment grey targets.
AUGMENTATIONS = {
    "none": Augmentation(),
    # Utrera et al., ICLR 2021 (code); also CIFAR-10 in MadryLab/robustness.
    "utrera_color": Augmentation(crop_padding=4, flip=True, jitter=0.25, rotation=2.0),
    "salman": Augmentation(flip=True, resized_crop=0.08),  # NeurIPS 2020 (code): torchvision's defaults
    # ImageNet in MadryLab/robustness, data_augmentation.py, used by Salman et al. to train their sources.
    "robustness": Augmentation(flip=True, jitter=0.1, lighting=0.05, resized_crop=0.08),
}


def choose_augmentation(
    augmentation: Augmentation, images: UInt8[np.ndarray, "n h w 3"] | None = None
) -> Augmentation:
    """Replaces a preset by its fields.

    The preset "utrera" depends on `images`, uint8 [N, H, W, 3]: "none" if they are grey (all channels equal),
    otherwise "utrera_color", as in the paper's code.

    Raises:
      ValueError: the preset "utrera" without images.
    """
    preset = augmentation.preset
    if images is not None:
        chex.assert_rank(images, 4)
    if preset == "utrera":
        if images is None:
            raise ValueError(
                "preset=utrera depends on the images, which are not known here: set utrera_color or none"
            )
        preset = "none" if _are_grey(images) else "utrera_color"
    return AUGMENTATIONS[preset] if preset else augmentation


def _are_grey(images: np.ndarray) -> bool:
    """Whether all channels of [N, H, W, 3] are equal; checked in chunks, up to the first coloured image."""
    return all(
        np.array_equal(some[..., 0], some[..., channel])
        for some in (images[i : i + 256] for i in range(0, len(images), 256))
        for channel in (1, 2)
    )


def augment(
    keys: Key[Array, " n"], images: Float[AnyArray, "n h w 3"], augmentation: Augmentation
) -> Float[Array, "n h w 3"]:
    """Applies the transforms of an augmentation.

    Each transform has its own key, so switching one off does not change the others. `augmentation` is static
    under jit: disabled transforms are not compiled.
    """
    _check(keys, images)
    images = jnp.asarray(images)
    crop_keys, flip_keys, jitter_keys, rotation_keys, box_keys, light_keys = _split(keys, 6)
    augmentation = choose_augmentation(augmentation)
    if augmentation.resized_crop:
        images = random_resized_crop(box_keys, images, min_area=augmentation.resized_crop)
    if augmentation.crop_padding:
        images = random_crop(crop_keys, images, padding=augmentation.crop_padding)
    if augmentation.flip:
        images = random_flip(flip_keys, images)
    if jitter := augmentation.jitter:
        images = color_jitter(jitter_keys, images, brightness=jitter, contrast=jitter, saturation=jitter)
    if augmentation.rotation:
        images = random_rotation(rotation_keys, images, degrees=augmentation.rotation)
    if augmentation.lighting:
        images = random_lighting(light_keys, images, scale=augmentation.lighting)
    return images


def to_float(images: UInt8[AnyArray, "n h w c"], image_size: int | None = None) -> Float32[Array, "n _ _ c"]:
    """Converts uint8 [0, 255] to float32 [0, 1], resized to `image_size` (see `resize`) if given."""
    chex.assert_rank(images, 4)
    chex.assert_type(images, jnp.uint8)
    images = images.astype(jnp.float32) / jnp.float32(255)
    return images if image_size is None else resize(images, image_size)


def resize(images: Float[AnyArray, "n h w c"], size: int) -> Float[Array, "n {size} {size} c"]:
    """Resizes to [N, size, size, C], bilinear, with antialias when shrinking.

    The filter is Pillow's BILINEAR, a triangle as wide as the pixels of the coarser grid, truncated at the
    border. Unlike Pillow, which rounds to 8 bits after each direction, nothing is rounded.
    """
    chex.assert_rank(images, 4)
    if images.shape[1:3] == (size, size):
        return jnp.asarray(images)
    shape = (images.shape[0], size, size, images.shape[3])
    # With rounding, the sum of the weights may slightly exceed 1.
    return jnp.clip(jax.image.resize(images, shape, method="linear", antialias=True), 0, 1)


def random_crop(
    keys: Key[Array, " n"], images: Float[AnyArray, "n h w c"], *, padding: int = 4
) -> Float[Array, "n h w c"]:
    """Pads with `padding` black pixels on each side and crops to the original size at a random position."""
    _check(keys, images)
    draw = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 2 * padding + 1))
    return crop_at(images, draw(keys), padding=padding)


def crop_at(
    images: Float[AnyArray, "n h w c"], offsets: Integer[AnyArray, "n 2"], *, padding: int
) -> Float[Array, "n h w c"]:
    """Crops [H, W] from the padded images at (row, column) = `offsets`, integers [N, 2]."""
    chex.assert_rank(images, 4)
    chex.assert_shape(offsets, (images.shape[0], 2))
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def crop(image: AnyArray, offset: AnyArray) -> Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, offsets)


def random_resized_crop(
    keys: Key[Array, " n"], images: Float[AnyArray, "n h w c"], *, min_area: float
) -> Float[Array, "n h w c"]:
    """Crops a random box from each image and scales it to the image's size, as in torchvision.

    The box's fraction of the area is uniform in [min_area, 1] and the logarithm of its aspect ratio, width /
    height, uniform between log(3/4) and log(4/3). The first of ten tries that fits is used; if none does, the
    whole image.
    """
    _check(keys, images)
    height, width = images.shape[1:3]

    def draw(key: Array) -> Array:
        area_key, ratio_key, place_key = jax.random.split(key, 3)
        area = height * width * jax.random.uniform(area_key, (10,), jnp.float32, min_area, 1.0)
        ratio = jnp.exp(jax.random.uniform(ratio_key, (10,), jnp.float32, np.log(3 / 4), np.log(4 / 3)))
        sides = jnp.round(jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)], axis=1))
        whole = jnp.array([height, width], jnp.float32)
        fits = jnp.all((sides >= 1) & (sides <= whole[None]), axis=1)
        sides = jnp.where(jnp.any(fits), sides[jnp.argmax(fits)], whole)
        place = jnp.floor(jax.random.uniform(place_key, (2,), jnp.float32) * (whole - sides + 1))
        return jnp.concatenate([place, sides])

    return resized_crop_at(images, jax.vmap(draw)(keys))


def resized_crop_at(
    images: Float[AnyArray, "n h w c"], boxes: Float[AnyArray, "n 4"]
) -> Float[Array, "n h w c"]:
    """Crops boxes and scales them to the images' size, bilinear with antialias, as in Pillow.

    Args:
      images: in [0, 1].
      boxes: [N, 4], whole numbers: top, left, height, width.
    """
    chex.assert_rank(images, 4)
    chex.assert_shape(boxes, (images.shape[0], 4))

    def weights(first: Array, length: Array, size: int) -> Array:
        """Weight of input pixels (columns) in output pixels (rows): a triangle, truncated at the box."""
        scale = length / size
        old = jnp.arange(size, dtype=jnp.float32)[None, :]
        middle = first - 0.5 + (jnp.arange(size, dtype=jnp.float32)[:, None] + 0.5) * scale
        share = jnp.maximum(0, 1 - jnp.abs(old - middle) / jnp.maximum(scale, 1))
        share = jnp.where((old >= first) & (old < first + length), share, 0)
        return share / jnp.sum(share, axis=1, keepdims=True)

    def cut(image: AnyArray, box: AnyArray) -> Array:
        rows = weights(box[0], box[2], image.shape[0])
        columns = weights(box[1], box[3], image.shape[1])
        return jnp.einsum("ay,bx,yxc->abc", rows, columns, image, precision="highest")

    # With rounding, the sum of the weights may slightly exceed 1.
    return jnp.clip(jax.vmap(cut)(images, boxes), 0, 1)


def random_flip(keys: Key[Array, " n"], images: Float[AnyArray, "n h w c"]) -> Float[Array, "n h w c"]:
    """Mirrors each image left to right with probability 1/2."""
    _check(keys, images)
    return flip_where(images, jax.vmap(jax.random.bernoulli)(keys))


def flip_where(images: Float[AnyArray, "n h w c"], flipped: Bool[AnyArray, " n"]) -> Float[Array, "n h w c"]:
    """Mirrors the images whose entry in `flipped`, bool [N], is true."""
    chex.assert_rank(images, 4)
    chex.assert_shape(flipped, images.shape[:1])
    return jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)


def color_jitter(
    keys: Key[Array, " n"],
    images: Float[AnyArray, "n h w 3"],
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
) -> Float[Array, "n h w 3"]:
    """Changes brightness, contrast and saturation in random order, as in torchvision.

    Factors are uniform in [max(0, 1 - x), 1 + x]; values are clipped to [0, 1] after each change.
    """
    _check(keys, images)
    order_keys, factor_keys = _split(keys, 2)
    spans = jnp.array([brightness, contrast, saturation], jnp.float32)
    low, high = jnp.maximum(0, 1 - spans), 1 + spans
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (3,), jnp.float32, low, high))
    which = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(_ORDERS)))(order_keys)
    return adjust_colors(images, uniform(factor_keys), jnp.asarray(_ORDERS)[which])


def adjust_colors(
    images: Float[AnyArray, "n h w 3"], factors: Float[AnyArray, "n 3"], order: Integer[AnyArray, "n 3"]
) -> Float[Array, "n h w 3"]:
    """Changes brightness (0), contrast (1) and saturation (2), in an order given for each image.

    Each change blends the image with a base: black (brightness), its mean grey (contrast) or its greyscale
    version (saturation). Factor 0 is the base, 1 is the image, and more than 1 extrapolates.

    Args:
      images: in [0, 1].
      factors: [N, 3], indexed by the change.
      order: [N, 3], a permutation of the changes for each image.
    """
    chex.assert_rank(images, 4)
    chex.assert_shape([factors, order], (images.shape[0], 3))

    for step in range(3):
        red, green, blue = (images[..., channel, None] for channel in range(3))
        grey = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
        flat = jnp.mean(grey, axis=(1, 2), keepdims=True)
        which = order[:, step, None, None, None]
        base = jnp.where(which == 2, grey, jnp.where(which == 1, flat, 0))
        factor = jnp.take_along_axis(factors, order[:, step, None], axis=1)[..., None, None]
        images = jnp.clip(factor * images + (1 - factor) * base, 0, 1)
    return images


def random_lighting(
    keys: Key[Array, " n"], images: Float[AnyArray, "n h w 3"], *, scale: float
) -> Float[Array, "n h w 3"]:
    """Adds to each image a colour along the principal components of ImageNet's pixels, clipped to [0, 1].

    The coefficients of the components are normal with standard deviation `scale` (Krizhevsky et al., 2012,
    section 4.1; components and 0.05 as in MadryLab/robustness, which clips only in the attack).
    """
    _check(keys, images)
    shares = jax.vmap(lambda key: scale * jax.random.normal(key, (3,), jnp.float32))(keys)
    return light_by(images, shares)


def light_by(images: Float[AnyArray, "n h w 3"], shares: Float[AnyArray, "n 3"]) -> Float[Array, "n h w 3"]:
    """Adds the colour with the coefficients `shares`, float32 [N, 3], of the three principal components."""
    chex.assert_rank(images, 4)
    chex.assert_shape(shares, (images.shape[0], 3))
    colors = jnp.matmul(shares, (_PCA_VECTORS * _PCA_VALUES).T, precision="highest")
    return jnp.clip(images + colors[:, None, None, :], 0, 1)


def random_rotation(
    keys: Key[Array, " n"], images: Float[AnyArray, "n h w c"], *, degrees: float
) -> Float[Array, "n h w c"]:
    """Rotates each image by an angle uniform in [-degrees, degrees].

    Interpolation is bilinear; torchvision's default is nearest, which at the ±2° of Utrera et al. (ICLR 2021)
    leaves most pixels of a small image in place and shifts the others by a whole pixel.
    """
    _check(keys, images)
    draw = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32, -degrees, degrees))
    return rotate_by(images, draw(keys))


def rotate_by(images: Float[AnyArray, "n h w c"], degrees: Float[AnyArray, " n"]) -> Float[Array, "n h w c"]:
    """Rotates counter-clockwise about the centre by `degrees`, float32 [N]; uncovered pixels are black."""
    chex.assert_rank(images, 4)
    chex.assert_shape(degrees, images.shape[:1])
    height, width = images.shape[1:3]
    angle = jnp.deg2rad(degrees)[:, None, None]
    y = (jnp.arange(height, dtype=jnp.float32) - (height - 1) / 2)[None, :, None]
    x = (jnp.arange(width, dtype=jnp.float32) - (width - 1) / 2)[None, None, :]
    from_x = jnp.cos(angle) * x - jnp.sin(angle) * y + (width - 1) / 2
    from_y = jnp.sin(angle) * x + jnp.cos(angle) * y + (height - 1) / 2
    left, top = jnp.floor(from_x), jnp.floor(from_y)

    out = jnp.zeros(images.shape, jnp.float32)
    for down, right in itertools.product((0, 1), repeat=2):
        row, column = top + down, left + right
        weight = (1 - jnp.abs(from_y - row)) * (1 - jnp.abs(from_x - column))
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        weight = jnp.where(inside, weight, 0)
        row = jnp.clip(row, 0, height - 1).astype(jnp.int32)
        column = jnp.clip(column, 0, width - 1).astype(jnp.int32)
        taps = jax.vmap(lambda image, row, column: image[row, column])(images, row, column)
        out = out + weight[..., None] * taps
    return out


def _split(keys: Array, num: int) -> tuple[Array, ...]:
    """`num` independent keys for each image: a tuple of key arrays [N]."""
    split = jax.vmap(lambda key: jax.random.split(key, num), out_axes=1)(keys)
    return tuple(split[i] for i in range(num))


def _check(keys: Array, images: AnyArray) -> None:
    chex.assert_rank(images, 4)
    chex.assert_type(images, float)
    chex.assert_shape(keys, images.shape[:1])
