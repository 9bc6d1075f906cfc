"""A function of windows, applied to a whole scene: overlapping windows, blended without a seam.

    for part in blend(function, image, window=512, overlap=0.25):
        part.values                             # (K, rows, W) on the device, from top to bottom

An image of any size is cut into overlapping windows. Each axis has weights that rise and fall
linearly across an overlap and add up to exactly 1 at every pixel, so blending needs no second pass.
`blend` walks down the scene one row of windows at a time, and yields rows once no later window can
change them. Windows are computed in batches, and a batch may reach into the next rows of windows.
What is in memory depends on the scene's width and on the batch, not on the scene's height. The
result depends on the windows, not on how the file is stored. Windows without data are left out.

While the device computes, a thread reads the next rows (`ahead`), and another writes the last ones
(`Behind`). `blend` itself never waits for a GPU.

Letters: B batch, C channels, H W pixels, h w those of a window, K values a pixel.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from support.cli import UsageError
from support.raster import Rows

# --- Windows --------------------------------------------------------------------------------------


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


class Part(NamedTuple):
    """Finished rows of a scene."""

    top: int  # the first of them
    pixels: np.ndarray  # (rows, W, C) uint8, of the image
    values: Tensor  # (K, rows, W) float32, on the device; 0 in windows (but one) without data
    valid: np.ndarray | None  # (rows, W) bool: where the image has data; None: everywhere


def blend(
    function: Callable[[Tensor], Tensor],
    image: np.ndarray | Rows,
    window: int,
    overlap: float,
    device: torch.device,
    batch: "BatchSize",
    progress: Callable[[float], None] | None = None,
) -> Iterator[Part]:
    """Yield the parts of a scene from top to bottom.

    function: windows (B, h, w, C) uint8 on `device` -> values (B, K, h, w) float32 that may be
    overwritten; image (H, W, C) uint8 of any size, an array or the rows of a file; window in
    pixels, overlap as a share of it; progress(share) after each window.
    """
    H, W = image.shape[:2]
    rows, row_weights = axis_windows(H, window, overlap)
    columns, column_weights = axis_windows(W, window, overlap)
    height, width = min(window, H), min(window, W)
    weights = [torch.from_numpy(axis).to(device) for axis in (row_weights, column_weights)]
    bands: deque[tuple] = deque()  # rows of windows whose blending is not finished
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def windows() -> Iterator[Tensor | None]:
        first = True  # it is computed in any case, and says what K is
        for band, valid, on_device in ahead(read_bands(image, rows, height, device, stream)):
            bands.append((band, valid))
            for left in columns:
                needed = first or valid is None or valid[:, left : left + width].any()
                yield on_device[:, left : left + width] if needed else None
                first = False

    values = in_batches(function, windows(), batch)
    pending = None  # (K, ., W): blended rows from `top` on that later windows still add to
    for index, top in enumerate(rows):
        blended = None  # (K, height, W)
        for column, left in enumerate(columns):
            p = next(values)  # (K, height, width)
            if blended is None:
                known = p if pending is None else pending  # what K is, if there is no p
                blended = known.new_zeros(len(known), height, W)
            if p is not None:
                p *= torch.outer(weights[0][index], weights[1][column]).float()
                blended[:, :, left : left + width] += p
            if progress:
                progress((index + (column + 1) / len(columns)) / len(rows))
        if pending is not None:
            shared = pending.shape[1]
            blended[:, :shared] += pending
        following = rows[index + 1] if index + 1 < len(rows) else H
        pending = blended[:, following - top :].clone()  # a copy, so that `blended` itself can go
        pixels, valid = (x if x is None else x[: following - top] for x in bands.popleft())
        yield Part(top, pixels, blended[:, : following - top], valid)


def read_bands(
    image: np.ndarray | Rows, tops: list[int], height: int, device: torch.device, stream
) -> Iterator[tuple[np.ndarray, np.ndarray | None, Tensor]]:
    """Rows top..top+height-1 of an image: (height, W, C), where they hold data, and on `device`.

    stream: the caller's, on a GPU; the thread that runs this has its own.
    """
    for top in tops:
        band = np.array(image[top : top + height], order="C")
        valid = image.valid(top, top + height) if isinstance(image, Rows) else None
        with torch.cuda.stream(stream) if stream else nullcontext():
            on_device = upload(band, device)
        yield band, valid, on_device


def upload(pixels: np.ndarray, device: torch.device) -> Tensor:
    """To the device. From pinned memory the copy waits for nothing that the GPU still does."""
    tensor = torch.from_numpy(pixels)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# --- Batches --------------------------------------------------------------------------------------


class BatchSize:
    """How many windows are computed at a time. It shrinks, for all scenes to come, when a GPU's
    memory does not hold so many."""

    def __init__(self, size: int):
        self.size = size

    @classmethod
    def of(cls, size: "BatchSize | int | None", device: str | torch.device) -> "BatchSize":
        """`size`; None is 1 on a CPU, whose cores one window keeps busy, and 16 on a GPU."""
        if isinstance(size, cls):
            return size
        return cls(size or (16 if torch.device(device).type == "cuda" else 1))

    def halve(self) -> None:
        if self.size == 1:
            raise UsageError(
                "the GPU's memory does not hold one window of the scene; "
                "infer.py takes a smaller --window"
            )
        print(
            f"{self.size} windows at a time do not fit into the GPU's memory; "
            f"going on with {self.size // 2}",
            file=sys.stderr,
        )
        self.size //= 2
        torch.cuda.empty_cache()  # blocks in sizes that are no longer asked for


def in_batches(
    function: Callable[[Tensor], Tensor], windows: Iterator[Tensor | None], batch: BatchSize
) -> Iterator[Tensor | None]:
    """function(windows)[i] for each window i in turn, computed `batch.size` at a time; None for
    None."""
    waiting: list[Tensor | None] = []
    while waiting := waiting + [*islice(windows, max(0, batch.size - len(waiting)))]:
        now = waiting[: batch.size]
        computed = [window for window in now if window is not None]
        try:
            values = function(torch.stack(computed)) if computed else ()
        except torch.OutOfMemoryError:
            values = None  # halved below: in here the traceback still holds the batch's maps
        if values is None:
            batch.halve()
            continue
        waiting = waiting[len(now) :]
        values = iter(values)
        yield from (None if window is None else next(values) for window in now)


# --- Threads --------------------------------------------------------------------------------------


def ahead(items: Iterator) -> Iterator:
    """The same items. A thread makes the next one while the caller uses the last one."""
    end = object()
    with ThreadPoolExecutor(1, "ahead") as thread:
        upcoming = thread.submit(next, items, end)
        while (item := upcoming.result()) is not end:
            upcoming = thread.submit(next, items, end)
            yield item


class Behind:
    """Calls in a thread, one after the other, while the caller prepares the next one.

        with Behind() as behind:
            for item in items: behind(write, item)      # waits until the last item is written

    The thread uses a GPU's default stream.

    What a call raises is raised at the next one, or at the end of the block.
    """

    def __enter__(self):
        self.thread, self.last = ThreadPoolExecutor(1, "behind"), None
        return self

    def __call__(self, function: Callable, *arguments) -> None:
        if self.last:
            self.last.result()
        self.last = self.thread.submit(function, *arguments)

    def __exit__(self, error, *_):
        self.thread.shutdown()
        if self.last and error is None:
            self.last.result()
