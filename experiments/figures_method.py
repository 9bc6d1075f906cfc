"""The diagram of the method: one training step, and what remains of it for deployment.

    python -m experiments.figures method            # writes docs/figures/method.png

A branch is a lane of boxes; its colour is the branch's everywhere. The image and its labels are a
toy scene.
"""

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
from support import toy
from support.labels import encode_colours
from support.layouts import POTSDAM
from support.pictures import CNN_COLOUR, TRANSFORMER_COLOUR

HEIGHT = 482
STRIDES = (4, 8, 16, 32)

# Where things stand: columns by their left edge and width, lanes by their upper edge.
STAGES = [(120 + 84 * s, 70) for s in range(4)]
HEAD, LOGITS, RIGHT = (456, 48), (536, 84), (772, 92)
BRANCHING = 750  # where a line leaves the logits for the cross entropy
TRANSFER_DOWN, TRANSFER_UP = 562, 594
CNN_LANE, TRANSFORMER_LANE, LANE = 56, 380, 48  # upper edges, and the height of a box
MIDDLE = (CNN_LANE + TRANSFORMER_LANE + LANE) / 2
SPACE_TOP, SPACE_BOTTOM = 150, 334


def method() -> Sheet:
    """One training step from the image to the losses, and what remains of it for deployment."""
    sheet = Sheet(HEIGHT)
    zones(sheet)
    for top, colour in ((CNN_LANE, CNN_COLOUR), (TRANSFORMER_LANE, TRANSFORMER_COLOUR)):
        lane(sheet, top, colour)
    data(sheet)
    shared_space(sheet)
    transfer(sheet)
    supervision(sheet)
    return sheet


def zones(sheet: Sheet) -> None:
    """What exists in training only, and what is deployed; the image lies outside both."""
    left, right = STAGES[0][0] - 12, WIDTH - 8
    sheet.box(Box(left, 8, right, 352), outline=GREY, dashed=True)
    sheet.box(Box(left, 368, right, 474), TRANSFORMER_TINT, TRANSFORMER_COLOUR, width=2.5)
    above, below = CNN_LANE - 18, TRANSFORMER_LANE + LANE + 29  # baselines
    scales, deployed = "3 x 3, then 5 to 11 positions wide in parallel", "DEPLOYED: best.pt"
    keys = "attention, its keys on a coarser grid"
    for y, name, what, fate, colour, fates_colour in (
        (above, "CNN branch", scales, "TRAINING ONLY", CNN_COLOUR, GREY),
        (below, "Transformer branch", keys, deployed, *2 * [TRANSFORMER_COLOUR]),
    ):
        heading = sheet.text(left + 12, y, name, colour, 17, "ls", bold=True)
        sheet.text(heading.right + 16, y, what, anchor="ls")
        sheet.text(right - 12, y, fate, fates_colour, anchor="rs", bold=True)


def lane(sheet: Sheet, top: float, colour) -> None:
    """A branch: four stages, head, logits. The deployed one is solid, the other one dashed."""
    deployed = colour == TRANSFORMER_COLOUR
    fill, words = (colour, PAPER) if deployed else (CNN_TINT, INK)
    bottom, y = top + LANE, top + LANE / 2
    rows = [[f"stage {s + 1}", f"stride {stride}"] for s, stride in enumerate(STRIDES)]
    rows += [["head"], ["logits"]]
    boxes = [Box(left, top, left + width, bottom) for left, width in (*STAGES, HEAD, LOGITS)]
    for box, lines in zip(boxes, rows, strict=True):
        sheet.box(box, fill, colour, dashed=not deployed)
        sheet.lines(box.x, y, lines, words)
    for before, after in zip(boxes, boxes[1:], strict=False):
        sheet.arrow((before.right, y), (after.left - 1, y), colour=colour)


def data(sheet: Sheet) -> None:
    """The image on the left feeds both branches; so do the labels, on the right, their losses."""
    image, label = toy.scene(0)
    part = slice(64, 320)  # of the scene
    box = Box(8, MIDDLE - 40, 88, MIDDLE + 40)
    sheet.picture(box, image[part, part])
    sheet.text(box.x + 8, box.bottom + 14, "image", anchor="lm", bold=True)
    for edge, lane_top in ((box.top, CNN_LANE), (box.bottom, TRANSFORMER_LANE)):
        y = lane_top + LANE / 2
        sheet.arrow((box.x, edge), (box.x, y), (STAGES[0][0] - 1, y))
    box = labels_box()
    sheet.picture(box, encode_colours(label[part, part], POTSDAM.colours))
    sheet.text(box.x + 8, box.bottom + 14, "labels", anchor="lm", bold=True)


def labels_box() -> Box:
    x, half = RIGHT[0] + RIGHT[1] / 2, 30
    return Box(x - half, MIDDLE - half, x + half, MIDDLE + half)


def shared_space(sheet: Sheet) -> None:
    """Projections of all stages meet here: two alignments and the covariance penalty."""
    left, right = STAGES[0][0], STAGES[3][0] + STAGES[3][1]
    sheet.box(Box(left, SPACE_TOP, right, SPACE_BOTTOM), SPACE_TINT, GREY, dashed=True)
    for start, width in STAGES:
        x = start + width / 2
        sheet.arrow((x, CNN_LANE + LANE), (x, SPACE_TOP - 1), colour=CNN_COLOUR)
        sheet.arrow((x, TRANSFORMER_LANE), (x, SPACE_BOTTOM + 1), colour=TRANSFORMER_COLOUR)
    middle = (left + right) / 2
    sheet.text(middle, SPACE_TOP + 20, "projected into one shared space", size=15, bold=True)
    early = Box(left + 10, SPACE_TOP + 40, middle - 6, SPACE_BOTTOM - 40)
    late = Box(middle + 6, early.top, right - 10, early.bottom)
    for box, rows in (
        (early, ["align stages 1, 2", "both ways, at all", "labelled positions"]),
        (late, ["align stages 3, 4", "to the better branch", "of each region"]),
    ):
        sheet.box(box, PAPER, GREY)
        sheet.lines(box.x, box.y, rows)
    sheet.text(middle, SPACE_BOTTOM - 20, "covariance penalty against collapse")


def transfer(sheet: Sheet) -> None:
    """Each branch teaches the other, at each pixel as much as the gate allows."""
    gate = Box(LOGITS[0] - 28, MIDDLE - 28, LOGITS[0] + LOGITS[1] + 28, MIDDLE + 28)
    top, bottom = CNN_LANE + LANE, TRANSFORMER_LANE
    down, up = TRANSFER_DOWN, TRANSFER_UP
    sheet.arrow((down, top), (down, bottom - 1), colour=CNN_COLOUR, width=4, head=13)
    sheet.arrow((up, bottom), (up, top + 1), colour=TRANSFORMER_COLOUR, width=4, head=13)
    sheet.box(gate, PAPER, INK, width=2)
    sheet.lines(gate.x, gate.y, ["gate r", "who is right here?"])
    rows = ["CNN teaches", "weight r"]
    sheet.lines(down - 12, (gate.bottom + bottom) / 2, rows, CNN_COLOUR, "rm")
    rows = ["Transformer teaches", "weight 1 - r"]
    sheet.lines(up + 12, (gate.top + top) / 2, rows, TRANSFORMER_COLOUR, "lm")


def supervision(sheet: Sheet) -> None:
    """The labels' three uses: a cross entropy for each branch, and the gate."""
    labels, (left, width) = labels_box(), RIGHT
    gate_edge = LOGITS[0] + LOGITS[1] + 29
    sheet.arrow((labels.left, labels.y), (gate_edge, labels.y))
    cnn, transformer = (
        Box(left, MIDDLE + sign * 81 - 21, left + width, MIDDLE + sign * 81 + 21)
        for sign in (-1, 1)
    )
    sheet.arrow((labels.x, labels.top), (labels.x, cnn.bottom + 1))
    sheet.arrow((labels.x, labels.bottom), (labels.x, transformer.top - 1))
    after_logits = LOGITS[0] + LOGITS[1]
    for box, top, colour in (
        (cnn, CNN_LANE, CNN_COLOUR),
        (transformer, TRANSFORMER_LANE, TRANSFORMER_COLOUR),
    ):
        y = top + LANE / 2
        path = (after_logits, y), (BRANCHING, y), (BRANCHING, box.y), (box.left - 1, box.y)
        sheet.arrow(*path, colour=colour)
        sheet.box(box, PAPER, colour, dashed=True)
        sheet.lines(box.x, box.y, ["cross", "entropy"], bold_first=False)
    deployed = Box(left, TRANSFORMER_LANE, left + width, TRANSFORMER_LANE + LANE)
    y = deployed.y
    sheet.arrow((after_logits, y), (left - 1, y), colour=TRANSFORMER_COLOUR)
    sheet.box(deployed, TRANSFORMER_COLOUR, TRANSFORMER_COLOUR)
    sheet.lines(deployed.x, y, ["class map"], PAPER)
