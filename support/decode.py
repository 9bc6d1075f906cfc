"""The files of a scene, decoded, each at most once if there is a cache.

    decoder = Decoder(files.classes, files.encoding, Cache(folder), MAX_UNKNOWN)
    rows, pixels = decoder.image(tile.image)            # the file, and its pixels (H, W, C)
    label = decoder.label(tile.label, tile.image, rows) # label.pixels (H, W), label.cells

Letters: H W pixels, C channels, K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.cache import Cache, MappedArray, NoCache
from support.images import ImageRows, open_rows
from support.labels import ROWS, UNKNOWN, LabelReader, count_cells
from support.layouts import IGNORE, Classes, LabelEncoding
from support.place import misplaced
from support.raster import DataError
from support.stretch import Stretch

Pixels = np.ndarray | MappedArray


class DecodedLabel(NamedTuple):
    pixels: Pixels | None = None  # (H, W) uint8, 0..K-1 or IGNORE
    cells: np.ndarray | None = None  # pixels of each class in squares of CELL, (., ., K)
    notes: tuple[str, ...] = ()  # what the user should know


@dataclass
class Decoder:
    classes: Classes
    encoding: LabelEncoding
    cache: Cache | NoCache
    max_unknown: float  # share of a label's pixels that may have a colour of no class
    stretch: Stretch | None = None  # of images of 16 bits
    decoded: int = 0  # pixels of labels that were not in the cache
    no_data: int = 0  # those of them where the image has no data

    def image(self, path: Path) -> tuple[ImageRows, Pixels]:
        """The file, and its pixels (H, W, C) uint8."""
        rows = open_rows(path, self.stretch)
        name = self.cache.name(path, f"image {self.stretch}" if self.stretch else "image")
        image = self.cache.find(name)
        if image is None:
            image = self.cache.store(name, rows.shape, np.uint8, row_blocks(rows))
        return rows, image

    def label(self, path: Path | None, image_path: Path, image: ImageRows) -> DecodedLabel:
        """The classes of a label file; DataError unless it is as large as the image, or when the
        image's transparency looks like infrared.

        They are ignored where the image has no data.
        """
        if path is None:
            return DecodedLabel()
        how = repr((self.classes, self.encoding, self.max_unknown))
        if image.no_data.declared:
            how += self.cache.name(image_path, image.no_data.stamp())
        name = self.cache.name(path, how)
        pixels, cells = self.cache.find(f"{name}.label"), self.cache.find(f"{name}.cells")
        if pixels is None or cells is None:
            reader = LabelReader(path, self.classes, self.encoding, image)
            check_size(reader.shape, image.shape, path, image_path)  # before the work
            if sentence := misplaced(path, image_path):
                raise DataError(sentence)
            pixels, cells = self.decode_label(reader, name, image_path)
        check_size(pixels.shape, image.shape, path, image_path)
        K, notes = len(self.classes.names), ()
        if unknown := cells[..., K].sum():
            notes = (f"{path}: {unknown} pixels have a colour of no class; they are ignored",)
        return DecodedLabel(pixels, np.array(cells[..., :K]), notes)

    def decode_label(
        self, reader: LabelReader, name: str, image_path: Path
    ) -> tuple[Pixels, Pixels]:
        """The classes (H, W), and how many of each and of UNKNOWN lie in squares of CELL."""
        K, counts = len(self.classes.names), []

        def blocks():
            for rows in row_blocks(reader):
                counts.append(count_cells(rows, K))
                rows[rows == UNKNOWN] = IGNORE
                yield rows
            reader.check(self.max_unknown)  # before the label gets its name in the cache
            if doubt := reader.image.no_data.doubt():
                raise DataError(f"{image_path}: {doubt}")

        pixels = self.cache.store(f"{name}.label", reader.shape, np.uint8, blocks())
        cells = np.concatenate(counts)
        self.decoded += pixels.size
        self.no_data += reader.no_data
        return pixels, self.cache.store(f"{name}.cells", cells.shape, cells.dtype, [cells])


def row_blocks(source) -> Iterator[np.ndarray]:
    """An image or a label from top to bottom, ROWS at a time, to keep the decoding memory small."""
    for top in range(0, source.shape[0], ROWS):
        yield source.read(top, min(top + ROWS, source.shape[0]))


def check_size(label, image, label_path: Path, image_path: Path) -> None:
    if label != image[:2]:
        raise DataError(
            f"{label_path}: is {label[1]} x {label[0]} pixels, but its image {image_path} "
            f"{image[1]} x {image[0]}"
        )
