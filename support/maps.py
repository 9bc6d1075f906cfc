"""The files of one map: the class of each pixel, how sure it is, and a picture.

    with MapFiles(out, Path("scene.tif"), rows, classes, confidence=True) as files:
        files.add(top, pixels, labels, most, valid)     # from top to bottom
    print(files.summary())

Where the image has no data the class is IGNORE and the confidence 0, which no pixel has otherwise.
These values are declared as the files' no-data values. The picture is transparent there.

Letters: H W pixels, K classes.
"""

import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from support.geotiff import create
from support.images import ImageRows
from support.layouts import IGNORE, Classes
from support.pictures import Overlay
from support.place import georeference
from support.raster import header


class MapFiles:
    """Writes NAME_classes, NAME_confidence and NAME_overlay as the rows of a map come in."""

    def __init__(
        self, out: Path, image: Path, rows: ImageRows, classes: Classes, confidence: bool = False
    ):
        self.out, self.image, self.rows, self.classes = out, image, rows, classes
        self.declared, self.place = rows.no_data.declared, georeference(image)
        self.suffix = ".tif" if header(image).format == "TIFF" else ".png"
        self.overlay = Overlay(rows.shape[:2], classes)
        self.counts = np.zeros(256, np.int64)  # pixels of each class, and of IGNORE
        self.with_confidence, self.begin = confidence, time.perf_counter()

    def path(self, kind: str, suffix: str) -> Path:
        return self.out / f"{self.image.stem}_{kind}{suffix}"

    def __enter__(self) -> "MapFiles":
        (H, W, _), place = self.rows.shape, self.place
        self.confidence_file = None
        with ExitStack() as stack:
            path, none = self.path("classes", self.suffix), IGNORE if self.declared else None
            created = create(path, (H, W), self.classes.colours, place, none)
            self.classes_file = stack.enter_context(created)
            if self.with_confidence:
                path, none = self.path("confidence", self.suffix), 0 if self.declared else None
                created = create(path, (H, W), None, place, none)
                self.confidence_file = stack.enter_context(created)
            self.stack = stack.pop_all()  # nothing has failed
        return self

    def add(self, top: int, pixels, labels: np.ndarray, most: np.ndarray, valid) -> None:
        """Rows from `top` on: the image's pixels (rows, W, C), classes and confidence (rows, W)
        uint8, and where there is data (rows, W) bool, None for everywhere."""
        if valid is not None:
            labels, most = np.where(valid, labels, np.uint8(IGNORE)), most * valid
        self.classes_file.append(labels)
        if self.confidence_file:
            self.confidence_file.append(most)
        self.overlay.add(top, pixels, labels)
        self.counts += np.bincount(labels.ravel(), minlength=256)

    def __exit__(self, kind, error, trace):
        if error is None:
            picture = np.asarray(self.overlay.picture())
            path = self.path("overlay", ".png")
            self.stack.enter_context(create(path, picture.shape)).append(picture)
        return self.stack.__exit__(kind, error, trace)

    def summary(self) -> str:
        """The shares of the classes among the pixels with data, and the share without."""
        H, W, _ = self.rows.shape
        seconds, names = time.perf_counter() - self.begin, self.classes.names
        shares = self.counts[: len(names)] / max(1, self.counts[: len(names)].sum())
        text = ", ".join(f"{name} {share:.1%}" for name, share in zip(names, shares, strict=True))
        text = f"{self.path('classes', self.suffix)}  {W} x {H}, {seconds:.1f} s: {text}"
        if self.declared:
            share = self.counts[IGNORE] / (H * W)
            text += f"\n  no data at {share:.1%} of the pixels: {IGNORE} in the map"
            if doubt := self.rows.no_data.doubt():
                text += f"; {doubt}"
        if self.place.lost:
            text += f"\n  its place is not carried to the map from: {', '.join(self.place.lost)}"
        return text
