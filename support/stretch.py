"""16 bits -> 8 bits: one linear stretch of each band, the same in training and in mapping.

    stretch = measure(images, (2, 98))          # of all training images together
    stretch.apply(pixels)                       # (rows, W, C) uint16 or int16 -> uint8

Pleiades, WorldView and some drones have 11 to 16 bits in a file of 16. A stretch for each image
would give one roof another grey in each tile. So the values below which LOW and HIGH per cent of
the training pixels lie are measured once. They become 0 and 255, and best.pt keeps them.

Letters: H W pixels, C channels.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from support.raster import DataError

ROWS = 256  # read at a time
VALUES = 2**16


class Stretch(NamedTuple):
    """The values that become 0 and 255, for each band."""

    limits: tuple[tuple[int, int], ...]

    @classmethod
    def of_lists(cls, limits: list[list[int]] | None) -> "Stretch | None":
        """As files have it."""
        return cls(tuple(map(tuple, limits))) if limits else None

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """(rows, W, C) uint16 or int16 -> uint8."""
        values = all_values(pixels.dtype)
        index, out = pixels.view(np.uint16), np.empty(pixels.shape, np.uint8)
        for band, (low, high) in enumerate(self.limits):
            table = ((values - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)
            out[..., band] = table[index[..., band]]
        return out


def measure(images: Iterable, per_cent: tuple[float, ...]) -> Stretch:
    """The stretch of images (images.ImageRows) of 16 bits, by the values of all of them together.

    Raises DataError when `per_cent` is not (LOW, HIGH), when images differ in their bands or in the
    type of their values, when none has a pixel with data, or when a band has one value only.
    """
    if len(per_cent) != 2 or not 0 <= per_cent[0] < per_cent[1] <= 100:
        given = " ".join(f"{number:g}" for number in per_cent)
        raise DataError(f"--stretch takes LOW and HIGH in per cent, like 2 98; got {given}")
    counts, dtype, bands = 0, None, None  # counts of each value: (C, 65536)
    for rows in images:
        if dtype not in (None, rows.stored.dtype):
            raise DataError(f"{rows.stored.path}: has signed values, and other images have not")
        dtype = rows.stored.dtype
        if bands not in (None, rows.shape[2]):
            raise DataError(
                f"{rows.stored.path}: has {rows.shape[2]} bands, and other images have {bands}"
            )
        bands = rows.shape[2]
        for top in range(0, rows.shape[0], ROWS):
            counts = counts + histogram(rows, top, min(top + ROWS, rows.shape[0]))
    if not np.any(counts):
        raise DataError("--stretch: no pixel of the images holds data")
    values = all_values(dtype)
    order, limits = np.argsort(values), []
    for number, band in enumerate(counts[:, order], 1):
        below = band.cumsum()
        shares = (max(1, share / 100 * below[-1]) for share in per_cent)
        low, high = (int(values[order][np.searchsorted(below, share)]) for share in shares)
        if low == high:
            raise DataError(f"--stretch: LOW and HIGH are both {low} in band {number}")
        limits.append((low, high))
    return Stretch(tuple(limits))


def histogram(rows, top: int, bottom: int) -> np.ndarray:
    """How often each value occurs in each band of these rows, where there is data: (C, 65536)."""
    pixels, valid = rows.read_stored(top, bottom), rows.valid(top, bottom)
    pixels = pixels.reshape(-1, pixels.shape[2]) if valid is None else pixels[valid]
    bands = np.ascontiguousarray(pixels.T).view(np.uint16)
    return np.array([np.bincount(band, minlength=VALUES) for band in bands])


def all_values(dtype: np.dtype) -> np.ndarray:
    """What the 65536 patterns of bits stand for, uint16 or int16, as float64."""
    return np.arange(VALUES, dtype=np.uint16).view(dtype).astype(np.float64)
