"""A whole scene through the deployed Transformer, window by window.

    for top, p in predict(student, open_rows("scene.tif")):     # p (K, rows, W), from top to bottom
        ...

An image of any size is cut into overlapping windows. Each axis has weights that rise and fall
linearly across an overlap and add up to exactly 1 at every pixel, so blending needs no second pass:
`predict` walks down the scene, reads the rows of one row of windows at a time, and yields each band
of rows as soon as nothing can change it. The memory it needs depends on the width of the scene and
not on its height. The windows decide the result; how the file is cut into strips does not.

Letters: B batch, C channels, H W pixels, K classes.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raster import Rows

STRIDE = 32  # of the deepest stage: tiles are mirrored up to a multiple, their logits cut back


def axis_windows(length: int, window: int, overlap: float) -> tuple[list[int], np.ndarray]:
    """Where windows start along an axis, and the weights in each (number of windows, window).

    Neighbours share at least `overlap` of a window; the last one is moved back to the edge. Weights
    are > 0, and at every pixel those of the windows that hold it sum to 1.
    """
    window = min(window, length)
    step = max(1, round(window * (1 - overlap)))
    starts = [*range(0, length - window, step), length - window]
    ramp = np.minimum(np.arange(1, window + 1), np.arange(window, 0, -1))
    ramp = np.minimum(ramp, max(1, window - step))  # flat where no neighbour reaches
    total = np.zeros(length)
    for start in starts:
        total[start : start + window] += ramp
    return starts, np.stack([ramp / total[start : start + window] for start in starts])


@torch.no_grad()
def predict(
    student: Callable[[Tensor], Tensor],
    image: np.ndarray | Rows,
    window: int = 512,
    overlap: float = 0.25,
    device: str | torch.device = "cpu",
    tta: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, class probabilities (K, rows, W) float32) from top to bottom.

    image (H, W, C) uint8 of any size, an array or the rows of a file; student: images (B, C, H, W)
    0..255 -> logits (B, K, ...) at any resolution; window in pixels, overlap as a share of it; tta:
    the mean over the eight orientations of each window; progress(share) after each row of windows.
    """
    H, W = image.shape[:2]
    rows, row_weights = axis_windows(H, window, overlap)
    columns, column_weights = axis_windows(W, window, overlap)
    height, width = min(window, H), min(window, W)
    pending = None  # (K, ., W): blended rows from `top` on that later windows still add to
    for index, top in enumerate(rows):
        strip = image[top : top + height]  # (height, W, C)
        band = None
        for column, left in enumerate(columns):
            p = probabilities(student, strip[:, left : left + width], device, tta)
            if band is None:
                band = np.zeros((len(p), height, W), np.float32)
            p *= np.outer(row_weights[index], column_weights[column]).astype(np.float32)
            band[:, :, left : left + width] += p
            if progress:
                progress((index + (column + 1) / len(columns)) / len(rows))
        if pending is not None:
            shared = pending.shape[1]
            band[:, :shared] += pending
        following = rows[index + 1] if index + 1 < len(rows) else H
        pending = band[:, following - top :].copy()  # so that the band itself can go
        yield top, band[:, : following - top]


def probabilities(student, tile: np.ndarray, device, tta: bool = False) -> np.ndarray:
    """softmax(logits) of one tile (H, W, C) at its own size, (K, H, W) float32.

    With `tta` the mean over flips and quarter turns: seen from above, no orientation is special.
    """
    if tta:
        total = 0
        for quarter in range(4):
            turned = np.rot90(tile, quarter)
            p = probabilities(student, turned, device)
            p = p + probabilities(student, turned[:, ::-1], device)[:, :, ::-1]
            total = total + np.rot90(p, -quarter, axes=(1, 2))
        return total / np.float32(8)
    H, W = tile.shape[:2]
    below, right = -H % STRIDE, -W % STRIDE
    tile = np.pad(tile, ((0, below), (0, right), (0, 0)), "symmetric")
    images = torch.from_numpy(tile).to(device).permute(2, 0, 1)[None].float()
    logits = student(images).float()
    if logits.shape[-2:] != images.shape[-2:]:
        logits = F.interpolate(logits, images.shape[-2:], mode="bilinear")
    return logits.softmax(dim=1)[0, :, :H, :W].cpu().numpy()


def predict_classes(student, image: np.ndarray | Rows, **options):
    """Class map (H, W) uint8 and the probability of each pixel's class, (H, W) float32."""
    H, W = image.shape[:2]
    classes, confidence = np.empty((H, W), np.uint8), np.empty((H, W), np.float32)
    for top, p in predict(student, image, **options):
        bottom = top + p.shape[1]
        classes[top:bottom] = p.argmax(axis=0)
        confidence[top:bottom] = p.max(axis=0)
    return classes, confidence
