"""Image files: what each says about its pixels, before one of them is decoded.

    header("scene.tif").bits                    # bands, bits, turned or not, ...
    read_tags("scene.tif")                      # of a TIFF: {number: (type, values)}

support/tiff.py and support/images.py read the pixels. Here is also what all readers have in common:
`Rows`, an image that is read by rows, and `DataError`, one sentence about a file that is wrong.

Letters: H W pixels, C channels.
"""

import re
import struct
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

Image.MAX_IMAGE_PIXELS = 500_000_000  # decoded at once; from twice as many on Pillow refuses


class DataError(ValueError):
    """Something is wrong with the data. The message says what, where, and what to do."""


@contextmanager
def data_errors(path: Path):
    """Turn any error while reading `path` into a DataError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on tags and sizes
            yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, not an image") from None
    except PermissionError:
        raise DataError(f"{path}: may not be read (permission denied)") from None
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise DataError(f"{path}: would need {most:,} pixels or more decoded at once") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: is damaged, or no PNG, JPEG or TIFF that can be read") from None
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error) as error:
        raise DataError(f"{path}: is damaged ({error})") from None


class Rows:
    """An image that is read by rows. shape: (H, W, C)."""

    shape: tuple[int, int, int]

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Rows top..bottom-1 as (bottom - top, W, C); DataError when they are damaged."""
        raise NotImplementedError

    def valid(self, top: int, bottom: int) -> np.ndarray | None:
        """Which of their pixels hold data, (bottom - top, W) bool; None: all that there are."""
        return None

    def __getitem__(self, rows: slice) -> np.ndarray:
        """rows[top:bottom], so that an array and a file can be used alike."""
        top, bottom, _ = rows.indices(self.shape[0])
        return self.read(top, max(top, bottom))


# --- Metadata -----------------------------------------------------------------------------------


class Header(NamedTuple):
    """A file's metadata about its pixels."""

    format: str  # PNG, JPEG or TIFF
    width: int
    height: int
    bands: int
    bits: int  # per band; the most, where bands differ
    mode: str  # L grey, P palette, RGB, RGBX (fourth band unspecified), RGBA (transparency), ...
    sample: str = "unsigned"  # or signed, float, unknown
    compression: str = ""  # of a TIFF
    planar: bool = False  # a TIFF that stores its bands one after the other
    tiled: bool = False
    big: bool = False  # a BigTIFF
    orientation: int = 1  # 1: the first row is the top; 2..8: viewers turn or mirror the image
    alpha: int | None = None  # the band that says how opaque a pixel is
    transparent: tuple[int, ...] = ()  # of a PNG: the one colour that is not there


# TIFF tags, and what their values are called.
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
ORIENTATION, BANDS, PLANAR, PREDICTOR, PALETTE, EXTRA_BANDS = 274, 277, 284, 317, 320, 338
STRIP_OFFSETS, ROWS_PER_STRIP, STRIP_BYTES, SAMPLE_FORMAT = 273, 278, 279, 339
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 322, 323, 324, 325
JPEG_TABLES, SUBSAMPLING, SUBFILE = 347, 530, 254
GDAL_METADATA, GDAL_NO_DATA = 42112, 42113
COMPRESSIONS = {1: "none", 5: "LZW", 7: "JPEG", 8: "deflate", 32946: "deflate", 32773: "PackBits"}
COMPRESSIONS |= {34925: "LZMA", 50000: "Zstandard"}
PHOTOMETRICS = {2: "RGB", 3: "P", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "LAB"}
SAMPLES = {1: "unsigned", 2: "signed", 3: "float"}
OVERVIEW, MASK = 1, 4  # bits of SUBFILE

Tags = dict[int, tuple[int, tuple | bytes]]  # number: (type, values)


def header(path: Path) -> Header:
    """The metadata of `path`; DataError when it is no image or cannot be parsed."""
    with data_errors(path), open(path, "rb") as file:
        start = file.read(26)
        if is_tiff(start):
            return tiff_header(read_tags(path), big=start[2] == 43)
        if not start.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")):
            raise DataError(f"{path}: {what_it_is(path, start)}")
        with Image.open(file, formats=("PNG", "JPEG")) as image:  # decodes no pixel
            bands, mode = len(image.getbands()), image.mode
            if image.format != "PNG":
                turned = exif_orientation(image)
                return Header("JPEG", *image.size, bands, 8, mode, orientation=turned)
            # Pillow's mode hides that it scales 1, 2 and 4 bits of grey up and 16 bits down.
            mode = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}[start[25]]
            key = image.info.get("transparency")
            return Header(
                *("PNG", *image.size, bands, start[24], mode),
                orientation=exif_orientation(image) if has_exif(file) else 1,
                alpha=bands - 1 if "A" in mode else None,
                transparent=key if isinstance(key, tuple) else (),
            )


def is_tiff(start: bytes) -> bool:
    return start[:4] in (b"II*\0", b"MM\0*", b"II+\0")


OTHER_FORMATS = {
    rb"RIFF....WEBP": "WebP",
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51": "JPEG 2000",
    rb"BM": "BMP",
    rb"GIF8": "GIF",
    rb"....ftyp(hei|mif|avi)": "HEIF or AVIF",
    rb"NITF": "NITF",
    rb"EHFA_HEADER_TAG": "ERDAS Imagine",
    rb"\x89HDF|CDF[\1\2]": "HDF5 or netCDF",
    rb"MM\0\+": "a big-endian BigTIFF",
}


def what_it_is(path: Path, start: bytes) -> str:
    """What the first bytes of a file say that is no image we read, and what to do."""
    for pattern, name in OTHER_FORMATS.items():
        if re.match(pattern, start, re.DOTALL):
            copy = f"gdal_translate {path.name} {path.stem}.tif"
            return f"is {name}, not a PNG, JPEG or TIFF; convert it: {copy}"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer to a file in Git LFS; fetch the file: git lfs pull"
    if start[:4] == b"\0\5\x16\7":
        return "is what macOS keeps beside a file, not an image; remove it: dot_clean"
    return "is not a PNG, JPEG or TIFF image that can be read"


def exif_orientation(image: Image.Image) -> int:
    """From EXIF or XMP; 1 where both are absent or cannot be parsed, as viewers have it."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return 1


def has_exif(file) -> bool:
    """Whether a PNG has EXIF or XMP. Pillow would decode every pixel to look behind them."""
    position = 8
    while True:
        file.seek(position)
        start = file.read(40)
        if len(start) < 12:
            return False
        length, kind = struct.unpack(">I4s", start[:8])
        texts = (b"XML:com.adobe.xmp", b"Raw profile type exif")
        if kind == b"eXIf" or kind[1:] in (b"TXt", b"EXt") and start[8:].startswith(texts):
            return True
        position += 12 + length


def read_tags(path: Path) -> Tags:
    """The first directory of a TIFF; DataError when there is a second image in the file."""
    return read_directories(path)[0]


def read_directories(path: Path) -> list[Tags]:
    """All directories of a TIFF: the image, its smaller copies and its masks.

    DataError when there is a second image in the file.
    """
    with data_errors(path), open(path, "rb") as file:
        start = file.read(16)
        directory = ImageFileDirectory_v2(start if start[2] == 43 else start[:8])
        found, seen = [], set()
        while directory.next and directory.next not in seen:
            seen.add(directory.next)
            tags = read_directory(path, file, directory)
            if found and not first_value(tags, SUBFILE, 0) & (OVERVIEW | MASK):
                raise DataError(
                    f"{path}: holds more than one image; save each as its own file: "
                    f"gdal_translate GTIFF_DIR:1:IN.tif OUT.tif"
                )
            found.append(tags)
        if not found:
            raise DataError(f"{path}: is damaged (it has no directory)")
    return found


def read_directory(path: Path, file, directory: ImageFileDirectory_v2) -> Tags:
    """The directory at `directory.next`, which then is where the following one begins."""
    file.seek(directory.next)
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        directory.load(file)
    if any(re.match("Corrupt EXIF|Truncated", str(remark.message)) for remark in remarks):
        raise DataError(
            f"{path}: is truncated (its directory is cut off at the end of the file); "
            f"copy or download it again"
        )
    tags = {tag: (directory.tagtype[tag], as_tuple(directory[tag])) for tag in directory}
    for text in (GDAL_METADATA, GDAL_NO_DATA):
        if text in tags and not isinstance(tags[text][1], bytes):
            raise DataError(
                f"{path}: its tag {text} is {tags[text][1][0]}, a number, where GDAL has a text; "
                f"write it anew: gdal_translate IN.tif OUT.tif"
            )
    for needed in (WIDTH, HEIGHT):
        if needed not in tags:
            raise DataError(f"{path}: is damaged (there is no tag {needed})")
    return tags


def as_tuple(value) -> tuple | bytes:
    """A tag's value from Pillow as bytes or as a tuple of numbers."""
    if isinstance(value, str):
        return value.encode("latin-1") + b"\0"
    return value if isinstance(value, bytes | tuple) else (value,)


def first_value(tags: Tags, tag: int, default: int) -> int:
    return tags[tag][1][0] if tag in tags else default


def text_of(tags: Tags, tag: int) -> str:
    """A tag's text, "" where it is absent."""
    return tags[tag][1].rstrip(b"\0 ").decode("latin-1") if tag in tags else ""


def tiff_header(tags: Tags, big: bool) -> Header:
    bands, photometric = first_value(tags, BANDS, 1), first_value(tags, PHOTOMETRIC, 1)
    compression = first_value(tags, COMPRESSION, 1)
    planar = bands > 1 and first_value(tags, PLANAR, 1) == 2
    extra = [*tags[EXTRA_BANDS][1]] if EXTRA_BANDS in tags else []
    alpha = next((bands - len(extra) + i for i, kind in enumerate(extra) if kind in (1, 2)), None)
    colours = bands - (alpha is not None)
    mode = PHOTOMETRICS.get(photometric, {1: "L", 2: "LX", 3: "RGB", 4: "RGBX"}.get(colours, ""))
    if photometric == 0:
        mode = "inverted L"
    elif mode == "YCbCr" and compression == 7 and bands == 3 and not planar:
        mode = "RGB"  # the JPEG decoder converts it
    elif mode == "RGB" and colours == 4:
        mode = "RGBX"
    if alpha is not None:
        mode += "A"
    formats = {*tags[SAMPLE_FORMAT][1]} if SAMPLE_FORMAT in tags else {1}
    return Header(
        "TIFF",
        first_value(tags, WIDTH, 0),
        first_value(tags, HEIGHT, 0),
        bands,
        max(tags[BITS][1]) if BITS in tags else 1,
        mode,
        SAMPLES.get(formats.pop(), "unknown") if len(formats) == 1 else "unknown",
        COMPRESSIONS.get(compression, f"number {compression}"),
        planar,
        TILE_WIDTH in tags,
        big,
        first_value(tags, ORIENTATION, 1),
        alpha,
    )
