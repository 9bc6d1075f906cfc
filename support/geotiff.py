"""Maps written row by row, with the georeference of the image they were made from.

    with create("map.tif", (H, W), colours, georeference("scene.tif")) as file:
        file.append(rows)                       # (any number, W) uint8, from top to bottom

Only a few blocks of rows are in memory at a time.
"""

import math
import os
import struct
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from support.checkpoint import atomic_write
from support.place import Georeference, save_side_files
from support.raster import (
    BANDS,
    BITS,
    COMPRESSION,
    GDAL_NO_DATA,
    HEIGHT,
    PALETTE,
    PHOTOMETRIC,
    ROWS_PER_STRIP,
    STRIP_BYTES,
    STRIP_OFFSETS,
    WIDTH,
    DataError,
    Tags,
)
from support.tiff import tiff_directory, tiff_file_header


@contextmanager
def create(
    path: Path,
    shape,
    colours=None,
    place: Georeference | None = None,
    no_data: int | None = None,
):
    """In a `with` block, a Writer of a new .tif or .png of 8 bits, shape (H, W); a .png also
    (H, W, 3) or (H, W, 4).

    With `colours` it is a palette image, without them a grey one. It gets the georeference `place`.
    `no_data` is declared as the value of pixels without data.
    """
    kind = {".tif": TiffWriter, ".png": PngWriter}[Path(path).suffix]
    place = place or Georeference({}, {})
    with atomic_write(path) as file:
        writer = kind(file, path, shape, colours, place.tags, no_data)
        try:
            yield writer
            if writer.rows != shape[0]:
                raise ValueError(f"{path}: {writer.rows} of {shape[0]} rows were written")
            writer.finish()
        finally:
            writer.threads.shutdown(cancel_futures=True)
        save_side_files(place, path)


BLOCK_SIZE = 2**18  # bytes that are compressed at a time
THREADS = min(8, os.cpu_count() or 1)  # of each writer; zlib releases the interpreter's lock


class Writer:
    """Writes an image row by row: `append` takes the rows from top to bottom.

    Rows are compressed in blocks, by threads, and written in their order. What differs between the
    kinds of files: `start`; `compress` (rows -> bytes, and the rows as they were compressed), in a
    thread; `write` (these two); `end`.
    """

    def __init__(self, file, path: Path, shape, colours, tags: Tags, no_data: int | None):
        self.file, self.path, self.shape, self.colours, self.tags = file, path, shape, colours, tags
        self.no_data = no_data
        self.height, self.width = shape[:2]
        self.line = math.prod(shape[1:])  # bytes of a row
        self.rows_per_block = max(1, BLOCK_SIZE // self.line)
        self.rows = 0  # appended so far
        self.waiting = np.empty((0, self.line), np.uint8)  # rows of a block that is not complete
        self.compressed: deque[Future] = deque()  # blocks that are not yet written
        self.threads = ThreadPoolExecutor(THREADS, "compress")
        self.start()

    def append(self, rows: np.ndarray) -> None:
        """The next rows, (any number, W) or (any number, W, 3 or 4) uint8."""
        if rows.dtype != np.uint8 or rows.shape[1:] != tuple(self.shape[1:]):
            expected = " x ".join(map(str, self.shape[1:]))
            raise ValueError(f"rows of {expected} bytes are expected, not {rows.shape}")
        self.rows += len(rows)
        self.waiting = np.concatenate([self.waiting, rows.reshape(-1, self.line)])
        while len(self.waiting) >= self.rows_per_block:
            self.hand_over(self.rows_per_block)

    def hand_over(self, count: int) -> None:
        """Give the first waiting rows to a thread, and write what came before the last few."""
        rows, self.waiting = np.split(self.waiting, [count])
        self.compressed.append(self.threads.submit(self.compress, rows))
        while len(self.compressed) > 2 * THREADS:
            self.write(*self.compressed.popleft().result())

    def finish(self) -> None:
        if len(self.waiting):
            self.hand_over(len(self.waiting))
        while self.compressed:
            self.write(*self.compressed.popleft().result())
        self.end()


class TiffWriter(Writer):
    """Strips of rows, each compressed with deflate; the directory comes last."""

    def start(self) -> None:
        if self.height * self.width >= 2**32 - 2**26:  # noise grows a little when it is deflated
            raise DataError(f"{self.path}: would not fit into the 4 GiB of a TIFF")
        self.offsets, self.sizes = [], []
        self.file.write(tiff_file_header(0))

    def compress(self, rows: np.ndarray) -> tuple[bytes, np.ndarray]:
        return zlib.compress(rows), rows

    def write(self, data: bytes, rows: np.ndarray) -> None:
        self.offsets.append(self.file.tell())
        self.sizes.append(self.file.write(data))

    def end(self) -> None:
        tags = self.tags | {
            WIDTH: (4, (self.width,)),
            HEIGHT: (4, (self.height,)),
            BITS: (3, (8,)),
            COMPRESSION: (3, (8,)),
            PHOTOMETRIC: (3, (3 if self.colours else 1,)),
            BANDS: (3, (1,)),
            ROWS_PER_STRIP: (4, (self.rows_per_block,)),
            STRIP_OFFSETS: (4, tuple(self.offsets)),
            STRIP_BYTES: (4, tuple(self.sizes)),
        }
        if self.no_data is not None:
            tags[GDAL_NO_DATA] = (2, b"%d\0" % self.no_data)
        if self.colours:
            palette = np.zeros((256, 3), np.uint16)
            palette[: len(self.colours)] = self.colours
            values = 257 * palette.T.ravel()  # all reds, all greens, all blues, in 16 bits
            tags[PALETTE] = (3, tuple(values.tolist()))
        self.file.write(b"\0" * (self.file.tell() % 2))
        offset = self.file.tell()
        self.file.write(tiff_directory(tags, offset))
        self.file.seek(0)
        self.file.write(tiff_file_header(offset))


class PngWriter(Writer):
    """One deflate stream. A block of rows is a part of it that ends at a byte, and a PNG chunk.

    Each line begins with its filter: 0, the bytes themselves, for indices and grey; 1, differences
    to the pixel before, for colours, which are pictures to look at and compressed least.
    """

    def start(self) -> None:
        self.bands = self.shape[2] if len(self.shape) == 3 else 0  # 0: indices or grey
        self.checksum = zlib.adler32(b"")
        self.file.write(b"\x89PNG\r\n\x1a\n")
        kind = {3: 2, 4: 6}.get(self.bands, 3 if self.colours else 0)
        sizes = struct.pack(">IIBBBBB", self.width, self.height, 8, kind, 0, 0, 0)
        self.write_chunk(b"IHDR", sizes)
        if self.colours:
            palette = np.array(self.colours, np.uint8)
            if self.no_data is not None:  # an entry for it, transparent below
                palette = np.pad(palette, ((0, self.no_data + 1 - len(palette)), (0, 0)))
            self.write_chunk(b"PLTE", palette.tobytes())
        if self.no_data is not None:
            opaque = b"\xff" * self.no_data  # a byte for each entry of the palette
            value = opaque + b"\0" if self.colours else struct.pack(">H", self.no_data)
            self.write_chunk(b"tRNS", value)
        self.write_chunk(b"IDAT", b"\x78\x01")  # a deflate stream begins

    def compress(self, rows: np.ndarray) -> tuple[bytes, np.ndarray]:
        lines = np.pad(rows, ((0, 0), (1, 0)))
        if self.bands:
            lines[:, 0] = 1
            lines[:, self.bands + 1 :] -= rows[:, : -self.bands]
        deflate = zlib.compressobj(1 if self.bands else 6, wbits=-15)
        return deflate.compress(lines) + deflate.flush(zlib.Z_SYNC_FLUSH), lines

    def write(self, data: bytes, lines: np.ndarray) -> None:
        self.checksum = zlib.adler32(lines, self.checksum)
        self.write_chunk(b"IDAT", data)

    def write_chunk(self, kind: bytes, data: bytes) -> None:
        check = struct.pack(">I", zlib.crc32(kind + data))
        self.file.write(struct.pack(">I", len(data)) + kind + data + check)

    def end(self) -> None:
        last_block = zlib.compressobj(wbits=-15).flush()
        self.write_chunk(b"IDAT", last_block + struct.pack(">I", self.checksum))
        self.write_chunk(b"IEND", b"")
