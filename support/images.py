"""Images: three bands of 8 bits, or four with infrared, and which of their pixels hold data.

    rows = open_rows("scene.tif")               # decodes only the rows that are asked for
    rows.shape                                  # (H, W, C)
    rows[0:512]                                 # (512, W, C) uint8; so does rows.read(0, 512)
    rows.valid(0, 512)                          # (512, W) bool; None if all pixels hold data
    image = read_image("scene.tif")             # (H, W, C) uint8, C = 3, or 4 with infrared

Five things say that there is nothing at a pixel; support/nodata.py reads them. Values are returned
as they are stored, and no colour profile is applied. What would lose information, or what viewers
show another way than it is stored, is refused with the command that helps.

A PNG, a JPEG, or a TIFF that is one single compressed strip cannot be decoded in part. It is
decoded once as a whole and stays in memory (4 bytes a pixel; 3 for the TIFF).

Letters: H W pixels, C channels.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from support.nodata import NoData
from support.raster import DataError, Header, Rows, data_errors, header, read_tags
from support.stretch import Stretch
from support.tiff import TiffRows


class WholeRows(Rows):
    """The rows of a PNG or JPEG, which is decoded as a whole at the first read."""

    def __init__(self, path: Path, header: Header):
        self.path, self.header, self.image = path, header, None
        self.shape = (header.height, header.width, header.bands)
        self.dtype = np.dtype(np.uint16 if header.bits == 16 else np.uint8)

    def read(self, top: int, bottom: int) -> np.ndarray:
        with data_errors(self.path):
            if self.image is None:
                with open(self.path, "rb") as file:
                    image = Image.open(file, formats=("PNG", "JPEG"))
                    image.load()  # a truncated file fails here
                self.image = image
            part = np.asarray(self.image.crop((0, top, self.shape[1], bottom)))
        if self.header.mode == "L" and self.header.bits in (2, 4):
            part = part // (255 // (2**self.header.bits - 1))  # Pillow scales them to 0..255
        return part.astype(self.dtype, copy=False).reshape(bottom - top, *self.shape[1:])


def open_stored(path: Path, found: Header) -> WholeRows | TiffRows:
    """All bands as they are stored, of any kind of values; the first row is the top."""
    if found.orientation in range(2, 9):  # some cameras write 0: not known
        raise DataError(
            f"{path}: is stored turned (orientation {found.orientation}), and not every program "
            f"turns it; write it upright: magick IN -auto-orient OUT, or, if its mask fits the "
            f"stored rows: exiftool -Orientation= FILE"
        )
    if found.format == "TIFF":
        tags = read_tags(path)
        return TiffRows(path, found, tags, fill=NoData.of_tags(tags))
    if found.bits == 16 and found.mode != "L":  # Pillow reads its high bytes
        raise DataError(f"{path}: has 16 bits per band; a TIFF keeps them: {TO_TIFF}")
    return WholeRows(path, found)


TO_TIFF = "gdal_translate IN.png OUT.tif"
TO_8_BITS = "gdal_translate -ot Byte -scale IN.tif OUT.tif"


class ImageRows(Rows):
    """The colours of an image, by rows, and which pixels hold data."""

    def __init__(
        self,
        path: Path,
        found: Header,
        stored: WholeRows | TiffRows,
        stretch: Stretch | None = None,
    ):
        self.stored, self.no_data, self.stretch = stored, NoData(path, found, stored), stretch
        self.colours = [band for band in range(found.bands) if band != found.alpha]
        self.shape = (found.height, found.width, len(self.colours))

    def read(self, top: int, bottom: int) -> np.ndarray:
        pixels = self.read_stored(top, bottom)
        return self.stretch.apply(pixels) if self.stretch else pixels

    def read_stored(self, top: int, bottom: int) -> np.ndarray:
        """As `read`, of the type that is stored."""
        pixels = self.stored.read(top, bottom)
        if pixels.shape[2] == len(self.colours):
            return pixels
        return np.ascontiguousarray(pixels[..., self.colours])

    def valid(self, top: int, bottom: int) -> np.ndarray | None:
        if not self.no_data.declared:
            return None
        return self.no_data.valid(self.stored.read(top, bottom), top)


def open_rows(path: Path, stretch: Stretch | None = None) -> ImageRows:
    """The rows of an image of three bands, or of four, the fourth infrared; with `stretch` of one
    of 16 bits.

    Raises DataError for other bands, bits or values, for an image that is stored turned, and for a
    damaged or a truncated file. Of a PNG or JPEG the damage shows only at the first read.
    """
    found = header(path)
    if stretch:
        check_16_bits(path, found)
    else:
        check_values(path, found)
    check_bands(path, found)
    rows = ImageRows(path, found, open_stored(path, found), stretch)
    if stretch and len(stretch.limits) != rows.shape[2]:
        bands = f"{rows.shape[2]} bands, but the stretch is of {len(stretch.limits)}"
        raise DataError(f"{path}: has {bands}")
    return rows


def open_16_bits(path: Path) -> ImageRows:
    """To measure a stretch: `read_stored` and `valid` of an image of 16 bits."""
    found = header(path)
    check_16_bits(path, found)
    check_bands(path, found)
    return ImageRows(path, found, open_stored(path, found))


def check_16_bits(path: Path, found: Header) -> None:
    if found.bits != 16 or found.sample not in ("unsigned", "signed"):
        raise DataError(
            f"{path}: has {found.bits} bits per band ({found.sample}); a stretch is for 16 bits, "
            f"and one model takes either 8 or 16"
        )


def check_values(path: Path, found: Header) -> None:
    if found.bits == 16 and found.sample != "float":
        raise DataError(
            f"{path}: has 16 bits per band; train.py --stretch 2 98 takes 16 bits, or convert it "
            f"to 8: {TO_8_BITS}"
        )
    if found.bits != 8 and not (found.format == "PNG" and found.mode == "P"):
        bits = f"{found.bits} bit{'s' if found.bits > 1 else ''}"
        raise DataError(f"{path}: has {bits} per band; convert it to 8 bits: {TO_8_BITS}")
    if found.sample != "unsigned":
        raise DataError(f"{path}: has {found.sample} values; convert them to 0..255: {TO_8_BITS}")


def check_bands(path: Path, found: Header) -> None:
    """DataError unless the colours, without alpha, are RGB or RGB and infrared."""
    mode, bands = found.mode.removesuffix("A"), found.bands - (found.alpha is not None)
    if mode == "P":
        raise DataError(
            f"{path}: is P (a palette), not RGB; write its colours: "
            f"gdal_translate -expand rgb IN.tif OUT.tif"
        )
    if bands not in (1, 3, 4):
        more = "gdal_translate -b 1 -b 2 -b 3 IN.tif OUT.tif" if bands > 4 else ""
        keep = f"; keep three: {more}" if more else ""
        raise DataError(f"{path}: has {bands} bands; an image has 3, or 4 with infrared{keep}")
    if mode not in ("RGB", "RGBX"):
        how = "gdal_translate -b 1 -b 1 -b 1 IN.tif OUT.tif" if mode == "L" else TO_SRGB
        raise DataError(f"{path}: is {mode}, not RGB; convert it to three bands of 8 bits: {how}")


TO_SRGB = "magick IN -colorspace sRGB OUT"


def read_image(path: Path) -> np.ndarray:
    """All rows of `open_rows`: (H, W, C) uint8, C = 3, or 4 with infrared."""
    rows = open_rows(path)
    return rows.read(0, rows.shape[0])
