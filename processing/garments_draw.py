"""Draws a garment of the generated corpus and says in which box of the photo each of its attributes is seen.

Everything is drawn at twice the wanted size and halved. A look at a photo goes: scenery, shadow, cloth (silhouette,
pattern, texture), trims and details, light. Source: ours.
"""

import math
import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops

from .garments_details import draw_details, draw_hood
from .garments_shape import (
    SUPERSAMPLING,
    Canvas,
    Colour,
    Look,
    Point,
    Shape,
    View,
    corners,
    darker,
    item_colour,
    places,
    trim_places,
)

LEAST_SIDE = 2.5  # of a 64-pixel photo: what is thinner cannot be told apart


def frame_box(canvas: Canvas, outline: Sequence[Point], size: int) -> tuple[list[float], float]:
    """The box of an outline in final pixels, clipped to the frame, and the share of its area that is in the frame."""
    xs, ys = zip(*canvas.points(outline))
    factor = size / canvas.image.width
    x0, x1, y0, y1 = min(xs) * factor, max(xs) * factor, min(ys) * factor, max(ys) * factor
    box = [max(0.0, x0), max(0.0, y0), min(float(size), x1), min(float(size), y1)]
    area = max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
    return box, area / max(1e-6, (x1 - x0) * (y1 - y0))


def is_seen(box: Sequence[float], share: float, size: int, least_share: float = 0.5) -> bool:
    """Whether enough of a place is in the frame, and large enough, to tell what is there."""
    return share >= least_share and min(box[2] - box[0], box[3] - box[1]) >= LEAST_SIDE * size / 64


def draw_view(
    attributes: dict[str, str], shape: Shape, look: Look, view: View, size: int
) -> tuple[Image.Image, dict[str, list[list[float]]]]:
    """Draw one photo; returns it (RGB, size x size) and, per attribute seen in it, the boxes in pixels of where.

    An attribute is absent when its place is out of the frame, mostly cut off, too small, or on the other side.
    """
    side = size * SUPERSAMPLING
    canvas = Canvas(Image.new("RGB", (side, side)), view, look)
    scenery = random.Random(view.scenery)
    draw_scenery(canvas, view, scenery)
    mask = draw_cloth(canvas, attributes, shape, look, view)
    draw_details(canvas, attributes, shape, look, view.side)
    seen = _seen_places(canvas, attributes, shape, view.side, size)
    seen |= _seen_cloth(canvas, mask, attributes, shape, view.side, size)
    return _lit(canvas.image.reduce(SUPERSAMPLING), scenery), seen


def _seen_places(canvas: Canvas, attributes, shape: Shape, side: str, size: int) -> dict[str, list[list[float]]]:
    found = places(attributes, shape, side)
    if attributes["pattern"] == "plain":
        found["second_colour"] = trim_places(attributes, shape, side)
    seen = {}
    for attribute, outlines in found.items():
        boxes = [frame_box(canvas, outline, size) for outline in outlines]
        boxes = [box for box, share in boxes if is_seen(box, share, size)]
        if boxes:
            seen[attribute] = boxes
    return seen


def _seen_cloth(canvas: Canvas, mask: Image.Image, attributes, shape: Shape, side: str, size: int) -> dict:
    """Category (where half of the garment is in the frame), colours, pattern and texture (wherever there is cloth)."""
    found = mask.getbbox()
    if found is None:
        return {}
    cloth = [edge / SUPERSAMPLING for edge in found]
    seen = {"main_colour": [cloth], "pattern": [cloth]}
    _, share = frame_box(canvas, corners(shape.extent), size)
    if is_seen(cloth, share, size):
        seen["category"] = [cloth]
    if side == "back":
        seen["texture"] = [cloth]
    if attributes["pattern"] != "plain":
        seen["second_colour"] = [cloth]
    return seen


# ---------------------------------------------------------------- scenery and light

BACKGROUNDS: tuple[Colour, ...] = (
    (226, 222, 214),
    (204, 210, 218),
    (214, 222, 208),
    (228, 212, 210),
    (176, 180, 186),
    (186, 176, 166),
    (150, 160, 170),
    (240, 238, 236),
)


def draw_scenery(canvas: Canvas, view: View, rng: random.Random) -> None:
    """A wall, sometimes a floor, and in most photos a thing or two that no text names."""
    side, draw = canvas.image.width, canvas.draw
    wall = rng.choice(BACKGROUNDS)
    draw.rectangle((0, 0, side, side), fill=wall)
    if rng.random() < 0.5:
        draw.rectangle((0, side * rng.uniform(0.7, 0.9), side, side), fill=tuple(int(c * 0.86) for c in wall))
    for _ in range(rng.choice((0, 1, 1, 2))):
        x, y = rng.choice((rng.uniform(0.04, 0.2), rng.uniform(0.8, 0.96))), rng.uniform(0.1, 0.9)
        thing = rng.choice((_plant, _box, _lamp, _ball, _shoe, _frame))
        thing(draw, x * side, y * side, side * rng.uniform(0.07, 0.12), rng)
    if view.name in ("front", "back") and rng.random() < 0.5:
        _hanger(canvas)


def _tone(rng: random.Random) -> Colour:
    """Any colour: a photo's colours are not the garment's alone."""
    return tuple(rng.randint(40, 220) for _ in range(3))


def _plant(draw, x: float, y: float, r: float, rng: random.Random) -> None:
    for dx in (-0.8, 0, 0.8):
        draw.line((x, y + r * 0.4, x + dx * r, y - r), fill=(60, 120, 70), width=max(2, int(r * 0.3)))
    draw.polygon(
        [(x - r * 0.6, y + r * 0.2), (x + r * 0.6, y + r * 0.2), (x + r * 0.4, y + r), (x - r * 0.4, y + r)], _tone(rng)
    )


def _box(draw, x: float, y: float, r: float, rng: random.Random) -> None:
    tone = _tone(rng)
    draw.rectangle((x - r, y - r * 0.7, x + r, y + r * 0.7), fill=tone, outline=darker(tone))
    draw.line((x, y - r * 0.7, x, y + r * 0.7), fill=darker(tone), width=2)


def _lamp(draw, x: float, y: float, r: float, rng: random.Random) -> None:
    draw.line((x, y, x, y + r * 1.6), fill=(70, 70, 74), width=3)
    draw.polygon([(x - r * 0.5, y - r), (x + r * 0.5, y - r), (x + r, y + r * 0.2), (x - r, y + r * 0.2)], _tone(rng))


def _ball(draw, x: float, y: float, r: float, rng: random.Random) -> None:
    draw.ellipse((x - r, y - r, x + r, y + r), fill=_tone(rng))


def _shoe(draw, x: float, y: float, r: float, rng: random.Random) -> None:
    outline = [(-1, -0.6), (-0.3, -0.6), (0.1, -0.1), (1, 0.1), (1, 0.5), (-1, 0.5)]
    draw.polygon([(x + dx * r, y + dy * r) for dx, dy in outline], fill=_tone(rng))
    draw.line((x - r, y + r * 0.5, x + r, y + r * 0.5), fill=(240, 240, 240), width=2)


def _frame(draw, x: float, y: float, r: float, rng: random.Random) -> None:
    draw.rectangle((x - r, y - r, x + r, y + r), fill=(236, 234, 228), outline=_tone(rng), width=max(2, int(r * 0.25)))


def _hanger(canvas: Canvas) -> None:
    ((x, y),) = canvas.points([(0, -0.8)])
    grey, u = (96, 98, 104), canvas.unit
    canvas.draw.line([(x, -2), (x, y - 0.1 * u), (x - 0.3 * u, y + 0.1 * u)], fill=grey, width=3)
    canvas.draw.line([(x, y - 0.1 * u), (x + 0.3 * u, y + 0.1 * u)], fill=grey, width=3)


@lru_cache(maxsize=4)
def _ramps(size: int) -> tuple[np.ndarray, np.ndarray]:
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    return ramp[None, :, None], ramp[:, None, None]


def _lit(image: Image.Image, rng: random.Random) -> Image.Image:
    """Light from one side, and the camera's exposure."""
    across, down = _ramps(image.width)
    angle, depth, exposure = rng.uniform(0, 6.283), rng.uniform(0, 0.1), rng.uniform(0.9, 1.06)
    light = exposure + depth * (math.cos(angle) * across + math.sin(angle) * down)
    pixels = np.asarray(image, dtype=np.float32) * light
    return Image.fromarray(np.minimum(pixels, 255).astype(np.uint8))


# ---------------------------------------------------------------- cloth


def draw_cloth(canvas: Canvas, attributes: dict[str, str], shape: Shape, look: Look, view: View) -> Image.Image:
    """Shadow, silhouette, pattern, the back's texture, seams; returns the silhouette's mask (L)."""
    main = item_colour(attributes["main_colour"], look.shade)
    second = item_colour(attributes["second_colour"], look.shade[3:])
    image, texture = canvas.image, attributes["texture"] if view.side == "back" else "smooth"
    mask = _silhouette(Canvas(Image.new("L", image.size), view, look), attributes, shape, view.side, texture)
    offset = max(1, int(0.05 * canvas.unit))
    image.paste(tuple(c // 2 for c in image.getpixel((1, 1))), (offset, offset), mask.point(lambda v: v // 3))
    image.paste(main, mask=mask)
    for layer, colour in ((_pattern(attributes["pattern"]), second), (_texture(texture), darker(main, 0.5))):
        if layer is not None:
            overlay = Canvas(Image.new("L", image.size), view, look)
            layer(overlay)
            image.paste(colour, mask=ImageChops.multiply(overlay.image, mask))
    _seams(canvas, shape, darker(main, 0.45), texture)
    return mask


def _silhouette(mask: Canvas, attributes: dict[str, str], shape: Shape, side: str, texture: str) -> Image.Image:
    for outline in (*shape.sleeves, shape.body):
        mask.polygon(outline, 255)
        if texture == "fluffy":
            _tufts(mask, outline)
    if attributes["category"] == "hoodie":
        draw_hood(mask, shape.cut, side, 255)
    return mask.image


def _seams(canvas: Canvas, shape: Shape, colour: Colour, texture: str) -> None:
    cut = shape.cut
    for outline in (*shape.sleeves, shape.body) if texture != "fluffy" else ():
        canvas.line([*outline, outline[0]], 0.02, colour)
    if cut.crotch is not None:
        canvas.line([(0, cut.waist_y if cut.shoulder else cut.top), (0, cut.crotch)], 0.02, colour)


def _pattern(kind: str):
    return {"striped": _stripes, "dotted": _dots, "checked": _checks, "zigzag": _zigzags}.get(kind)


def _texture(kind: str):
    return {"quilted": _quilting, "pleated": _pleats, "fluffy": _fluff}.get(kind)


STEPS = [-0.98 + 0.28 * k for k in range(8)]


def _stripes(layer: Canvas) -> None:
    for y in STEPS:
        layer.rectangle(-1.3, y, 1.3, y + 0.11, 255)


def _dots(layer: Canvas) -> None:
    for row, y in enumerate(STEPS):
        for column in range(-4, 5):
            layer.dot(column * 0.28 + 0.14 * (row % 2), y + 0.1, 0.085, 255)


def _checks(layer: Canvas) -> None:
    for k in range(-4, 5):
        layer.rectangle(k * 0.29 - 0.04, -1.3, k * 0.29 + 0.04, 1.3, 255)
        layer.rectangle(-1.3, k * 0.29 - 0.04, 1.3, k * 0.29 + 0.04, 255)


def _zigzags(layer: Canvas) -> None:
    for y in STEPS:
        layer.line([(-1.32 + 0.165 * k, y + 0.16 * (k % 2)) for k in range(17)], 0.085, 255)


def _quilting(layer: Canvas) -> None:
    for k in range(-7, 8):
        layer.line([(k * 0.34 - 1, -1), (k * 0.34 + 1, 1)], 0.045, 210)
        layer.line([(k * 0.34 + 1, -1), (k * 0.34 - 1, 1)], 0.045, 210)


def _pleats(layer: Canvas) -> None:
    for k in range(-7, 8):
        layer.line([(k * 0.16, -1.1), (k * 0.16, 1.1)], 0.06, 210)


FLECKS = [(0.17 * (k % 14 - 6.5) + 0.05 * math.sin(k * 7.0), 0.17 * (k // 14 - 6.5)) for k in range(196)]


def _fluff(layer: Canvas) -> None:
    for k, (x, y) in enumerate(FLECKS):
        layer.line([(x, y), (x + 0.07 * math.cos(k * 2.4), y + 0.07 * math.sin(k * 2.4))], 0.05, 230)


def _tufts(mask: Canvas, outline: Sequence[Point]) -> None:
    """A woolly edge for the silhouette."""
    for (x0, y0), (x1, y1) in zip(outline, [*outline[1:], outline[0]]):
        count = max(1, round(math.hypot(x1 - x0, y1 - y0) / 0.09))
        for k in range(count):
            mask.dot(x0 + (x1 - x0) * k / count, y0 + (y1 - y0) * k / count, 0.06, 255)
