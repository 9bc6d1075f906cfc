"""Where an image says that it holds no data.

    no_data = NoData(path, header(path), stored)
    no_data.declared                            # whether the file says anything about it
    no_data.valid(pixels, top)                  # of rows from `top` on, as stored: (rows, W) bool

A pixel has no data where any of these says so:

- alpha is 0: the band that a TIFF declares (ExtraSamples 1 or 2) or a PNG has
- all bands have the no-data value: of GDAL's tag 42113, of NODATA_VALUES in its tag 42112, of the
  NoDataValue in FILE.aux.xml, or a PNG's one transparent colour
- a mask inside the TIFF is 0 (a second directory of the type 4)
- the mask FILE.msk beside the file is 0, as GDAL writes it
- a strip or a tile was never written (GDAL's SPARSE_OK)

In training these pixels are ignored. In a map they get the value IGNORE.

Letters: H W pixels, C channels.
"""

import re
from pathlib import Path

import numpy as np

from support.place import aux_xml
from support.raster import (
    GDAL_METADATA,
    GDAL_NO_DATA,
    MASK,
    OVERVIEW,
    SUBFILE,
    DataError,
    Header,
    Tags,
    first_value,
    header,
    read_directories,
    read_tags,
    text_of,
    tiff_header,
)
from support.tiff import TiffRows, fits

NO_ALPHA = "gdal_translate -co ALPHA=NO IN.tif OUT.tif"
NO_FOURTH = "gdal_translate -b 1 -b 2 -b 3 IN.tif OUT.tif"
LIKE_INFRARED = 0.5  # an alpha with more of its pixels neither 0 nor 255 is none


class NoData:
    """What a file says about pixels without data."""

    def __init__(self, path: Path, found: Header, stored):
        """stored: the rows of all bands."""
        self.alpha = found.alpha
        self.colours = [band for band in range(found.bands) if band != found.alpha]
        self.values = no_data_values(path, found, len(self.colours), stored.dtype)
        self.masks = masks(path, found)
        self.gaps = stored if isinstance(stored, TiffRows) and 0 in stored.sizes else None
        self.seen, self.missing, self.partial = 0, 0, 0  # pixels; partial: of an alpha in between
        declared = self.alpha is not None, self.values is not None, self.masks, self.gaps
        self.declared = any(declared)

    def valid(self, pixels: np.ndarray, top: int) -> np.ndarray:
        """Where rows from `top` on, (rows, W, C) as stored, hold data: (rows, W) bool."""
        bottom = top + len(pixels)
        valid = np.ones(pixels.shape[:2], bool)
        if self.alpha is not None:
            alpha = pixels[..., self.alpha]
            valid &= alpha != 0
            self.partial += np.count_nonzero(valid & (alpha != np.iinfo(alpha.dtype).max))
        if self.values is not None:
            colours = pixels[..., self.colours] if self.alpha is not None else pixels
            missing = np.ones_like(valid)
            for band, value in enumerate(self.values):
                missing &= colours[..., band] == value
            valid &= ~missing
        for mask in self.masks:
            valid &= mask.read(top, bottom).any(axis=-1)
        if self.gaps:
            valid &= self.gaps.written(top, bottom)
        self.seen += valid.size
        self.missing += valid.size - np.count_nonzero(valid)
        return valid

    def share(self) -> float:
        """Of the pixels without data among those that were looked at so far."""
        return self.missing / max(1, self.seen)

    def doubt(self) -> str:
        """After rows were looked at: a sentence if alpha may be infrared, else ""."""
        if self.partial <= LIKE_INFRARED * self.seen:
            return ""
        return (
            "its last band is declared as transparency, but varies like an image; if it is "
            f"infrared: {NO_ALPHA}; if not, keep the colours: {NO_FOURTH}"
        )

    def stamp(self) -> str:
        """Changes when what lies beside the image says something else."""
        beside = [(str(mask.path), mask.path.stat().st_mtime_ns) for mask in self.masks]
        return repr((self.values, beside))

    @staticmethod
    def of_tags(tags: Tags) -> float:
        """The value of a chunk that was never written: the no-data value of the tags, or 0."""
        value = as_number(text_of(tags, GDAL_NO_DATA))
        return 0 if value is None else value


def no_data_values(path: Path, found: Header, count: int, dtype: np.dtype) -> list | None:
    """One value for each of `count` bands, of this dtype; None where no pixel can have them."""
    values = found.transparent
    if found.format == "TIFF":
        tags = read_tags(path)
        values = [as_number(text_of(tags, GDAL_NO_DATA))] * count
        item = r'name="NODATA_VALUES"[^>]*>([^<]*)<'
        if several := re.search(item, text_of(tags, GDAL_METADATA)):
            values = [as_number(word) for word in several[1].split()]
    if (xml := aux_xml(path)) is not None:
        nodes = [band.find("NoDataValue") for band in xml.iter("PAMRasterBand")]
        if nodes and None not in nodes:
            values = [as_number(node.text) for node in nodes]
    values = [*values][:count]
    if len(values) < count or not all(fits(value, dtype) for value in values):
        return None
    return values


def as_number(text: str | None) -> float | None:
    """ "-9999", "255.0", "nan"; None for what is no number."""
    try:
        return float(text)
    except (ValueError, TypeError):
        return None


def masks(path: Path, found: Header) -> list[TiffRows]:
    """The masks inside a TIFF and beside any file, as large as the image; 0: no data."""
    rows = []
    if found.format == "TIFF":
        for tags in read_directories(path)[1:]:
            if first_value(tags, SUBFILE, 0) & (OVERVIEW | MASK) == MASK:
                rows.append(TiffRows(path, tiff_header(tags, found.big), tags))
    beside = path.with_name(f"{path.name}.msk")
    if beside.exists():
        rows.append(TiffRows(beside, header(beside), read_tags(beside)))
    for mask in rows:
        if mask.shape[:2] != (found.height, found.width):
            raise DataError(
                f"{mask.path}: the mask of {path.name} is {mask.shape[1]} x {mask.shape[0]} "
                f"pixels, the image {found.width} x {found.height}"
            )
    return rows
