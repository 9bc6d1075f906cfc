"""Aerial data sets as their publishers unpack them: found, checked, decoded once.

    dataset = load("potsdam", root="/data/potsdam", split="train", cache="/data/cache")
    scene = dataset.scenes[0]
    scene.image[0:512, 0:512]                   # (512, 512, C) uint8, read from a memory map

`toy` needs no files; `potsdam`, `vaihingen` and `loveda` read the publishers' folders (layouts.py);
`folder` anyone's own:

    ROOT/classes.json      {"classes": ["road", ...], "ignore": 255, "colours": [[r, g, b], ...]}
    ROOT/{train,val,test}/images/NAME.{png,jpg,tif}
    ROOT/{train,val,test}/masks/NAME.{png,tif}        one channel, values are class indices

There is no patching step: windows.py cuts from the maps. Labels are uint8, 255 is ignored, and what
is no class is an error or is ignored and reported: it never becomes class 0.

    python data.py audit potsdam --root /data/potsdam   # is it fit to train on?
    python data.py toy --root DIR                       # toy scenes as files, in Potsdam's layout

Letters: H W pixels, C channels, K classes.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from support import audit, cli, toy
from support.cache import Cache, Map
from support.labels import (
    CELL,
    MAX_UNKNOWN,
    ROWS,
    UNKNOWN,
    LabelReader,
    count_cells,
    encode_colours,
)
from support.layouts import BANDS, IGNORE, POTSDAM, POTSDAM_TILES, SPLITS, Classes, Found, find
from support.raster import DataError, open_rows


class Scene(NamedTuple):
    name: str
    image: np.ndarray | Map  # (H, W, C) uint8
    label: np.ndarray | Map | None  # (H, W) uint8, 0..K-1 or IGNORE
    eroded: np.ndarray | Map | None = None  # without boundaries; `label` itself if that is so too
    path: Path | None = None  # the image's file
    domain: str = ""  # LoveDA: "urban" or "rural"
    cells: np.ndarray | None = None  # pixels of each class in squares of labels.CELL, (., ., K)


class Dataset(NamedTuple):
    classes: Classes
    scenes: list[Scene]
    notes: list[str]  # what the user should know about what was found
    bands: str = "rgb"  # of the images: one of BANDS


# Scene seeds of the toy splits: far apart, so that no split can grow into another.
TOY_SCENES = {"train": range(0, 24), "val": range(1000, 1006), "test": range(2000, 2012)}

DATA_SETS = ("toy", "potsdam", "vaihingen", "loveda", "folder")


def load(
    data: str,
    root: Path | None = None,
    split: str = "train",
    tiles=(),
    *,
    cache: Path | None = None,
    bands: str | None = None,
    max_unknown: float | None = None,
) -> Dataset:
    """All scenes of one split. `tiles` names the scenes to take instead of the split's.

    With a folder `cache`, arrays are decoded into it once and are Maps; without, they are decoded
    into memory. `bands` asks for one of BANDS where the publisher has several. `max_unknown` is the
    share of a label's pixels whose colour may be of no class (None: MAX_UNKNOWN); they are ignored.

    Raises DataError when anything is missing, damaged, or would be misread.
    """
    if data == "toy":
        if root is not None or tiles or bands not in (None, "rgb"):
            raise DataError("--data toy is made, not read: it takes no --root, no tiles, no bands")
        return load_toy(split)
    if root is None:
        raise DataError(f"--data {data} needs --root, the folder that holds it")
    found = find(data, root, split, tiles, bands)
    if found.faults:
        more = len(found.faults) - 1
        hint = f" (and {more} more: python data.py audit lists them)" if more else ""
        raise DataError(found.faults[0] + hint)
    max_unknown = MAX_UNKNOWN if max_unknown is None else max_unknown
    store = Cache(cache) if cache is not None else None
    scenes, notes = [], found.gaps + found.notes
    with cli.Progress(f"decoding the {split} split") as progress:
        for index, tile in enumerate(found.tiles):
            image = load_image(tile.image, store)
            label, cells = load_label(tile.label, image, tile, found, store, max_unknown, notes)
            eroded = label if tile.eroded == tile.label else None
            if eroded is None and split != "train":  # eroded labels are for scores only
                eroded, _ = load_label(tile.eroded, image, tile, found, store, max_unknown, notes)
            scene = Scene(tile.name, image, label, eroded, tile.image, tile.domain, cells)
            scenes.append(scene)
            progress((index + 1) / len(found.tiles))
    return Dataset(found.classes, scenes, notes, same_bands(scenes, found, bands))


def load_toy(split: str) -> Dataset:
    K, scenes = len(POTSDAM.names), []
    for seed in TOY_SCENES[split]:
        image, label = toy.scene(seed)
        scenes.append(Scene(f"toy_{seed}", image, label, cells=count_cells(label, K)[..., :K]))
    return Dataset(POTSDAM, scenes, [])


# --- Files -> arrays -----------------------------------------------------------------------------


def load_image(path: Path, store: Cache | None) -> np.ndarray | Map:
    """(H, W, C) uint8, decoded at most once if there is a cache."""
    name = store and store.name(path, "image")
    if store and (image := store.find(name)) is not None:
        return image
    rows = open_rows(path)
    return kept(store, name, rows.shape, np.uint8, row_blocks(rows))


def load_label(path, image, tile, found: Found, store: Cache | None, max_unknown: float, notes):
    """The classes (H, W) uint8 of a label file, and how many of each lie in squares of CELL."""
    if path is None:
        return None, None
    K = len(found.classes.names)
    name = store and store.name(path, repr((found.classes, found.coding, max_unknown)))
    label, cells = (store.find(f"{name}.{what}") if store else None for what in ("label", "cells"))
    if label is None or cells is None:
        reader = LabelReader(path, found.classes, found.coding)
        check_size(reader.shape, image.shape, path, tile.image)
        counts = []

        def decoded():
            for rows in row_blocks(reader):
                counts.append(count_cells(rows, K))
                rows[rows == UNKNOWN] = IGNORE
                yield rows
            reader.check(max_unknown)  # before the label gets its name

        label = kept(store, f"{name}.label", reader.shape, np.uint8, decoded())
        cells = np.concatenate(counts)
        cells = kept(store, f"{name}.cells", cells.shape, cells.dtype, [cells])
    check_size(label.shape, image.shape, path, tile.image)
    if unknown := cells[..., K].sum():
        notes.append(f"{path}: {unknown} pixels have a colour of no class; they are ignored")
    return label, np.array(cells[..., :K])


def row_blocks(source):
    """All rows of an image or label, ROWS at a time: decoding needs the memory of a band."""
    for top in range(0, source.shape[0], ROWS):
        yield source.read(top, min(top + ROWS, source.shape[0]))


def kept(store: Cache | None, name: str, shape, dtype, blocks) -> np.ndarray | Map:
    return store.keep(name, shape, dtype, blocks) if store else np.concatenate([*blocks])


def check_size(label, image, label_path: Path, image_path: Path) -> None:
    if label != image[:2]:
        raise DataError(
            f"{label_path}: is {label[1]} x {label[0]} pixels, but its image {image_path} "
            f"{image[1]} x {image[0]}"
        )


def same_bands(scenes: list[Scene], found: Found, asked: str | None) -> str:
    """What the bands of all images are; DataError where they are not the same, or not those."""
    if asked and found.bands not in ("", asked):
        raise DataError(f"there are no {asked} images in this data set, only {found.bands}")
    bands = asked or found.bands or {3: "rgb", 4: "rgbir"}[scenes[0].image.shape[2]]
    for scene in scenes:
        C = scene.image.shape[2]
        if C != BANDS[bands]:
            raise DataError(f"{scene.path}: has {C} bands, but {bands} has {BANDS[bands]}")
    return bands


# --- Random windows ----------------------------------------------------------------------------

RARE_SHARE, SCARCE = 0.25, 0.01


@dataclass
class Windows:
    """Augmented training windows. `batch(step)` is a pure function of (seed, rank, step)."""

    scenes: list[Scene]
    crop: int  # side of a window in pixels
    batch_size: int
    seed: int = 0
    rank: int = 0
    rare: float = 0.0  # share of the windows that are drawn around a pixel of a rare class
    augment: bool = True  # in scale and light; without, windows are turned and flipped only

    def __post_init__(self):
        areas = np.array([scene.label.size for scene in self.scenes], float)
        self.shares = areas / areas.sum()
        self.places = rare_places(self.scenes) if self.rare else []

    def batch(self, step: int, map=map) -> tuple[np.ndarray, np.ndarray]:
        """images (B, C, crop, crop) uint8, labels (B, crop, crop) uint8; `map` may be a pool's."""
        windows = map(self.window, [step] * self.batch_size, range(self.batch_size))
        images, labels = zip(*windows, strict=True)
        return np.stack(images).transpose(0, 3, 1, 2), np.stack(labels)

    def window(self, step: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Window k of `step`: a scene by its area, a place, a scale, an orientation, a light."""
        # A counter-based generator: (seed, rank) is the key, (k, step) the counter's upper words.
        bits = np.random.Philox(key=[self.seed, self.rank], counter=[0, 0, k, step])
        rng = np.random.Generator(bits)
        point = None
        if self.places and rng.random() < self.rare:
            scene, point = self.places[rng.integers(len(self.places))].draw(rng, self.scenes)
        else:
            scene = rng.choice(len(self.shares), p=self.shares)
        side = self.crop  # in the scene's pixels
        if self.augment:
            side = round(side / rng.uniform(0.5, 1.5))
        image, label = cut(self.scenes[scene], side, rng, point)
        image, label = resize(image, label, self.crop)
        image, label = turn(image, label, quarter=rng.integers(4), flip=rng.integers(2))
        if self.augment:
            image = change_light(image, rng)
        return image, label


class Places:
    """Where the pixels of class k are; draws one of them, all alike."""

    def __init__(self, scenes: list[Scene], k: int):
        self.k, counts = k, [scene.cells[..., k] for scene in scenes]
        cells = [np.argwhere(count) for count in counts]
        self.scene = np.repeat(np.arange(len(scenes)), [len(c) for c in cells])
        self.cells = np.concatenate(cells)  # (row, column) of each square that has some
        self.pixels = np.cumsum(np.concatenate([count[count > 0] for count in counts]))

    def draw(self, rng, scenes: list[Scene]) -> tuple[int, tuple[int, int]]:
        """A scene's number, and a row and a column in it."""
        index = np.searchsorted(self.pixels, rng.integers(self.pixels[-1]), side="right")
        scene, (top, left) = self.scene[index], self.cells[index] * CELL
        label = scenes[scene].label[top : top + CELL, left : left + CELL]
        row, column = rng.choice(np.argwhere(label == self.k))
        return scene, (top + row, left + column)


def rare_places(scenes: list[Scene]) -> list[Places]:
    """One for each class that has some pixels, but less than half of an equal share."""
    total = class_pixels(scenes)
    rare = np.nonzero((total > 0) & (total < total.sum() / (2 * len(total))))[0]
    return [Places(scenes, k) for k in rare]


def rare_share(scenes: list[Scene]) -> float:
    """RARE_SHARE where a class that occurs is SCARCE; else 0, it did no good there (NOTES.md)."""
    total = class_pixels(scenes)
    return RARE_SHARE if ((total > 0) & (total < SCARCE * total.sum())).any() else 0.0


def class_pixels(scenes: list[Scene]) -> np.ndarray:
    return sum(scene.cells.sum(axis=(0, 1), dtype=np.int64) for scene in scenes)


def cut(scene: Scene, side: int, rng, point=None) -> tuple[np.ndarray, np.ndarray]:
    """A random square, with `point` in it; where the scene is smaller, mirrored pixels whose label
    is ignored."""
    H, W = scene.label.shape
    y, x = point or (None, None)
    top, left = start(H, side, rng, y), start(W, side, rng, x)
    area = np.s_[top : top + side, left : left + side]
    image, label = scene.image[area], scene.label[area]
    if label.shape != (side, side):
        below, right = side - label.shape[0], side - label.shape[1]
        image = np.pad(image, ((0, below), (0, right), (0, 0)), "symmetric")
        label = np.pad(label, ((0, below), (0, right)), constant_values=IGNORE)
    return image, label


def start(length: int, side: int, rng, point: int | None = None) -> int:
    """Where a window begins on an axis: its centre is anywhere, or `point` is anywhere in it; then
    it is moved inside.

    Windows that start anywhere inside would hardly ever show a scene's margin: in a scene of 512
    pixels and windows of 256, the outermost pixel in one of 257, a pixel of the middle always.
    """
    begin = rng.integers(length) - side // 2 if point is None else point - rng.integers(side)
    return int(np.clip(begin, 0, max(length - side, 0)))


def resize(image: np.ndarray, label: np.ndarray, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """Both to (crop, crop): the image bilinearly, the label by nearest neighbour."""
    if label.shape != (crop, crop):
        size, bilinear = (crop, crop), Image.Resampling.BILINEAR
        if image.shape[2] == 3:
            image = Image.fromarray(image).resize(size, bilinear)
        else:  # band by band: four would be taken for a colour and its transparency
            bands = (Image.fromarray(np.ascontiguousarray(b)) for b in np.moveaxis(image, 2, 0))
            image = np.stack([band.resize(size, bilinear) for band in bands], axis=-1)
        label = Image.fromarray(label).resize(size, Image.Resampling.NEAREST)
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
    mean = [image[..., band].sum() / image[..., band].size for band in range(bands)]  # 20x mean()
    contrast = rng.uniform(0.8, 1.25)
    exposure = rng.uniform(0.9, 1.1) * rng.uniform(0.98, 1.02, bands)
    table = ((np.arange(256)[:, None] - mean) * contrast + mean) * exposure  # (256, C)
    table = table.clip(0, 255).astype(np.uint8)
    return np.stack([table[image[..., band], band] for band in range(bands)], axis=-1)


def prefetch(windows: Windows, steps: range, threads: int = 1):
    """Yield (step, images, labels, seconds waited), the next batch being made meanwhile.

    A batch's windows are made by `threads` threads: most of a window's time is spent in Pillow and
    numpy, which let others run.
    """
    with ThreadPoolExecutor(1, "batch") as ahead, ThreadPoolExecutor(threads, "window") as pool:
        upcoming = ahead.submit(windows.batch, steps.start, pool.map) if steps else None
        for step in steps:
            begin = time.perf_counter()
            images, labels = upcoming.result()
            waited = time.perf_counter() - begin
            if step + 1 < steps.stop:
                upcoming = ahead.submit(windows.batch, step + 1, pool.map)
            yield step, images, labels, waited


# --- python data.py -----------------------------------------------------------------------------


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
    command: Literal["audit", "toy"] = cli.option(None, "what to do", positional=True)
    data: tuple[str, ...] = cli.option((), "audit: the data set", positional=True)
    root: Path = cli.option(None, "the folder to read, or for toy to write to")
    split: Literal["all", *SPLITS] = cli.option("all", "audit this split only")
    tiles: tuple[str, ...] = cli.option((), "audit these tiles only, by name")
    bands: Literal["auto", *BANDS] = cli.option("auto", "where the publisher has several")
    max_unknown: float = cli.option(MAX_UNKNOWN, "share of a label whose colour may be no class")

    def __post_init__(self):
        audited = [name for name in DATA_SETS if name != "toy"]
        if self.command == "audit" and (len(self.data) != 1 or self.data[0] not in audited):
            raise cli.UsageError(f"say what to audit: python data.py audit {' | '.join(audited)}")
        if self.command == "toy" and self.data:
            raise cli.UsageError("python data.py toy takes nothing but --root")
        if self.root is None:
            raise cli.UsageError(f"python data.py {self.command} needs --root, a folder")
        if not 0 <= self.max_unknown <= 1:
            raise cli.UsageError(f"--max-unknown is a share, 0 to 1; got {self.max_unknown}")
        if self.tiles and self.split == "all":
            raise cli.UsageError("--tiles needs --split, the split to which they belong")


def main(arguments: list[str]) -> int | None:
    config = cli.parse(Config, arguments, __doc__.partition("\n")[0])
    if config.command == "audit":
        splits = SPLITS if config.split == "all" else (config.split,)
        bands = None if config.bands == "auto" else config.bands
        options = {"tiles": config.tiles, "bands": bands, "max_unknown": config.max_unknown}
        return audit.report(audit.examine(config.data[0], config.root, splits, **options))
    write_toy(config.root)
    print(f"python train.py --data potsdam --root {config.root}")


if __name__ == "__main__":
    cli.run(main, DataError)
