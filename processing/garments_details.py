"""What is sewn onto a garment of the generated corpus: neckline, closure, pocket, prints, belt, hem, cuffs.

Every function draws one attribute in its own place (`garments_shape.places`) and nowhere else. Source: ours.
"""

import math

from .garments_shape import (
    Canvas,
    Colour,
    Cut,
    Look,
    Point,
    Shape,
    around,
    belt_line,
    closure_line,
    darker,
    item_colour,
)

INK, CREAM, GOLD, LEATHER, STEEL = (26, 24, 32), (252, 244, 214), (238, 188, 40), (92, 50, 26), (206, 210, 216)


def draw_details(canvas: Canvas, attributes: dict[str, str], shape: Shape, look: Look, side: str) -> None:
    """Draw all that is sewn on, on this side."""
    main = item_colour(attributes["main_colour"], look.shade)
    second = item_colour(attributes["second_colour"], look.shade[3:])
    cut = shape.cut
    _hem(canvas, attributes, shape, main, second)
    for end in shape.sleeve_ends:
        _sleeve_end(canvas, attributes["cuff"], end, main, second)
    if attributes["sleeve"] == "sleeveless":
        for hole in shape.sleeves:
            canvas.line([hole[0], hole[1], hole[2], hole[3]], 0.07, second)
    _top(canvas, attributes, cut, side, main, second)
    if side == "front":
        _closure(canvas, attributes["closure"], cut, main)
        _pocket(canvas, attributes["pocket"], cut.pocket_at, main, second)
        _print(canvas, attributes["front_print"], cut.print_at, 0.2)
    else:
        _print(canvas, attributes["back_print"], cut.back_print_at, 0.28)
    _belt(canvas, attributes["belt"], cut, side)


# ---------------------------------------------------------------- edges


def _hem(canvas: Canvas, attributes: dict[str, str], shape: Shape, main: Colour, second: Colour) -> None:
    """The band along the bottom, one a leg; hoodies and jackets have a waistband there."""
    kind, ink = attributes["hem"], darker(second)
    for x0, y, x1, _ in shape.hems:
        y, low, width = y + 0.02, y + 0.15, x1 - x0
        if kind == "ruffled":
            radius = 0.09
            count = max(2, round(width / 0.15))
            for k in range(count):
                canvas.dot(x0 + width * (k + 0.5) / count, low - 0.03, radius, second, ink)
            canvas.rectangle(x0, y - 0.02, x1, low - 0.05, second)
        elif kind == "fringed":
            canvas.rectangle(x0, y - 0.02, x1, y + 0.05, second)
            count = max(3, round(width / 0.1))
            for k in range(count + 1):
                x = x0 + width * k / count
                canvas.line([(x, y), (x, low + 0.09)], 0.04, second)
        elif kind == "jagged":
            count = max(2, round(width / 0.22))
            step = width / count
            for k in range(count):
                tooth = [(x0 + step * k, y), (x0 + step * (k + 1), y), (x0 + step * (k + 0.5), low + 0.09)]
                canvas.polygon(tooth, second, ink)
        else:
            canvas.rectangle(x0, y, x1, low, second, ink)
            if kind == "none":
                for k in range(1, 12):
                    canvas.line([(x0 + width * k / 12, y), (x0 + width * k / 12, low)], 0.015, ink)


def _sleeve_end(canvas: Canvas, kind: str, end: list[Point], main: Colour, second: Colour) -> None:
    """A sleeve's last quarter: trim for sleeves that have no cuff, else the cuff."""
    back_outer, outer, inner, back_inner = end
    if kind == "fur":
        for t in (0.15, 0.55, 0.95):
            for s in (0.0, 0.5, 1.0):
                x = _mix(_mix(back_outer, outer, t), _mix(back_inner, inner, t), s)
                canvas.dot(*x, 0.085, CREAM if (t + s) * 2 % 1 < 0.5 else (226, 214, 184))
        return
    depth = {"none": 0.6, "ribbed": 0.2, "folded": 0.0}[kind]
    quad = [_mix(back_outer, outer, depth), outer, inner, _mix(back_inner, inner, depth)]
    if kind == "folded":
        centre = _mix(outer, inner, 0.5)
        quad = [_mix(centre, point, 1.35) if i in (1, 2) else point for i, point in enumerate(quad)]
        wide = _mix(quad[0], quad[3], 0.5)
        quad[0], quad[3] = _mix(wide, quad[0], 1.35), _mix(wide, quad[3], 1.35)
    canvas.polygon(quad, second, darker(second))
    if kind == "ribbed":
        for t in (0.1, 0.37, 0.63, 0.9):
            canvas.line([_mix(quad[0], quad[3], t), _mix(quad[1], quad[2], t)], 0.03, INK)


def _mix(a: Point, b: Point, share: float) -> Point:
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share


# ---------------------------------------------------------------- neck and waistband


def _top(canvas: Canvas, attributes: dict[str, str], cut: Cut, side: str, main: Colour, second: Colour) -> None:
    """Neckline, hood, collar or waistband, as the category has it."""
    category, top, ink = attributes["category"], cut.top, darker(second)
    if not cut.shoulder:
        canvas.rectangle(-cut.waist, top, cut.waist, top + 0.1, second, ink)
    elif category == "hoodie":
        draw_hood(canvas, cut, side, main)
    elif category == "jacket":
        canvas.rectangle(-0.22, top - 0.12, 0.22, top + 0.06, second, ink)
        if side == "front":
            canvas.polygon([(-0.1, top - 0.12), (0.1, top - 0.12), (0, top + 0.08)], darker(main, 0.4))
    elif category == "coat":
        _lapels(canvas, cut, side, main)
    elif side == "back":
        canvas.rectangle(-0.2, top - 0.02, 0.2, top + 0.05, second, ink)
    else:
        _neckline(canvas, attributes["neckline"], top, main, second)


def _neckline(canvas: Canvas, kind: str, top: float, main: Colour, second: Colour) -> None:
    inside, ink = darker(main, 0.35), darker(second)
    if kind == "round":
        arc = [(0.2 * math.cos(a), 0.2 * math.sin(a)) for a in (math.pi * k / 10 for k in range(11))]
        canvas.polygon([(x * 1.38, top + y * 1.4) for x, y in arc], second, ink)
        canvas.polygon([(x * 1.02, top + y * 1.05) for x, y in arc], inside)
    elif kind == "v-neck":
        canvas.polygon([(-0.27, top), (0.27, top), (0, top + 0.42)], second, ink)
        canvas.polygon([(-0.19, top), (0.19, top), (0, top + 0.3)], inside)
    elif kind == "square":
        canvas.rectangle(-0.29, top, 0.29, top + 0.36, second, ink)
        canvas.rectangle(-0.21, top, 0.21, top + 0.28, inside)
    elif kind == "turtleneck":
        canvas.rectangle(-0.19, top - 0.16, 0.19, top + 0.08, second, ink)
        canvas.line([(-0.19, top - 0.04), (0.19, top - 0.04)], 0.03, ink)
    elif kind == "collar":
        canvas.polygon([(-0.1, top - 0.05), (0.1, top - 0.05), (0, top + 0.16)], inside)
        for sign in (-1, 1):
            wing = [(0.0, top + 0.16), (0.1, top - 0.14), (0.2, top - 0.06), (0.3, top + 0.32)]
            canvas.polygon([(sign * x, y) for x, y in wing], second, ink)


def draw_hood(canvas: Canvas, cut: Cut, side: str, colour: Colour | int) -> None:
    """The hood: around the neck in front, hanging down behind. Also drawn into the silhouette's mask (colour 255)."""
    top = cut.top
    if side == "front":
        hood = [(-0.24, top + 0.16), (-0.33, top - 0.1), (-0.2, top - 0.36), (0.2, top - 0.36), (0.33, top - 0.1)]
        hood = [*hood, (0.24, top + 0.16), (0, top + 0.26)]
    else:
        hood = [(-0.3, top - 0.06), (0.3, top - 0.06), (0.32, top + 0.14), (0.0, top + 0.44), (-0.32, top + 0.14)]
    if isinstance(colour, int):
        return canvas.polygon(hood, colour)
    canvas.polygon(hood, colour, darker(colour, 0.45))
    if side == "front":
        hole = [(-0.18, top - 0.04), (-0.14, top - 0.24), (0.14, top - 0.24), (0.18, top - 0.04), (0, top + 0.2)]
        canvas.polygon(hole, darker(colour, 0.35))
        for x in (-0.1, 0.1):
            canvas.line([(x, top + 0.14), (x * 1.2, top + 0.36)], 0.025, CREAM)


def _lapels(canvas: Canvas, cut: Cut, side: str, main: Colour) -> None:
    top, ink = cut.top, darker(main, 0.45)
    if side == "back":
        canvas.polygon(
            [(-0.2, top - 0.06), (0.2, top - 0.06), (0.27, top + 0.1), (-0.27, top + 0.1)], darker(main, 0.8), ink
        )
        return canvas.line([(0, cut.bottom - 0.6), (0, cut.bottom)], 0.03, ink)
    canvas.polygon([(-0.16, top - 0.02), (0.16, top - 0.02), (0, top + 0.34)], darker(main, 0.35))
    for sign in (-1, 1):
        lapel = [(0.02, top + 0.36), (0.14, top - 0.06), (0.27, top + 0.06), (0.22, top + 0.12), (0.3, top + 0.18)]
        canvas.polygon([(sign * x, y) for x, y in lapel], darker(main, 0.8), ink)


# ---------------------------------------------------------------- closure, pocket, prints, belt


def _closure(canvas: Canvas, kind: str, cut: Cut, main: Colour) -> None:
    top, bottom = closure_line(cut)
    if kind == "zip":
        canvas.line([(0, top), (0, bottom)], 0.15, INK)
        for k in range(int((bottom - top) / 0.1)):
            canvas.rectangle(-0.05, top + 0.1 * k, 0.05, top + 0.1 * k + 0.05, STEEL)
        canvas.rectangle(-0.075, top, 0.075, top + 0.14, STEEL, INK)
    elif kind == "buttons":
        canvas.line([(0.11, top), (0.11, bottom)], 0.015, darker(main, 0.45))
        for k in range(1 + int((bottom - top - 0.16) / 0.22)):
            canvas.dot(0, top + 0.08 + 0.22 * k, 0.08, CREAM, INK)
    elif kind == "laces":
        for k in range(int((bottom - top) / 0.2)):
            y = top + 0.2 * k
            for line in ([(-0.1, y), (0.1, y + 0.2)], [(0.1, y), (-0.1, y + 0.2)]):
                canvas.line(line, 0.075, INK)
                canvas.line(line, 0.035, CREAM)


def _pocket(canvas: Canvas, kind: str, centre: Point, main: Colour, second: Colour) -> None:
    if kind == "none":
        return
    (x0, y0, x1, y1), ink = around(centre, 0.17), darker(second, 0.4)
    if kind == "round":
        canvas.dot(*centre, 0.17, second, ink)
        canvas.line([(x0 + 0.03, y0 + 0.09), (x1 - 0.03, y0 + 0.09)], 0.03, ink)
        return
    canvas.rectangle(x0, y0, x1, y1, second, ink)
    if kind == "patch":
        canvas.rectangle(x0 + 0.07, y0 + 0.07, x1 - 0.07, y1 - 0.07, second, ink)
    else:
        flap = [(x0 - 0.02, y0 - 0.01), (x1 + 0.02, y0 - 0.01), (x1 + 0.02, y0 + 0.1), (centre[0], y0 + 0.22)]
        canvas.polygon([*flap, (x0 - 0.02, y0 + 0.1)], INK)
        canvas.dot(centre[0], y0 + 0.09, 0.045, GOLD)


def _polar(radius, count: int) -> list[Point]:
    turns = [(2 * math.pi * k / count - math.pi / 2, radius(k)) for k in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for a, r in turns]


def _moon() -> list[Point]:
    outer = [(math.cos(a), math.sin(a)) for a in (math.radians(50 + 26 * k) for k in range(11))]
    inner = [(0.72 * math.cos(a) + 0.42, 0.72 * math.sin(a)) for a in (math.radians(300 - 24 * k) for k in range(11))]
    return [*outer, *inner]


def _heart() -> list[Point]:
    turns = [2 * math.pi * k / 24 for k in range(24)]
    wave = [
        (math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        for t in turns
    ]
    return [(x, -0.06 * y - 0.1) for x, y in wave]


WING = [(0.1, -0.1), (0.3, -0.6), (0.7, -0.9), (1.2, -0.95), (1.12, -0.6), (1.0, -0.5), (1.02, -0.2), (0.84, -0.12)]
WING += [(0.84, 0.16), (0.62, 0.22), (0.56, 0.5), (0.3, 0.5), (0.1, 0.2)]
FIGURES: dict[str, list[Point]] = {
    "star": _polar(lambda k: 1.05 if k % 2 == 0 else 0.42, 10),
    "heart": _heart(),
    "moon": _moon(),
    "flower": _polar(lambda k: 0.72 + 0.33 * math.cos(2 * math.pi * k / 6), 30),
    "bolt": [(0.35, -1.05), (-0.6, 0.15), (-0.05, 0.15), (-0.4, 1.05), (0.65, -0.25), (0.1, -0.25)],
    "wings": [*WING, *((-x, y) for x, y in reversed(WING))],
    "crown": [(-0.9, 0.65), (-0.95, -0.6), (-0.45, 0.0), (0.0, -0.85), (0.45, 0.0), (0.95, -0.6), (0.9, 0.65)],
    "tree": [(0, -1.05), (0.55, -0.2), (0.3, -0.2), (0.8, 0.55), (0.18, 0.55), (0.18, 1), (-0.18, 1), (-0.18, 0.55)]
    + [(-0.8, 0.55), (-0.3, -0.2), (-0.55, -0.2)],
    "sun": _polar(lambda k: 1.05 if k % 2 == 0 else 0.62, 22),
}


TINTS = {"star": GOLD, "heart": (240, 60, 100), "moon": (150, 214, 255), "bolt": (90, 235, 130), "sun": (255, 150, 50)}
TINTS |= {"crown": GOLD, "tree": (80, 190, 90)}


def _print(canvas: Canvas, figure: str, centre: Point, size: float) -> None:
    """A figure in its own light tint with a dark rim, so that it stands out from any cloth."""
    if figure == "none":
        return
    x0, y0 = centre
    outline = canvas.points([(x0 + size * x, y0 + size * y) for x, y in FIGURES[figure]])
    canvas.draw.line([*outline, outline[0], outline[1]], fill=INK, width=max(4, int(0.09 * canvas.unit)), joint="curve")
    canvas.draw.polygon(outline, fill=TINTS.get(figure, CREAM))
    if figure == "flower":
        canvas.dot(x0, y0, size * 0.34, GOLD, INK)


def _belt(canvas: Canvas, kind: str, cut: Cut, side: str) -> None:
    """Around the waist; a buckle in front only, the sash's ends beside the hip so that both sides show them."""
    width, y = belt_line(cut)
    if kind == "leather":
        canvas.rectangle(-width, y - 0.07, width, y + 0.07, LEATHER, CREAM)
        if side == "front":
            canvas.rectangle(-0.11, y - 0.1, 0.11, y + 0.1, GOLD, INK)
            canvas.rectangle(-0.05, y - 0.045, 0.05, y + 0.045, LEATHER)
    elif kind == "sash":
        tone, ink = (240, 92, 120), (120, 20, 50)
        canvas.rectangle(-width, y - 0.06, width, y + 0.06, tone, ink)
        x = width * 0.62
        for end in (-0.1, 0.08):
            canvas.polygon([(x, y), (x + end + 0.06, y + 0.4), (x + end - 0.08, y + 0.38)], tone, ink)
        canvas.dot(x, y, 0.09, tone, ink)
    elif kind == "chain":
        canvas.rectangle(-width, y - 0.06, width, y + 0.06, INK)
        count = round(width / 0.07)
        for k in range(count):
            canvas.dot(-width + 2 * width * (k + 0.5) / count, y, 0.055, GOLD)
