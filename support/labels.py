"""Label files -> classes. Colours and values of no class are counted and never become class 0.

    reader = LabelReader(path, files.classes, files.encoding)
    for top in range(0, reader.shape[0], ROWS): classes = reader.read(top, top + ROWS)  # (rows, W)
    reader.check(MAX_UNKNOWN)                           # DataError if the file is no valid label

Every ISPRS colour is a corner of the RGB cube. So each band is thresholded at 127, and the corner
is looked up. This also decodes the tiles that lossy compression has damaged (Potsdam 4_12 has
24,850 colours) or that were painted 252 instead of 255 (6_7). Two checks refuse pictures that are
no labels:

- A colour has no class when no class has its corner, or when one of its bands is farther than FAR
  from the corner, in the middle between two of them. Such pixels are ignored. More than MAX_UNKNOWN
  of them in one label are an error.
- In a label most pixels lie close to a corner, even after lossy compression. A file in which more
  than MAX_BLURRED of the pixels are farther than BLURRED away is a photograph or an overlay.

The thresholds were measured as the share of pixels far from every corner:

    file                                                farther than 112    farther than 32
    synthetic label 6000 x 6000, JPEG of quality 90            0.004 %              4.5 %
    the same, quality 75                                       0.04 %               4.4 %
    aerial photograph                                         10 %                 99.9 %
    aerial photograph under its label at 80 % opacity          0 %                 88 %

The label of quality 90 has 24,147 colours, about as many as 4_12. An overlay at 85 % opacity passes
the check, and decodes to the label.

Letters: H W pixels, K classes.
"""

from pathlib import Path

import numpy as np

from support.layouts import IGNORE, Classes, LabelEncoding
from support.raster import DataError, open_rows, read_indices

FAR, MAX_UNKNOWN = 112, 0.001
BLURRED, MAX_BLURRED = 32, 0.2
UNKNOWN = IGNORE - 1  # what LabelReader returns for a colour of no class; IGNORE in a Scene
ROWS = 256  # decoded at a time, a multiple of CELL
CELL = 64  # side in pixels of the squares in which classes are counted


def decode_colours(rgb: np.ndarray, colours) -> np.ndarray:
    """Label colours (H, W, 3) -> classes (H, W); UNKNOWN where the colour has no class.

    Black marks the eroded boundary and becomes IGNORE.
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
    """Where a band is farther than `distance` from both 0 and 255, (H, W) bool."""
    middle = (rgb > distance) & (rgb < 255 - distance)
    return middle[..., 0] | middle[..., 1] | middle[..., 2]  # 8x any()


def encode_colours(label: np.ndarray, colours) -> np.ndarray:
    """Classes (H, W) -> colours (H, W, 3); IGNORE becomes black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    return table[label]


class LabelReader:
    """One label file, read by rows, of shape (H, W). It counts the pixels that have no class."""

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
        self.wrong_values = np.zeros(256, np.int64)  # pixels of each index that is no class

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Rows top..bottom-1 as (rows, W) uint8: 0..K-1, IGNORE, or UNKNOWN."""
        rows = self.rows[top:bottom]
        if self.encoding.coloured:
            label = decode_colours(rows, self.classes.colours)
            self.unknown += int((label == UNKNOWN).sum())
            self.blurred += int(far_from_corners(rows, BLURRED).sum())
            return label
        first, last = (
            self.encoding.first_index,
            self.encoding.first_index + len(self.classes.names) - 1,
        )
        valid = rows != self.encoding.ignore_index
        wrong = rows[valid & ((rows < first) | (rows > last))]
        self.wrong_values += np.bincount(wrong, minlength=256)
        return np.where(valid, rows - np.uint8(first), np.uint8(IGNORE))

    def check(self, max_unknown: float) -> None:
        """After the last row: DataError when the file is no valid label."""
        if self.wrong_values.any():
            first, last = (
                self.encoding.first_index,
                self.encoding.first_index + len(self.classes.names) - 1,
            )
            raise DataError(
                f"{self.path}: has the value {self.wrong_values.nonzero()[0][0]} at "
                f"{self.wrong_values.sum()} pixels, but the {len(self.classes.names)} classes are "
                f"{first}..{last} and {self.encoding.ignore_index} is ignored"
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
    """Up to the next thousandth: a value for --max-unknown that is large enough."""
    return np.ceil(share * 1000 + 1e-9).item() / 1000


def count_cells(label: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels of each class, and of UNKNOWN at K, in squares of CELL: (., ., K + 1) int32."""
    (H, W), K = label.shape, num_classes
    rows, columns = -(-H // CELL), -(-W // CELL)  # of squares
    bin_of = np.full(256, K + 1, np.int32)  # ignored pixels have a bin, which is not returned
    bin_of[: K + 1] = range(K + 1)
    bin_of[UNKNOWN] = K
    offset = np.arange(W, dtype=np.int32) // CELL * (K + 2)
    counts = np.empty((rows, columns, K + 2), np.int32)
    for row in range(rows):
        index = bin_of[label[row * CELL : (row + 1) * CELL]] + offset
        counts[row] = np.bincount(index.ravel(), minlength=counts[row].size).reshape(columns, -1)
    return counts[..., : K + 1]
