"""Image files, read by rows, and refused when reading them would lose information.

    rows = open_rows("scene.tif")               # decodes only the rows that are asked for
    rows.shape                                  # (H, W, C)
    rows[0:512]                                 # (512, W, C) uint8; so does rows.read(0, 512)
    image = read_image("scene.tif")             # (H, W, C) uint8, C = 3, or 4 with infrared
    mask = read_indices("mask.png")             # (H, W) uint8, class indices
    header("scene.tif").bits                    # the file's metadata, without decoding a pixel

Of a TIFF, the compressed strips or tiles that hold the wanted rows are copied into a small TIFF in
memory, which Pillow decodes. This reads every compression that Pillow knows, separate planes and
BigTIFF, in the memory of those rows. Uncompressed strips are read directly from the file. A PNG, a
JPEG, or a TIFF that is one single compressed strip cannot be decoded in part. It is decoded once as
a whole and stays in memory (4 bytes a pixel; 3 for the TIFF).

Values are returned as they are stored, and no colour profile is applied. Inverted grey and an image
that its orientation tag rotates are refused.

Letters: H W pixels, C channels.
"""

import os
import struct
import warnings
from contextlib import contextmanager
from io import BytesIO
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
    orientation: int = 1  # of a TIFF; 1: the first row is the top


# TIFF tags, and what their values are called.
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
ORIENTATION, BANDS, PLANAR, PREDICTOR, PALETTE, EXTRA_BANDS = 274, 277, 284, 317, 320, 338
STRIP_OFFSETS, ROWS_PER_STRIP, STRIP_BYTES, SAMPLE_FORMAT = 273, 278, 279, 339
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 322, 323, 324, 325
JPEG_TABLES, SUBSAMPLING, SUBFILE = 347, 530, 254
COMPRESSIONS = {1: "none", 5: "LZW", 7: "JPEG", 8: "deflate", 32946: "deflate", 32773: "PackBits"}
COMPRESSIONS |= {34925: "LZMA", 50000: "Zstandard"}
PHOTOMETRICS = {2: "RGB", 3: "P", 5: "CMYK", 6: "YCbCr", 8: "LAB"}
SAMPLES = {1: "unsigned", 2: "signed", 3: "float"}

Tags = dict[int, tuple[int, tuple | bytes]]  # number: (type, values)


def header(path: Path) -> Header:
    """The metadata of `path`; DataError when it is no image or cannot be parsed."""
    with data_errors(path), open(path, "rb") as file:
        start = file.read(26)
        if start[:4] in (b"II*\0", b"MM\0*", b"II+\0"):
            return tiff_header(read_tags(path), big=start[2] == 43)
        if not start.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")):
            raise DataError(f"{path}: is not a PNG, JPEG or TIFF image that can be read")
        with Image.open(file, formats=("PNG", "JPEG")) as image:  # decodes no pixel
            bands, mode = len(image.getbands()), image.mode
            if image.format != "PNG":
                return Header("JPEG", *image.size, bands, 8, mode)
            # Pillow's mode hides that it scales 1, 2 and 4 bits of grey up and 16 bits down.
            mode = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}[start[25]]
            return Header("PNG", *image.size, bands, start[24], mode)


def read_tags(path: Path) -> Tags:
    """The first directory of a TIFF; DataError when there is a second image in the file."""
    with data_errors(path), open(path, "rb") as file:
        start = file.read(16)
        directory = ImageFileDirectory_v2(start if start[2] == 43 else start[:8])
        file.seek(directory.next)
        directory.load(file)
        tags = {tag: (directory.tagtype[tag], as_tuple(directory[tag])) for tag in directory}
        for needed in (WIDTH, HEIGHT):
            if needed not in tags:
                raise DataError(f"{path}: is damaged (there is no tag {needed})")
        if directory.next:
            file.seek(directory.next)
            directory.load(file)
            if not directory.get(SUBFILE, 0) & 5:  # bit 1: a smaller copy, bit 4: a mask
                raise DataError(f"{path}: holds more than one image; save each as its own file")
    return tags


def as_tuple(value) -> tuple | bytes:
    """A tag's value from Pillow as bytes or as a tuple of numbers."""
    if isinstance(value, str):
        return value.encode("latin-1") + b"\0"
    return value if isinstance(value, bytes | tuple) else (value,)


def first_value(tags: Tags, tag: int, default: int) -> int:
    return tags[tag][1][0] if tag in tags else default


def tiff_header(tags: Tags, big: bool) -> Header:
    bands, photometric = first_value(tags, BANDS, 1), first_value(tags, PHOTOMETRIC, 1)
    compression = first_value(tags, COMPRESSION, 1)
    planar = bands > 1 and first_value(tags, PLANAR, 1) == 2
    extra = tags[EXTRA_BANDS][1] if EXTRA_BANDS in tags else ()
    mode = PHOTOMETRICS.get(photometric, {1: "L", 2: "LX", 3: "RGB", 4: "RGBX"}.get(bands, ""))
    if photometric == 0:
        mode = "inverted L"
    elif mode == "YCbCr" and compression == 7 and bands == 3 and not planar:
        mode = "RGB"  # the JPEG decoder converts it
    elif mode == "RGB" and bands == 4:
        mode = "RGBX"
    if {1, 2} & {*extra}:
        mode = mode.replace("X", "") + "A"
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
    )


# --- Reading ------------------------------------------------------------------------------------


class Rows:
    """An image that is read by rows. shape: (H, W, C)."""

    shape: tuple[int, int, int]

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Rows top..bottom-1 as (bottom - top, W, C) uint8; DataError when they are damaged."""
        raise NotImplementedError

    def __getitem__(self, rows: slice) -> np.ndarray:
        """rows[top:bottom], so that an array and a file can be used alike."""
        top, bottom, _ = rows.indices(self.shape[0])
        return self.read(top, max(top, bottom))


class WholeRows(Rows):
    """The rows of a PNG or JPEG, which is decoded as a whole at the first read."""

    def __init__(self, path: Path, header: Header):
        self.path, self.image = path, None
        self.shape = (header.height, header.width, header.bands)

    def read(self, top: int, bottom: int) -> np.ndarray:
        with data_errors(self.path):
            if self.image is None:
                with open(self.path, "rb") as file:
                    image = Image.open(file, formats=("PNG", "JPEG"))
                    image.load()  # a truncated file fails here
                self.image = image
            part = np.asarray(self.image.crop((0, top, self.shape[1], bottom)))
        return part.reshape(bottom - top, *self.shape[1:])


class TiffRows(Rows):
    """The rows of a TIFF. Decodes the strips or tiles that hold them and remembers the last ones.

    A chunk is a strip or a tile. Windows that overlap need the same chunks twice in a row.
    """

    def __init__(self, path: Path, header: Header):
        self.path, self.header, self.tags = path, header, read_tags(path)
        H, W, C = self.shape = (header.height, header.width, header.bands)
        if header.compression.startswith("number") or first_value(self.tags, FILL_ORDER, 1) != 1:
            raise DataError(
                f"{path}: has compression {header.compression}, fill order "
                f"{first_value(self.tags, FILL_ORDER, 1)}; save it with LZW or deflate"
            )
        if header.tiled:
            self.chunk_height = first_value(self.tags, TILE_HEIGHT, 0)
            chunk_width = first_value(self.tags, TILE_WIDTH, 0)
            offsets, sizes = TILE_OFFSETS, TILE_BYTES
        else:
            self.chunk_height = min(first_value(self.tags, ROWS_PER_STRIP, H), H)
            chunk_width = W
            offsets, sizes = STRIP_OFFSETS, STRIP_BYTES
        if min(H, W, self.chunk_height, chunk_width) < 1 or not {offsets, sizes} <= set(self.tags):
            raise DataError(f"{path}: is damaged (it does not say where its pixels are)")
        self.offsets, self.sizes = self.tags[offsets][1], self.tags[sizes][1]
        self.planes, self.bands = (C, 1) if header.planar else (1, C)  # `bands` of each plane
        self.rows_of_chunks = -(-H // self.chunk_height)  # in each plane
        self.columns_of_chunks = -(-W // chunk_width)
        self.uncompressed_strips = header.compression == "none" and not header.tiled
        self.recent: dict[int, np.ndarray] = {}  # row of chunks -> its pixels, from the last read
        self.check_chunks()

    def check_chunks(self) -> None:
        """DataError unless every chunk is listed and lies completely inside the file."""
        H, W, path = *self.shape[:2], self.path
        expected = self.planes * self.rows_of_chunks * self.columns_of_chunks
        if not len(self.offsets) == len(self.sizes) == expected:
            found = min(len(self.offsets), len(self.sizes))
            raise DataError(f"{path}: is damaged ({found} strips or tiles, {expected} expected)")
        end = max(a + b for a, b in zip(self.offsets, self.sizes, strict=True))
        if end > (length := os.path.getsize(path)):
            raise DataError(f"{path}: is truncated ({end - length:,} bytes are missing)")
        if 0 in self.sizes:
            raise DataError(f"{path}: has strips or tiles that were never written")
        if self.uncompressed_strips:
            for number, size in enumerate(self.sizes):
                rows = min(self.chunk_height, H - number % self.rows_of_chunks * self.chunk_height)
                if size < rows * W * self.bands:
                    raise DataError(f"{path}: is damaged (strip {number} is too short)")

    def read(self, top: int, bottom: int) -> np.ndarray:
        with data_errors(self.path), open(self.path, "rb") as file:
            if self.uncompressed_strips:
                return self.read_uncompressed(file, top, bottom)
            wanted = range(top // self.chunk_height, -(-bottom // self.chunk_height))
            if missing := [i for i in wanted if i not in self.recent]:
                decoded = self.decode(file, missing[0], missing[-1] + 1)
                for i in range(missing[0], missing[-1] + 1):
                    begin = (i - missing[0]) * self.chunk_height
                    self.recent[i] = decoded[begin : begin + self.chunk_height]
            self.recent = {i: self.recent[i] for i in wanted}
            parts = [
                rows[max(0, top - i * self.chunk_height) : bottom - i * self.chunk_height]
                for i, rows in self.recent.items()
            ]
            return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), np.uint8)

    def read_uncompressed(self, file, top: int, bottom: int) -> np.ndarray:
        """These rows, from the bytes of the uncompressed strips."""
        H, W, C = self.shape
        line = W * self.bands
        planes = np.empty((self.planes, bottom - top, line), np.uint8)
        for plane, rows in enumerate(planes):
            row = top
            while row < bottom:
                strip, skip = divmod(row, self.chunk_height)
                stop = min(bottom, (strip + 1) * self.chunk_height)
                number = plane * self.rows_of_chunks + strip
                data = self.fetch(file, self.offsets[number] + skip * line, (stop - row) * line)
                rows[row - top : stop - top] = np.frombuffer(data, np.uint8).reshape(-1, line)
                row = stop
        return join_planes(planes.reshape(self.planes, bottom - top, W, self.bands))

    def decode(self, file, begin: int, end: int) -> np.ndarray:
        """The pixels of rows begin..end-1 of chunks, (rows, W, C), decoded by Pillow."""
        rows = min(self.shape[0], end * self.chunk_height) - begin * self.chunk_height
        planes = []
        for plane in range(self.planes):
            first_row = plane * self.rows_of_chunks
            numbers = range(
                (first_row + begin) * self.columns_of_chunks,
                (first_row + end) * self.columns_of_chunks,
            )
            chunks = [self.fetch(file, self.offsets[i], self.sizes[i]) for i in numbers]
            with Image.open(BytesIO(self.wrap_as_tiff(rows, chunks)), formats=("TIFF",)) as image:
                image.load()
                planes.append(np.asarray(image).reshape(rows, self.shape[1], self.bands))
        return join_planes(planes)

    def fetch(self, file, offset: int, size: int) -> bytes:
        file.seek(offset)
        data = file.read(size)
        if len(data) != size:
            raise DataError(f"{self.path}: was cut off while it was being read")
        return data

    def wrap_as_tiff(self, rows: int, chunks: list[bytes]) -> bytes:
        """A complete TIFF file of `rows` rows that consists of these chunks."""
        offsets, position = [], 8
        for chunk in chunks:
            offsets.append(position)
            position += len(chunk)
        copied = (COMPRESSION, PREDICTOR, JPEG_TABLES, SUBSAMPLING, TILE_WIDTH, TILE_HEIGHT)
        tags = {tag: self.tags[tag] for tag in copied if tag in self.tags}
        photometric = 1 if self.bands == 1 else 2  # grey or RGB
        if first_value(self.tags, PHOTOMETRIC, 1) == 6:
            photometric = 6  # YCbCr
        places = (TILE_OFFSETS, TILE_BYTES) if self.header.tiled else (STRIP_OFFSETS, STRIP_BYTES)
        tags |= {
            WIDTH: (4, (self.shape[1],)),
            HEIGHT: (4, (rows,)),
            BITS: (3, (8,) * self.bands),
            PHOTOMETRIC: (3, (photometric,)),
            BANDS: (3, (self.bands,)),
            places[0]: (4, tuple(offsets)),
            places[1]: (4, tuple(map(len, chunks))),
        }
        if not self.header.tiled:
            tags[ROWS_PER_STRIP] = (4, (self.chunk_height,))
        if self.bands == 4:
            tags[EXTRA_BANDS] = (3, (2,))  # Pillow drops a fourth band unless it is transparency
        padding = b"\0" * (position % 2)
        body = b"".join([*chunks, padding])
        return tiff_file_header(8 + len(body)) + body + tiff_directory(tags, 8 + len(body))


SIZES = {1: ("B", 1), 2: ("s", 1), 3: ("H", 2), 4: ("I", 4), 7: ("s", 1), 12: ("d", 8)}


def tiff_file_header(directory_offset: int) -> bytes:
    return struct.pack("<2sHI", b"II", 42, directory_offset)


def tiff_directory(tags: Tags, offset: int) -> bytes:
    """A TIFF directory for byte `offset` of a file, followed by the values longer than 4 bytes."""
    table, values = [], b""
    after = offset + 2 + 12 * len(tags) + 4
    for tag, (kind, entry) in sorted(tags.items()):
        letter, size = SIZES[kind]
        data = entry if isinstance(entry, bytes) else struct.pack(f"<{len(entry)}{letter}", *entry)
        count, place = len(data) // size, data
        if len(data) > 4:
            place = struct.pack("<I", after + len(values))
            values += data + b"\0" * (len(data) % 2)
        table.append(struct.pack("<HHI4s", tag, kind, count, place))
    return struct.pack("<H", len(tags)) + b"".join(table) + bytes(4) + values


def join_planes(planes) -> np.ndarray:
    """Planes (rows, W, bands) concatenated along the bands."""
    return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=-1)


def open_8bit_rows(path: Path) -> tuple[Header, Rows]:
    """The rows of any image of unsigned 8-bit values; DataError for other values."""
    found = header(path)
    palette_png = found.format == "PNG" and found.mode == "P"  # fewer bits are the same indices
    if found.bits != 8 and not palette_png:
        bits = f"{found.bits} bit{'s' if found.bits > 1 else ''}"
        raise DataError(f"{path}: has {bits} per band; convert it to 8 bits first")
    if found.sample != "unsigned":
        raise DataError(f"{path}: has {found.sample} values; convert them to 0..255 first")
    if found.format != "TIFF":
        return found, WholeRows(path, found)
    if found.orientation != 1:
        raise DataError(
            f"{path}: is stored turned (orientation {found.orientation}); turn it first"
        )
    return found, TiffRows(path, found)


def open_rows(path: Path) -> Rows:
    """The rows of an image of three bands, or of four, the fourth infrared.

    Raises DataError for other bands, bits or values, for transparency, and for a damaged or a
    truncated file. Of a PNG or JPEG the damage shows only at the first read.
    """
    found, rows = open_8bit_rows(path)
    if found.mode == "RGBA":
        hint = " (if it is infrared: gdal_translate -co ALPHA=NO)" if found.format == "TIFF" else ""
        raise DataError(f"{path}: is RGBA, not RGB; remove the transparency first{hint}")
    if found.bands not in (1, 3, 4):
        raise DataError(f"{path}: has {found.bands} bands; an image has 3, or 4 with infrared")
    if found.mode not in ("RGB", "RGBX"):
        raise DataError(f"{path}: is {found.mode}, not RGB; convert it to three bands of 8 bits")
    return rows


def read_image(path: Path) -> np.ndarray:
    """All rows of `open_rows`: (H, W, C) uint8, C = 3, or 4 with infrared."""
    rows = open_rows(path)
    return rows.read(0, rows.shape[0])


def read_indices(path: Path) -> np.ndarray:
    """One band whose values are class indices (grey or palette), (H, W) uint8."""
    found, rows = open_8bit_rows(path)
    if found.mode not in ("L", "P"):
        raise DataError(f"{path}: is {found.mode}; a mask has one band, its values class indices")
    return rows.read(0, rows.shape[0])[..., 0]
