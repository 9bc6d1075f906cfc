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

from collections import Counter
from pathlib import Path

import numpy as np

from support.images import open_rows
from support.layouts import IGNORE, Classes, LabelEncoding
from support.masks import NO_INDEX, MaskRows
from support.raster import DataError, Rows

FAR, MAX_UNKNOWN = 112, 0.001
BLURRED, MAX_BLURRED = 32, 0.2
UNKNOWN = IGNORE - 1  # what LabelReader returns for a colour of no class; IGNORE in a Scene
ROWS = 256  # decoded at a time, a multiple of CELL
MOST_COLOURS, MOST_SHOWN = 10_000, 8  # of unknown colours: counted, and shown in a message
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

    def __init__(
        self, path: Path, classes: Classes, encoding: LabelEncoding, image: Rows | None = None
    ):
        """image: what the label is of; where it has no data the label is ignored."""
        self.path, self.classes, self.encoding, self.image = path, classes, encoding, image
        if encoding.corners:
            self.rows = open_rows(path)
            self.decode, self.explain = self.decode_corners, self.unknown_corners
            if self.rows.shape[2] != 3:
                raise DataError(f"{path}: has {self.rows.shape[2]} bands; a label has three")
        else:
            self.rows = MaskRows(path)
            self.decode, self.explain = self.decode_indices, self.unknown_indices
            if self.rows.coloured:
                self.decode, self.explain = self.decode_exact, self.unknown_colours
        self.shape = self.rows.shape[:2]
        self.unknown, self.blurred, self.no_data = 0, 0, 0  # pixels
        self.others: Counter[tuple | int] = Counter()  # pixels of the commonest unknown colours
        self.class_of_index = self.index_table()
        self.check_palette()

    def index_table(self) -> np.ndarray:
        """The class of each index 0..255 and, at -1, of NO_INDEX: (257,) uint8."""
        table = np.full(257, UNKNOWN, np.uint8)
        declared = getattr(self.rows, "no_data", None)
        if declared is not None and declared in range(256):
            table[int(declared)] = IGNORE  # unless it is a class
        for k, value in enumerate(self.encoding.values):
            table[value] = k
        if self.encoding.ignore is not None:
            table[self.encoding.ignore] = IGNORE
        table[NO_INDEX] = IGNORE
        return table

    def check_palette(self) -> None:
        """DataError when an index is one class and the colour that its palette gives it another.

        Programs that make a PNG small write colours as a palette, in any order.
        """
        colours, palette = self.encoding.colours, getattr(self.rows, "palette", [])
        for k, value in enumerate(self.encoding.values):
            shown = palette[value] if value < len(palette) else None
            if shown in colours and colours[k] != shown:
                names, other = self.classes.names, colours.index(shown)
                raise DataError(
                    f"{self.path}: its value {value} is {names[k]}, but has the colour of "
                    f"{names[other]}; decode the colours: gdal_translate -expand rgb IN OUT.tif, "
                    f'or, if the values are right, take "colours" out of classes.json'
                )

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Rows top..bottom-1 as (rows, W) uint8: 0..K-1, IGNORE, or UNKNOWN."""
        rows = self.rows[top:bottom]
        label = self.decode(rows)
        valid = self.image.valid(top, bottom) if self.image else None
        far = far_from_corners(rows, BLURRED) if self.encoding.corners else np.zeros(1, bool)
        if valid is not None:
            label[~valid], far = IGNORE, far & valid
            self.no_data += valid.size - np.count_nonzero(valid)
        self.blurred += np.count_nonzero(far)
        unknown = label == UNKNOWN
        if found := np.count_nonzero(unknown):
            self.unknown += found
            if not self.encoding.corners and len(self.others) < MOST_COLOURS:
                values, pixels = np.unique(rows[unknown], axis=0, return_counts=True)
                keys = map(tuple, values.tolist()) if values.ndim == 2 else values.tolist()
                self.others.update(dict(zip(keys, pixels.tolist(), strict=True)))
        return label

    def decode_corners(self, rgb: np.ndarray) -> np.ndarray:
        return decode_colours(rgb, self.classes.colours)

    def decode_exact(self, rgb: np.ndarray) -> np.ndarray:
        """Colours (rows, W, 3) -> classes, each by exactly its own."""
        code = rgb.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
        label = np.full(code.shape, UNKNOWN, np.uint8)
        colours = [*enumerate(self.encoding.colours)]
        if self.encoding.ignore_colour:
            colours.append((IGNORE, self.encoding.ignore_colour))
        for k, (red, green, blue) in colours:
            label[code == (red << 16 | green << 8 | blue)] = k
        return label

    def decode_indices(self, indices: np.ndarray) -> np.ndarray:
        return self.class_of_index[indices]

    def check(self, max_unknown: float) -> None:
        """After the last row: DataError when the file is no valid label."""
        pixels = self.shape[0] * self.shape[1]
        if self.blurred > max(MAX_BLURRED, max_unknown) * pixels:
            raise DataError(
                f"{self.path}: {self.blurred / pixels:.0%} of it is far from every class's colour; "
                f"it looks like a photograph or an overlay, not like a label"
            )
        if self.explain == self.unknown_indices:
            max_unknown = 0
        elif not self.encoding.corners and max_unknown == MAX_UNKNOWN:
            max_unknown = 0  # the default is for lossy labels of ISPRS
        if self.unknown > max_unknown * pixels:
            raise DataError(f"{self.path}: {self.explain(self.unknown / pixels)}")

    def unknown_corners(self, share: float) -> str:
        return (
            f"{self.unknown} pixels ({share:.2%}) have a colour of no class; "
            f"--max-unknown {round_up_share(share)} would ignore them"
        )

    def unknown_colours(self, share: float) -> str:
        """With the colours, as lines to paste."""
        common = self.others.most_common(MOST_SHOWN)
        colours = ", ".join(str([*colour]) for colour, _ in common)
        shares = ", ".join(f"{count / self.unknown:.1%}" for _, count in common)
        if len(self.others) > MOST_SHOWN:
            colours += ", ..."
        why = "" if self.encoding.colours else " (it gives no colours)"
        return (
            f"{self.unknown} pixels ({share:.2%}) have a colour of no class of classes.json{why}: "
            f'"colours": [{colours}] ({shares}); give each class its own there, and "ignore" that '
            f"of pixels without a class"
        )

    def unknown_indices(self, share: float) -> str:
        values, ignore = self.encoding.values, self.encoding.ignore
        known = ", ".join(map(str, values))
        if values == tuple(range(values[0], values[-1] + 1)):
            known = f"{values[0]}..{values[-1]}"
        nothing = "nothing" if ignore is None else ignore
        return (
            f"has the value {self.others.most_common(1)[0][0]} at {self.unknown} pixels, but the "
            f"{len(values)} classes are {known} and {nothing} is ignored"
        )


def absent_classes(classes: Classes, encoding: LabelEncoding, pixels, ignored: int) -> str:
    """A sentence on classes that have none of the labelled `pixels` (K,), with the likely cause;
    "" when each has some."""
    absent = [k for k, count in enumerate(pixels) if not count]
    if not absent:
        return ""
    names = ", ".join(classes.names[k] for k in absent)
    share = ignored / max(1, sum(pixels) + ignored)
    if len(absent) > 1 or not ignored or encoding.ignore is None or encoding.corners:
        return f"no pixel is {names}; label some, or take it out of classes.json"
    values = [*encoding.values]
    values[absent[0]] = encoding.ignore
    return (
        f"no pixel is {names}; {encoding.ignore} is ignored here and is {share:.0%} of the pixels: "
        f'is it {names}? then write "values": {values}, "ignore": null in classes.json'
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
