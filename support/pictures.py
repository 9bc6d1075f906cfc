"""Pictures of the programs' results, drawn with Pillow: overlays, samples, curves, differences.

    overlay = Overlay((H, W), classes)                   # a class map over its image, and a legend
    overlay.add(top, image_rows, label_rows)             # block by block of any scene
    overlay.picture().save("overlay.png")
    samples(rows, classes).save("samples.png")           # both branches' maps, and who teaches
    curves(log, panels).save("curves.png")
    forest(rows, title).save("differences.png")          # differences with their intervals
    row({"image": image, "error": heat(error)})          # panels, charts and bars of notebooks
    line_chart(title, [Series(name, points, colour)], x_label);  bars(title, groups, values)

Branches have the same two colours everywhere. Theirs and PALETTE's are those of Okabe and Ito
("Color universal design", 2008), which people with any common colour blindness tell apart.

Letters: H W pixels.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from support.labels import encode_colours
from support.layouts import IGNORE, Classes

INK, GREY, PAPER = (30, 30, 30), (200, 200, 200), (255, 255, 255)
CNN_COLOUR, TRANSFORMER_COLOUR = (214, 96, 20), (20, 108, 190)  # orange, blue: in every picture
PALETTE = INK, (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0)  # for all others
DARK = (8, 32, 80)  # of the largest value of a heat map
LARGEST_OVERLAY = 4096  # pixels on a side; only the class map itself keeps every pixel


def font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


# --- Overlays -----------------------------------------------------------------------------------


class Overlay:
    """An image with its class map over it at 45 %, and a legend of the classes that occur. Where
    the image has no data it is transparent.

    It is made from blocks of rows. Of a scene larger than LARGEST_OVERLAY it shows, and keeps in
    memory, only every n-th pixel of every n-th row.
    """

    def __init__(self, shape: tuple[int, int], classes: Classes):
        """shape: (H, W) of the scene."""
        self.classes, self.step = classes, math.ceil(max(shape) / LARGEST_OVERLAY)
        height, width = (math.ceil(length / self.step) for length in shape)
        self.shown = np.zeros((height, width, 4), np.uint8)
        self.present: set[int] = set()  # classes

    def add(self, top: int, image: np.ndarray, labels: np.ndarray) -> None:
        """The rows from `top` on: image (rows, W, C), labels (rows, W), IGNORE without data."""
        first = -top % self.step  # the first of these rows that is shown
        shown = labels[first :: self.step, :: self.step]
        colours = Image.fromarray(encode_colours(shown, self.classes.colours))
        pixels = np.ascontiguousarray(image[first :: self.step, :: self.step, :3])
        row = (top + first) // self.step
        blended = Image.blend(Image.fromarray(pixels), colours, 0.45)
        part = self.shown[row : row + len(shown)]
        part[..., :3], part[..., 3] = np.asarray(blended), 255
        part[shown == IGNORE] = 0
        self.present |= {*np.flatnonzero(np.bincount(shown.ravel())).tolist()}

    def picture(self) -> Image.Image:
        """RGB, or RGBA if some pixels have no data. All rows must have been added."""
        classes, present = self.classes, sorted(self.present - {IGNORE})
        key = legend([(classes.names[i], classes.colours[i]) for i in present])
        opaque = IGNORE not in self.present
        shown = Image.fromarray(self.shown[..., :3] if opaque else self.shown)
        size = max(shown.width, key.width), shown.height + key.height
        picture = Image.new(shown.mode, size, PAPER)
        picture.paste(shown, (0, 0))
        picture.paste(key, (0, shown.height))
        return picture


def class_legend(classes: Classes, *more: tuple[str, tuple[int, int, int]]) -> Image.Image:
    return legend([*zip(classes.names, classes.colours, strict=True), *more])


def legend(entries: list[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    """Coloured squares with names, in one row."""
    face, x = font(14), 8
    widths = [30 + math.ceil(face.getlength(name)) for name, _ in entries]
    key = Image.new("RGB", (sum(widths) + 16, 26), PAPER)
    draw = ImageDraw.Draw(key)
    for (name, colour), width in zip(entries, widths, strict=True):
        draw.rectangle((x, 6, x + 13, 19), fill=tuple(colour), outline=INK)
        draw.text((x + 18, 13), name, INK, face, anchor="lm")
        x += width
    return key


# --- Columns of panels --------------------------------------------------------------------------


class Sample(NamedTuple):
    image: np.ndarray  # (H, W, 3) uint8
    truth: np.ndarray  # (H, W) uint8
    cnn: np.ndarray  # (H, W) uint8
    transformer: np.ndarray  # (H, W) uint8
    gate: np.ndarray  # (H, W) float; 1: the CNN teaches, 0: the Transformer teaches, NaN: ignored


def middles(scenes, smallest: int, rows: int = 3, side: int = 256) -> list[tuple]:
    """(image (H, W, C), label (H, W)) of the middle of the first scenes of at least `smallest`.

    H and W are multiples of 32, up to `side`."""
    found = []
    for scene in [s for s in scenes if min(s.label.shape) >= smallest][:rows]:
        H, W = (min(side, length) // 32 * 32 for length in scene.label.shape)
        top, left = (scene.label.shape[0] - H) // 2, (scene.label.shape[1] - W) // 2
        area = np.s_[top : top + H, left : left + W]
        found.append((scene.image[area], scene.label[area]))
    return found


def samples(rows: list[Sample], classes: Classes) -> Image.Image:
    """Per sample: image, truth, both branches' maps, who teaches, the Transformer's errors."""

    def errors(row: Sample) -> np.ndarray:
        wrong = (row.truth != row.transformer) & (row.truth != IGNORE)
        return np.where(wrong[..., None], (220, 30, 30), row.image[..., :3] // 2 + 96)

    columns = {
        "image": [row.image for row in rows],
        "truth": [encode_colours(row.truth, classes.colours) for row in rows],
        "CNN": [encode_colours(row.cnn, classes.colours) for row in rows],
        "Transformer": [encode_colours(row.transformer, classes.colours) for row in rows],
        "who teaches": [gate_colours(row.gate) for row in rows],
        "Transformer wrong": [errors(row) for row in rows],
    }
    teachers = ("CNN teaches", CNN_COLOUR), ("Transformer teaches", TRANSFORMER_COLOUR)
    return sheet(columns, class_legend(classes, *teachers))


def side_by_side(columns: dict[str, list[np.ndarray]], classes: Classes) -> Image.Image:
    """Crops under the titles of their columns, twice as large; (H, W) classes or (H, W, 3)."""

    def enlarged(crop: np.ndarray) -> np.ndarray:
        shown = crop if crop.ndim == 3 else encode_colours(crop, classes.colours)
        return shown.repeat(2, axis=0).repeat(2, axis=1)

    shown = {title: [enlarged(crop) for crop in crops] for title, crops in columns.items()}
    return sheet(shown, class_legend(classes))


def row(panels: dict[str, np.ndarray], side: int = 192, key: Image.Image | None = None):
    """Panels (H, W, 3) beside each other under their titles, the longer edge of each `side` pixels;
    single pixels stay visible."""

    def resized(panel: np.ndarray) -> np.ndarray:
        height, width = (round(side * n / max(panel.shape[:2])) for n in panel.shape[:2])
        shown = Image.fromarray(np.ascontiguousarray(panel[..., :3]))
        larger = height * width > shown.height * shown.width
        how = Image.Resampling.NEAREST if larger else Image.Resampling.BOX
        return np.asarray(shown.resize((width, height), how))

    shown = {title: [resized(panel)] for title, panel in panels.items()}
    return reduced(sheet(shown, key or Image.new("RGB", (1, 1), PAPER)))


def reduced(picture: Image.Image) -> Image.Image:
    """In 126 colours of its own and the exact INK and PAPER: a third of the bytes as a PNG."""
    small = picture.quantize(126, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    pixels, before = np.array(small), np.asarray(picture)
    for index, colour in ((126, INK), (127, PAPER)):
        pixels[(before == colour).all(-1)] = index
    palette = np.zeros((128, 3), np.uint8)
    palette[: len(small.getpalette()) // 3] = np.reshape(small.getpalette(), (-1, 3))[:128]
    palette[126:] = INK, PAPER
    result = Image.fromarray(pixels, "P")
    result.putpalette(palette.tobytes())
    return result


def sheet(columns: dict[str, list[np.ndarray]], key: Image.Image) -> Image.Image:
    """Panels (H, W, 3 or more bands) one below the other under their titles, a legend below all."""
    wide, high = (max(p.shape[i] for panels in columns.values() for p in panels) for i in (1, 0))
    gap, top, count = 6, 26, max(map(len, columns.values()))
    width = max(gap + len(columns) * (wide + gap), key.width)
    image = Image.new("RGB", (width, top + count * (high + gap) + key.height), PAPER)
    draw = ImageDraw.Draw(image)
    for column, (title, panels) in enumerate(columns.items()):
        x = gap + column * (wide + gap)
        draw.text((x, 4), title, INK, font(15))
        for number, panel in enumerate(panels):
            shown = Image.fromarray(panel[..., :3].astype(np.uint8))
            image.paste(shown, (x, top + number * (high + gap)))
    image.paste(key, (0, image.height - key.height))
    return image


def gate_colours(gate: np.ndarray) -> np.ndarray:
    """The gate r (H, W) -> (H, W, 3) uint8.

    The CNN's colour at r = 1, white at 1/2, the Transformer's at 0, and black at NaN.
    """
    r = np.nan_to_num(gate)[..., None]
    strength = np.abs(2 * r - 1)
    colour = np.where(r > 0.5, CNN_COLOUR, TRANSFORMER_COLOUR)
    shown = strength * colour + (1 - strength) * np.array(PAPER)
    return np.where(np.isnan(gate)[..., None], 0, shown).astype(np.uint8)


def heat(values: np.ndarray, largest: float | None = None) -> np.ndarray:
    """(H, W) -> (H, W, 3) uint8, from white at 0 to dark blue at `largest` (the largest value)."""
    values = np.asarray(values, float)
    share = (values / (largest or values.max() or 1)).clip(0, 1)[..., None]
    return ((1 - share) * PAPER + share * DARK).round().astype(np.uint8)


def signed(values: np.ndarray, largest: float | None = None) -> np.ndarray:
    """(H, W) -> (H, W, 3) uint8: white at 0, orange above, blue below; full at `largest`."""
    values = np.asarray(values, float)
    return gate_colours(0.5 + 0.5 * (values / (largest or np.abs(values).max() or 1)).clip(-1, 1))


# --- Curves -------------------------------------------------------------------------------------


class Series(NamedTuple):
    name: str
    points: list[tuple[float, float]]
    colour: tuple[int, int, int]


class Line(NamedTuple):
    column: str  # of the log
    name: str
    colour: tuple[int, int, int]


def curves(log: list[dict], panels: dict[str, list[Line]]) -> Image.Image:
    """A panel per title, two in a row. x is the step, and rows without a value are skipped."""
    width, height = 560, 320
    rows = math.ceil(len(panels) / 2)
    sheet = Image.new("RGB", (2 * width, rows * height), PAPER)
    for number, (title, lines) in enumerate(panels.items()):
        panel = draw_panel(log, title, lines, width, height)
        sheet.paste(panel, (number % 2 * width, number // 2 * height))
    return sheet


def draw_panel(log, title: str, lines: list[Line], width: int, height: int) -> Image.Image:
    series = [Series(line.name, points_of(log, line), line.colour) for line in lines]
    steps = 0, max((r["step"] for r in log), default=1)
    return line_chart(title, series, "step", x_range=steps, size=(width, height))


def line_chart(
    title: str,
    series: list[Series],
    x_label: str,
    *,
    x_range: tuple[float, float] | None = None,
    size: tuple[int, int] = (560, 320),
) -> Image.Image:
    """Lines over one pair of axes, drawn at twice their size and then reduced, which smooths them.

    x_range is that of the points if left out; y runs from a round number to a round number.
    """
    width, height = size
    image = Image.new("RGB", (2 * width, 2 * height), PAPER)
    draw, face = ImageDraw.Draw(image), font(24)
    left, right, top, bottom = 110, 2 * width - 40, 94, 2 * height - 86
    points = [point for line in series for point in line.points]
    start, end = x_range or (min(x for x, _ in points), max(x for x, _ in points))
    values = [y for _, y in points]
    ticks = nice_ticks(min(values, default=0), max(values, default=1))

    def place(x: float, y: float) -> tuple[float, float]:
        share = (y - ticks[0]) / (ticks[-1] - ticks[0])
        return left + (x - start) / (end - start) * (right - left), bottom - share * (bottom - top)

    for tick in ticks:
        y = place(start, tick)[1]
        draw.line((left, y, right, y), fill=GREY, width=1)
        draw.text((left - 12, y), f"{tick:.4g}", INK, face, anchor="rm")
    for tick in nice_ticks(start, end):
        if start <= tick <= end:
            draw.text((place(tick, 0)[0], bottom + 14), f"{tick:.6g}", INK, face, anchor="ma")
    draw.text(((left + right) / 2, 2 * height - 8), x_label, INK, face, anchor="md")
    draw.text((left, 12), title, INK, font(28))
    x = left
    for line in series:
        path = [place(*point) for point in line.points]
        draw.line(path, fill=line.colour, width=4, joint="curve")
        if len(path) < 15:
            for px, py in path:
                draw.ellipse((px - 6, py - 6, px + 6, py + 6), fill=line.colour)
        draw.text((x, 48), line.name, line.colour, face)
        x += face.getlength(line.name) + 30
    return image.resize((width, height), Image.Resampling.LANCZOS)


def points_of(log: list[dict], line: Line) -> list[tuple[float, float]]:
    """(step, value) of the rows that have a finite value."""
    values = [(row["step"], row.get(line.column)) for row in log]
    return [(step, y) for step, y in values if y is not None and math.isfinite(y)]


def nice_ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers that span [low, high]."""
    spread = max(high - low, 1e-6 * max(abs(high), 1))
    unit = 10 ** math.floor(math.log10(spread))
    unit *= next(m for m in (0.1, 0.2, 0.5, 1, 2) if spread / (m * unit) <= 6)
    first, last = math.floor(low / unit), math.ceil(high / unit)
    return [i * unit for i in range(first, max(last, first + 1) + 1)]


# --- Bars ---------------------------------------------------------------------------------------


def bars(title: str, groups: list[str], values: dict[str, list[float]], form: str = "{:.0f}"):
    """Horizontal bars from 0: for each group one of each series, with its number at its end.

    values: series -> a value of 0 or more for each group. A series called CNN or Transformer has
    that branch's colour.
    """
    face, thick, left, width = font(26), 34, 330, 1240
    pitch = thick * len(values) + 22
    image = Image.new("RGB", (width, 110 + pitch * len(groups)), PAPER)
    draw = ImageDraw.Draw(image)
    branches, others = {"CNN": CNN_COLOUR, "Transformer": TRANSFORMER_COLOUR}, iter(PALETTE)
    colours = {name: branches.get(name) or next(others) for name in values}
    longest = max(max(numbers) for numbers in values.values()) or 1
    draw.text((20, 12), title, INK, font(28))
    x = 20
    for name, colour in colours.items() if len(values) > 1 else ():
        draw.text((x, 54), name, colour, face)
        x += face.getlength(name) + 30
    for number, group in enumerate(groups):
        top = 98 + pitch * number
        middle = top + thick * len(values) / 2
        draw.text((left - 16, middle), group, INK, face, anchor="rm")
        for name, numbers in values.items():
            end = left + numbers[number] / longest * (width - left - 150)
            draw.rectangle((left, top, end, top + thick - 5), fill=colours[name])
            shown = form.format(numbers[number])
            draw.text((end + 12, top + thick / 2 - 2), shown, INK, face, anchor="lm")
            top += thick
    return reduced(image.resize((width // 2, image.height // 2), Image.Resampling.LANCZOS))


# --- Differences between settings ---------------------------------------------------------------


class Difference(NamedTuple):
    name: str
    values: list[float]  # one per seed
    mean: float
    half: float | None  # half the width of the 95 % interval; None if there is one value only


def forest(rows: list[Difference], title: str) -> Image.Image:
    """A forest plot. Per row: a dot per value, a mark at the mean, a bar for the interval."""
    face, step, left, width = font(28), 56, 760, 1700
    image = Image.new("RGB", (width, 150 + step * len(rows)), PAPER)
    draw = ImageDraw.Draw(image)
    ends = [v for row in rows for v in (*row.values, row.mean - (row.half or 0))]
    ends += [row.mean + (row.half or 0) for row in rows]
    ticks = nice_ticks(min(0, *ends), max(0, *ends))

    def place(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (width - 60 - left)

    draw.text((20, 16), title, INK, font(32))
    bottom = image.height - 60
    for tick in ticks:
        ink, thick = (INK, 3) if tick == 0 else (GREY, 1)
        draw.line((place(tick), 74, place(tick), bottom), fill=ink, width=thick)
        draw.text(
            (place(tick), bottom + 10), f"{tick:+.4g}" if tick else "0", INK, face, anchor="ma"
        )
    for number, row in enumerate(rows):
        y = 100 + number * step
        draw.text((20, y), f"{row.name}, n = {len(row.values)}", INK, face, anchor="lm")
        if row.half is not None:
            span = place(row.mean - row.half), y - 5, place(row.mean + row.half), y + 5
            draw.rectangle(span, fill=TRANSFORMER_COLOUR)
        x = place(row.mean)
        draw.rectangle((x - 4, y - 16, x + 4, y + 16), fill=INK)
        for value in row.values:
            x = place(value)
            draw.ellipse((x - 7, y - 7, x + 7, y + 7), fill=PAPER, outline=CNN_COLOUR, width=3)
    return image.resize((width // 2, image.height // 2), Image.Resampling.LANCZOS)
