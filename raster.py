"""Image files as they are: opened with care, refused when reading them would lose bits or bands.

    image = read_image("scene.tif")             # (H, W, 3) uint8
    mask = read_indices("mask.png")             # (H, W) uint8, class indices

Letters: H W pixels, C channels.
"""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

Image.MAX_IMAGE_PIXELS = 500_000_000  # a 22,000 x 22,000 scene; Pillow refuses twice as many


class DataError(ValueError):
    """Something is wrong with the data; the message says what, where, and what to do."""


def open_image(path: Path) -> Image.Image:
    """A fully decoded image, refused when Pillow would silently lose bits or bands."""
    try:
        image = Image.open(path, formats=("PNG", "JPEG", "TIFF"))
        bits, bands = 8, len(image.getbands())
        if image.format == "TIFF":
            bits, bands = max(image.tag_v2.get(258, (1,))), image.tag_v2.get(277, 1)
        elif "16" in str(image.tile):  # the decoder's name, as in RGB;16B
            bits = 16
        if bits > 8:
            raise DataError(f"{path}: has {bits} bits per band; convert it to 8 bits first")
        if bands != len(image.getbands()):
            raise DataError(f"{path}: has {bands} bands, of which only {image.mode} can be read")
        image.load()  # open() does not look at the pixels: a truncated file only fails here
    except UnidentifiedImageError:
        raise DataError(f"{path}: is not a PNG, JPEG or TIFF image that can be read") from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, not an image") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path}: is larger than {2 * Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: is damaged ({error})") from None
    return image


def read_image(path: Path) -> np.ndarray:
    """Three bands of eight bits, (H, W, 3) uint8."""
    image = open_image(path)
    if image.mode != "RGB":
        raise DataError(f"{path}: is {image.mode}, not RGB; convert it to three bands of 8 bits")
    return np.asarray(image)


def read_indices(path: Path) -> np.ndarray:
    """One band whose values are class indices (grey or palette), (H, W) uint8."""
    mask = open_image(path)
    if mask.mode not in ("L", "P"):
        raise DataError(f"{path}: is {mask.mode}; a mask has one band, its values class indices")
    return np.asarray(mask)
