"""TIFF files: rows of any layout, without decoding the rest; and directories, to write one.

    rows = TiffRows(path, header(path), read_tags(path))
    rows.read(0, 512)                           # (512, W, C) as stored: uint8, uint16, float32

A chunk is a strip or a tile. Those that hold the wanted rows are copied into a small TIFF in
memory, which Pillow decodes. This reads every compression that Pillow knows, separate planes and
BigTIFF, in the memory of those rows. Uncompressed strips are read directly from the file. What
Pillow would change or refuses (1, 16, 32 or 64 bits, five bands) is unpacked by Pillow as bytes,
and the bytes are taken apart here.

A chunk that was never written has offset and size 0. As in GDAL it holds the no-data value, or 0.

Letters: H W pixels, C channels.
"""

import os
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from support.raster import (
    BANDS,
    BITS,
    COMPRESSION,
    EXTRA_BANDS,
    FILL_ORDER,
    HEIGHT,
    JPEG_TABLES,
    PHOTOMETRIC,
    PREDICTOR,
    ROWS_PER_STRIP,
    STRIP_BYTES,
    STRIP_OFFSETS,
    SUBSAMPLING,
    TILE_BYTES,
    TILE_HEIGHT,
    TILE_OFFSETS,
    TILE_WIDTH,
    WIDTH,
    DataError,
    Header,
    Rows,
    Tags,
    data_errors,
    first_value,
)


class TiffRows(Rows):
    """The rows of a TIFF as they are stored. Decodes the chunks that hold them and remembers the
    last ones: windows that overlap need the same chunks twice in a row.
    """

    def __init__(self, path: Path, header: Header, tags: Tags, fill: float = 0):
        """fill: the value of chunks that were never written; 0 where no pixel can have it."""
        self.path, self.header, self.tags = path, header, tags
        H, W, C = self.shape = (header.height, header.width, header.bands)
        if header.compression.startswith("number") or first_value(tags, FILL_ORDER, 1) != 1:
            raise DataError(
                f"{path}: has compression {header.compression}, fill order "
                f"{first_value(tags, FILL_ORDER, 1)}; save it with LZW or deflate: "
                f"gdal_translate -co COMPRESS=DEFLATE IN.tif OUT.tif"
            )
        self.dtype = self.stored_dtype()
        self.fill = fill if self.dtype.kind == "f" or fits(fill, self.dtype) else 0
        if header.tiled:
            self.chunk_height = first_value(tags, TILE_HEIGHT, 0)
            self.chunk_width = first_value(tags, TILE_WIDTH, 0)
            offsets, sizes = TILE_OFFSETS, TILE_BYTES
        else:
            self.chunk_height = min(first_value(tags, ROWS_PER_STRIP, H), H)
            self.chunk_width = W
            offsets, sizes = STRIP_OFFSETS, STRIP_BYTES
        lengths = H, W, self.chunk_height, self.chunk_width
        if min(lengths) < 1 or not {offsets, sizes} <= set(tags):
            raise DataError(f"{path}: is damaged (it does not say where its pixels are)")
        self.offsets, self.sizes = tags[offsets][1], tags[sizes][1]
        self.planes, self.bands = (C, 1) if header.planar else (1, C)  # `bands` of each plane
        self.rows_of_chunks = -(-H // self.chunk_height)  # in each plane
        self.columns_of_chunks = -(-W // self.chunk_width)
        self.line = -(-self.chunk_width * self.bands * header.bits // 8)  # bytes of a chunk's row
        whole_bytes = header.bits % 8 == 0
        self.uncompressed_strips = (
            header.compression == "none" and not header.tiled and whole_bytes and all(self.sizes)
        )
        self.by_pillow = self.dtype == np.uint8 and whole_bytes and self.bands in (1, 3, 4)
        self.recent: dict[int, np.ndarray] = {}  # row of chunks -> its pixels, from the last read
        self.check_chunks()

    def stored_dtype(self) -> np.dtype:
        """Of the values; uint8 for values of less than 8 bits."""
        bits, sample = self.header.bits, self.header.sample
        each = set(self.tags[BITS][1]) if BITS in self.tags else {bits}
        kind = {"unsigned": "u", "signed": "i", "float": "f"}.get(sample)
        if bits in (1, 2, 4) and kind == "u" and len(each) == 1:
            return np.dtype(np.uint8)
        known = kind and bits in ((16, 32, 64) if kind == "f" else (8, 16, 32, 64))
        if self.header.compression == "JPEG":
            known = (bits, kind) == (8, "u")
        if not known or len(each) > 1:
            raise DataError(
                f"{self.path}: has {bits} bits per band with {sample} values; convert it to 8 "
                f"bits: gdal_translate -ot Byte -scale IN.tif OUT.tif"
            )
        return np.dtype(f"{kind}{bits // 8}")

    def check_chunks(self) -> None:
        """DataError unless every chunk is listed and lies completely inside the file."""
        H, path = self.shape[0], self.path
        expected = self.planes * self.rows_of_chunks * self.columns_of_chunks
        if not len(self.offsets) == len(self.sizes) == expected:
            found = min(len(self.offsets), len(self.sizes))
            raise DataError(f"{path}: is damaged ({found} strips or tiles, {expected} expected)")
        end = max(a + b for a, b in zip(self.offsets, self.sizes, strict=True))
        if end > (length := os.path.getsize(path)):
            raise DataError(f"{path}: is truncated ({end - length:,} bytes are missing)")
        if self.uncompressed_strips:
            for number, size in enumerate(self.sizes):
                rows = min(self.chunk_height, H - number % self.rows_of_chunks * self.chunk_height)
                if size < rows * self.line:
                    raise DataError(f"{path}: is damaged (strip {number} is too short)")

    def written(self, top: int, bottom: int) -> np.ndarray:
        """Where these rows lie in a chunk that was written, in any plane: (rows, W) bool."""
        grid = np.array(self.sizes).reshape(self.planes, self.rows_of_chunks, -1).any(axis=0)
        rows = grid[np.arange(top, bottom) // self.chunk_height]
        return rows[:, np.arange(self.shape[1]) // self.chunk_width]

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
            return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), self.dtype)

    def read_uncompressed(self, file, top: int, bottom: int) -> np.ndarray:
        """These rows, from the bytes of the uncompressed strips."""
        W, line = self.shape[1], self.line
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
        if self.dtype != np.uint8:
            planes = self.values(file, planes)
        return join_planes(planes.reshape(self.planes, bottom - top, W, self.bands))

    # --- Compressed chunks ---

    def decode(self, file, begin: int, end: int) -> np.ndarray:
        """The pixels of rows begin..end-1 of chunks, (rows, W, C)."""
        rows = min(self.shape[0], end * self.chunk_height) - begin * self.chunk_height
        planes = []
        for plane in range(self.planes):
            first = (plane * self.rows_of_chunks + begin) * self.columns_of_chunks
            numbers = range(first, first + (end - begin) * self.columns_of_chunks)
            written = [i for i in numbers if self.sizes[i]]
            chunks = [self.fetch(file, self.offsets[i], self.sizes[i]) for i in written]
            if self.columns_of_chunks == 1 and len(written) == len(numbers):
                planes.append(self.decode_stack(file, chunks, rows)[:, : self.shape[1]])
                continue
            grid = np.full(
                (len(numbers), self.chunk_height, self.chunk_width, self.bands),
                self.fill,
                self.dtype,
            )
            if chunks:
                high = len(chunks) * self.chunk_height
                if not self.header.tiled and written[-1] % self.rows_of_chunks == end - 1:
                    high += rows - (end - begin) * self.chunk_height  # the last strip may be lower
                pixels = self.decode_stack(file, chunks, high)
                for place, i in enumerate(written):
                    chunk = pixels[place * self.chunk_height : (place + 1) * self.chunk_height]
                    grid[i - first, : len(chunk)] = chunk
            grid = grid.reshape(end - begin, self.columns_of_chunks, *grid.shape[1:])
            grid = grid.swapaxes(1, 2).reshape((end - begin) * self.chunk_height, -1, self.bands)
            planes.append(grid[:rows, : self.shape[1]])
        return join_planes(planes)

    def decode_stack(self, file, chunks: list[bytes], rows: int) -> np.ndarray:
        """Chunks one below the other, `rows` rows in all, (rows, chunk width, bands)."""
        with Image.open(BytesIO(self.wrap_as_tiff(rows, chunks)), formats=("TIFF",)) as image:
            image.load()
            pixels = np.asarray(image)
        if not self.by_pillow:
            pixels = self.values(file, pixels.reshape(rows, self.line))
        return pixels.reshape(rows, -1, self.bands)[:, : self.chunk_width]

    def values(self, file, lines: np.ndarray) -> np.ndarray:
        """The values in lines of bytes, (..., bytes) uint8 -> (..., values)."""
        bits, bands = self.header.bits, self.bands
        predictor = first_value(self.tags, PREDICTOR, 1)
        if self.header.compression in ("none", "PackBits"):
            predictor = 1
        if bits < 8:
            each = np.unpackbits(lines, axis=-1).reshape(*lines.shape[:-1], -1, bits)
            weights = 1 << np.arange(bits)[::-1]
            values = (each * weights).sum(axis=-1).astype(np.uint8)
            return values[..., : self.chunk_width * bands]
        if predictor == 3:  # differences of bytes; first the highest bytes of a line, ...
            by_band = lines.reshape(*lines.shape[:-1], -1, bands)
            sums = by_band.cumsum(axis=-2, dtype=np.uint8)
            sums = sums.reshape(*lines.shape[:-1], bits // 8, -1).swapaxes(-1, -2)
            lines = np.ascontiguousarray(sums).reshape(lines.shape)
            return lines.view(self.dtype.newbyteorder(">")).astype(self.dtype)
        file.seek(0)
        order = ">" if file.read(2) == b"MM" else "<"
        values = np.ascontiguousarray(lines).view(self.dtype.newbyteorder(order))
        values = values.astype(self.dtype)
        if predictor == 2:
            unsigned = values.view(f"u{bits // 8}").reshape(*values.shape[:-1], -1, bands)
            sums = np.cumsum(unsigned, axis=-2, dtype=unsigned.dtype)
            values = sums.reshape(values.shape).view(self.dtype)
        return values

    def fetch(self, file, offset: int, size: int) -> bytes:
        file.seek(offset)
        data = file.read(size)
        if len(data) != size:
            raise DataError(f"{self.path}: was cut off while it was being read")
        return data

    def wrap_as_tiff(self, rows: int, chunks: list[bytes]) -> bytes:
        """A complete TIFF file of `rows` rows that consists of these chunks, one below the other.

        What Pillow does not read becomes a grey image of its bytes.
        """
        offsets, position = [], 8
        for chunk in chunks:
            offsets.append(position)
            position += len(chunk)
        copied = (COMPRESSION, PREDICTOR, JPEG_TABLES, SUBSAMPLING, TILE_WIDTH, TILE_HEIGHT)
        bands, width, tiled = self.bands, self.chunk_width, self.header.tiled
        if not self.by_pillow:
            copied, bands, width, tiled = (COMPRESSION,), 1, self.line, False
        tags = {tag: self.tags[tag] for tag in copied if tag in self.tags}
        photometric = 1 if bands == 1 else 2  # grey or RGB
        if first_value(self.tags, PHOTOMETRIC, 1) == 6:
            photometric = 6  # YCbCr
        places = (TILE_OFFSETS, TILE_BYTES) if tiled else (STRIP_OFFSETS, STRIP_BYTES)
        tags |= {
            WIDTH: (4, (width,)),
            HEIGHT: (4, (rows,)),
            BITS: (3, (8,) * bands),
            PHOTOMETRIC: (3, (photometric,)),
            BANDS: (3, (bands,)),
            places[0]: (4, tuple(offsets)),
            places[1]: (4, tuple(map(len, chunks))),
        }
        if not tiled:
            tags[ROWS_PER_STRIP] = (4, (self.chunk_height,))
        if bands == 4:
            tags[EXTRA_BANDS] = (3, (2,))  # Pillow drops a fourth band unless it is transparency
        padding = b"\0" * (position % 2)
        body = b"".join([*chunks, padding])
        return tiff_file_header(8 + len(body)) + body + tiff_directory(tags, 8 + len(body))


def fits(value: float | None, dtype: np.dtype) -> bool:
    """Whether a pixel of this dtype can have the value; nan equals nothing."""
    if value is None or value != value:
        return False
    if dtype.kind == "f":
        return True
    limits = np.iinfo(dtype)
    return float(value).is_integer() and limits.min <= value <= limits.max


def join_planes(planes) -> np.ndarray:
    """Planes (rows, W, bands) concatenated along the bands."""
    return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=-1)


# --- Writing ------------------------------------------------------------------------------------

SIZES = {1: ("B", 1), 2: ("s", 1), 3: ("H", 2), 4: ("I", 4), 7: ("s", 1), 12: ("d", 8)}
SIZES |= {6: ("b", 1), 8: ("h", 2), 9: ("i", 4), 11: ("f", 4), 16: ("Q", 8)}


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
