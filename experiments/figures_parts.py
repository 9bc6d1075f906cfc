"""Three parts of the model as diagrams: the multi-scale block, attention, the dual cell.

    python -m experiments.figures multiscale attention dual_cell

What the diagrams count (taps, weights, sizes) is taken from the model and its kernels, so that a
change there changes the picture.
"""

import numpy as np
import torch

from ctclm import KEY_REDUCTION, MultiScaleConv
from experiments.figures_sheet import (
    CNN_TINT,
    GREY,
    INK,
    PAPER,
    SPACE_TINT,
    TRANSFORMER_TINT,
    WIDTH,
    Box,
    Sheet,
)
from kernels.upsample import interpolation_matrix
from support.pictures import CNN_COLOUR, TRANSFORMER_COLOUR

LARGEST = MultiScaleConv.SIZES[-1]  # 11


def mixed(colour, share: float) -> tuple[int, ...]:
    """`share` of a colour on white."""
    return tuple(round(share * c + (1 - share) * p) for c, p in zip(colour, PAPER, strict=True))


def grid(sheet: Sheet, left: float, top: float, cell: float, shares: np.ndarray, colour) -> Box:
    """A matrix of squares, each with its share (0..1) of a colour."""
    for (y, x), share in np.ndenumerate(shares):
        place = Box(left + cell * x, top + cell * y, left + cell * (x + 1), top + cell * (y + 1))
        sheet.square(place, mixed(colour, share))
    rows, columns = shares.shape
    return Box(left, top, left + cell * columns, top + cell * rows)


# --- The multi-scale block ------------------------------------------------------------------------


def multiscale() -> Sheet:
    """Above, the kernels whose sum is one; below, where that sum stands in the block."""
    sheet = Sheet(430)
    sizes = (1, *MultiScaleConv.SIZES)
    sheet.text(12, 26, "Parallel kernels are one kernel", CNN_COLOUR, 18, "lm", bold=True)
    words = "linear in the same input, so: pad with zeros, add, convolve once"
    sheet.text(308, 27, words, anchor="lm")
    cell, top, left = 8.6, 52, 12.0
    side, total = cell * LARGEST, np.zeros((LARGEST, LARGEST))
    names = ["identity"] + [f"{n} x {n}" for n in sizes[1:]]
    for i, (size, name) in enumerate(zip(sizes, names, strict=True)):
        covered = np.zeros((LARGEST, LARGEST))
        inner = slice((LARGEST - size) // 2, (LARGEST + size) // 2)
        covered[inner, inner] = 1
        total += covered
        box = grid(sheet, left, top, cell, 0.45 * covered, CNN_COLOUR)
        sheet.text(box.x, box.bottom + 18, name, size=15)
        sign = "+" if i < len(sizes) - 1 else "="
        sheet.text(box.right + 26, box.y, sign, size=24)
        left = box.right + 52
    box = grid(sheet, left, top, cell, total / total.max(), CNN_COLOUR)
    sheet.text(box.x, box.bottom + 18, f"sum, {LARGEST} x {LARGEST}", size=15, bold=True)
    taps = sum(n * n for n in MultiScaleConv.SIZES)
    words = f"for each channel and pixel {LARGEST**2} multiply-adds instead of {taps}"
    sheet.text(WIDTH - 12, top + side + 46, words, anchor="rm")
    block(sheet, 330)
    return sheet


def block(sheet: Sheet, y: float) -> None:
    """MultiScaleBlock from left to right around the height y, with its two residual sums."""
    sheet.text(12, y - 72, "The block", CNN_COLOUR, 18, "lm", bold=True)
    steps = [
        (72, ["1 x 1", "norm, GELU"], 92),
        (184, ["depthwise", "3 x 3"], 86),
        (290, ["their sum", f"{LARGEST} x {LARGEST}"], 96),
        (406, ["1 x 1", "times g1"], 78),
        (564, ["norm", "Conv-FFN", "times g2"], 92),
    ]
    sums = [530, 702]
    boxes = [Box(left, y - 32, left + width, y + 32) for left, _, width in steps]
    sheet.text(24, y, "x", size=18, bold=True)
    edge = 36
    for number, (box, (_, rows, _)) in enumerate(zip(boxes, steps, strict=True)):
        merged = number == 2
        sheet.box(box, CNN_TINT if not merged else CNN_COLOUR, CNN_COLOUR)
        colour = PAPER if merged else INK
        sheet.lines(box.x, box.y, rows, colour, bold_first=merged)
        if number == 4:
            edge = sums[0] + 12
        sheet.arrow((edge, y), (box.left - 1, y), colour=CNN_COLOUR)
        edge = box.right
        if number >= 3:
            sheet.arrow((edge, y), (sums[number - 3] - 12, y), colour=CNN_COLOUR)
    for at, begin in zip(sums, (48, 548), strict=True):
        sheet.disc(at, y, 11, PAPER, CNN_COLOUR)
        sheet.text(at, y - 1, "+", size=18)
        path = (begin, y), (begin, y + 56), (at, y + 56), (at, y + 12)
        sheet.arrow(*path, colour=GREY)
    sheet.arrow((sums[1] + 12, y), (760, y), colour=CNN_COLOUR)
    sheet.text(772, y, "next block", anchor="lm")
    sheet.text(237, y + 76, "in space, at several scales", GREY)
    sheet.text(620, y + 76, "in channels", GREY)


# --- Attention's tall score matrix ----------------------------------------------------------------


def attention() -> Sheet:
    """Left, the shapes of all stages to scale; right, how a program walks along one of them."""
    sheet = Sheet(446)
    crop, colour = 512, TRANSFORMER_COLOUR
    sheet.text(12, 26, "Scores of a head, to scale", colour, 18, "lm", bold=True)
    sheet.text(12, 50, f"a crop of {crop} x {crop} pixels", anchor="lm")
    keys, left = 5.0, 34.0
    for stage, r in enumerate(KEY_REDUCTION):
        N = (crop // (4 * 2**stage)) ** 2
        M = N // r**2
        height = keys * N / M
        sheet.square(Box(left, 78, left + keys, 78 + height), colour)
        sheet.text(left + 14, 86, f"stage {stage + 1}", anchor="lm", bold=True)
        sheet.text(left + 14, 104, f"{N:,}", anchor="lm")
        sheet.text(left + 14, 121, f"x {M}", anchor="lm")
        left += 82
    sheet.text(12, 420, "queries down, keys across", GREY, anchor="lm")
    program(sheet)
    return sheet


def program(sheet: Sheet) -> None:
    colour, left, top = TRANSFORMER_COLOUR, 566, 118
    width, height, tile = 128, 246, 41
    sheet.text(400, 26, "A program keeps the keys", colour, 18, "lm", bold=True)
    sheet.text(400, 50, "queries stream past; no score is ever written", anchor="lm")
    sheet.box(Box(left, top - 44, left + width, top - 10), TRANSFORMER_TINT, colour)
    sheet.text(left + width / 2, top - 27, "k, v: 256 keys")
    sheet.box(Box(left - 66, top, left - 12, top + height), TRANSFORMER_TINT, colour)
    sheet.box(
        Box(left + width + 64, top, left + width + 118, top + height), TRANSFORMER_TINT, colour
    )
    for i in range(6):
        y = top + tile * i
        scores = Box(left, y, left + width, y + tile)
        sheet.square(scores, colour if i == 2 else SPACE_TINT)
        for x in (left - 66, left + width + 64):
            here = Box(x, y, x + 54, y + tile)
            sheet.square(here, mixed(colour, 0.55) if i == 2 else TRANSFORMER_TINT)
    y = top + 2.5 * tile
    sheet.lines(left + width / 2, y, ["one tile", "in registers"], PAPER)
    sheet.arrow((left - 12, y), (left - 1, y), colour=INK)
    sheet.arrow((left + width, y), (left + width + 63, y), colour=INK)
    sheet.text(left + width + 32, y - 12, "softmax")
    sheet.text(left + width + 32, y + 15, "times v")
    sheet.text(left - 39, top - 14, "q", bold=True, size=16)
    sheet.text(left + width + 91, top - 14, "output", bold=True, size=16)
    sheet.arrow((left - 84, top + 8), (left - 84, top + height - 4), colour=GREY)
    sheet.text(left - 94, top + height / 2, "64 queries", GREY, anchor="rm")
    sheet.text(left - 94, top + height / 2 + 18, "at a time", GREY, anchor="rm")
    words = "The usual kernels expect a square; here 256 keys fit into one processor."
    sheet.text(400, 392, words, anchor="lm")
    words = "Backward, queries are cut into slices, or most processors would idle."
    sheet.text(400, 414, words, anchor="lm")


# --- The dual cell --------------------------------------------------------------------------------

PIXEL, LOGITS = 15.5, 4  # a square's side; logits in each direction


def dual_cell() -> Sheet:
    """Left, four logits make 16 pixels; right, a logit's gradient comes from 64 pixels."""
    sheet = Sheet(408)
    n = 4 * LOGITS
    for left, title, words in (
        (74, "Forward: a dual cell", "16 pixels depend on 4 logits alone"),
        (540, "Backward: a gather", "a logit asks the 64 pixels of its 4 dual cells"),
    ):
        sheet.text(left, 26, title, INK, 18, "lm", bold=True)
        sheet.text(left, 50, words, anchor="lm")
    matrix = interpolation_matrix(LOGITS, n, torch.float64, torch.device("cpu")).numpy()
    between = np.zeros((n, n))
    between[6:10, 6:10] = 0.45
    box = grid(sheet, 74, 84, PIXEL, between, CNN_COLOUR)
    cells(sheet, box)
    logits(sheet, box, CNN_COLOUR, {(y, x) for y in (1, 2) for x in (1, 2)})
    for i in range(4):  # the way from the logit before to the one after, in eighths
        at = box.top + PIXEL * (6.5 + i)
        sheet.text(box.left - 8, at, f"{2 * i + 1}/8", CNN_COLOUR, 12, "rm")
    sheet.text(box.x, box.bottom + 20, "the way from one logit to the next:")
    sheet.text(box.x, box.bottom + 40, "z = a + f (b - a), f = 1/8, 3/8, 5/8, 7/8")
    weights = np.outer(matrix[:, 1], matrix[:, 2])
    box = grid(sheet, 540, 84, PIXEL, 0.9 * weights / weights.max(), TRANSFORMER_COLOUR)
    cells(sheet, box)
    logits(sheet, box, TRANSFORMER_COLOUR, {(1, 2)})
    for i, weight in enumerate(matrix[2:10, 1]):
        at = box.top + PIXEL * (2.5 + i)
        sheet.text(box.left - 8, at, f"{round(8 * weight)}/8", TRANSFORMER_COLOUR, 12, "rm")
    sheet.text(box.x, box.bottom + 20, "each gradient is written once,")
    sheet.text(box.x, box.bottom + 40, "in one order, without atomics")
    key(sheet)
    return sheet


def cells(sheet: Sheet, box: Box) -> None:
    """The outlines of all dual cells: their corners are logits, and at the border they are cut."""
    for i in range(LOGITS):
        at = PIXEL * (4 * i + 2)
        sheet.dashes((box.left + at, box.top), (box.left + at, box.bottom), INK, 7)
        sheet.dashes((box.left, box.top + at), (box.right, box.top + at), INK, 7)


def logits(sheet: Sheet, box: Box, colour, named: set[tuple[int, int]]) -> None:
    for y in range(LOGITS):
        for x in range(LOGITS):
            at = box.left + PIXEL * (4 * x + 2), box.top + PIXEL * (4 * y + 2)
            sheet.disc(*at, 6 if (y, x) in named else 4, colour if (y, x) in named else GREY, PAPER)


def key(sheet: Sheet) -> None:
    x, y = 366, 170
    sheet.disc(x, y, 4, GREY, PAPER)
    sheet.text(x + 16, y, "a logit", anchor="lm")
    sheet.square(Box(x - 7, y + 25, x + 7, y + 39), PAPER)
    sheet.text(x + 16, y + 32, "a pixel", anchor="lm")
    sheet.dashes((x - 12, y + 64), (x + 8, y + 64), INK, 7)
    sheet.text(x + 16, y + 64, "dual cells: four", anchor="lm")
    sheet.text(x + 16, y + 82, "logits at corners,", anchor="lm")
    sheet.text(x + 16, y + 100, "cut at the border", anchor="lm")
