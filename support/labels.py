"""Label files -> classes. What is no class is counted and said, and never becomes class 0.

    reader = LabelReader(path, found.classes, found.encoding)
    for top in range(0, reader.shape[0], ROWS): classes = reader.read(top, top + ROWS)  # (rows, W)
    reader.check(MAX_UNKNOWN)                           # DataError, if they are not to be believed

Every ISPRS colour is a corner of the RGB cube, so thresholding each band at 127 and looking up the
corner decodes also the tiles damaged by lossy compression (Potsdam 4_12, 24,850 colours) or painted
252 for 255 (6_7). Two things keep this from reading sense into a picture that is no label:

- A colour is of no class when its corner is none's, or when one of its bands is farther than FAR
  from its corner, so that nobody can say which side it belongs to. Such pixels are ignored, and
  more than MAX_UNKNOWN of a label are an error.
- In a label most pixels lie close to a corner, however it was compressed. Where more than
  MAX_BLURRED of them are farther than BLURRED away, it is a photograph or an overlay.

The numbers: a made-up label of 6000 x 6000 saved as a JPEG of quality 90 has 24,147 colours, about
as many as 4_12; 0.004 % of its pixels are farther than 112 away and 4.5 % farther than 32; at
quality 75, 0.04 % and 4.4 %. Of a real aerial photograph 10 % and 99.9 %, of one under its label at
80 % opacity 0 % and 88 %. (At 85 % it passes, and decodes to the label.)

Letters: H W pixels, K classes.
"""

from pathlib import Path

import numpy as np

from support.layouts import IGNORE, Classes, LabelEncoding
from support.raster import DataError, open_rows, read_indices

FAR, MAX_UNKNOWN = 112, 0.001
BLURRED, MAX_BLURRED = 32, 0.2
UNKNOWN = IGNORE - 1  # in a decoded label, before it is given away: the colour of no class
ROWS = 256  # decoded at a time, a multiple of CELL
CELL = 64  # side in pixels of the squares in which classes are counted


def decode_colours(rgb: np.ndarray, colours) -> np.ndarray:
    """Label colours (H, W, 3) -> classes (H, W); UNKNOWN where the colour is of no class.

    Black is the eroded boundary: IGNORE.
    """
    corner = np.array([4, 2, 1], np.uint8)
    table = np.full(8, UNKNOWN, np.uint8)
    table[0] = IGNORE
    for index, colour in enumerate(colours):
        table[(np.array(colour) > 127) @ corner] = index
    bright = (rgb > 127).view(np.uint8)
    label = table[bright @ corner]
    label[far_from_corners(rgb, FAR)] = UNKNOWN
    return label


def far_from_corners(rgb: np.ndarray, distance: int) -> np.ndarray:
    """Where some band is farther than `distance` from both 0 and 255, (H, W) bool."""
    middle = (rgb > distance) & (rgb < 255 - distance)
    return middle[..., 0] | middle[..., 1] | middle[..., 2]  # 8x any()


def encode_colours(label: np.ndarray, colours) -> np.ndarray:
    """Classes (H, W) -> colours (H, W, 3); IGNORE becomes black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    return table[label]


class LabelReader:
    """One label file, read by rows. shape (H, W); counts what it meets on the way."""

    def __init__(self, path: Path, classes: Classes, encoding: LabelEncoding):
        self.path, self.classes, self.encoding = path, classes, encoding
        if encoding.coloured:
            self.rows = open_rows(path)
            if self.rows.shape[2] != 3:
                raise DataError(f"{path}: has {self.rows.shape[2]} bands; a label has three")
        else:
            self.rows = read_indices(path)
        self.shape = self.rows.shape[:2]
        self.unknown, self.blurred = 0, 0  # pixels
        self.values = np.zeros(256, np.int64)  # pixels of each index that is no class

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Rows top..bottom-1 as (rows, W) uint8: 0..K-1, IGNORE, or UNKNOWN."""
        rows = self.rows[top:bottom]
        if self.encoding.coloured:
            label = decode_colours(rows, self.classes.colours)
            self.unknown += int((label == UNKNOWN).sum())
            self.blurred += int(far_from_corners(rows, BLURRED).sum())
            return label
        first, last = self.encoding.first, self.encoding.first + len(self.classes.names) - 1
        counts = rows != self.encoding.ignore
        wrong = rows[counts & ((rows < first) | (rows > last))]
        self.values += np.bincount(wrong, minlength=256)
        return np.where(counts, rows - np.uint8(first), np.uint8(IGNORE))

    def check(self, max_unknown: float) -> None:
        """After the last row: DataError when the file is not to be believed."""
        if self.values.any():
            first, last = self.encoding.first, self.encoding.first + len(self.classes.names) - 1
            raise DataError(
                f"{self.path}: has the value {self.values.nonzero()[0][0]} at {self.values.sum()} "
                f"pixels, but the {len(self.classes.names)} classes are {first}..{last} and "
                f"{self.encoding.ignore} is ignored"
            )
        pixels = self.shape[0] * self.shape[1]
        if self.blurred > max(MAX_BLURRED, max_unknown) * pixels:
            raise DataError(
                f"{self.path}: {self.blurred / pixels:.0%} of it is far from every class's colour; "
                f"it looks like a photograph or an overlay, not like a label"
            )
        if self.unknown > max_unknown * pixels:
            share = self.unknown / pixels
            raise DataError(
                f"{self.path}: {self.unknown} pixels ({share:.2%}) have a colour of no class; "
                f"--max-unknown {round_up_share(share)} would ignore them"
            )


def round_up_share(share: float) -> float:
    """Up to the next thousandth, for an option that is to allow it."""
    return np.ceil(share * 1000 + 1e-9).item() / 1000


def count_cells(label: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels of each class, and of UNKNOWN at K, in squares of CELL: (., ., K + 1) int32."""
    H, W = label.shape
    down, across, K = -(-H // CELL), -(-W // CELL), num_classes
    column = np.zeros(256, np.int32) + K + 1  # what is ignored is counted too, and cut off
    column[: K + 1] = range(K + 1)
    column[UNKNOWN] = K
    offset = np.arange(W, dtype=np.int32) // CELL * (K + 2)
    counts = np.empty((down, across, K + 2), np.int32)
    for row in range(down):
        index = column[label[row * CELL : (row + 1) * CELL]] + offset
        counts[row] = np.bincount(index.ravel(), minlength=counts[row].size).reshape(across, -1)
    return counts[..., : K + 1]
