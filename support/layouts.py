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

from support.names import IMAGES, MASK_ENDINGS, TIFFS, by_stem, pair, stem, visible_files
from support.raster import DataError

IGNORE = 255

Colour = tuple[int, int, int]


class Classes(NamedTuple):
    names: tuple[str, ...]
    colours: tuple[Colour, ...]  # red, green, blue
    clutter: int | None = None  # the class that some protocols leave out of the mean


class LabelEncoding(NamedTuple):
    """How label files say which class a pixel has: ISPRS by the corner of the colour cube that is
    nearest, others by an index, or in masks of three bands by a colour."""

    corners: bool = False
    values: tuple[int, ...] = ()  # the index of each class
    ignore: int | None = IGNORE  # the index of pixels without a class
    colours: tuple[Colour, ...] = ()  # of each class, exactly
    ignore_colour: Colour | None = None


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
    for path in visible_files(root, TIFFS, deep=True):
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
    return SplitFiles(POTSDAM, LabelEncoding(corners=True), bands, result, faults, gaps, notes)


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
    archives = sorted(path.name for path in visible_files(root, (".zip",), deep=True))
    return f" (perhaps still packed in {', '.join(archives)})" if archives else ""


def find_loveda(root: Path, split: str, tiles: tuple[str, ...]) -> SplitFiles:
    """{Train,Val,Test}/{Urban,Rural}/{images_png,masks_png}/N.png, at any depth."""
    folders = defaultdict(dict)  # Urban or Rural, images_png or masks_png -> {N: path}
    for path in visible_files(root, (".png",), deep=True):
        kind, domain, of_split = (parent.name.lower() for parent in path.absolute().parents[:3])
        if kind in ("images_png", "masks_png") and of_split == split:
            folders[path.parent.parent, kind][stem(path)] = path
    domains = sorted(domain for domain, kind in folders if kind == "images_png")
    paths = []
    for domain in domains:
        images = folders[domain, "images_png"]
        paths += sorted(images.values(), key=lambda path: (len(path.stem), path))
    if not paths:
        raise DataError(
            f"{root}: holds no Urban/images_png/N.png or Rural/images_png/N.png in a folder "
            f"{split.capitalize()}{archives_hint(root)}"
        )
    faults, gaps, result = [], [], []
    areas = {path: path.absolute().parents[1].name for path in paths}  # Urban or Rural
    names = {path: f"{area}_{path.stem}" for path, area in areas.items()}
    for path in select_tiles(names, tiles, root):
        domain = path.parent.parent
        mask = folders[domain, "masks_png"].get(stem(path))
        if split != "test" and not mask:
            faults.append(f"{path}: has no mask (looked for it in {domain / 'masks_png'})")
        result.append(Tile(names[path], path, mask, None, areas[path].lower()))
    if not tiles and len(paths) != LOVEDA_IMAGES[split]:
        count = f"{len(paths)} of the {LOVEDA_IMAGES[split]} {split} images are there"
        gaps.append(count + archives_hint(root))
    for domain in domains:
        alone = folders[domain, "masks_png"].keys() - folders[domain, "images_png"].keys()
        gaps += masks_without_image(domain / "images_png", alone, ".png")
    values = tuple(range(1, len(LOVEDA.names) + 1))
    encoding = LabelEncoding(values=values, ignore=0)
    return SplitFiles(LOVEDA, encoding, "rgb", result, faults, gaps, [])


def find_folder(root: Path, split: str, tiles: tuple[str, ...]) -> SplitFiles:
    """Anyone's own data, in the layout that the docstring of data.py describes."""
    classes, encoding = read_classes(root / "classes.json")
    folder, masks_folder = root / split / "images", root / split / "masks"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (the layout is SPLIT/images and SPLIT/masks)")
    faults, notes, result = [], [], []
    images = by_stem(visible_files(folder, IMAGES), faults)
    if masks_folder.is_dir():
        masks = by_stem(visible_files(masks_folder, IMAGES), faults)
    else:  # beside the images
        masks = {name: path for name, path in images.items() if MASK_ENDINGS.search(name)}
        images = {name: path for name, path in images.items() if name not in masks}
    if not images:
        raise DataError(f"{folder}: holds no .png, .jpg or .tif image")
    pairs, several = pair(images, masks)
    claimed = defaultdict(list)  # mask -> images
    for image, mask in pairs.items():
        claimed[mask].append(image)
    for path in select_tiles({path: path.stem for path in images.values()}, tiles, folder):
        name = stem(path)
        if name in several:
            faults.append(f"{path}: {several[name]} could be its mask; remove one")
        elif name not in pairs:
            if split != "test" or pairs:  # a test split may have none, as LoveDA's
                faults.append(f"{path}: has no mask (looked for it in {masks_folder})")
        elif len(claimed[pairs[name]]) > 1:
            both = " and ".join(claimed[pairs[name]])
            faults.append(f"{path}: {pairs[name]} could be the mask of {both}; name it after one")
        elif pairs[name] != name and not notes:
            notes.append(f"{masks[pairs[name]]} is taken for the mask of {path.name}, others alike")
        result.append(Tile(path.stem, path, masks.get(pairs.get(name))))
    gaps = masks_without_image(folder, masks.keys() - {*pairs.values()})
    return SplitFiles(classes, encoding, "", result, faults, gaps, notes)


def masks_without_image(folder: Path, masks: set[str], ending: str = "") -> list[str]:
    if masks:
        names = ", ".join(f"{name}{ending}" for name in sorted(masks)[:5])
        return [f"{folder}: {len(masks)} masks have no image here ({names})"]
    return []


def select_tiles(names: dict[Path, str], tiles: tuple[str, ...], where: Path) -> list[Path]:
    """The paths whose name, or stem, is in `tiles`; all when there are no tiles."""
    if unknown := {*tiles} - {*names.values()} - {path.stem for path in names}:
        raise DataError(f"{where}: no image named {', '.join(sorted(unknown))}")
    return [p for p, name in names.items() if not tiles or {name, p.stem} & {*tiles}]


def read_classes(path: Path) -> tuple[Classes, LabelEncoding]:
    """classes.json -> the classes, and how the masks say which one a pixel has."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(entry["classes"], list):
            raise TypeError("classes must be a list of names")
        names = tuple(str(name) for name in entry["classes"])
        values = tuple(int(value) for value in entry.get("values", range(len(names))))
        own_colours = entry.get("colours", entry.get("colors")) or ()
        own_colours = tuple((int(r), int(g), int(b)) for r, g, b in own_colours)
        ignore, ignore_colour = entry.get("ignore", None if IGNORE in values else IGNORE), None
        if isinstance(ignore, list):
            red, green, blue = ignore
            ignore, ignore_colour = None, (int(red), int(green), int(blue))
        elif ignore is not None:
            ignore = int(ignore)
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; it names the classes of --data folder, and python data.py "
            f"classes {path.parent} writes a first one"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{path}: must look like {{"classes": ["road", ...], "ignore": 255}} ({error!r})'
        ) from None
    colours = own_colours or tuple(distinct_colours(len(names)))
    if not 1 <= len(names) < IGNORE or len(colours) != len(names):
        raise DataError(f"{path}: {len(names)} classes with {len(colours)} colours")
    for what, found in (("value", values), ("colour", own_colours or range(len(names)))):
        if len({*found}) != len(names):
            raise DataError(f"{path}: each of the {len(names)} classes needs a {what} of its own")
    if not {*values} <= {*range(256)} or ignore is not None and ignore not in range(256):
        raise DataError(f"{path}: values and ignore must be in 0..255")
    for colour in (*own_colours, ignore_colour or (0, 0, 0)):
        if not {*colour} <= {*range(256)}:
            raise DataError(f"{path}: the colour {[*colour]} is not in 0..255")
    if ignore_colour in own_colours:
        raise DataError(
            f"{path}: {[*ignore_colour]} is ignored, and it is the colour of "
            f"{names[own_colours.index(ignore_colour)]}; take it out of one of them"
        )
    if ignore in values:
        others = [value for value in range(256) if value != ignore][: len(names)]
        raise DataError(
            f"{path}: {ignore} is ignored, and it is the value of {names[values.index(ignore)]}; "
            f'say which values the classes have: "values": {others}'
        )
    return Classes(names, colours), LabelEncoding(
        values=values, ignore=ignore, colours=own_colours, ignore_colour=ignore_colour
    )


def distinct_colours(count: int) -> list[tuple[int, int, int]]:
    """Hues a golden ratio apart, so that any number of them stay different."""
    hues = [(0.6180339887 * i) % 1 for i in range(count)]
    return [tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.75, 0.9)) for hue in hues]
