"""Data sets -> scenes -> random training windows.

    dataset = load("potsdam", root="/data/potsdam", split="train", cache="/data/cache")
    scene = dataset.scenes[0]
    scene.image[0:512, 0:512]                   # (512, 512, C) uint8, read from a memory map
    windows = Windows(dataset.scenes, crop=512, batch_size=8, seed=0)
    images, labels = windows.batch(step)        # (B, C, crop, crop) uint8, (B, crop, crop) uint8

`toy` needs no files. `potsdam`, `vaihingen` and `loveda` are read from the folders as their
publishers pack them (support/layouts.py). `folder` is anyone's own data:

    ROOT/classes.json      {"classes": ["road", ...], "ignore": 255, "colours": [[r, g, b], ...]}
    ROOT/{train,val,test}/images/NAME.{png,jpg,tif}
    ROOT/{train,val,test}/masks/NAME.{png,tif}        class indices, or the colours of classes.json

There is no patching step: windows are cut from whole scenes. Labels are uint8, and 255 is ignored.
A pixel that has no class is an error, or it is ignored and reported. It never becomes class 0.
Where an image has no data (support/nodata.py) its label is ignored.

Window k of step s depends on nothing but (seed, rank, s, k). So there is no sampler to save and no
worker to seed, and a resumed run continues with the same windows. The abstract names Potsdam and
LoveDA but says nothing about windows or augmentation. Both are our choice.

A fraction `rare_class_fraction` of the windows is drawn around a pixel of a rare class. A class is
rare when it has less than half the pixels it would have if all classes had the same number: of
Potsdam's six, car and clutter. The class is drawn first, each rare one with the same probability,
then one of its pixels, then the place of that pixel in the window. While labels are decoded their
classes are counted in small squares, so that finding a pixel takes no pass over all labels.

    python data.py audit potsdam --root /data/potsdam   # is it fit to train on?
    python data.py classes DIR                          # a first classes.json from masks
    python data.py toy --root DIR                       # toy scenes as files, in Potsdam's layout

Letters: B batch, C channels, H W pixels, K classes.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from support import audit, classes, cli, toy
from support.cache import Cache, NoCache
from support.decode import Decoder, Pixels
from support.images import open_16_bits
from support.labels import CELL, MAX_UNKNOWN, absent_classes, count_cells
from support.layouts import BANDS, IGNORE, POTSDAM, SPLITS, Classes, SplitFiles, Tile, find_split
from support.machine import keep_freed_memory
from support.progress import Progress
from support.raster import DataError
from support.stretch import Stretch, measure

DATA_SETS = ("toy", "potsdam", "vaihingen", "loveda", "folder")

# --- Data sets ----------------------------------------------------------------------------------


class Scene(NamedTuple):
    name: str
    image: Pixels  # (H, W, C) uint8
    label: Pixels | None  # (H, W) uint8, 0..K-1 or IGNORE
    eroded: Pixels | None = None  # without boundaries, if it is there; `label` if that is eroded
    path: Path | None = None  # the image's file
    domain: str = ""  # LoveDA: "urban" or "rural"
    cells: np.ndarray | None = None  # pixels of each class in squares of labels.CELL, (., ., K)


class Dataset(NamedTuple):
    classes: Classes
    scenes: list[Scene]
    notes: list[str]  # what the user should know about the files
    bands: str = "rgb"  # of the images: one of BANDS
    stretch: Stretch | None = None  # of images of 16 bits


def load(
    data: str,
    root: Path | None = None,
    split: str = "train",
    tiles=(),
    *,
    cache: Path | None = None,
    bands: str | None = None,
    max_unknown: float | None = None,
    stretch: Stretch | tuple[float, ...] | None = None,
) -> Dataset:
    """All scenes of one split. `tiles` names the scenes to take instead of the split's.

    With a folder `cache`, files are decoded into it once and scenes hold MappedArrays. Without it
    they are decoded into memory. `bands` asks for one of BANDS where the publisher has several.
    `max_unknown` is the share of a label's pixels that may have a colour of no class (None:
    MAX_UNKNOWN). These pixels are ignored. `stretch` takes images of 16 bits: LOW and HIGH in per
    cent, measured here, or what was measured before.

    Raises DataError when anything is missing, damaged, or would be misread.
    """
    if data == "toy":
        if root is not None or tiles or bands not in (None, "rgb") or stretch:
            raise DataError(
                "--data toy is made, not read: it takes no --root, no tiles, no bands, no --stretch"
            )
        return load_toy(split)
    if root is None:
        raise DataError(f"--data {data} needs --root, the folder that holds it")
    files = find_split(data, root, split, tiles, bands)
    if files.faults:
        more = len(files.faults) - 1
        hint = f" (and {more} more: python data.py audit lists them)" if more else ""
        raise DataError(files.faults[0] + hint)
    store = NoCache() if cache is None else Cache(cache)
    max_unknown = MAX_UNKNOWN if max_unknown is None else max_unknown
    if stretch and not isinstance(stretch, Stretch):
        stretch = measure((open_16_bits(tile.image) for tile in files.tiles), stretch)
    decoder = Decoder(files.classes, files.encoding, store, max_unknown, stretch or None)
    with_eroded = split != "train"  # eroded labels are for scores only
    scenes, notes = [], files.gaps + files.notes
    with Progress(f"decoding the {split} split") as progress:
        for index, tile in enumerate(files.tiles):
            scene, scene_notes = read_scene(decoder, tile, with_eroded)
            scenes.append(scene)
            notes += scene_notes
            progress((index + 1) / len(files.tiles))
    if decoder.no_data:
        share = decoder.no_data / decoder.decoded
        notes.append(f"{split}: no data at {share:.1%} of the pixels; their labels are ignored")
    if data == "folder":
        check_classes(split, files, scenes, notes)
    bands = common_bands(scenes, files, bands)
    return Dataset(files.classes, scenes, notes, bands, decoder.stretch)


def read_scene(decoder: Decoder, tile: Tile, with_eroded: bool) -> tuple[Scene, tuple[str, ...]]:
    """The scene, and what the user should know about its labels."""
    rows, image = decoder.image(tile.image)
    label = decoder.label(tile.label, tile.image, rows)
    eroded, notes = label, label.notes
    if tile.eroded != tile.label:
        path = tile.eroded if with_eroded else None
        eroded = decoder.label(path, tile.image, rows)
        notes += eroded.notes
    labels = {"label": label.pixels, "eroded": eroded.pixels, "cells": label.cells}
    return Scene(tile.name, image, **labels, path=tile.image, domain=tile.domain), notes


def check_classes(split: str, files: SplitFiles, scenes: list[Scene], notes: list[str]) -> None:
    """A class of classes.json without a pixel: DataError in training, elsewhere a note."""
    labelled = [scene for scene in scenes if scene.label is not None]
    if labelled:
        pixels = count_classes(labelled).tolist()
        ignored = sum(scene.label.size for scene in labelled) - sum(pixels)
        if sentence := absent_classes(files.classes, files.encoding, pixels, ignored):
            if split == "train":
                raise DataError(f"{files.tiles[0].label.parent}: {sentence}")
            notes.append(f"{split}: {sentence}")


def load_toy(split: str) -> Dataset:
    K, scenes = len(POTSDAM.names), []
    for seed in toy.SPLIT_SEEDS[split]:
        image, label = toy.scene(seed)
        scenes.append(Scene(f"toy_{seed}", image, label, cells=count_cells(label, K)[..., :K]))
    return Dataset(POTSDAM, scenes, [])


def common_bands(scenes: list[Scene], files: SplitFiles, asked: str | None) -> str:
    """The bands of all images. DataError where images differ, or have not the bands asked for."""
    if asked and files.bands not in ("", asked):
        raise DataError(f"there are no {asked} images in this data set, only {files.bands}")
    bands = asked or files.bands or {3: "rgb", 4: "rgbir"}[scenes[0].image.shape[2]]
    for scene in scenes:
        C = scene.image.shape[2]
        if C != BANDS[bands]:
            raise DataError(f"{scene.path}: has {C} bands, but {bands} has {BANDS[bands]}")
    return bands


# --- Scenes -> random windows -------------------------------------------------------------------


@dataclass
class Windows:
    """Augmented training windows. `batch(step)` is a pure function of (seed, rank, step)."""

    scenes: list[Scene]
    crop: int  # side of a window in pixels
    batch_size: int
    seed: int = 0
    rank: int = 0
    rare_class_fraction: float = 0.0  # of the windows, drawn around a pixel of a rare class
    augment: bool = True  # flips, turns, scale and light; False: flips and turns only

    def __post_init__(self):
        areas = np.array([scene.label.size for scene in self.scenes], float)
        self.area_shares = areas / areas.sum()
        self.rare_classes = rare_class_pixels(self.scenes) if self.rare_class_fraction else []

    def batch(self, step: int, map=map) -> tuple[np.ndarray, np.ndarray]:
        """images (B, C, crop, crop) uint8, labels (B, crop, crop) uint8.

        `map` may be a thread pool's: the windows are the same.
        """
        windows = map(self.window, [step] * self.batch_size, range(self.batch_size))
        images, labels = zip(*windows, strict=True)
        return np.stack([image.transpose(2, 0, 1) for image in images]), np.stack(labels)

    def window(self, step: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Window k of `step`: image (crop, crop, C) uint8, label (crop, crop) uint8."""
        # A counter-based generator: (seed, rank) is the key, (k, step) the counter's upper words.
        bits = np.random.Philox(key=[self.seed, self.rank], counter=[0, 0, k, step])
        rng = np.random.Generator(bits)
        point = None
        if self.rare_classes and rng.random() < self.rare_class_fraction:
            pixels = self.rare_classes[rng.integers(len(self.rare_classes))]
            scene, point = pixels.draw(rng, self.scenes)
        else:
            scene = rng.choice(len(self.area_shares), p=self.area_shares)
        side = self.crop  # in the scene's pixels
        if self.augment:
            side = round(side / rng.uniform(0.5, 1.5))
        image, label = random_crop(self.scenes[scene], side, rng, point)
        image, label = resize(image, label, self.crop)
        quarter_turns, flip = rng.integers(4), rng.integers(2)
        image, label = flip_and_rotate(image, label, quarter_turns, flip)
        if self.augment:
            image = photometric_jitter(image, rng)
        return image, label


class ClassPixels:
    """Where the pixels of class k lie; `draw` gives each of them with the same probability."""

    def __init__(self, scenes: list[Scene], k: int):
        self.k, counts = k, [scene.cells[..., k] for scene in scenes]
        cells = [np.argwhere(count) for count in counts]
        self.scene = np.repeat(np.arange(len(scenes)), [len(c) for c in cells])
        self.cells = np.concatenate(cells)  # (row, column) of each square that has some
        self.cumulative = np.cumsum(np.concatenate([count[count > 0] for count in counts]))

    def draw(self, rng, scenes: list[Scene]) -> tuple[int, tuple[int, int]]:
        """The index of a scene, and a row and a column in it."""
        pixel = rng.integers(self.cumulative[-1])
        index = np.searchsorted(self.cumulative, pixel, side="right")
        scene, (top, left) = self.scene[index], self.cells[index] * CELL
        label = scenes[scene].label[top : top + CELL, left : left + CELL]
        row, column = rng.choice(np.argwhere(label == self.k))
        return scene, (top + row, left + column)


def rare_class_pixels(scenes: list[Scene]) -> list[ClassPixels]:
    """One for each class that has some pixels, but less than half of an equal share."""
    total = count_classes(scenes)
    rare = np.nonzero((total > 0) & (total < total.sum() / (2 * len(total))))[0]
    return [ClassPixels(scenes, k) for k in rare]


def default_rare_class_fraction(scenes: list[Scene]) -> float:
    """0.25 where a class has less than a hundredth of the pixels, but some; else 0.

    On data without so rare a class, windows around rare classes did no good (experiments/NOTES.md).
    """
    total = count_classes(scenes)
    return 0.25 if ((total > 0) & (total < 0.01 * total.sum())).any() else 0.0


def class_weights(scenes: list[Scene]) -> tuple[float, ...]:
    """share^(-1/2) of each class, its share being that of the labelled pixels, scaled to a mean of
    1 over these pixels. A class without pixels has 1, which multiplies nothing."""
    total = count_classes(scenes)
    root = np.sqrt(total / total.sum())
    weights = np.divide(1, root * root.sum(), out=np.ones(len(root)), where=root > 0)
    return tuple(weights.round(4).tolist())


def count_classes(scenes: list[Scene]) -> np.ndarray:
    """Pixels of each class in all scenes, (K,) int64."""
    return sum(scene.cells.sum(axis=(0, 1), dtype=np.int64) for scene in scenes)


def random_crop(scene: Scene, side: int, rng, point=None) -> tuple[np.ndarray, np.ndarray]:
    """A random square of a scene, (side, side, C) and (side, side), with the pixel `point` in it.

    Where the scene is smaller than `side`, the image is continued by mirrored pixels, whose label
    is IGNORE.
    """
    H, W = scene.label.shape
    y, x = point or (None, None)
    top, left = window_start(H, side, rng, y), window_start(W, side, rng, x)
    area = np.s_[top : top + side, left : left + side]
    image, label = scene.image[area], scene.label[area]
    if label.shape != (side, side):
        below, right = side - label.shape[0], side - label.shape[1]
        image = np.pad(image, ((0, below), (0, right), (0, 0)), "symmetric")
        label = np.pad(label, ((0, below), (0, right)), constant_values=IGNORE)
    return image, label


def window_start(length: int, side: int, rng, point: int | None = None) -> int:
    """Where a window begins on an axis of `length` pixels.

    Its centre is anywhere on the axis, or `point` is anywhere in it. Then it is moved inside.
    Windows that start anywhere inside would hardly ever show a scene's margin: in a scene of 512
    pixels and windows of 256, one window in 257 would show the outermost pixel, and all of them the
    middle one.
    """
    start = rng.integers(length) - side // 2 if point is None else point - rng.integers(side)
    return int(np.clip(start, 0, max(length - side, 0)))


def resize(image: np.ndarray, label: np.ndarray, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """Both to (crop, crop): the image bilinearly, the label by nearest neighbour."""
    if label.shape != (crop, crop):
        size = (crop, crop)
        # Pillow's takes 2.5 times as long, and four bands for a colour and its transparency.
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        image = pixels[0].permute(1, 2, 0).numpy()
        label = np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
    return image, label


def flip_and_rotate(image, label, quarter_turns: int, flip: int) -> tuple[np.ndarray, np.ndarray]:
    """One of the eight orientations of a square. In aerial images all are equally likely."""
    image, label = np.rot90(image, quarter_turns), np.rot90(label, quarter_turns)
    return (image[:, ::-1], label[:, ::-1]) if flip else (image, label)


def photometric_jitter(image: np.ndarray, rng) -> np.ndarray:
    """Random contrast about each band's own mean, exposure and colour cast, as a table per band.

    Contrast about a fixed mid-grey would change the brightness and hue of a dark scene by more than
    the difference between its classes.
    """
    bands = image.shape[2]
    mean = [image[..., band].sum() / image[..., band].size for band in range(bands)]  # 20x mean()
    contrast = rng.uniform(0.8, 1.25)
    exposure = rng.uniform(0.9, 1.1) * rng.uniform(0.98, 1.02, bands)
    table = ((np.arange(256)[:, None] - mean) * contrast + mean) * exposure  # (256, C)
    table = table.clip(0, 255).astype(np.uint8)
    jittered = [table[:, band].take(image[..., band]) for band in range(bands)]
    return np.stack(jittered).transpose(1, 2, 0)


def prefetch(windows: Windows, steps: range, threads: int = 1):
    """Yield (step, images, labels, seconds waited) while the next batch is being made.

    `threads` threads make the windows of a batch. Most of a window's time is spent in PyTorch
    and numpy, which release the interpreter's lock.
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


@dataclass
class Config:
    command: Literal["audit", "classes", "toy"] = cli.option(
        None, "audit, classes or toy", positional=True
    )
    data: tuple[str, ...] = cli.option(
        (), "audit: the data set; classes: the folder of masks", positional=True
    )
    root: Path = cli.option(None, "the folder to read, or for toy to write to")
    split: Literal["all", *SPLITS] = cli.option("all", "audit this split only")
    tiles: tuple[str, ...] = cli.option((), "audit these tiles only, by name")
    bands: Literal["auto", *BANDS] = cli.option("auto", "where the publisher has several")
    max_unknown: float = cli.option(MAX_UNKNOWN, "share of a label whose colour may be no class")
    stretch: tuple[float, ...] = cli.option((), "for images of 16 bits: LOW HIGH in per cent")

    def __post_init__(self):
        audited, is_one = [name for name in DATA_SETS if name != "toy"], len(self.data) == 1
        known = self.command != "audit" or (is_one and self.data[0] in audited)
        cli.require(known, f"say what to audit: python data.py audit {' | '.join(audited)}")
        nothing = self.command != "toy" or not self.data
        cli.require(nothing, "python data.py toy takes nothing but --root")
        if self.command == "classes":
            one = is_one and self.root is None
            cli.require(one, "say where the masks are: python data.py classes DIR")
        else:
            there = self.root is not None
            cli.require(there, f"python data.py {self.command} needs --root, a folder")
        is_share = 0 <= self.max_unknown <= 1
        cli.require(is_share, f"--max-unknown is a share, 0 to 1; got {self.max_unknown}")
        belong = not self.tiles or self.split != "all"
        cli.require(belong, "--tiles needs --split, the split to which they belong")


def main(arguments: list[str]) -> int | None:
    config = cli.parse(Config, arguments, __doc__.partition("\n")[0])
    keep_freed_memory()
    if config.command == "audit":
        splits = SPLITS if config.split == "all" else (config.split,)
        bands = None if config.bands == "auto" else config.bands
        options = {"tiles": config.tiles, "bands": bands, "max_unknown": config.max_unknown}
        options |= {"stretch": config.stretch}
        return audit.report(audit.examine(config.data[0], config.root, splits, **options))
    if config.command == "classes":
        print("\n".join(classes.propose(Path(config.data[0]))))
        return None
    toy.write_files(config.root)
    print(f"python train.py --data potsdam --root {config.root}")


if __name__ == "__main__":
    cli.run(main, DataError)
