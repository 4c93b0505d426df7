"""The shapes of the generated corpus: silhouettes, and the place where each attribute of a garment is seen.

Garment units: x to the right, y down, a full-length garment reaches from -1 to 1. `View` places these units in the
frame. Source: ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

Point = tuple[float, float]
Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]

SUPERSAMPLING = 2
COLOURS: dict[str, Colour] = {
    "red": (208, 28, 38),
    "orange": (246, 128, 16),
    "yellow": (250, 218, 40),
    "green": (24, 138, 60),
    "blue": (32, 84, 208),
    "purple": (122, 48, 164),
    "pink": (250, 142, 190),
    "brown": (122, 76, 40),
    "black": (32, 32, 36),
    "white": (246, 246, 243),
}


@dataclass(frozen=True)
class Cut:
    """Half widths and heights of a category's silhouette, and the centres of its prints and pocket."""

    top: float
    bottom: float
    shoulder: float  # 0: hangs from the waist
    armpit: float
    waist: float
    waist_y: float
    hem: float
    print_at: Point
    pocket_at: Point
    back_print_at: Point
    crotch: float | None = None  # height where two legs begin


CUTS = {
    "tee": Cut(-0.7, 0.66, 0.46, 0.43, 0.44, 0.1, 0.46, (-0.25, -0.14), (0.25, 0.26), (0, -0.12)),
    "dress": Cut(-0.95, 0.92, 0.36, 0.32, 0.25, -0.14, 0.64, (-0.22, 0.4), (0.23, 0.34), (0, 0.38)),
    "hoodie": Cut(-0.6, 0.76, 0.48, 0.46, 0.48, 0.4, 0.42, (-0.26, 0.06), (0.26, 0.36), (0, 0.12)),
    "jacket": Cut(-0.66, 0.62, 0.52, 0.5, 0.58, 0.3, 0.4, (-0.26, -0.12), (0.26, 0.24), (0, -0.02)),
    "coat": Cut(-0.92, 0.94, 0.46, 0.42, 0.36, -0.08, 0.58, (-0.24, 0.36), (0.25, 0.34), (0, 0.4)),
    "skirt": Cut(-0.62, 0.6, 0, 0, 0.32, -0.56, 0.68, (-0.24, 0.08), (0.24, 0.02), (0, 0.02)),
    "pants": Cut(-0.95, 0.95, 0, 0, 0.38, -0.88, 0.52, (-0.24, -0.26), (0.24, -0.34), (0, -0.5), -0.3),
    "shorts": Cut(-0.56, 0.52, 0, 0, 0.46, -0.48, 0.66, (-0.34, 0.14), (0.32, 0.04), (0, -0.12), 0.08),
    "jumpsuit": Cut(-0.96, 0.96, 0.37, 0.34, 0.29, -0.2, 0.44, (-0.22, 0.24), (0.22, 0.16), (0, -0.5), 0.24),
    "poncho": Cut(-0.62, 0.6, 0.34, 0.6, 0.86, 0.32, 0.98, (-0.34, 0.12), (0.34, 0.14), (0, 0.06)),
}
SLEEVE_LENGTHS = {"sleeveless": 0.0, "short": 0.4, "puff": 0.5, "bell": 0.86, "long": 1.0}
WITH_SLEEVES = ("tee", "dress", "hoodie", "jacket", "coat", "jumpsuit")
WITH_NECKLINE = ("tee", "dress", "jumpsuit", "poncho")
WITH_HEM = ("tee", "dress", "coat", "skirt", "pants", "shorts", "jumpsuit", "poncho")
WITH_BELT = ("dress", "coat", "skirt", "pants", "shorts", "jumpsuit")


@dataclass(frozen=True)
class Look:
    """What makes two items of equal attributes different photos: proportions and shades. Named by no text."""

    width: float
    length: float
    sleeve_angle: float  # from straight down, radians
    shade: tuple[int, ...]  # six small numbers added to both colours


@dataclass(frozen=True)
class View:
    """How the camera sees an item: `scale` frame widths a garment unit, centre (x, y) in frame widths."""

    name: str
    side: str  # front | back
    x: float
    y: float
    scale: float
    angle: float
    scenery: int  # seed of background, distractors and light


class Canvas:
    """A picture that is drawn on in garment units."""

    def __init__(self, image: Image.Image, view: View, look: Look):
        side = image.width
        self.image, self.draw = image, ImageDraw.Draw(image)
        self.unit = view.scale * side
        cos, sin = math.cos(view.angle) * self.unit, math.sin(view.angle) * self.unit
        self.xx, self.xy = cos * look.width, -sin * look.length
        self.yx, self.yy = sin * look.width, cos * look.length
        self.x, self.y = view.x * side, view.y * side

    def points(self, points: Sequence[Point]) -> list[Point]:
        """Garment units to pixels of the picture."""
        xx, xy, yx, yy, x0, y0 = self.xx, self.xy, self.yx, self.yy, self.x, self.y
        return [(x0 + xx * x + xy * y, y0 + yx * x + yy * y) for x, y in points]

    def polygon(self, points: Sequence[Point], fill, outline=None) -> None:
        """A filled polygon, with a line of one final pixel around it if asked."""
        points = self.points(points)
        self.draw.polygon(points, fill=fill)
        if outline is not None:
            self.draw.line([*points, points[0]], fill=outline, width=SUPERSAMPLING)

    def line(self, points: Sequence[Point], width: float, fill) -> None:
        """An open line, `width` in garment units, never thinner than one final pixel."""
        self.draw.line(self.points(points), fill=fill, width=max(SUPERSAMPLING, round(width * self.unit)))

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, fill, outline=None) -> None:
        """A rectangle of the garment (turned with it)."""
        self.polygon(corners((x0, y0, x1, y1)), fill, outline)

    def dot(self, x: float, y: float, radius: float, fill, outline=None) -> None:
        """A disc."""
        ((x, y),) = self.points([(x, y)])
        r = radius * self.unit
        outline = outline if r > 3 else None  # a rim would hide the disc
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=outline, width=SUPERSAMPLING)


def darker(colour: Colour, factor: float = 0.6) -> Colour:
    """A darker shade; of the darkest colours a lighter one, so that lines stay visible."""
    if sum(colour) < 150:
        return tuple(min(255, c + 78) for c in colour)
    return tuple(int(c * factor) for c in colour)


def item_colour(name: str, shade: Sequence[int]) -> Colour:
    """A colour name's shade on this item."""
    return tuple(min(255, max(0, c + d)) for c, d in zip(COLOURS[name], shade))


def corners(box: Box) -> list[Point]:
    """The four corners of a box (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = box
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def mirrored(points: Sequence[Point]) -> list[Point]:
    """The same on the garment's other half."""
    return [(-x, y) for x, y in points]


# ---------------------------------------------------------------- shape


def body_outline(cut: Cut) -> list[Point]:
    """The silhouette without sleeves."""
    right: list[Point] = [(cut.waist, cut.top), (cut.waist * 1.06, cut.waist_y)]
    if cut.shoulder:
        right = [(0.17, cut.top), (cut.shoulder, cut.top + 0.1), (cut.armpit, cut.top + 0.42)]
        right.append((cut.waist, cut.waist_y))
    if cut.crotch is not None:
        hip = (cut.waist + cut.hem) / 2 + 0.03
        inner = (0.07 if cut.hem < 0.6 else 0.12, cut.bottom)
        right += [(hip, cut.crotch - 0.1), (cut.hem, cut.bottom), inner]
        return [*right, (0.0, cut.crotch), *reversed(mirrored(right))]
    if not cut.shoulder:  # a skirt's hips
        right.append((cut.waist * 0.55 + cut.hem * 0.38, cut.top + 0.5))
    right += [(cut.hem, cut.bottom), (cut.hem * 0.5, cut.bottom + 0.03)]
    return [*right, *reversed(mirrored(right))]


def sleeve_outline(cut: Cut, kind: str, angle: float) -> list[Point]:
    """The right sleeve: from the shoulder down, outwards by `angle`; sleeveless: the hole that the arm goes through."""
    shoulder, armpit = (cut.shoulder - 0.03, cut.top + 0.1), (cut.armpit, cut.top + 0.42)
    if kind == "sleeveless":
        return [shoulder, (cut.shoulder + 0.01, cut.top + 0.12), (cut.armpit + 0.01, cut.top + 0.42), armpit]
    x, y = (shoulder[0] + armpit[0]) / 2, (shoulder[1] + armpit[1]) / 2
    along, across = (math.sin(angle), math.cos(angle)), (math.cos(angle), -math.sin(angle))

    def at(distance: float, aside: float) -> Point:
        return x + along[0] * distance + across[0] * aside, y + along[1] * distance + across[1] * aside

    length = SLEEVE_LENGTHS[kind]
    if kind == "puff":
        bulge = [at(d, w) for d, w in ((0.02, 0.27), (0.18, 0.33), (0.36, 0.26))]
        return [shoulder, *bulge, at(length, 0.13), at(length, -0.13), at(0.38, -0.22), armpit]
    end = {"short": 0.17, "long": 0.115, "bell": 0.11}[kind]
    if kind == "bell":
        flare = [at(length, 0.33), at(length, -0.3)]
        return [shoulder, at(length * 0.5, end), *flare, at(length * 0.5, -end), armpit]
    return [shoulder, at(length, end), at(length, -end), armpit]


def sleeve_end(outline: list[Point], kind: str, depth: float) -> list[Point]:
    """The last `depth` (0-1) of a sleeve: where trim and cuff sit."""
    count = len(outline)
    outer, inner = {"puff": (4, 5), "bell": (2, 3)}.get(kind, (1, count - 2))
    before, after = outline[outer - 1], outline[inner + 1]
    back = [_between(outline[outer], before, depth), _between(outline[inner], after, depth)]
    return [back[0], outline[outer], outline[inner], back[1]]


def _between(a: Point, b: Point, share: float) -> Point:
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share


@dataclass(frozen=True)
class Shape:
    """An item's outlines in garment units: `sleeves` and `cuffs` are (right, left) or empty."""

    cut: Cut
    body: list[Point]
    sleeves: tuple[list[Point], ...]
    cuffs: tuple[list[Point], ...]
    sleeve_ends: tuple[list[Point], ...]
    hems: tuple[Box, ...]
    headroom: float  # what a collar or hood rises above the shoulders

    @property
    def extent(self) -> Box:
        """The box around body, sleeves, what rises above the neck and what hangs from the hem."""
        xs, ys = zip(*self.body, *(point for sleeve in self.sleeves for point in sleeve))
        return min(xs), min(ys) - self.headroom, max(xs), max(ys) + (0.08 if self.hems else 0)


def shape_of(attributes: dict[str, str], look: Look) -> Shape:
    """The outlines of an item."""
    cut = CUTS[attributes["category"]]
    sleeves, cuffs, ends, kind = (), (), (), attributes["sleeve"]
    if kind != "none":
        right = sleeve_outline(cut, kind, look.sleeve_angle)
        sleeves = (right, mirrored(right))
        if kind != "sleeveless":
            end = sleeve_end(right, kind, 0.32)
            ends = (end, mirrored(end))
        cuffs = ends if kind == "long" else ()
    low = cut.bottom + (0.05 if attributes["hem"] in ("none", "straight") else 0.1)
    hems = [(-cut.hem, cut.bottom - 0.14, cut.hem, low)]
    if cut.crotch is not None:
        inner = 0.07 if cut.hem < 0.6 else 0.12
        hems = [(-cut.hem, cut.bottom - 0.14, -inner, low), (inner, cut.bottom - 0.14, cut.hem, low)]
    headroom = {"hoodie": 0.36}.get(attributes["category"], 0.14 if cut.shoulder else 0.0)
    return Shape(cut, body_outline(cut), sleeves, cuffs, ends, tuple(hems), headroom)


# ---------------------------------------------------------------- where attributes are seen


def places(attributes: dict[str, str], shape: Shape, side: str) -> dict[str, list[Sequence[Point]]]:
    """Per attribute the outlines of the places where its value, "none" included, is seen on this side of the garment.

    Colours, pattern, texture and category have no place of their own: they are seen wherever their cloth is.
    """
    cut, found = shape.cut, {}
    if attributes["hem"] != "none":
        found["hem"] = _hem_places(shape)
    if shape.sleeves:
        found["sleeve"] = list(shape.sleeves)
        if attributes["sleeve"] == "sleeveless":
            hole = corners((cut.armpit - 0.12, cut.top + 0.06, cut.shoulder + 0.06, cut.top + 0.44))
            found["sleeve"] = [hole, mirrored(hole)]
    if shape.cuffs:
        found["cuff"] = list(shape.cuffs)
    if attributes["category"] in WITH_BELT:
        width, y = belt_line(cut)
        found["belt"] = [corners(half) for half in halves((-width, y - 0.09, width, y + 0.09))]
        if attributes["belt"] == "sash":
            found["belt"][1] = corners((width * 0.62 - 0.18, y - 0.1, width * 0.62 + 0.16, y + 0.42))
    return found | (
        _front_places(attributes, cut)
        if side == "front"
        else {"back_print": [corners(around(cut.back_print_at, 0.31))]}
    )


def _front_places(attributes: dict[str, str], cut: Cut) -> dict[str, list[Sequence[Point]]]:
    top, bottom = closure_line(cut)
    found = {
        "front_print": [corners(around(cut.print_at, 0.22))],
        "pocket": [corners(around(cut.pocket_at, 0.19))],
        "closure": [corners((-0.12, top, 0.12, bottom))],
    }
    if attributes["neckline"] != "none":
        found["neckline"] = [neckline_place(cut)]
    return found


def _hem_places(shape: Shape) -> list[Sequence[Point]]:
    """The hem's two halves, or one place a leg."""
    return [corners(box) for box in (shape.hems if len(shape.hems) > 1 else halves(shape.hems[0]))]


def neckline_place(cut: Cut) -> list[Point]:
    """Where any neckline is, a turtleneck's height included."""
    return corners((-0.3, cut.top - 0.16, 0.3, cut.top + 0.42))


def trim_places(attributes: dict[str, str], shape: Shape, side: str) -> list[Sequence[Point]]:
    """The outlines of what wears the second colour on a plain garment."""
    cut = shape.cut
    trims = [*_hem_places(shape), *shape.sleeve_ends]
    if not cut.shoulder and attributes["belt"] == "none":
        trims.append(corners((-cut.waist, cut.top, cut.waist, cut.top + 0.1)))
    if side == "front" and attributes["neckline"] != "none":
        trims.append(neckline_place(cut))
    if side == "front" and attributes["pocket"] != "none":
        trims.append(corners(around(cut.pocket_at, 0.17)))
    return trims


def halves(box: Box) -> tuple[Box, Box]:
    """The left and right half of a long thin box: turned, two boxes follow it more closely than one."""
    x0, y0, x1, y1 = box
    return (x0, y0, (x0 + x1) / 2, y1), ((x0 + x1) / 2, y0, x1, y1)


def around(centre: Point, half: float) -> Box:
    """The square of half width `half` around a point."""
    return centre[0] - half, centre[1] - half, centre[0] + half, centre[1] + half


def belt_line(cut: Cut) -> tuple[float, float]:
    """Half width and height of the waist."""
    return cut.waist + 0.03, cut.waist_y


def closure_line(cut: Cut) -> tuple[float, float]:
    """Top and bottom of the closure in the middle of the front."""
    if cut.shoulder:
        bottom = cut.bottom - 0.2 if cut.crotch is None else cut.crotch
        return cut.top + 0.43, min(bottom, cut.top + 1.4)
    return cut.waist_y + 0.1, cut.bottom - 0.2 if cut.crotch is None else cut.crotch
