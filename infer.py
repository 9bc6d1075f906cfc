"""Map whole images with the deployed Transformer, or score it on a data set.

    python infer.py runs/demo/best.pt scene.tif --out maps           # class map and overlay
    python infer.py runs/demo/best.pt --data toy --split test        # scores

An image of any size is cut into overlapping windows. Each axis has weights that rise and fall
linearly across an overlap and add up to exactly 1 at every pixel, so blending needs no second pass:
`predict` walks down the scene and yields each band of rows as soon as nothing can change it, and
the memory it needs depends on the width of the scene and not on its height.

Letters: B batch, C channels, H W pixels, K classes.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import cli
import metrics
import pictures
from checkpoint import CheckpointError
from ctclm import load_transformer
from data import DATA_SETS, Classes, DataError, Dataset, load
from raster import read_image

STRIDE = 32  # of the deepest stage: tiles are mirrored up to a multiple, their logits cut back


# --- Windows over a scene -----------------------------------------------------------------------


def axis_windows(length: int, window: int, overlap: float) -> tuple[list[int], np.ndarray]:
    """Where windows start along an axis, and their weights (number of windows, length).

    Neighbours share at least `overlap` of a window; the last one is moved back to the edge. The
    weights are >= 0, 0 outside the window, and sum to 1 at every pixel.
    """
    window = min(window, length)
    step = max(1, round(window * (1 - overlap)))
    starts = [*range(0, length - window, step), length - window]
    weights = np.zeros((len(starts), length))
    ramp = np.minimum(np.arange(1, window + 1), np.arange(window, 0, -1))
    ramp = np.minimum(ramp, max(1, window - step))  # flat where no neighbour reaches
    for row, start in zip(weights, starts, strict=True):
        row[start : start + window] = ramp
    return starts, weights / weights.sum(axis=0)


@torch.no_grad()
def predict(
    student: Callable[[Tensor], Tensor],
    image: np.ndarray,
    window: int = 512,
    overlap: float = 0.25,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, class probabilities (K, rows, W) float32) from top to bottom.

    image (H, W, C) uint8 of any size; student: images (B, C, H, W) 0..255 -> logits (B, K, ...) at
    any resolution; window in pixels, overlap as a share of it.
    """
    H, W = image.shape[:2]
    rows, row_weights = axis_windows(H, window, overlap)
    columns, column_weights = axis_windows(W, window, overlap)
    height, width = min(window, H), min(window, W)
    pending = None  # (K, height, W): blended rows from `top` on that later windows still add to
    for index, top in enumerate(rows):
        band = None
        for column, left in enumerate(columns):
            tile = image[top : top + height, left : left + width]
            p = probabilities(student, tile, device)  # (K, height, width)
            if band is None:
                band = np.zeros((len(p), height, W), np.float32)
            weight = np.outer(
                row_weights[index, top : top + height],
                column_weights[column, left : left + width],
            )
            band[:, :, left : left + width] += p * weight.astype(np.float32)
        if pending is not None:
            shared = pending.shape[1]
            band[:, :shared] += pending
        following = rows[index + 1] if index + 1 < len(rows) else H
        yield top, band[:, : following - top]
        pending = band[:, following - top :]


def probabilities(student, tile: np.ndarray, device) -> np.ndarray:
    """softmax(logits) of one tile (H, W, C) at its own size, (K, H, W) float32."""
    H, W = tile.shape[:2]
    below, right = -H % STRIDE, -W % STRIDE
    tile = np.pad(tile, ((0, below), (0, right), (0, 0)), "symmetric")
    images = torch.from_numpy(tile).to(device).permute(2, 0, 1)[None].float()
    logits = student(images).float()
    if logits.shape[-2:] != images.shape[-2:]:
        logits = F.interpolate(logits, images.shape[-2:], mode="bilinear")
    return logits.softmax(dim=1)[0, :, :H, :W].cpu().numpy()


def predict_classes(student, image: np.ndarray, progress=None, **options):
    """Class map (H, W) uint8 and the probability of each pixel's class, (H, W) float32."""
    H, W = image.shape[:2]
    classes, confidence = np.empty((H, W), np.uint8), np.empty((H, W), np.float32)
    for top, p in predict(student, image, **options):
        bottom = top + p.shape[1]
        classes[top:bottom] = p.argmax(axis=0)
        confidence[top:bottom] = p.max(axis=0)
        if progress:
            progress(bottom / H)
    return classes, confidence


# --- Scores -------------------------------------------------------------------------------------


def evaluate(student, dataset: Dataset, progress=None, **options) -> dict:
    """Scores of `student` on whole scenes: miou, mf1, oa, kappa, iou, f1, boundary_f1."""
    K = len(dataset.classes.names)
    matrix = torch.zeros(K, K, dtype=torch.int64)
    edges = torch.zeros(K, 4, dtype=torch.int64)
    for index, scene in enumerate(dataset.scenes):
        prediction, _ = predict_classes(student, scene.image, **options)
        matrix += metrics.confusion_matrix(prediction, scene.label, K)
        edges += metrics.boundary_counts(prediction, scene.label, K)
        if progress:
            progress((index + 1) / len(dataset.scenes))
    result = metrics.scores(matrix)
    result["boundary_f1"] = metrics.boundary_f1(edges)["boundary_f1"]
    result["confusion_matrix"] = matrix.tolist()
    return result


def table(result: dict, classes: Classes) -> str:
    """Per-class and mean scores in per cent, as text."""

    def percent(value) -> str:
        return "    -" if value is None else f"{100 * value:5.1f}"

    lines = [f"{'class':16} {'IoU':>5} {'F1':>5}"]
    for name, iou, f1 in zip(classes.names, result["iou"], result["f1"], strict=True):
        lines.append(f"{name:16} {percent(iou)} {percent(f1)}")
    lines.append(f"{'mean':16} {percent(result['miou'])} {percent(result['mf1'])}")
    lines.append(
        f"overall accuracy {percent(result['oa'])}   kappa {percent(result['kappa'])}   "
        f"boundary F1 within 3 pixels {percent(result['boundary_f1'])}"
    )
    return "\n".join(lines)


# --- python infer.py ----------------------------------------------------------------------------


@dataclass
class Config:
    checkpoint: Path = cli.option(None, "best.pt of a run", positional=True)
    images: tuple[Path, ...] = cli.option((), "images to map", positional=True)
    out: Path = cli.option(Path("maps"), "folder for the maps")
    window: int = cli.option(512, "side of a window in pixels, a multiple of 32")
    overlap: float = cli.option(0.25, "share of a window that neighbours have in common, below 0.9")
    confidence: bool = cli.option(False, "also write the probability of each pixel's class, 0..255")
    data: Literal["", *DATA_SETS] = cli.option("", "score on this data set instead")
    root: Path = cli.option(None, "the data set's folder")
    split: Literal["val", "test"] = cli.option("val", "the data set's split")
    device: Literal["auto", "cpu", "cuda"] = cli.option("auto", "where to run")


def main(arguments: list[str]) -> None:
    config = cli.parse(Config, arguments, __doc__.partition("\n")[0])
    if config.window % STRIDE or config.window <= 0:
        raise cli.UsageError(
            f"--window must be a positive multiple of {STRIDE}; got {config.window}"
        )
    if not 0 <= config.overlap < 0.9:
        raise cli.UsageError(f"--overlap must be in [0, 0.9); got {config.overlap}")
    if bool(config.images) == bool(config.data):
        raise cli.UsageError("give images to map, or --data to score on (one of the two)")
    device = cli.pick_device(config.device)
    student = load_transformer(config.checkpoint).to(device)
    options = {"window": config.window, "overlap": config.overlap, "device": device}
    if config.data:
        score(student, config, options)
    else:
        write_maps(student, config, options)


def score(student, config: Config, options: dict) -> None:
    dataset = load(config.data, config.root, config.split)
    if dataset.classes.names != tuple(student.about["classes"]):
        raise DataError(
            f"{config.checkpoint}: was trained on {', '.join(student.about['classes'])}; "
            f"{config.data} has {', '.join(dataset.classes.names)}"
        )
    if dataset.scenes[0].label is None:
        raise DataError(f"the {config.split} split of {config.data} has no labels to score against")
    with cli.Progress(f"{len(dataset.scenes)} scenes") as progress:
        result = evaluate(student, dataset, progress, **options)
    print(f"{config.checkpoint} on {config.data}, {config.split} split\n")
    print(table(result, dataset.classes))


def write_maps(student, config: Config, options: dict) -> None:
    colours = tuple(tuple(colour) for colour in student.about["colours"])
    classes = Classes(tuple(student.about["classes"]), colours)
    stems = [path.stem for path in config.images]
    if twice := {stem for stem in stems if stems.count(stem) > 1}:
        raise cli.UsageError(
            f"two images are called {sorted(twice)[0]}: map them to different folders"
        )
    config.out.mkdir(parents=True, exist_ok=True)
    for path in config.images:
        image, begin = read_image(path), time.perf_counter()
        with cli.Progress(path.name) as progress:
            labels, confidence = predict_classes(student, image, progress, **options)
        suffix = ".tif" if path.suffix.lower() in (".tif", ".tiff") else ".png"
        written = config.out / f"{path.stem}_classes{suffix}"
        pictures.save_class_map(labels, colours, written)
        pictures.overlay(image, labels, classes).save(config.out / f"{path.stem}_overlay.png")
        if config.confidence:
            grey = Image.fromarray((255 * confidence).round().astype(np.uint8))
            grey.save(config.out / f"{path.stem}_confidence{suffix}")
        shares = np.bincount(labels.ravel(), minlength=len(classes.names)) / labels.size
        summary = ", ".join(
            f"{name} {share:.1%}" for name, share in zip(classes.names, shares, strict=True)
        )
        seconds = time.perf_counter() - begin
        print(f"{written}  {image.shape[1]} x {image.shape[0]}, {seconds:.1f} s: {summary}")


if __name__ == "__main__":
    cli.run(main, DataError, CheckpointError)
