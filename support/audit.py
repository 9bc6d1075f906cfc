"""Is a data set fit to train on? A row per tile, what is wrong with it, and a verdict.

    python data.py audit potsdam --root /data/potsdam

Every file is decoded to its last row, a few rows at a time: a truncated TIFF opens like a whole
one. Beyond what loading refuses anyway (a missing label, 16 bits, a label of another size, an
overlay in its place, a value that is no class), the audit finds what trains without complaint and
is wrong: files of a set that are not there, a tile with nothing but ignored pixels, an image that
is a label, red and blue swapped.

Swapped bands leave nothing in a file that says so. What can honestly be told:

- ISPRS labels: swapped colours turn every building into clutter and every lawn into cars. A tile is
  suspected when cars cover more than low vegetation, and swapping them back brings its class shares
  closer to the published ones.
- ISPRS images, over all tiles: with infrared first, low vegetation is brighter in the first band
  than in the third; in Potsdam's RGB, tiled roofs make buildings redder than blue, and low
  vegetation is not bluer than red. (In a real piece of tile 2_10 buildings have 127, 96, 78 and low
  vegetation 50, 54, 48.)
- LoveDA and others: not at all. In two real images of LoveDA buildings are bluer than red.

Letters: H W pixels, C channels, K classes.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.labels import BLURRED, MAX_UNKNOWN, ROWS, UNKNOWN, LabelReader, far_from_corners
from support.layouts import BANDS, IGNORE, SplitFiles, Tile, find_split
from support.progress import Progress
from support.raster import DataError, header, open_rows

# Class shares of Potsdam's 38 tiles, in the order of its classes.
PUBLISHED = np.array([0.296, 0.257, 0.226, 0.155, 0.018, 0.048])
BUILDING, LOW, CAR, CLUTTER = 1, 2, 4, 5
SWAPPED = [0, CLUTTER, CAR, 3, LOW, BUILDING]  # what each class becomes without red for blue
CLEAR = 5  # grey values by which one band's mean has to exceed another's
CORNERS = 0.95  # of an image's pixels this close to corners of the colour cube: it is a label
EVERY = 4  # colours are compared at every fourth pixel of every fourth row


class Row(NamedTuple):
    """What was seen of one tile."""

    split: str
    tile: Tile
    image: str  # size, mode, bands and bits
    label: str
    pixels: np.ndarray  # of each class, ignored, of no class: (K + 2,)
    sums: np.ndarray  # of the image's values over each class: (K, C)
    counts: np.ndarray  # of the pixels in `sums`: (K,)
    faults: list[str]


class Audit(NamedTuple):
    data: str
    classes: tuple[str, ...]
    rows: list[Row]
    faults: list[str]  # training would be wrong
    notes: list[str]


def examine(
    data: str, root: Path, splits, tiles=(), bands: str | None = None, max_unknown=MAX_UNKNOWN
) -> Audit:
    """Everything about these splits. What is missing from `test` alone does not spoil training.

    Raises DataError when `root` is no folder.
    """
    if not Path(root).is_dir():
        raise DataError(f"{root}: no such folder (--root must be where {data} was unpacked)")
    rows, faults, notes, names = [], [], [], ()
    for split in splits:
        try:
            found = find_split(data, root, split, tiles, bands)
        except DataError as error:
            (notes if split == "test" else faults).append(str(error))
            continue
        names = found.classes.names
        faults += found.faults
        notes += found.notes
        (notes if split == "test" else faults).extend(found.gaps)
        with Progress(f"auditing {split}") as progress:
            for index, tile in enumerate(found.tiles):
                rows.append(examine_tile(split, tile, found, max_unknown))
                progress((index + 1) / len(found.tiles))
        of_split = [row for row in rows if row.split == split]
        faults += [fault for row in of_split for fault in row.faults]
        total = sum(row.pixels for row in of_split)[: len(names)]
        notes += [
            f"{split}: no pixel is {name}"
            for name, pixels in zip(names, total, strict=True)
            if total.any() and not pixels
        ]
    if data in ("potsdam", "vaihingen") and rows:
        faults += swapped_images(rows, found.bands)
    if len({row.sums.shape for row in rows if row.counts.any()}) > 1:
        faults.append(f"{root}: some images have {min(BANDS.values())} bands and some have more")
    faults = [*dict.fromkeys(faults)]  # a sentence may be due to several splits
    return Audit(data, names, rows, faults, [n for n in dict.fromkeys(notes) if n not in faults])


def examine_tile(split: str, tile: Tile, found: SplitFiles, max_unknown: float) -> Row:
    faults, K = [], len(found.classes.names)
    image = examine_image(tile.image, found.bands, faults)
    label, pixels = examine_label(tile.label, found, max_unknown, faults)
    if tile.eroded not in (None, tile.label) and split != "train":
        eroded, _ = examine_label(tile.eroded, found, max_unknown, faults)
        compare_sizes(tile.image, tile.eroded, faults)
    sums, counts = np.zeros((K, 1 if image is None else image.shape[2])), np.zeros(K, int)
    if label is not None:
        if not pixels[:K].any():
            faults.append(f"{tile.label}: every pixel is ignored, there is nothing to learn from")
        if found.encoding.coloured and (fault := swapped_label(tile.label, pixels[:K])):
            faults.append(fault)
        if compare_sizes(tile.image, tile.label, faults) and image is not None:
            for k in range(K):
                sums[k], counts[k] = image[label == k].sum(0, dtype=float), (label == k).sum()
    return Row(
        split,
        tile,
        describe_file(tile.image),
        describe_file(tile.label),
        pixels,
        sums,
        counts,
        faults,
    )


def describe_file(path: Path | None) -> str:
    """A file's own word on its pixels, for the table."""
    if path is None:
        return "missing"
    try:
        h = header(path)
    except DataError:
        return "unreadable"
    return f"{h.width} x {h.height} {h.mode} {h.bands} x {h.bits}"


def compare_sizes(image: Path, label: Path, faults: list[str]) -> bool:
    try:
        sizes = [f"{h.width} x {h.height}" for h in (header(label), header(image))]
    except DataError:  # said already
        return False
    if sizes[0] != sizes[1]:
        faults.append(f"{label}: is {sizes[0]} pixels, but its image {image} {sizes[1]}")
    return sizes[0] == sizes[1]


def examine_image(path: Path, bands: str, faults: list[str]) -> np.ndarray | None:
    """A small copy (H / EVERY, W / EVERY, C), if the file is a photograph to its end."""
    try:
        rows = open_rows(path)
        H, W, C = rows.shape
        if bands and C != BANDS[bands]:
            raise DataError(f"{path}: has {C} bands, but {bands} has {BANDS[bands]}")
        small = [rows.read(top, min(top + ROWS, H))[::EVERY, ::EVERY] for top in range(0, H, ROWS)]
        small = np.concatenate(small)
        if (small == small[0, 0]).all():
            raise DataError(f"{path}: all of it has one colour, {tuple(small[0, 0].tolist())}")
        if 1 - far_from_corners(small, BLURRED).mean() > CORNERS:
            raise DataError(f"{path}: has the colours of a label; it is no photograph")
    except DataError as error:
        faults.append(str(error))
        return None
    return small


def examine_label(path: Path | None, found: SplitFiles, max_unknown: float, faults: list[str]):
    """A small copy (H / EVERY, W / EVERY), if there is one, and the pixels of each class,
    ignored, and of no class (K + 2,)."""
    K = len(found.classes.names)
    counts = np.zeros(256, np.int64)
    small = []
    if path is not None:
        try:
            reader = LabelReader(path, found.classes, found.encoding)
            for top in range(0, reader.shape[0], ROWS):
                label = reader.read(top, min(top + ROWS, reader.shape[0]))
                counts += np.bincount(label.ravel(), minlength=256)
                small.append(label[::EVERY, ::EVERY])
            reader.check(max_unknown)
        except DataError as error:
            faults.append(str(error))
            small = []
    pixels = np.array([*counts[:K], counts[IGNORE], counts[UNKNOWN]])
    return (np.concatenate(small) if small else None), pixels


# --- Red and blue -------------------------------------------------------------------------------


def swapped_label(path: Path, pixels: np.ndarray) -> str | None:
    if not pixels.any():
        return None
    shares = pixels / pixels.sum()
    as_it_is, swapped = (abs(s - PUBLISHED).sum() for s in (shares, shares[SWAPPED]))
    if shares[CAR] <= shares[LOW] or as_it_is <= swapped:
        return None
    return (
        f"{path}: red and blue look swapped: {shares[CAR]:.0%} would be cars, {shares[LOW]:.0%} "
        f"low vegetation, {shares[CLUTTER]:.0%} clutter and {shares[BUILDING]:.0%} buildings"
    )


def swapped_images(rows: list[Row], bands: str) -> list[str]:
    """Over all tiles: one tile may have blue roofs or brown grass."""
    seen = [row for row in rows if row.counts[LOW] and row.counts[BUILDING]]
    if not seen:
        return []
    sums, counts = sum(row.sums for row in seen), sum(row.counts for row in seen)
    lawn, roof = (sums[k] / counts[k] for k in (LOW, BUILDING))
    if bands == "irrg" and lawn[2] > lawn[0] + CLEAR:
        what = f"low vegetation has {lawn[0]:.0f} in the first band and {lawn[2]:.0f} in the third"
    elif bands != "irrg" and roof[2] > roof[0] + CLEAR and lawn[2] >= lawn[0]:
        what = f"buildings are {roof[0]:.0f} in red and {roof[2]:.0f} in blue"
    else:
        return []
    return [f"{rows[0].tile.image.parent}: the first and third band look swapped: {what}"]


# --- Saying it ----------------------------------------------------------------------------------


def report(audit: Audit) -> int:
    """Print the table, the notes, the faults and the verdict -> the exit code, 1 when unfit."""
    if audit.rows:
        for line in table(audit):
            print(line)
    for kind, sentences in (("note", audit.notes), ("fault", audit.faults)):
        for sentence in sentences:
            print(f"{kind}: {sentence}")
    if audit.faults:
        print(f"\n{audit.data}: NOT fit to train on (faults: {len(audit.faults)})")
        return 1
    print(f"\n{audit.data}: fit to train on (tiles: {len(audit.rows)})")
    return 0


def table(audit: Audit) -> list[str]:
    """A line per tile and one per split; shares in per cent of the label's pixels."""
    columns = ("split", "tile", "image", "label", "eroded")
    shares = [name[:7] for name in audit.classes] + ["ignored", "unknown"]
    lines = [(columns, [f"{share:>7}" for share in shares])]
    for row in audit.rows:
        eroded = {None: "-", row.tile.label: "only"}.get(row.tile.eroded, "yes")
        texts = (row.split, row.tile.name, row.image, row.label, eroded)
        lines.append((texts, percent(row.pixels) + ["  WRONG"] * bool(row.faults)))
    for split in dict.fromkeys(row.split for row in audit.rows):
        of_split = [row for row in audit.rows if row.split == split]
        texts = (split, f"all {len(of_split)}", "", "", "")
        lines.append((texts, percent(sum(row.pixels for row in of_split))))
    widths = [max(len(texts[i]) for texts, _ in lines) for i in range(len(columns))]
    return [
        " ".join([*(f"{t:{w}}" for t, w in zip(texts, widths, strict=True)), *numbers]).rstrip()
        for texts, numbers in lines
    ]


def percent(pixels: np.ndarray) -> list[str]:
    if not pixels.any():
        return [f"{'-':>7}"] * len(pixels)
    return [f"{100 * share:7.2f}" for share in pixels / pixels.sum()]
