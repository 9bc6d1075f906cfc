"""Aerial data sets as their publishers unpack them: found, decoded, cut into random windows.

    dataset = load("potsdam", root="/data/potsdam", split="train")
    windows = Windows(dataset.scenes, crop=512, batch=8, seed=0)
    images, labels = windows.batch(step)        # (B, C, crop, crop) uint8, (B, crop, crop) uint8

`toy` needs no files; `potsdam` and `loveda` read the publishers' folders; `folder` anyone's own:

    ROOT/classes.json      {"classes": ["road", ...], "ignore": 255, "colours": [[r, g, b], ...]}
    ROOT/{train,val,test}/images/NAME.{png,jpg,tif}
    ROOT/{train,val,test}/masks/NAME.{png,tif}        one channel, values are class indices

There is no patching step: window k of step s is a pure function of (seed, rank, s, k), so the
step number is the whole state of the data. Labels are uint8, 255 is ignored, and a colour or an
index that is not a class is an error or is ignored and reported: it never becomes class 0.

Letters: B batch, C channels, H W pixels, K classes.
"""

import colorsys
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

import cli
import toy
from raster import DataError, read_image, read_indices

IGNORE = 255


class Classes(NamedTuple):
    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]  # red, green, blue
    clutter: int | None = None  # the class that some protocols leave out of the mean


class Scene(NamedTuple):
    name: str
    image: np.ndarray  # (H, W, C) uint8
    label: np.ndarray | None  # (H, W) uint8, 0..K-1 or IGNORE
    eroded: np.ndarray | None = None  # the publisher's label without boundaries, where there is one
    path: Path | None = None  # the image's file
    domain: str = ""  # LoveDA: "urban" or "rural"


class Dataset(NamedTuple):
    classes: Classes
    scenes: list[Scene]
    notes: list[str]  # what the user should know about what was found


# --- The data sets ------------------------------------------------------------------------------

POTSDAM = Classes(
    ("impervious", "building", "low vegetation", "tree", "car", "clutter"),
    ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)),
    clutter=5,
)
# ISPRS 2D Semantic Labeling Contest, Potsdam: 24 tiles came with labels, 14 were the test set.
# 7_10 has wrong annotations and is left out (as GeoSeg does). The publisher gives no validation
# set; we chose one tile of each of four rows, so that models are never selected on test.
POTSDAM_TILES = {
    "train": "2_10 2_12 3_10 3_11 4_11 4_12 5_10 5_11 6_7 6_8 6_9 6_10 6_11 7_7 7_9 7_11 7_12",
    "val": "2_11 3_12 4_10 5_12 6_12 7_8",
    "test": "2_13 2_14 3_13 3_14 4_13 4_14 4_15 5_13 5_14 5_15 6_13 6_14 6_15 7_13",
}
POTSDAM_IMAGE = re.compile(r"top_potsdam_(\d+_\d+)_RGB\.tif")
POTSDAM_LABEL = re.compile(r"top_potsdam_(\d+_\d+)_label(_noBoundary)?\.tif")

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

# Scene seeds of the toy splits: far apart, so that no split can grow into another.
TOY_SCENES = {"train": range(0, 24), "val": range(1000, 1006), "test": range(2000, 2012)}

DATA_SETS = ("toy", "potsdam", "loveda", "folder")
SPLITS = ("train", "val", "test")


def load(
    data: str, root: Path | None = None, split: str = "train", tiles=(), *, cache=None, bands=None
) -> Dataset:
    """All scenes of one split, decoded. `tiles` names the scenes to take instead of the split's.

    Raises DataError when anything is missing, damaged, or would be misread.
    """
    if data == "toy":
        if root is not None or tiles:
            raise DataError("--data toy is made, not read: it takes no --root and no tiles")
        return load_toy(split)
    if root is None:
        raise DataError(f"--data {data} needs --root, the folder that holds it")
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (--root must be where {data} was unpacked)")
    return {"potsdam": load_potsdam, "loveda": load_loveda, "folder": load_folder}[data](
        root, split, tuple(tiles)
    )


def load_toy(split: str) -> Dataset:
    scenes = [Scene(f"toy_{seed}", *toy.scene(seed)) for seed in TOY_SCENES[split]]
    return Dataset(POTSDAM, scenes, [])


def load_potsdam(root: Path, split: str, tiles: tuple[str, ...]) -> Dataset:
    """Tiles by the pattern of their base name, wherever in `root` they are."""
    images, full, eroded, notes = {}, {}, {}, []
    for path in sorted(root.rglob("top_potsdam_*.tif")):
        if match := POTSDAM_IMAGE.fullmatch(path.name):
            images[match[1]] = path
        elif match := POTSDAM_LABEL.fullmatch(path.name):
            (eroded if match[2] else full)[match[1]] = path
    if not images:
        raise DataError(f"{root}: holds no top_potsdam_ROW_COLUMN_RGB.tif")
    wanted = tiles or tuple(POTSDAM_TILES[split].split())
    found = [tile for tile in wanted if tile in images]
    missing = [tile for tile in wanted if tile not in images]
    if tiles and missing:
        raise DataError(f"{root}: no image of tile {', '.join(missing)}")
    if not found:
        raise DataError(f"{root}: none of the {split} tiles is here ({', '.join(missing)})")
    if missing:
        notes.append(f"{len(missing)} of the {split} tiles are not there: {', '.join(missing)}")
    scenes = []
    for tile in found:
        path = full.get(tile) or eroded.get(tile)
        if path is None:
            raise DataError(f"{images[tile]}: there is no label of tile {tile} in {root}")
        if path == eroded.get(tile):
            notes.append(f"tile {tile}: only the label with eroded boundaries is there, using it")
        image, label = read_image(images[tile]), read_image(path)
        label, unknown = decode_colours(label, POTSDAM.colours)
        if unknown:
            notes.append(f"{path}: {unknown} pixels have a colour of no class; they are ignored")
        scene = checked_scene(tile, image, label, images[tile], path, POTSDAM)
        without = scene.label
        if path != eroded.get(tile):
            without = None
            if tile in eroded:
                without, _ = decode_colours(read_image(eroded[tile]), POTSDAM.colours)
        scenes.append(scene._replace(eroded=without, path=images[tile]))
    return Dataset(POTSDAM, scenes, notes)


def load_loveda(root: Path, split: str, tiles: tuple[str, ...]) -> Dataset:
    """{Train,Val,Test}/{Urban,Rural}/{images_png,masks_png}/N.png; mask 0 no-data, 1..7 classes."""
    base = root / split.capitalize()
    paths = sorted(base.glob("*/images_png/*.png"), key=lambda p: (p.parts[-3], len(p.stem), p))
    if not paths:
        raise DataError(f"{base}: holds no Urban/images_png/N.png or Rural/images_png/N.png")
    scenes = []
    for path in select(paths, tiles, root):
        mask = path.parent.parent / "masks_png" / path.name
        if split == "test":
            scenes.append(Scene(path.stem, read_image(path), None, path=path))
            continue
        label = read_indices(mask if mask.exists() else missing_mask(path, mask))
        name = f"{path.parts[-3]}_{path.stem}"
        image = read_image(path)
        scene = checked_scene(name, image, label, path, mask, LOVEDA, ignore=0, first=1)
        scenes.append(scene._replace(path=path, domain=path.parts[-3].lower()))
    return Dataset(LOVEDA, scenes, [])


def load_folder(root: Path, split: str, tiles: tuple[str, ...]) -> Dataset:
    """Anyone's own data, in the layout of this file's docstring."""
    classes, ignore = read_classes(root / "classes.json")
    folder = root / split / "images"
    endings = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (the layout is SPLIT/images and SPLIT/masks)")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in endings)
    if not paths:
        raise DataError(f"{folder}: holds no .png, .jpg or .tif image")
    masks = {path.stem: path for path in sorted((root / split / "masks").glob("*"))}
    scenes = []
    for path in select(paths, tiles, folder):
        mask = masks.get(path.stem) or missing_mask(path, root / split / "masks")
        label = read_indices(mask)
        image = read_image(path)
        scenes.append(checked_scene(path.stem, image, label, path, mask, classes, ignore))
    return Dataset(classes, scenes, [])


def select(paths: list[Path], tiles: tuple[str, ...], where: Path) -> list[Path]:
    """The paths whose stem is in `tiles`; all when there are no tiles."""
    if unknown := set(tiles) - {path.stem for path in paths}:
        raise DataError(f"{where}: no image named {', '.join(sorted(unknown))}")
    return [path for path in paths if not tiles or path.stem in tiles]


def missing_mask(image: Path, expected: Path):
    raise DataError(f"{image}: has no mask (looked for it in {expected})")


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


# --- Labels -> classes ---------------------------------------------------------------------------


def decode_colours(rgb: np.ndarray, colours) -> tuple[np.ndarray, int]:
    """Label colours (H, W, 3) -> classes (H, W), and how many pixels have a colour of no class.

    Every ISPRS colour is a corner of the RGB cube, so thresholding each band at 127 decodes also
    the tiles damaged by lossy compression (4_12) or painted 252 for 255 (6_7). Black is the eroded
    boundary: ignored, and not counted.
    """
    corner = np.array([4, 2, 1], np.uint8)
    table = np.full(8, IGNORE - 1, np.uint8)  # a corner that is no class
    table[0] = IGNORE
    for index, colour in enumerate(colours):
        table[(np.array(colour) > 127) @ corner] = index
    label = table[(rgb > 127) @ corner]
    unknown = label == IGNORE - 1
    label[unknown] = IGNORE
    return label, int(unknown.sum())


def checked_scene(
    name, image, label, image_path, label_path, classes, ignore=IGNORE, first=0
) -> Scene:
    """The scene, if image and label fit each other and every label is a class or `ignore`.

    `first` is the file's value for class 0; `ignore` its value for what does not count.
    """
    if image.shape[:2] != label.shape:
        size, image_size = (f"{array.shape[1]} x {array.shape[0]}" for array in (label, image))
        raise DataError(f"{label_path}: is {size} pixels, but its image {image_path} {image_size}")
    last = first + len(classes.names) - 1
    counts = label != ignore
    wrong = label[counts & ((label < first) | (label > last))]
    if wrong.size:
        raise DataError(
            f"{label_path}: has the value {wrong[0]} at {wrong.size} pixels, but the "
            f"{len(classes.names)} classes are {first}..{last} and {ignore} is ignored"
        )
    return Scene(name, image, np.where(counts, label - np.uint8(first), np.uint8(IGNORE)))


# --- Random windows -----------------------------------------------------------------------------


@dataclass
class Windows:
    """Augmented training windows. `batch(step)` is a pure function of (seed, rank, step)."""

    scenes: list[Scene]
    crop: int  # side of a window in pixels
    batch_size: int
    seed: int = 0
    rank: int = 0

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """images (B, C, crop, crop) uint8, labels (B, crop, crop) uint8."""
        images, labels = zip(*(self.window(step, k) for k in range(self.batch_size)), strict=True)
        return np.stack(images).transpose(0, 3, 1, 2), np.stack(labels)

    def window(self, step: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Window k of `step`: a scene by its area, a place, a scale, an orientation, a light."""
        # A counter-based generator: (seed, rank) is the key, (k, step) the counter's upper words.
        bits = np.random.Philox(key=[self.seed, self.rank], counter=[0, 0, k, step])
        rng = np.random.Generator(bits)
        areas = np.array([scene.label.size for scene in self.scenes], float)
        scene = self.scenes[rng.choice(len(areas), p=areas / areas.sum())]
        side = round(self.crop / rng.uniform(0.5, 1.5))  # in the scene's pixels
        image, label = cut(scene, side, rng)
        image, label = resize(image, label, self.crop)
        image, label = turn(image, label, quarter=rng.integers(4), flip=rng.integers(2))
        return change_light(image, rng), label


def cut(scene: Scene, side: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """A random square; where the scene is smaller, mirrored pixels whose label is ignored."""
    H, W = scene.label.shape
    top, left = start(H, side, rng), start(W, side, rng)
    area = np.s_[top : top + side, left : left + side]
    image, label = scene.image[area], scene.label[area]
    if label.shape != (side, side):
        below, right = side - label.shape[0], side - label.shape[1]
        image = np.pad(image, ((0, below), (0, right), (0, 0)), "symmetric")
        label = np.pad(label, ((0, below), (0, right)), constant_values=IGNORE)
    return image, label


def start(length: int, side: int, rng) -> int:
    """Where a window begins on an axis: its centre is anywhere, then it is moved inside.

    Windows that start anywhere inside would hardly ever show a scene's margin: in a scene of 512
    pixels and windows of 256, the outermost pixel in one of 257, a pixel of the middle always.
    """
    return int(np.clip(rng.integers(length) - side // 2, 0, max(length - side, 0)))


def resize(image: np.ndarray, label: np.ndarray, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """Both to (crop, crop): the image bilinearly, the label by nearest neighbour."""
    if label.shape != (crop, crop):
        image = Image.fromarray(image).resize((crop, crop), Image.Resampling.BILINEAR)
        label = Image.fromarray(label).resize((crop, crop), Image.Resampling.NEAREST)
    return np.asarray(image), np.asarray(label)


def turn(image, label, quarter: int, flip: int) -> tuple[np.ndarray, np.ndarray]:
    """One of the eight orientations; seen from above none is more likely than another."""
    image, label = np.rot90(image, quarter), np.rot90(label, quarter)
    return (image[:, ::-1], label[:, ::-1]) if flip else (image, label)


def change_light(image: np.ndarray, rng) -> np.ndarray:
    """Contrast about each band's own mean, exposure and a colour cast, as one table per band.

    About a fixed mid-grey, the contrast of a dark scene would change its brightness and hue by more
    than what tells its classes apart.
    """
    bands = image.shape[2]
    mean = image.mean(axis=(0, 1))
    contrast = rng.uniform(0.8, 1.25)
    exposure = rng.uniform(0.9, 1.1) * rng.uniform(0.98, 1.02, bands)
    table = ((np.arange(256)[:, None] - mean) * contrast + mean) * exposure  # (256, C)
    table = table.clip(0, 255).astype(np.uint8)
    return np.stack([table[image[..., band], band] for band in range(bands)], axis=-1)


def prefetch(windows: Windows, steps: range):
    """Yield (step, images, labels, seconds waited), the next batch being made meanwhile."""
    with ThreadPoolExecutor(1, "windows") as executor:
        upcoming = executor.submit(windows.batch, steps.start) if steps else None
        for step in steps:
            begin = time.perf_counter()
            images, labels = upcoming.result()
            waited = time.perf_counter() - begin
            if step + 1 < steps.stop:
                upcoming = executor.submit(windows.batch, step + 1)
            yield step, images, labels, waited


# --- python data.py -----------------------------------------------------------------------------


def encode_colours(label: np.ndarray, colours) -> np.ndarray:
    """Classes (H, W) -> colours (H, W, 3); IGNORE becomes black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    return table[label]


def write_toy(root: Path, scenes_per_split: int = 3) -> None:
    """Toy scenes as files in the layout of ISPRS Potsdam, under names of its own splits."""
    for folder in ("2_Ortho_RGB", "5_Labels_all"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        for tile, seed in zip(
            POTSDAM_TILES[split].split()[:scenes_per_split], TOY_SCENES[split], strict=False
        ):
            image, label = toy.scene(seed)
            Image.fromarray(image).save(root / "2_Ortho_RGB" / f"top_potsdam_{tile}_RGB.tif")
            label = Image.fromarray(encode_colours(label, POTSDAM.colours))
            label.save(root / "5_Labels_all" / f"top_potsdam_{tile}_label.tif")


@dataclass
class Config:
    command: Literal["toy"] = cli.option("toy", "write toy scenes as files", positional=True)
    root: Path = cli.option(Path("toy"), "the folder to write to")


def main(arguments: list[str]) -> None:
    config = cli.parse(Config, arguments, "Write toy scenes in the layout of ISPRS Potsdam.")
    write_toy(config.root)
    print(f"python train.py --data potsdam --root {config.root}")


if __name__ == "__main__":
    cli.run(main, DataError)
