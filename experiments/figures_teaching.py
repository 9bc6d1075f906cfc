"""Who teaches whom on a toy scene: a short training run, then the gate at every pixel.

    python -m experiments.figures teaching          # trains `tiny` for STEPS steps first

The scene is one of the validation split, so neither branch has been trained on it.
"""

import tempfile
from pathlib import Path

import numpy as np

from data import prefetch
from experiments.figures_sheet import GREY, WIDTH, Box, Sheet
from support.labels import encode_colours
from support.layouts import IGNORE, POTSDAM
from support.pictures import CNN_COLOUR, TRANSFORMER_COLOUR, Sample, gate_colours
from train import Config, prepare, samples

STEPS, SCENE = 500, 1  # of the optimiser; of the validation split
SMALL, LARGE, TOP = 200, 420, 44  # edges of the panels, and the first one's


def teaching() -> Sheet:
    return drawn(trained_sample())


def trained_sample() -> Sample:
    """The middle of a validation scene after a short run, as samples.png of a run would show it."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(Config(steps=STEPS, crop=96, out=Path(folder) / "run"))
        for _, images, labels, _ in prefetch(run.windows, range(STEPS)):
            run.train_step(images, labels)
        return samples(run.model, run.val_set.scenes[SCENE : SCENE + 1])[0]


def drawn(sample: Sample) -> Sheet:
    """Left, image, truth and both branches' errors; right, large, the gate."""
    sheet = Sheet(524)
    truth = encode_colours(sample.truth, POTSDAM.colours)
    panels = {
        "image": sample.image[..., :3],
        "truth": truth,
        "CNN wrong": errors(sample, sample.cnn, CNN_COLOUR),
        "Transformer wrong": errors(sample, sample.transformer, TRANSFORMER_COLOUR),
    }
    for number, (title, pixels) in enumerate(panels.items()):
        left, top = 8 + 212 * (number % 2), TOP + 236 * (number // 2)
        sheet.text(left, top - 12, title, size=15, anchor="lm", bold=True)
        sheet.picture(Box(left, top, left + SMALL, top + SMALL), pixels)
    classes(sheet, TOP + 236 + SMALL + 14)
    left = WIDTH - 8 - LARGE
    sheet.text(left, TOP - 12, "who teaches", size=15, anchor="lm", bold=True)
    sheet.picture(Box(left, TOP, WIDTH - 8, TOP + LARGE), gate_colours(sample.gate))
    scale(sheet, left, TOP + LARGE + 14)
    return sheet


def classes(sheet: Sheet, top: float) -> None:
    """The colours of the truth, in two rows."""
    for k, (name, colour) in enumerate(zip(POTSDAM.names, POTSDAM.colours, strict=True)):
        left, y = 8 + 140 * (k % 3), top + 18 * (k // 3)
        sheet.square(Box(left, y - 6, left + 12, y + 6), colour)
        sheet.text(left + 18, y, name, anchor="lm")


def errors(sample: Sample, classes: np.ndarray, colour) -> np.ndarray:
    """The image in pale grey, and where these classes are wrong in a branch's colour."""
    wrong = (classes != sample.truth) & (sample.truth != IGNORE)
    grey = 130 + sample.image[..., :3].mean(-1, keepdims=True) * 0.45
    return np.where(wrong[..., None], colour, grey).astype(np.uint8)


def scale(sheet: Sheet, left: float, top: float) -> None:
    """The gate's colours from the CNN alone to the Transformer alone."""
    r = np.linspace(1, 0, 101)[None].repeat(8, 0)
    bar = Box(left + 96, top, left + LARGE - 140, top + 14)
    sheet.picture(bar, gate_colours(r))
    sheet.text(bar.left - 10, bar.y, "CNN, r = 1", CNN_COLOUR, anchor="rm")
    sheet.text(bar.right + 10, bar.y, "Transformer, r = 0", TRANSFORMER_COLOUR, anchor="lm")
    sheet.text(bar.x, bar.bottom + 14, "1/2: no difference", GREY)
