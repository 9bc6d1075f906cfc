"""The published data sets: their classes, their splits, and the files of a split.

    files = find_split("potsdam", Path("/data/potsdam"), "train")
    for tile in files.tiles: print(tile.name, tile.image, tile.label)

Nothing is decoded here. `root` is the folder as it was unpacked, with or without the sub-folders of
the archives: files are found by the pattern of their base names (ISPRS) or by the last folders of
their path (LoveDA). Splits are constants with their source. Nothing is guessed: where two different
files claim to be the same tile, the error names both, and missing files are reported.

Problems with the files are of three kinds. `faults` forbid training, `gaps` are missing files that
a complete set would have, and `notes` are worth knowing.
"""

import colorsys
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from support.raster import DataError

IGNORE = 255


class Classes(NamedTuple):
    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]  # red, green, blue
    clutter: int | None = None  # the class that some protocols leave out of the mean


class LabelEncoding(NamedTuple):
    """How label files say which class a pixel has: by a colour or by an index."""

    coloured: bool  # by the colours of the classes; otherwise by an index
    first_index: int = 0  # the index of class 0
    ignore_index: int = IGNORE  # the index of pixels without a class


class Tile(NamedTuple):
    """The files of one scene."""

    name: str
    image: Path
    label: Path | None = None
    eroded: Path | None = None  # the label without boundaries, where the publisher has one
    domain: str = ""  # LoveDA: "urban" or "rural"


class SplitFiles(NamedTuple):
    """The files of one split, how to read them, and what is wrong with them."""

    classes: Classes
    encoding: LabelEncoding
    bands: str  # of the images: "rgb", "irrg", "rgbir"; "" where it is not known before decoding
    tiles: list[Tile]
    faults: list[str]
    gaps: list[str]
    notes: list[str]


# --- What is published --------------------------------------------------------------------------

SPLITS = ("train", "val", "test")
BANDS = {"rgb": 3, "irrg": 3, "rgbir": 4}  # how many; in order of preference; ir: near infrared

POTSDAM = Classes(
    ("impervious", "building", "low vegetation", "tree", "car", "clutter"),
    ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)),
    clutter=5,
)
# ISPRS 2D Semantic Labeling Contest, Potsdam: 24 tiles came with labels, 14 were the test set.
# 7_10 has wrong annotations. We leave it out, as GeoSeg does; --train-tiles can ask for it. The
# publisher gives no validation set. We chose one tile from each of the six rows, so that no model
# is ever selected on the test set.
POTSDAM_TILES = {
    "train": "2_10 2_12 3_10 3_11 4_11 4_12 5_10 5_11 6_7 6_8 6_9 6_10 6_11 7_7 7_9 7_11 7_12",
    "val": "2_11 3_12 4_10 5_12 6_12 7_8",
    "test": "2_13 2_14 3_13 3_14 4_13 4_14 4_15 5_13 5_14 5_15 6_13 6_14 6_15 7_13",
}
# ISPRS 2D Semantic Labeling Contest, Vaihingen: 33 areas. The 17 test areas are those of GeoSeg and
# mmsegmentation. We chose every fourth of the other 16 for validation.
VAIHINGEN_TILES = {
    "train": "1 3 5 11 13 15 21 23 26 30 32 34",
    "val": "7 17 28 37",
    "test": "2 4 6 8 10 12 14 16 20 22 24 27 29 31 33 35 38",
}

LOVEDA = Classes(
    ("background", "building", "road", "water", "barren", "forest", "agriculture"),
    (
        (255, 255, 255),
        (255, 0, 0),
        (255, 255, 0),
        (0, 0, 255),
        (159, 129, 183),
        (0, 255, 0),
        (255, 195, 128),
    ),
)
LOVEDA_IMAGES = {"train": 2522, "val": 1669, "test": 1796}  # Wang et al., NeurIPS 2021 data track


class Isprs(NamedTuple):
    """One of the two ISPRS data sets: the names of its files, and its splits."""

    pattern: re.Pattern  # of a base name, with groups `tile`, `eroded` and (Potsdam only) `kind`
    example: str
    splits: dict[str, str]


ISPRS = {
    "potsdam": Isprs(
        re.compile(
            r"top_potsdam_(?P<tile>\d+_\d+)_(?P<kind>RGB|IRRG|RGBIR|label)"
            r"(?P<eroded>(?<=label)_noBoundary)?\.tiff?",
            re.IGNORECASE,
        ),
        "top_potsdam_ROW_COLUMN_RGB.tif",
        POTSDAM_TILES,
    ),
    "vaihingen": Isprs(
        re.compile(
            r"top_mosaic_09cm_area(?P<tile>\d+)(?P<eroded>_noBoundary)?\.tiff?", re.IGNORECASE
        ),
        "top_mosaic_09cm_areaNUMBER.tif",
        VAIHINGEN_TILES,
    ),
}
# Vaihingen's labels have the same names as their images, so the folder must tell them apart. The
# publisher's folders are `top` for images, and `gts_for_participants` and
# `..._ground_truth_[eroded_]COMPLETE` for labels.
LABEL_FOLDER = re.compile(r"gts|ground_?truth|labels?(?!ing)|masks?", re.IGNORECASE)


# --- Finding ------------------------------------------------------------------------------------


def find_split(data: str, root: Path, split: str, tiles=(), bands: str | None = None) -> SplitFiles:
    """The files of one split.

    `tiles` names the scenes to take instead of the split's. `bands` is one of BANDS, or None for
    the first of them that is there. Raises DataError when there is no image to work with.
    """
    root, tiles = Path(root), tuple(tiles)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (--root must be where {data} was unpacked)")
    if data in ISPRS:
        return find_isprs(data, root, split, tiles, bands)
    return {"loveda": find_loveda, "folder": find_folder}[data](root, split, tiles)


def find_isprs(data: str, root: Path, split: str, tiles: tuple[str, ...], bands) -> SplitFiles:
    """Tiles by the pattern of their base name, at any depth below `root`."""
    isprs = ISPRS[data]
    files = defaultdict(list)  # (tile, kind) -> paths
    for path in files_below(root, "*.[tT][iI][fF]*"):
        if match := isprs.pattern.fullmatch(path.name):
            kind = match.groupdict().get("kind", "").lower()
            if match["eroded"]:
                kind = "eroded"
            elif data == "vaihingen":
                kind = "label" if LABEL_FOLDER.search(path.parent.name) else "irrg"
            files[match["tile"], kind].append(path)
    kinds = [name for name in BANDS if any(kind == name for _, kind in files)]
    if not kinds:
        raise DataError(f"{root}: holds no {isprs.example}{archives_hint(root)}")
    bands = bands or kinds[0]
    if bands not in kinds:
        raise DataError(f"{root}: has no {bands} images, only {', '.join(kinds)} (--bands)")
    wanted = tiles or tuple(isprs.splits[split].split())
    found = [tile for tile in wanted if (tile, bands) in files]
    missing = [tile for tile in wanted if (tile, bands) not in files]
    if tiles and missing:
        raise DataError(
            f"{root}: no {bands} image of tile {', '.join(missing)}{archives_hint(root)}"
        )
    if not found:
        raise DataError(
            f"{root}: none of the {split} tiles is here ({', '.join(missing)}){archives_hint(root)}"
        )
    faults, gaps, notes, result = [], [], [], []
    if missing:
        names = ", ".join(missing)
        gaps.append(
            f"{len(missing)} of the {split} tiles are not there: {names}{archives_hint(root)}"
        )
    if split != "test" and (seen := set(tiles) & set(isprs.splits["test"].split())):
        notes.append(f"{', '.join(sorted(seen))}: of the official test set, used for {split}")
    labelled = any((tile, kind) in files for tile in found for kind in ("label", "eroded"))
    for tile in found:
        image, label, eroded = (
            choose_copy(files.get((tile, kind)), tile, faults)
            for kind in (bands, "label", "eroded")
        )
        if label is None and eroded is None and (labelled or split != "test"):
            faults.append(
                f"{image}: there is no label of tile {tile} in {root}{archives_hint(root)}"
            )
        elif label is None and eroded is not None:
            notes.append(f"tile {tile}: only the label with eroded boundaries is there, using it")
        result.append(Tile(tile, image, label or eroded, eroded))
    return SplitFiles(POTSDAM, LabelEncoding(coloured=True), bands, result, faults, gaps, notes)


def files_below(root: Path, pattern: str) -> list[Path]:
    """Matches at any depth. Of links to folders, those that lie in `root` itself are followed."""
    links = [path for path in root.iterdir() if path.is_symlink() and path.is_dir()]
    return sorted({match for folder in (root, *links) for match in folder.rglob(pattern)})


def choose_copy(paths: list[Path] | None, tile: str, faults: list[str]) -> Path | None:
    """One of the copies of a file, which may lie in several folders. Another size is a fault.

    Potsdam's labels come twice, in 5_Labels_all and 5_Labels_for_participants. The former is taken.
    """
    if not paths:
        return None
    paths = sorted(paths, key=lambda path: ("participants" in path.parent.name.lower(), path))
    public = [path for path in paths if "participants" not in path.parent.name.lower()] or paths
    if len({path.stat().st_size for path in public}) > 1:
        faults.append(
            f"{public[0]} and {public[1]} differ, and both claim to be tile {tile}: remove one"
        )
    return paths[0]


def archives_hint(root: Path) -> str:
    """A hint for messages about missing files: the archives that may still hold them."""
    archives = sorted(path.name for path in files_below(root, "*.zip"))
    return f" (perhaps still packed in {', '.join(archives)})" if archives else ""


def find_loveda(root: Path, split: str, tiles: tuple[str, ...]) -> SplitFiles:
    """{Train,Val,Test}/{Urban,Rural}/{images_png,masks_png}/N.png, at any depth."""
    folders = [
        folder
        for folder in files_below(root, "images_png")
        if folder.absolute().parent.parent.name.lower() == split
    ]
    paths = [p for f in folders for p in sorted(f.glob("*.png"), key=lambda p: (len(p.stem), p))]
    if not paths:
        raise DataError(
            f"{root}: holds no Urban/images_png/N.png or Rural/images_png/N.png in a folder "
            f"{split.capitalize()}{archives_hint(root)}"
        )
    faults, gaps, result = [], [], []
    for path in select_tiles(paths, tiles, root):
        mask = path.parent.parent / "masks_png" / path.name
        if split != "test" and not mask.exists():
            faults.append(f"{path}: has no mask (looked for it in {mask})")
        domain = path.parts[-3]
        label = mask if mask.exists() else None
        result.append(Tile(f"{domain}_{path.stem}", path, label, None, domain.lower()))
    if not tiles and len(paths) != LOVEDA_IMAGES[split]:
        count = f"{len(paths)} of the {LOVEDA_IMAGES[split]} {split} images are there"
        gaps.append(count + archives_hint(root))
    for folder in folders:
        masks = {path.name for path in folder.parent.glob("masks_png/*.png")}
        gaps += masks_without_image(folder, masks, {path.name for path in folder.glob("*.png")})
    return SplitFiles(
        LOVEDA,
        LabelEncoding(coloured=False, first_index=1, ignore_index=0),
        "rgb",
        result,
        faults,
        gaps,
        [],
    )


def find_folder(root: Path, split: str, tiles: tuple[str, ...]) -> SplitFiles:
    """Anyone's own data, in the layout that the docstring of data.py describes."""
    classes, ignore = read_classes(root / "classes.json")
    folder = root / split / "images"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (the layout is SPLIT/images and SPLIT/masks)")
    faults, result = [], []
    masks, images = images_by_stem(root / split / "masks", faults), images_by_stem(folder, faults)
    if not images:
        raise DataError(f"{folder}: holds no .png, .jpg or .tif image")
    for path in select_tiles([*images.values()], tiles, folder):
        if path.stem not in masks:
            faults.append(f"{path}: has no mask (looked for it in {root / split / 'masks'})")
        result.append(Tile(path.stem, path, masks.get(path.stem)))
    gaps = masks_without_image(folder, set(masks), set(images))
    return SplitFiles(
        classes, LabelEncoding(coloured=False, ignore_index=ignore), "", result, faults, gaps, []
    )


def images_by_stem(folder: Path, faults: list[str]) -> dict[str, Path]:
    """The images in a folder by their name without ending, which pairs an image with its mask."""
    files = {}
    for path in sorted(folder.glob("[!.]*")):
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".tif", ".tiff"):
            continue  # a .tfw, a note
        if path.stem in files:
            faults.append(f"{path} and {files[path.stem].name} have one name: remove one")
        files.setdefault(path.stem, path)
    return files


def masks_without_image(folder: Path, masks: set[str], images: set[str]) -> list[str]:
    if alone := sorted(masks - images):
        return [f"{folder}: {len(alone)} masks have no image here ({', '.join(alone[:5])})"]
    return []


def select_tiles(paths: list[Path], tiles: tuple[str, ...], where: Path) -> list[Path]:
    """The paths whose stem is in `tiles`; all when there are no tiles."""
    if unknown := set(tiles) - {path.stem for path in paths}:
        raise DataError(f"{where}: no image named {', '.join(sorted(unknown))}")
    return [path for path in paths if not tiles or path.stem in tiles]


def read_classes(path: Path) -> tuple[Classes, int]:
    """classes.json -> the classes and the mask value to ignore."""
    try:
        entry = json.loads(path.read_text())
        names = tuple(str(name) for name in entry["classes"])
        ignore = int(entry.get("ignore", IGNORE))
        colours = entry.get("colours", entry.get("colors")) or distinct_colours(len(names))
        colours = tuple((int(r), int(g), int(b)) for r, g, b in colours)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; it names the classes of --data folder") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{path}: must look like {{"classes": ["road", ...], "ignore": 255}} ({error!r})'
        ) from None
    if not 1 <= len(names) < IGNORE or len(colours) != len(names):
        raise DataError(f"{path}: {len(names)} classes with {len(colours)} colours")
    return Classes(names, colours), ignore


def distinct_colours(count: int) -> list[tuple[int, int, int]]:
    """Hues a golden ratio apart, so that any number of them stay different."""
    hues = [(0.6180339887 * i) % 1 for i in range(count)]
    return [tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.75, 0.9)) for hue in hues]
