"""A seeded town from the air: the `toy` data set, drawn with numpy and pillow.

`scene(seed, size)` returns an ortho photo (about 0.33 m per pixel) and its map of Potsdam's six
classes. A canvas holds the class, colour and height of every pixel. Each object is painted into all
three through one mask, and a higher surface hides a lower one. Then the sun lights the canvas and a
camera photographs it. So the label is exact to the pixel: shadows, blur and noise do not move it.

The classes are made so that colour alone does not separate them, and texture and layout do:
- Flat roofs have the greys of asphalt: only the layout tells them apart.
- Lawns, hedges and crowns have the same greens: a tree has leaves and a side in the shade.
- Soil is as brown as tiles, pale roofs are as pale as paving, containers are as bright as cars.
- Shadows darken whatever is lower than the object that casts them.
- Each scene has its own sun and camera.
- The smallest objects are cars (at least 6 x 12, never cut by the border, never covered), the
  largest are halls.

See it: `Image.fromarray(toy.scene(0)[0]).save("town.png")`. Lengths and heights are in pixels,
angles in radians, x points right and y down, colours are 0..255 before the light falls on them.
"""

from itertools import product
from math import cos, pi, sin
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from support import cli
from support.labels import encode_colours
from support.layouts import POTSDAM, POTSDAM_TILES, SPLITS

IMPERVIOUS, BUILDING, LOW, TREE, CAR, CLUTTER = range(6)  # Potsdam's order

GREENS = (98, 112, 68), (84, 104, 60), (112, 120, 76), (92, 106, 72)  # lawns, hedges, crowns
GREYS = (112, 112, 114), (98, 99, 103), (126, 124, 122), (106, 104, 102)  # asphalt, flat roofs
PALES = (176, 172, 164), (190, 188, 184), (164, 158, 148), (150, 146, 140)  # paving, pale roofs
TILES = (160, 96, 74), (140, 84, 68), (124, 96, 80), (168, 110, 84), (104, 94, 90)
SOILS = (152, 128, 100), (140, 112, 88), (164, 146, 118), (148, 108, 84), (132, 126, 112)
PAINTS = (212, 212, 214), (44, 46, 50), (128, 132, 138), (150, 50, 46), (56, 78, 124), (84, 88, 92)
STACKS = (156, 84, 62), (64, 94, 132), (84, 112, 88), (170, 144, 84), (150, 150, 152)
POOL, POND, GLASS, WHITE = ((92, 166, 182),), ((66, 82, 70),), ((40, 46, 54),), ((200, 198, 192),)
SIDEWALK = 5  # about 1.7 m
LATTICE = np.linspace(-0.5, 0.5, 9)  # fine enough to hit every road inside the largest plot


def rotated(angle, x, y):
    """The vector (x, y) in axes that are rotated by the angle."""
    return x * cos(angle) + y * sin(angle), y * cos(angle) - x * sin(angle)


class Box(NamedTuple):
    """A rectangle on the ground, centred at (x, y): `length` along `angle`, `width` across it."""

    x: float
    y: float
    angle: float
    length: float
    width: float

    def at(self, u, v):
        """The point at u along the length and v along the width from the centre."""
        dx, dy = rotated(-self.angle, u, v)
        return self.x + dx, self.y + dy

    def inner(self, u, v, length, width, turn=0.0) -> "Box":
        """A box whose centre and angle are relative to this one."""
        return Box(*self.at(u, v), self.angle + turn, length, width)


class Road(NamedTuple):
    """The line v = offset + bend sin(u / period + phase); u along `angle`, v at a right angle."""

    angle: float
    offset: float
    bend: float
    period: float
    phase: float
    width: float

    def distance(self, x, y):
        """Signed distance to the centre line, to first order: (v - line(u)) / |(1, line'(u))|."""
        u, v = rotated(self.angle, x, y)
        wave = u / self.period + self.phase
        slope = self.bend / self.period * np.cos(wave)
        return (v - self.offset - self.bend * np.sin(wave)) / np.sqrt(1 + slope**2)

    def along(self, size, step):
        """Every `step`-th u within a picture of this size."""
        c, s = cos(self.angle), sin(self.angle)
        return range(int(size * (min(c, 0) + min(s, 0))), int(size * (max(c, 0) + max(s, 0))), step)

    def beside(self, u, side, off, length=0.0, width=0.0) -> Box:
        """The box at u with its front `off` from the centre line and its width leading away."""
        wave = u / self.period + self.phase
        point = rotated(-self.angle, u, self.offset + self.bend * sin(wave))
        turn = np.arctan(self.bend / self.period * cos(wave)) + (0 if side > 0 else pi)
        return Box(*point, self.angle + turn, 0, 0).inner(0, off + width / 2, length, width)


def among(labels, classes):
    return np.logical_or.reduce([labels == k for k in classes])


class Canvas:
    """Class, height, colour and graininess of every pixel, and the noise that painters share."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng, self.size, bearing = rng, size, rng.uniform(0, 2 * pi)
        self.sun = cos(bearing), sin(bearing)  # where the sun stands
        self.cars, self.crowns = [], []  # planned while plots are drawn, painted after them
        self.label = np.full((size, size), LOW, np.uint8)
        self.height = np.zeros((size, size), np.float32)
        self.grain = np.full((size, size), 0.09, np.float32)  # relative to the colour
        self.land, self.patch = self.noise(130, 60, 30), self.noise(44, 20, 9)
        self.leaf, self.fine = self.noise(6, 3.2), self.noise(2, 1)
        dry = np.clip(0.5 + 0.28 * self.land + 0.2 * self.patch, 0, 1)[..., None] ** 1.5
        tufts = (1 + 0.1 * self.patch.clip(0, 2) * self.leaf)[..., None]  # meadow beside lawn
        self.colour = (self.tone(GREENS) * (1 - dry) + np.float32((140, 130, 92)) * dry) * tufts

    def noise(self, *cells):
        """Smooth noise of unit variance: one octave per cell size, each weaker than the last."""
        total, size = np.zeros((self.size, self.size), np.float32), (self.size, self.size)
        for i, cell in enumerate(cells):
            n = self.size / cell
            grid = self.rng.standard_normal((int(n) + 4, int(n) + 4), dtype=np.float32)
            span = (1, 1, 1 + n, 1 + n)  # one cell of margin, as bicubic wants
            octave = Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC, span)
            total += 0.7**i * np.asarray(octave)
        return total / total.std()

    def tone(self, palette, spread=0.08):
        """A colour of the palette, a little brighter or darker and a little off in hue."""
        shift = 1 + spread * self.rng.normal() + 0.015 * self.rng.normal(size=3)
        return np.float32(palette[self.rng.integers(len(palette))] * shift)

    def pixels(self, box):
        """The window around the box, and the coordinates (u, v) of its pixels in the box."""
        reach = np.hypot(box.length, box.width) / 2 + 1
        ends = np.array([box.x - reach, box.x + reach + 1, box.y - reach, box.y + reach + 1])
        x0, x1, y0, y1 = ends.clip(0, self.size).astype(int)
        x, y = np.float32(np.arange(x0, x1) - box.x), np.float32(np.arange(y0, y1) - box.y)
        return np.s_[y0:y1, x0:x1], *rotated(box.angle, x, y[:, None])

    def share(self, box, *classes, outside=0.0):
        """How much of the box has one of the classes; `outside` counts beyond the border."""
        x, y = np.rint(box.at(LATTICE[:, None] * box.length, LATTICE * box.width)).astype(int)
        seen = (x >= 0) & (x < self.size) & (y >= 0) & (y < self.size)
        hits = among(self.label[y[seen], x[seen]], classes).sum()
        return (hits + outside * (seen.size - seen.sum())) / seen.size

    def paint(self, window, mask, label, colour, height=0.0, grain=0.04, over=range(6)):
        """Paint the mask where nothing is higher and the class so far is one of `over`."""
        mask = mask & (height >= self.height[window]) & among(self.label[window], over)
        self.label[window][mask], self.grain[window][mask] = label, grain
        self.height[window][mask] = height[mask] if np.ndim(height) else height
        self.colour[window][mask] = colour[mask] if np.ndim(colour) == 3 else colour

    def fill(self, box, *args, **options):
        window, u, v = self.pixels(box)
        self.paint(window, (2 * abs(u) < box.length) & (2 * abs(v) < box.width), *args, **options)

    def blot(self, box, ragged, *args, **options):
        """A rounded patch with a ragged outline, the L3 norm of (u, v) being a constant."""
        window, u, v = self.pixels(box)
        radius = np.cbrt(abs(2 * u / box.length) ** 3 + abs(2 * v / box.width) ** 3)
        self.paint(window, radius + ragged * self.patch[window] < 0.9, *args, **options)


def plan_roads(rng, size) -> list[Road]:
    """A loose grid through the picture's middle: winding roads one way, cross streets the other."""
    roads, bearing = [], rng.uniform(0, pi)
    for turn, block in ((0, rng.uniform(200, 280)), (pi / 2, rng.uniform(250, 420))):
        first, reach = rng.uniform(-0.3, 0.3) * size, int(size / block) + 1
        for k in range(-reach, reach + 1):
            angle, shift = bearing + turn + rng.normal(0, 0.06), first + k * block
            shape = rng.uniform((4, 60, 0, 16), (26, 110, 2 * pi, 26)).tolist()
            if abs(shift) < 0.7 * size:
                roads.append(Road(angle, shift + rotated(angle, size / 2, size / 2)[1], *shape))
    return roads


def paint_roads(c: Canvas, roads):
    """Pavement, kerb, asphalt and markings; a smooth minimum of the distances rounds junctions."""
    y, x = np.mgrid[: c.size, : c.size].astype(np.float32)
    everywhere, distances = np.s_[:, :], [(road, road.distance(x, y)) for road in roads]
    edge, second = np.full((2, c.size, c.size), 1e3, np.float32)  # to the two nearest roads
    for road, distance in distances:
        d = abs(distance) - road.width / 2
        second = np.minimum(second, np.maximum(edge, d))
        edge = np.minimum(edge, d) - np.clip(18 - abs(edge - d), 0, None) ** 2 / (4 * 18)
    c.paint(everywhere, edge < SIDEWALK, IMPERVIOUS, c.tone(PALES))
    c.paint(everywhere, edge < 1, IMPERVIOUS, c.tone(PALES[1:2]))
    worn = c.tone(GREYS) * (1 + 0.04 * c.patch + 0.02 * c.leaf)[..., None]
    c.paint(everywhere, edge < 0, IMPERVIOUS, worn, grain=0.05)
    for road, distance in distances:
        dashes = (abs(distance) < 0.7) & (rotated(road.angle, x, y)[0] % 26 < 12) & (second > 22)
        crossing = (2 * abs(distance) < road.width - 3) & (abs(second - 13) < 5)
        zebra = crossing & (distance % 5 < 2.5)
        c.paint(everywhere, (dashes | zebra) & (edge < 0), IMPERVIOUS, c.tone(WHITE))


def pitched_roof(c: Canvas, box, colour, eaves, hip):
    """Two slopes, or four with a hip, each as bright as it faces the sun, and a ridge."""
    if box.width > box.length:
        box = box.inner(0, 0, box.width, box.length, pi / 2)
    window, u, v = c.pixels(box)
    to_end, to_side = box.length / 2 - abs(u), box.width / 2 - abs(v)  # > 0 inside
    rise = np.where(hip, np.minimum(to_end, to_side), to_side)
    end = hip & (to_end < to_side)
    sun_u, sun_v = rotated(box.angle, *c.sun)
    facing = np.where(end, np.sign(u) * sun_u, np.sign(v) * sun_v)
    shade = (1 + 0.3 * facing) * (1 + 0.05 * np.sin(2.1 * rise)) * (1 + 0.1 * (abs(v) < 0.8))
    inside, height = (to_end > 0) & (to_side > 0), eaves + 0.6 * rise
    c.paint(window, inside, BUILDING, shade[..., None] * colour, height, 0.06)
    for u, v in c.rng.uniform(-0.35, 0.35, (c.rng.integers(1, 4), 2)) * box[3:]:  # chimneys
        c.fill(box.inner(u, v, 3.5, 3), BUILDING, c.tone(GLASS + PALES[2:3]), eaves + box.width / 2)


def flat_roof(c: Canvas, box, colour, height):
    """A parapet, a deck with seams, and equipment that throws small shadows."""
    c.fill(box, BUILDING, colour * 1.15, height)
    window, u, v = c.pixels(box)
    deck = (abs(u) < box.length / 2 - 1.5) & (abs(v) < box.width / 2 - 1.5)
    seams = (1 - 0.05 * (u % 12 < 1.2) + 0.04 * c.patch[window])[..., None]
    c.paint(window, deck, BUILDING, seams * colour, height, 0.05)
    for u, v in c.rng.uniform(-0.35, 0.35, (int(box.length * box.width / 500), 2)) * box[3:]:
        unit, top = box.inner(u, v, *c.rng.uniform(3, 8, 2)), height + c.rng.uniform(2, 5)
        c.fill(unit, BUILDING, c.tone(PALES + GREYS), top)


def building(c: Canvas, box, pitched):
    """One wing, or two that make an L."""
    wings, height = [box], c.rng.uniform(10, 17) + 0.1 * box.length
    if c.rng.random() < 0.4:
        side = c.rng.uniform(0.35, 0.5) * box.length
        end = c.rng.choice((-0.5, 0.5)) * (box.length - side)
        wings = [box.inner(0, -0.2 * box.width, box.length, 0.6 * box.width)]
        wings.append(box.inner(end, 0, side, box.width))
    colour = c.tone(TILES if pitched else PALES if c.rng.random() < 0.3 else GREYS)
    hip = c.rng.random() < 0.35
    for wing in wings:
        if pitched:
            pitched_roof(c, wing, colour, height, hip)
        else:
            flat_roof(c, wing, colour, height)


def garden_house(c: Canvas, plot):
    """A hedged lawn, a drive, a house near the road; trees and now and then a pool behind it."""
    window, u, v = c.pixels(plot)
    rim = np.minimum(plot.length / 2 - abs(u), plot.width / 2 - abs(v))
    lawn = (rim > 0) & (c.label[window] == LOW)
    c.colour[window][lawn] *= c.tone(((1, 1, 1),), 0.12)
    hedge = lawn & (rim < 3) & (v > -plot.width / 3) & (c.patch[window] < 0.8)
    c.paint(window, hedge, LOW, c.tone(GREENS), 4, 0.16)
    front, depth, side = -plot.width / 2, c.rng.uniform(29, 41), c.rng.choice((-1, 1))
    drive = plot.inner(side * (plot.length / 2 - 7), front + 20, 11, 42)
    body = plot.inner(-4 * side, front + c.rng.uniform(5, 11) + depth / 2, plot.length - 14, depth)
    c.fill(drive, IMPERVIOUS, c.tone(PALES + GREYS), over=(LOW,))
    c.fill(body.inner(0, 2, body.length + 3, depth + 5), IMPERVIOUS, c.tone(PALES), over=(LOW,))
    building(c, body, c.rng.random() < 0.75)
    c.cars.append((drive, 0, -10, pi / 2))
    if c.rng.random() < 0.3:
        pool = plot.inner(c.rng.uniform(-8, 8), plot.width / 2 - 13, 24, 14)
        c.fill(pool, IMPERVIOUS, c.tone(PALES), over=(LOW,))
        c.fill(pool.inner(0, 0, 20, 10), CLUTTER, c.tone(POOL), 0, 0.02, (IMPERVIOUS,))
    for u, v in c.rng.uniform((-0.45, 0.1), (0.45, 0.5), (c.rng.integers(1, 6), 2)) * plot[3:]:
        c.crowns.append((*plot.at(u, v), c.rng.uniform(5, 12)))


def block(c: Canvas, plot):
    """Flats or a hall, on a paved yard or on grass."""
    front, depth = c.rng.uniform(3, 7), (plot.width - 9) * c.rng.uniform(0.85, 1)
    body = plot.inner(0, front + (depth - plot.width) / 2, plot.length - 8, depth)
    yard = plot if c.rng.random() < 0.6 else body.inner(0, 0, body.length + 5, depth + 5)
    c.fill(yard, IMPERVIOUS, c.tone(PALES + GREYS), over=(LOW,))
    building(c, body, depth < 46 and c.rng.random() < 0.6)


def parking(c: Canvas, plot):
    """Rows of marked stalls, some taken."""
    c.fill(plot, IMPERVIOUS, c.tone(GREYS), over=(LOW,))
    taken = c.rng.uniform(0.3, 0.8)
    for v, u in product(np.arange(11, plot.width - 10, 34), np.arange(7, plot.length - 6, 11)):
        u, v = u - plot.length / 2, v - plot.width / 2
        c.fill(plot.inner(u + 5.5, v, 1, 17), IMPERVIOUS, c.tone(WHITE), over=(IMPERVIOUS,))
        if c.rng.random() < taken:
            c.cars.append((plot, u, v, pi / 2))


def building_site(c: Canvas, plot):
    """Bare soil, heaps of rubble and at times containers, some stacked."""
    soil = c.tone(SOILS) * (1 + 0.07 * c.patch + 0.03 * c.leaf)[..., None]
    c.blot(plot, 0.14, CLUTTER, soil[c.pixels(plot)[0]], 0, 0.12, (LOW,))
    for u, v in c.rng.uniform(-20, 20, (3, 2)):
        heap = plot.inner(u, v, *c.rng.uniform(10, 22, 2))
        c.blot(heap, 0.3, CLUTTER, c.tone(SOILS + GREYS), 3, 0.35, (CLUTTER,))
    row = c.rng.uniform(-14, 14)
    for k in range(c.rng.integers(0, 5)):
        crate = plot.inner(row, 8 * k - 16, 19, 7.2)
        c.fill(crate, CLUTTER, c.tone(STACKS), c.rng.choice((8, 16)), 0.08, (CLUTTER,))


def park(c: Canvas, plot):
    """A grove, perhaps around a pond."""
    if c.rng.random() < 0.5:
        c.blot(plot.inner(0, 0, 48, 34), 0.14, CLUTTER, c.tone(POND), 0, 0.03, (LOW,))
    for u, v in c.rng.uniform(-0.5, 0.5, (int(plot.length * plot.width / 200), 2)) * plot[3:]:
        c.crowns.append((*plot.at(u, v), c.rng.uniform(6, 16)))


# How many of a kind are in a scene's deck (from, below), and its plot's range of length and width.
USES = {
    garden_house: ((6, 11), (46, 60), (56, 68)),
    block: ((6, 10), (60, 114), (48, 76)),
    parking: ((1, 2), (66, 104), (34, 60)),
    building_site: ((1, 3), (56, 86), (52, 70)),
    park: ((1, 4), (56, 90), (56, 76)),
}


def settle(c: Canvas, roads):
    """Deal plots along both sides of every road, row behind row, wherever the next one fits."""
    deck = [use for use, (often, *_) in USES.items() for _ in range(c.rng.integers(*often))]
    c.rng.shuffle(deck)
    for row, road, side in product((0, 68, 136), roads, (-1, 1)):
        free = -2 * c.size  # the first u that is not taken
        for u in road.along(c.size, 6):
            length, width = (c.rng.uniform(*span) for span in USES[deck[0]][1:])
            plot = road.beside(u, side, road.width / 2 + SIDEWALK + 1 + row, length, width)
            inside = min(plot.x, plot.y) > 0 and max(plot.x, plot.y) < c.size
            if u > free + length / 2 and inside and c.share(plot, LOW, outside=1) > 0.97:
                deck[0](c, plot)
                free = u + length / 2
                deck.append(deck.pop(0))
        deck.append(deck.pop(0))  # it may be too large for all that is left


def park_cars(c: Canvas, roads):
    """Cars on drives, in stalls and along roads: whole ones on free ground, or none."""
    for road, side in product(roads, (-1, 1)):
        for u in (u for u in road.along(c.size, 24) if c.rng.random() < 0.3):
            off = road.width / 2 - 5 if c.rng.random() < 0.7 else road.width / 4
            c.cars.append((road.beside(u, side, off), 0, 0, 0))
    for place, u, v, turn in c.cars:
        length, width = c.rng.uniform((13.5, 7.1), (16, 8))
        turn += pi * c.rng.integers(2) + c.rng.normal(0, 0.03)
        car = place.inner(u, v, length, width, turn)
        if c.share(car.inner(0, 0, length + 3, width + 2), IMPERVIOUS) == 1:
            window, u, v = c.pixels(car)
            u, v = 2 * u / length, 2 * v / width
            body = (abs(u) <= 1) & (abs(v) <= 1) & (u**6 + v**6 < 1.6)  # rounded corners
            glass = (abs(v) < 0.8) & ((abs(u - 0.28) < 0.18) | (abs(u + 0.65) < 0.15))
            c.paint(window, body, CAR, c.tone(PAINTS), 4, 0.02)
            c.paint(window, body & glass, CAR, c.tone(GLASS), 4, 0.02)


def plant(c: Canvas, roads):
    """Crowns of gardens and parks, in rows along roads and in groves: domes of leaves."""
    for road in (road for road in roads if c.rng.random() < 0.6):
        radius, step = c.rng.uniform(6, 9), c.rng.integers(22, 40)
        for u, side in product(road.along(c.size, step), (-1, 1)):
            spot = road.beside(u, side, road.width / 2 + 5)
            c.crowns.append((spot.x, spot.y, radius * c.rng.uniform(0.85, 1.15)))
    for x, y in c.rng.integers(0, c.size, (c.size**2 // 400, 2)):
        if c.land[y, x] > 0 and c.label[y, x] == LOW:
            c.crowns.append((x, y, c.rng.uniform(5, 16)))
    for x, y, r in c.crowns:
        box, core = (Box(x, y, 0, k * r, k * r) for k in (2.5, 2))
        if c.share(box, CAR) == 0 and c.share(core, BUILDING, CLUTTER) < 0.15:
            window, u, v = c.pixels(box)
            outline = np.hypot(u, v) / r + 0.12 * c.patch[window] + 0.1 * c.leaf[window]
            dome = np.clip(1 - outline**2, 0, None)
            free, height = c.label[window] != CAR, (r + 4) * (0.6 + 0.8 * dome)
            c.paint(window, free & (dome > 0), TREE, c.tone(GREENS, 0.14), height, 0.1)
    slope_y, slope_x = np.gradient(c.height + 2.2 * c.leaf)
    facing = np.clip(-slope_x * c.sun[0] - slope_y * c.sun[1], -2.5, 2.5)
    c.colour *= np.where(c.label == TREE, 1 + 0.22 * facing, 1)[..., None]


def cast_shadow(height: np.ndarray, sun, fall: float) -> np.ndarray:
    """Where something stands in the sun's way: height(p + t sun) > height(p) + t fall, t >= 1.

    height: (H, W) pixels; sun: unit vector (x, y) on the ground, towards the sun; fall: tangent of
    its elevation. Returns (H, W) bool. Beyond the border the ground is bare.
    """
    shadow, (rows, columns) = np.zeros(height.shape, bool), height.shape
    for t in range(1, int(height.max() / fall) + 1):
        dx, dy = round(t * sun[0]), round(t * sun[1])
        here = np.s_[max(0, -dy) : rows - max(0, dy), max(0, -dx) : columns - max(0, dx)]
        there = np.s_[max(0, dy) : rows + min(0, dy), max(0, dx) : columns + min(0, dx)]
        shadow[here] |= height[there] > height[here] + fall * t
    return shadow


def photograph(c: Canvas) -> np.ndarray:
    """Sun and blue sky, then the camera: exposure, colour cast, haze, blur and noise."""
    shadow = Image.fromarray(cast_shadow(c.height, c.sun, c.rng.uniform(0.9, 1.6)) * np.uint8(255))
    dark = np.float32(shadow.filter(ImageFilter.BoxBlur(1)))[..., None] / 255  # soft at its edge
    sky = np.float32((0.40, 0.46, 0.55)) * c.rng.uniform(0.9, 1.15)
    gain = np.float32(c.rng.uniform(0.95, 1.2) * (1 + 0.03 * c.rng.normal(size=3)))
    photo = c.colour * (1 + c.grain * c.fine)[..., None] * (1 - dark * (1 - sky))
    photo = (photo * gain + c.rng.uniform(0, 14)).clip(0, 255).astype(np.uint8)
    photo = Image.fromarray(photo).filter(ImageFilter.GaussianBlur(c.rng.uniform(0.5, 0.8)))
    noise = c.rng.standard_normal((c.size, c.size, 3), dtype=np.float32)
    return (np.float32(photo) + c.rng.uniform(1.5, 4) * noise).clip(0, 255).astype(np.uint8)


def scene(seed: int, size: int = 384) -> tuple[np.ndarray, np.ndarray]:
    """A pure function of its arguments: image (size, size, 3) uint8 RGB, label (size, size) uint8.

    Labels are 0..5 and no pixel is ignored. Any size from 128 on.
    """
    rng = np.random.default_rng(seed)
    c, roads = Canvas(rng, size), plan_roads(rng, size)
    for step in (paint_roads, settle, park_cars, plant):
        step(c, roads)
    return photograph(c), c.label


# --- The data set -------------------------------------------------------------------------------

# Scene seeds of each split: far apart, so that no split can grow into another.
SPLIT_SEEDS = {"train": range(0, 24), "val": range(1000, 1006), "test": range(2000, 2012)}


def write_files(root: Path, scenes_per_split: int = 3) -> None:
    """Toy scenes as files in the layout of ISPRS Potsdam, under names of its own splits."""
    images, labels = root / "2_Ortho_RGB", root / "5_Labels_all"
    cli.make_folder(images)
    cli.make_folder(labels)
    for split in SPLITS:
        tiles = POTSDAM_TILES[split].split()[:scenes_per_split]
        for tile, seed in zip(tiles, SPLIT_SEEDS[split], strict=False):
            image, label = scene(seed)
            colours = encode_colours(label, POTSDAM.colours)
            Image.fromarray(image).save(images / f"top_potsdam_{tile}_RGB.tif")
            Image.fromarray(colours).save(labels / f"top_potsdam_{tile}_label.tif")
