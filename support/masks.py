"""Masks as people have them: whole numbers of any type, or colours.

    rows = MaskRows("mask.png")
    rows.read(0, 256)                           # (256, W) int16 indices, or (256, W, 3) colours
    indices = read_indices("map.tif")           # (H, W) uint8

A mask with one band holds indices: 1 to 64 bits, signed, floating point or with a palette, as long
as every value is a whole number in 0..255 (QGIS writes Float32 unless told otherwise). A no-data
value outside 0..255 becomes NO_INDEX. One inside is left alone: QGIS declares 0, which is a class
in most masks (support/labels.py ignores it where it is none).

A mask with three bands holds colours. Nothing is guessed of what may be both or neither: a JPEG, a
mask with transparent pixels (alpha, or GDAL's mask in the file or beside it), one that is stored
turned.

Letters: H W pixels.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from support.images import open_stored
from support.nodata import as_number, masks
from support.raster import (
    GDAL_NO_DATA,
    PALETTE,
    DataError,
    Rows,
    Tags,
    data_errors,
    header,
    read_tags,
    text_of,
)

NO_INDEX = -1  # what MaskRows has where a mask of floats or large numbers has no data
TO_BYTES = "gdal_translate -ot Byte IN.tif OUT.tif"


class MaskRows(Rows):
    """The rows of a mask: indices (H, W) or colours (H, W, 3)."""

    def __init__(self, path: Path):
        found = header(path)
        if found.format == "JPEG":
            raise DataError(
                f"{path}: is a JPEG, which changes values; a mask must be a PNG or a TIFF: save it "
                f"as one where it was drawn"
            )
        opaque = found.mode.removesuffix("A")
        if opaque not in ("L", "P", "RGB"):
            raise DataError(
                f"{path}: is {found.mode} with {found.bands} bands; a mask has one band, its "
                f"values class indices, or three, its colours those of classes.json"
            )
        self.path, self.stored, self.alpha = path, open_stored(path, found), found.alpha
        self.masks = masks(path, found)
        self.coloured = opaque == "RGB"
        if self.coloured and self.stored.dtype != np.uint8:
            raise DataError(f"{path}: has colours of {found.bits} bits; a mask has 8: {TO_BYTES}")
        tags = read_tags(path) if found.format == "TIFF" else {}
        self.no_data = as_number(text_of(tags, GDAL_NO_DATA))
        size = (found.height, found.width)
        self.shape = (*size, 3) if self.coloured else size
        self.palette = palette(path, tags) if opaque == "P" else []

    def read(self, top: int, bottom: int) -> np.ndarray:
        """(rows, W) int16, 0..255 or NO_INDEX; or (rows, W, 3) uint8."""
        pixels = self.stored.read(top, bottom)
        opaque = [mask.read(top, bottom) for mask in self.masks]
        if self.alpha is not None:
            opaque.append(pixels[..., self.alpha])
            pixels = np.delete(pixels, self.alpha, axis=2)
        if not all(part.all() for part in opaque):
            raise DataError(
                f"{self.path}: has transparent pixels, which may be a class or none; save the mask "
                f"without transparency: gdal_translate -mask none -b 1 (-b 2 -b 3) IN OUT.tif"
            )
        return pixels if self.coloured else self.indices(pixels[..., 0])

    def indices(self, values: np.ndarray) -> np.ndarray:
        if values.dtype == np.uint8:
            return values.astype(np.int16)
        with np.errstate(invalid="ignore"):  # nan, and what a byte cannot hold
            indices = values.astype(np.uint8)
        missing = np.zeros(values.shape, bool)
        if self.no_data is not None and not 0 <= self.no_data <= 255:
            missing = np.isnan(values) if np.isnan(self.no_data) else values == self.no_data
        wrong = ~missing & ~((values >= 0) & (values <= 255) & (values == indices))
        if wrong.any():
            raise DataError(
                f"{self.path}: has the value {values[wrong][0]:g} (at {wrong.sum():,} pixels of "
                f"{len(values)} rows); a mask has whole numbers in 0..255"
            )
        return np.where(missing, np.int16(NO_INDEX), indices)


def palette(path: Path, tags: Tags) -> list[tuple[int, int, int]]:
    """The colour of each index of a palette image, 0..255 each; tags: of a TIFF."""
    if tags:
        values = np.array(tags[PALETTE][1] if PALETTE in tags else ()) // 256  # from 16 bits
        return [*zip(*values.reshape(3, -1).tolist(), strict=True)]
    with data_errors(path), Image.open(path, formats=("PNG",)) as image:
        return [*zip(*np.reshape(image.getpalette(), (-1, 3)).T.tolist(), strict=True)]


def read_indices(path: Path) -> np.ndarray:
    """All rows of a mask whose values are 0..255, (H, W) uint8."""
    rows = MaskRows(path)
    if rows.coloured:
        raise DataError(f"{path}: is RGB; a mask of indices has one band")
    return rows.read(0, rows.shape[0]).astype(np.uint8)
