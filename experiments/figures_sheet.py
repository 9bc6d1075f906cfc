"""A page to draw diagrams on, with Pillow: texts, boxes, arrows, pictures.

Coordinates are the pixels of a page of the README, which is WIDTH wide; the sheet is drawn SCALE
times as large and stored at half of that, so that it stays sharp on a slide. The sheet keeps the
rectangles of all texts and boxes, so that a test can hold that none is in another's way.
"""

from typing import NamedTuple

from PIL import Image, ImageDraw

from support import pictures

WIDTH = 884
SCALE, STORED = 4, 2  # drawn at 4 times the size, stored at 2

INK, GREY, PALE, PAPER = (30, 30, 30), (120, 120, 120), (190, 190, 190), (255, 255, 255)
CNN_TINT, TRANSFORMER_TINT, SPACE_TINT = (252, 236, 222), (222, 236, 249), (240, 240, 240)


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    @property
    def x(self) -> float:
        return (self.left + self.right) / 2

    @property
    def y(self) -> float:
        return (self.top + self.bottom) / 2


class Text(NamedTuple):
    words: str
    box: Box  # its ink


class Sheet:
    """A white page; every coordinate is in pixels of the README."""

    def __init__(self, height: int):
        self.height = height
        self.image = Image.new("RGB", (SCALE * WIDTH, SCALE * height), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.texts: list[Text] = []
        self.boxes: list[Box] = []

    def text(self, x, y, words: str, colour=INK, size=14, anchor="mm", bold=False) -> Box:
        """One line, and where its ink is; `anchor` is Pillow's: l, m, r, then m or s (baseline)."""
        place, face = (SCALE * x, SCALE * y), pictures.font(SCALE * size)
        stroke = SCALE // 3 if bold else 0  # Pillow's own font has no bold face
        options = {"font": face, "anchor": anchor, "stroke_width": stroke}
        self.draw.text(place, words, colour, **options)
        ink = self.draw.textbbox(place, words, **options)
        self.texts.append(Text(words, Box(*(edge / SCALE for edge in ink))))
        return self.texts[-1].box

    def lines(self, x, y, rows: list[str], colour=INK, anchor="mm", bold_first=True) -> None:
        """Several lines around the height y, the first of them bold."""
        for i, words in enumerate(rows):
            bold = bold_first and i == 0
            height = y + 18 * (i - (len(rows) - 1) / 2)
            self.text(x, height, words, colour, anchor=anchor, bold=bold)

    def box(self, box: Box, fill=PAPER, outline=INK, dashed=False, width=1.5) -> None:
        self.boxes.append(box)
        corners, line = [SCALE * edge for edge in box], round(SCALE * width)
        if not dashed:
            self.draw.rounded_rectangle(corners, SCALE * 5, fill, outline, line)
            return
        self.draw.rectangle(corners, fill)
        for x in (box.left, box.right):
            self.dashes((x, box.top), (x, box.bottom), outline, line)
        for y in (box.top, box.bottom):
            self.dashes((box.left, y), (box.right, y), outline, line)

    def dashes(self, start, end, colour, line: int) -> None:
        """A dashed horizontal or vertical line that begins and ends with a dash."""
        length = abs(end[0] - start[0]) + abs(end[1] - start[1])
        count = max(1, round(length / 8))  # of dashes, with gaps of half their length between
        dash = length / (1.5 * count - 0.5)
        for i in range(count):
            ends = [1.5 * i * dash / length, (1.5 * i + 1) * dash / length]
            points = [
                tuple(SCALE * (a + t * (b - a)) for a, b in zip(start, end, strict=True))
                for t in ends
            ]
            self.draw.line(points, colour, line)

    def arrow(self, *points, colour=INK, width=1.5, head=6) -> None:
        """A line through `points`, horizontal or vertical at its ends, with a tip at the end."""
        path = [[SCALE * x, SCALE * y] for x, y in points]
        tip, before, size = tuple(path[-1]), path[-2], SCALE * head
        axis = 0 if tip[0] != before[0] else 1
        back = size if before[axis] > tip[axis] else -size
        path[-1][axis] += back / 2  # the line stops inside its tip
        self.draw.line([tuple(p) for p in path], colour, round(SCALE * width), joint="curve")
        corners = [list(tip), list(tip)]
        for corner, side in zip(corners, (-0.6, 0.6), strict=True):
            corner[axis] += back
            corner[1 - axis] += side * size
        self.draw.polygon([tip, *map(tuple, corners)], colour)

    def square(self, box: Box, fill) -> None:
        """A cell of a matrix: filled, with a thin outline that is no box of the sheet."""
        corners = [round(SCALE * edge) for edge in box]
        self.draw.rectangle(corners, fill, PALE, width=2)

    def disc(self, x, y, radius, fill, outline) -> None:
        corners = [SCALE * edge for edge in (x - radius, y - radius, x + radius, y + radius)]
        self.draw.ellipse(corners, fill, outline, width=SCALE)

    def picture(self, box: Box, pixels) -> None:
        """An array (H, W, 3) that fills `box`."""
        left, top, right, bottom = (round(SCALE * edge) for edge in box)
        shown = Image.fromarray(pixels).resize((right - left, bottom - top), Image.Resampling.BOX)
        self.image.paste(shown, (left, top))
        self.draw.rectangle((left, top, right, bottom), outline=INK, width=SCALE)

    def finished(self) -> Image.Image:
        size = (STORED * WIDTH, STORED * self.height)
        small = self.image.resize(size, Image.Resampling.BOX)
        return small.quantize(256, dither=Image.Dither.NONE)  # a third of the bytes
