"""Random training windows, cut from the scenes of data.py and changed as seen from another flight.

    windows = Windows(dataset.scenes, crop=512, batch_size=8, seed=0)
    images, labels = windows.batch(step)        # (B, C, crop, crop) uint8, (B, crop, crop) uint8

Window k of step s is a pure function of (seed, rank, s, k), so the step number is the whole state
of the data: no sampler to save, no worker to seed, and a resumed run goes on with the same windows.

A share `rare` of the windows is drawn around a pixel of a rare class. A class is rare when it has
less than half the pixels it would have if all had the same: of Potsdam's six, car and clutter. The
class is drawn first, all rare ones alike, then one of its pixels, then where in the window it lies.
To find a pixel without a pass over all labels, data.py has counted the classes in small squares.
`rare_share` says where we do so unasked: where a class has less than a hundredth of the pixels.

Letters: B batch, C channels, H W pixels, K classes.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data import Scene
from labels import CELL
from layouts import IGNORE

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
