"""Is a data set fit to train on? A row per tile, what is wrong with it, and a verdict.

    python data.py audit potsdam --root /data/potsdam

Every file is decoded to its last row, a few rows at a time, because a truncated TIFF opens like a
complete one. Loading refuses a missing label (a test split may have none at all), 16 bits, a label
of another size, an overlay instead of a label, a value of no class, and one's own class without a
pixel in train. The audit reports these too, and also faults with which training would run: missing
files of the set, a tile whose pixels are all ignored, a label instead of an image, red and blue
swapped.

A label has saturated colours: one band near 255, another near 0. They cover 52 to 72 % of labels
of Potsdam and of toy scenes, and less than 0.005 % of each of 343 real images (Potsdam, LoveDA,
Mumbai, DroneDeploy). Dark water, snow, and the black or white edge of a mosaic lie near the corners
of the colour cube too, but have none.

No metadata says that bands are swapped. These are the signs that the audit looks for:

- ISPRS labels: swapped colours turn every building into clutter and every lawn into cars. A tile is
  suspected when cars cover more than low vegetation, and swapping the colours back brings its class
  shares closer to the published ones.
- ISPRS images, over all tiles: with infrared first, low vegetation is brighter in the first band
  than in the third. In Potsdam's RGB, tiled roofs make buildings redder than blue, and low
  vegetation is not bluer than red. (In a real crop of tile 2_10, buildings have 127, 96, 78 and low
  vegetation 50, 54, 48.)
- LoveDA and others: there is no such sign. In two real images of LoveDA, buildings are bluer than
  red.

Letters: H W pixels, C channels, K classes.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.images import open_16_bits, open_rows
from support.labels import (
    BLURRED,
    MAX_UNKNOWN,
    ROWS,
    UNKNOWN,
    LabelReader,
    absent_classes,
    far_from_corners,
)
from support.layouts import BANDS, IGNORE, SplitFiles, Tile, find_split
from support.place import misplaced
from support.progress import Progress
from support.raster import DataError, header
from support.stretch import Stretch, measure

# Class shares of Potsdam's 38 tiles, in the order of its classes.
PUBLISHED = np.array([0.296, 0.257, 0.226, 0.155, 0.018, 0.048])
BUILDING, LOW_VEGETATION, CAR, CLUTTER = 1, 2, 4, 5
SWAPPED = [0, CLUTTER, CAR, 3, LOW_VEGETATION, BUILDING]  # each class after swapping red and blue
CLEAR = 5  # grey values by which one band's mean must exceed another's
CORNERS = 0.95  # a label has more of its pixels within BLURRED of a corner of the colour cube,
SATURATED = 0.05  # and more near one that is neither black nor white
SAMPLING = 4  # colours are compared at every fourth pixel of every fourth row


class TileAudit(NamedTuple):
    """The findings about one tile."""

    split: str
    tile: Tile
    image: str  # size, mode, bands and bits
    label: str
    pixels: np.ndarray  # of each class, ignored, of no class: (K + 2,)
    no_data: tuple[int, int]  # pixels of the image without data, of how many that were looked at
    sums: np.ndarray  # of the image's values over each class: (K, C)
    counts: np.ndarray  # of the pixels in `sums`: (K,)
    faults: list[str]
    notes: list[str]


class Audit(NamedTuple):
    data: str
    classes: tuple[str, ...]
    rows: list[TileAudit]
    faults: list[str]  # training would be wrong
    notes: list[str]


def examine(
    data: str,
    root: Path,
    splits,
    tiles=(),
    bands: str | None = None,
    max_unknown=MAX_UNKNOWN,
    stretch: tuple[float, ...] = (),
) -> Audit:
    """Decode and check everything in these splits. Files missing from `test` are notes, not faults.

    Images of 16 bits are seen with `stretch`, measured on the first split. Raises DataError when
    `root` is no folder.
    """
    if not Path(root).is_dir():
        raise DataError(f"{root}: no such folder (--root must be where {data} was unpacked)")
    rows, faults, notes, names = [], [], [], ()
    for split in splits:
        try:
            files = find_split(data, root, split, tiles, bands)
            if stretch and not isinstance(stretch, Stretch):
                stretch = measure((open_16_bits(tile.image) for tile in files.tiles), stretch)
        except DataError as error:
            (notes if split == "test" else faults).append(str(error))
            continue
        names = files.classes.names
        faults += files.faults
        notes += files.notes
        (notes if split == "test" else faults).extend(files.gaps)
        with Progress(f"auditing {split}") as progress:
            for index, tile in enumerate(files.tiles):
                rows.append(examine_tile(split, tile, files, max_unknown, stretch or None))
                progress((index + 1) / len(files.tiles))
        of_split = [row for row in rows if row.split == split]
        faults += [fault for row in of_split for fault in row.faults]
        notes += [note for row in of_split for note in row.notes]
        if without := [row.no_data for row in of_split if row.no_data[0]]:
            missing, seen = np.sum(without, axis=0)
            where = f"{missing / seen:.1%} of the pixels of {len(without)} of the {len(of_split)}"
            notes.append(f"{split}: no data at {where} tiles; their labels are ignored")
        *total, ignored, _ = sum(row.pixels for row in of_split).tolist()
        absent = absent_classes(files.classes, files.encoding, total, ignored)
        if absent and any(total):
            unfit = data == "folder" and split == "train"
            if data != "folder":
                absent = absent.partition(";")[0]  # the rest is about classes.json
            (faults if unfit else notes).append(f"{split}: {absent}")
    if data in ("potsdam", "vaihingen") and rows:
        faults += swapped_images(rows, files.bands)
    if len({row.sums.shape for row in rows if row.counts.any()}) > 1:
        faults.append(f"{root}: some images have {min(BANDS.values())} bands and some have more")
    faults = [*dict.fromkeys(faults)]  # several splits may give the same sentence
    return Audit(data, names, rows, faults, [n for n in dict.fromkeys(notes) if n not in faults])


def examine_tile(
    split: str, tile: Tile, files: SplitFiles, max_unknown: float, stretch: Stretch | None = None
) -> TileAudit:
    faults, notes, K = [], [], len(files.classes.names)
    rows, image, one_colour = examine_image(tile.image, files.bands, faults, stretch)
    same_size = tile.label and compare_sizes(tile.image, tile.label, faults)
    of_image = rows if same_size else None
    if same_size and (sentence := misplaced(tile.label, tile.image)):
        faults.append(sentence)
    label, pixels = examine_label(tile.label, files, max_unknown, faults, of_image)
    if tile.eroded not in (None, tile.label) and split != "train":
        same_size = compare_sizes(tile.image, tile.eroded, faults)
        examine_label(tile.eroded, files, max_unknown, faults, rows if same_size else None)
    present = np.count_nonzero(pixels[:K])
    empty = label is not None and not present
    if one_colour and label is not None and present < 2:
        # A tile beyond the edge of a mosaic, or of water that was painted over.
        notes.append(f"{tile.image}: {one_colour}, and its label has no more than one class")
    elif one_colour:
        faults.append(f"{tile.image}: {one_colour}")
    elif empty:
        faults.append(f"{tile.label}: every pixel is ignored, there is nothing to learn from")
    if rows and (doubt := rows.no_data.doubt()):
        faults.append(f"{tile.image}: {doubt}")
    sums, counts = np.zeros((K, 1 if image is None else image.shape[2])), np.zeros(K, int)
    if label is not None:
        if files.encoding.corners and (fault := swapped_label(tile.label, pixels[:K])):
            faults.append(fault)
        if image is not None and image.shape[:2] == label.shape:
            for k in range(K):
                sums[k], counts[k] = image[label == k].sum(0, dtype=float), (label == k).sum()
    described = describe_file(tile.image), describe_file(tile.label)
    no_data = (rows.no_data.missing, rows.no_data.seen) if rows else (0, 0)
    return TileAudit(split, tile, *described, pixels, no_data, sums, counts, faults, notes)


def describe_file(path: Path | None) -> str:
    """A file's size, mode, bands and bits, for the table."""
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
    except DataError:  # already reported
        return False
    if sizes[0] != sizes[1]:
        faults.append(f"{label}: is {sizes[0]} pixels, but its image {image} {sizes[1]}")
    return sizes[0] == sizes[1]


def examine_image(path: Path, bands: str, faults: list[str], stretch: Stretch | None):
    """Its rows, a subsampled copy (H / SAMPLING, W / SAMPLING, C), and a remark if it has only one
    colour; None, None, and a fault, if it is no photo."""
    try:
        rows = open_rows(path, stretch)
        H, W, C = rows.shape
        if bands and C != BANDS[bands]:
            raise DataError(f"{path}: has {C} bands, but {bands} has {BANDS[bands]}")
        small, seen = [], []
        for top in range(0, H, ROWS):
            bottom = min(top + ROWS, H)
            small.append(rows.read(top, bottom)[::SAMPLING, ::SAMPLING])
            valid = rows.valid(top, bottom)
            seen.append(small[-1] if valid is None else small[-1][valid[::SAMPLING, ::SAMPLING]])
        small, seen = np.concatenate(small), np.concatenate([part.reshape(-1, C) for part in seen])
        if looks_like_a_label(seen[:, None]):
            raise DataError(f"{path}: has the colours of a label; it is no photograph")
    except DataError as error:
        faults.append(str(error))
        return None, None, ""
    if not len(seen):
        return rows, small, "none of its pixels holds data"
    if (seen == seen[0]).all():
        return rows, small, f"all of it has one colour, {tuple(seen[0].tolist())}"
    return rows, small, ""


def looks_like_a_label(pixels: np.ndarray) -> bool:
    """By the colours of an image, (., ., C)."""
    if not pixels.size or (pixels == pixels[0, 0]).all():
        return False
    if ((pixels == 0) | (pixels == 255)).all():  # also a mask in black and white
        return True
    near = ~far_from_corners(pixels, BLURRED)
    bright = pixels[..., :3] > 127
    saturated = near & bright.any(axis=-1) & ~bright.all(axis=-1)
    return near.mean() > CORNERS and saturated.mean() > SATURATED


def examine_label(
    path: Path | None, files: SplitFiles, max_unknown: float, faults: list[str], image=None
):
    """A subsampled copy (H / SAMPLING, W / SAMPLING) or None, and the numbers of pixels of each
    class, ignored, and of no class (K + 2,)."""
    K = len(files.classes.names)
    counts = np.zeros(256, np.int64)
    small = []
    if path is not None:
        try:
            reader = LabelReader(path, files.classes, files.encoding, image)
            for top in range(0, reader.shape[0], ROWS):
                label = reader.read(top, min(top + ROWS, reader.shape[0]))
                counts += np.bincount(label.ravel(), minlength=256)
                small.append(label[::SAMPLING, ::SAMPLING])
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
    car, low_vegetation = shares[CAR], shares[LOW_VEGETATION]
    if car <= low_vegetation or as_it_is <= swapped:
        return None
    return (
        f"{path}: red and blue look swapped: {car:.0%} would be cars, {low_vegetation:.0%} "
        f"low vegetation, {shares[CLUTTER]:.0%} clutter and {shares[BUILDING]:.0%} buildings"
    )


def swapped_images(rows: list[TileAudit], bands: str) -> list[str]:
    """Faults, judged over all tiles, because a single one may have blue roofs or brown grass."""
    seen = [row for row in rows if row.counts[LOW_VEGETATION] and row.counts[BUILDING]]
    if not seen:
        return []
    sums, counts = sum(row.sums for row in seen), sum(row.counts for row in seen)
    lawn, roof = (sums[k] / counts[k] for k in (LOW_VEGETATION, BUILDING))
    if bands == "irrg" and lawn[2] > lawn[0] + CLEAR:
        what = f"low vegetation has {lawn[0]:.0f} in the first band and {lawn[2]:.0f} in the third"
    elif bands != "irrg" and roof[2] > roof[0] + CLEAR and lawn[2] >= lawn[0]:
        what = f"buildings are {roof[0]:.0f} in red and {roof[2]:.0f} in blue"
    else:
        return []
    return [f"{rows[0].tile.image.parent}: the first and third band look swapped: {what}"]


# --- Before training ----------------------------------------------------------------------------


def require_trainable(train_set, val_set, root: Path | None) -> None:
    """DataError where training on two data.Datasets would be wrong; else says what they are."""
    both = {s.path for s in train_set.scenes} & {s.path for s in val_set.scenes}
    if both - {None}:  # toy scenes have no file
        raise DataError(
            f"{sorted(both)[0]}: is in the training and in the validation set; "
            f"choose with --train-tiles and --val-tiles"
        )
    for split, dataset in (("train", train_set), ("val", val_set)):
        labels = [scene.label for scene in dataset.scenes]
        if not any(label is not None and (label != IGNORE).any() for label in labels):
            raise DataError(f"{root}: no pixel of the {split} split has a label")
        pixels = sum(label.size for label in labels)
        print(f"{split}: {len(labels)} scenes, {pixels / 1e6:.1f} million pixels")
        for note in dataset.notes:
            print(f"  note: {note}")


# --- The report ---------------------------------------------------------------------------------


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
    """A line per tile and one per split, with class shares in per cent of the label's pixels."""
    columns = ("split", "tile", "image", "label", "eroded")
    shares = [name[:7] for name in audit.classes] + ["ignored", "unknown"]
    lines = [(columns, [f"{share:>7}" for share in shares])]
    for row in audit.rows:
        eroded = {row.tile.label: "only", None: "-"}.get(row.tile.eroded, "yes")
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
