"""The texts of the generated corpus: one product text per garment, and which attribute each of its words names.

Phrases are marked up: `*word` names the phrase's own attribute, `!word` the main colour, `~word` the second colour,
`@word` the category; unmarked words are function words or filler, which no photo shows.
"""

import random
from collections.abc import Iterable

MARKS = {"!": "main_colour", "~": "second_colour", "@": "category"}
MIN_WORDS, MAX_WORDS = 18, 32

COLOUR_WORDS = {
    "red": ("red", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green", "emerald"),
    "blue": ("blue", "cobalt"),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
    "brown": ("brown",),
    "black": ("black",),
    "white": ("white", "ivory"),
}
CATEGORY_WORDS = {
    "tee": ("tee", "t-shirt"),
    "dress": ("dress", "gown"),
    "hoodie": ("hoodie",),
    "jacket": ("jacket", "bomber"),
    "coat": ("coat", "overcoat"),
    "skirt": ("skirt",),
    "pants": ("pants", "trousers"),
    "shorts": ("shorts",),
    "jumpsuit": ("jumpsuit",),
    "poncho": ("poncho", "cape"),
}
HEADS = ("!{main} @{category}", "@{category} in !{main}", "the !{main} @{category}", "our !{main} @{category}")
HEADS_WITHOUT_COLOUR = ("@{category}", "the new @{category}", "our @{category}")

PHRASES = {
    "pattern": {
        "plain": ("*plain *fabric", "*solid *fabric"),
        "striped": ("*stripes all over", "a *striped *pattern"),
        "dotted": ("*dots all over", "a *dotted *pattern"),
        "checked": ("*checks all over", "a *checked *pattern"),
        "zigzag": ("*zigzags all over", "a *zigzag *pattern"),
    },
    "second_colour": {"": ("~{second} ~trim", "~trim in ~{second}", "~{second} ~accents")},
    "sleeve": {
        "sleeveless": ("*sleeveless *shoulders", "*bare *shoulders"),
        "short": ("*short *sleeves", "*half *sleeves"),
        "long": ("*long *sleeves", "*full *sleeves"),
        "puff": ("*puff *sleeves", "*balloon *sleeves"),
        "bell": ("*bell *sleeves", "*flared *sleeves"),
    },
    "neckline": {
        "round": ("a *round *neckline", "*crew *neckline"),
        "v-neck": ("a *v-neck", "*v-neck *neckline"),
        "square": ("a *square *neckline", "*boxy *neckline"),
        "turtleneck": ("a *turtleneck", "a *high *turtleneck"),
        "collar": ("a *pointed *collar", "*classic *collar"),
    },
    "closure": {
        "zip": ("a *zip *closure", "*zip through the *front"),
        "buttons": ("a row of *buttons", "*buttons down the *front"),
        "laces": ("*laces at the *front", "*crossed *laces"),
    },
    "pocket": {
        "patch": ("a *patch *pocket", "one *square-cut *pocket"),
        "flap": ("a *flap *pocket", "one *pocket with *flap"),
        "round": ("a *circle *pocket", "one *circle *pocket"),
    },
    "front_print": {
        value: (f"a *{value} *print", f"*{value} *print at the *front", f"*{value} *motif")
        for value in ("star", "heart", "moon", "flower", "bolt")
    },
    "back_print": {
        value: (f"*{value} on the *back", f"*{value} across the *back", f"*back *artwork of *{value}")
        for value in ("wings", "crown", "tree", "sun")
    },
    "hem": {
        "straight": ("a *straight *hem", "*clean *hem"),
        "ruffled": ("a *ruffled *hem", "*ruffles at the *hem"),
        "fringed": ("a *fringed *hem", "*fringes at the *hem"),
        "jagged": ("a *jagged *hem", "*spiky *hem"),
    },
    "cuff": {
        "ribbed": ("*ribbed *cuffs", "*cuffs with *ribs"),
        "fur": ("*furry *cuffs", "*cuffs with *fur"),
        "folded": ("*folded *cuffs", "*turned-up *cuffs"),
    },
    "belt": {
        "leather": ("a *leather *belt", "*buckled *belt"),
        "sash": ("a *tied *sash", "*sash at the *waist"),
        "chain": ("a *chain *belt", "*golden *chain at the *waist"),
    },
    "texture": {  # of the back: the front is smooth
        "smooth": ("*smooth *back", "*smooth *back *panel"),
        "quilted": ("*quilted *back", "*quilted *back *panel"),
        "pleated": ("*pleated *back", "*pleats on the *back"),
        "fluffy": ("*fluffy *back", "*fluffy *back *panel"),
    },
}
PATTERN_NOUNS = {"striped": "stripes", "dotted": "dots", "checked": "checks", "zigzag": "zigzags"}
PATTERN_WITH_COLOUR = ("~{second} *{noun}", "*{noun} in ~{second}")
FILLER = (
    "machine wash cold",
    "made in portugal",
    "made in italy",
    "free returns",
    "relaxed fit",
    "organic cotton",
    "ships within two days",
    "limited edition",
    "gift wrapping available",
    "do not bleach",
    "true to size",
    "a summer favourite",
    "soft on the skin",
    "easy care",
    "fair trade",
    "best seller",
    "for every day",
    "members save more",
)

Unit = tuple[str, str | None]
"""One word as written, punctuation included, and the attribute that it names (None: function word or filler)."""


def write_text(values: dict[str, str], claims: Iterable[str], rng: random.Random) -> tuple[str, list[str | None]]:
    """Describe a garment in 18-32 words; returns the text and, per word, the attribute that it names (or None).

    `claims` are the attributes to name; the category always is. Source: ours.

    >>> text, named = write_text({"category": "skirt", "main_colour": "red"}, ["main_colour"], random.Random(0))
    >>> "skirt" in text.lower(), len(text.split()) == len(named)
    (True, True)
    """
    claims = sorted(set(claims) | {"category"})
    while True:
        head, clauses = _head(values, claims, rng), _clauses(values, claims, rng)
        units = _join(head, _with_filler(clauses, len(head), rng), rng)
        if MIN_WORDS <= len(units) <= MAX_WORDS:
            return " ".join(word for word, _ in units), [attribute for _, attribute in units]


def _units(phrase: str, own: str | None) -> list[Unit]:
    """Read the marks: with own attribute "closure", "a *zip" becomes [("a", None), ("zip", "closure")]."""
    marks = {**MARKS, "*": own}
    return [(word[1:], marks[word[0]]) if word[0] in marks else (word, None) for word in phrase.split()]


def _head(values: dict[str, str], claims: list[str], rng: random.Random) -> list[Unit]:
    category = rng.choice(CATEGORY_WORDS[values["category"]])
    if "main_colour" not in claims:
        return _units(rng.choice(HEADS_WITHOUT_COLOUR).format(category=category), None)
    main = rng.choice(COLOUR_WORDS[values["main_colour"]])
    return _units(rng.choice(HEADS).format(category=category, main=main), None)


def _clauses(values: dict[str, str], claims: list[str], rng: random.Random) -> list[list[Unit]]:
    """One clause a claimed attribute; a pattern's colour and the pattern share one where both are claimed."""
    second = rng.choice(COLOUR_WORDS[values["second_colour"]]) if "second_colour" in claims else ""
    noun = PATTERN_NOUNS.get(values["pattern"]) if "pattern" in claims else None
    clauses = []
    for attribute in claims:
        if attribute in ("category", "main_colour") or (attribute == "second_colour" and noun):
            continue
        if attribute == "pattern" and noun and second:
            phrase = rng.choice(PATTERN_WITH_COLOUR).format(second=second, noun=noun)
        elif attribute == "second_colour":
            phrase = rng.choice(PHRASES[attribute][""]).format(second=second)
        else:
            phrase = rng.choice(PHRASES[attribute][values[attribute]])
        clauses.append(_units(phrase, attribute))
    return clauses


def _with_filler(clauses: list[list[Unit]], head_words: int, rng: random.Random) -> list[list[Unit]]:
    """Adds things that no photo shows until the text is long enough, and shuffles."""
    target, words = rng.randint(18, 26), head_words + sum(map(len, clauses))
    for phrase in rng.sample(FILLER, len(FILLER)):
        clauses.append(_units(phrase, None))
        words += len(clauses[-1])
        if words >= target:
            break
    rng.shuffle(clauses)
    return clauses


def _join(head: list[Unit], clauses: list[list[Unit]], rng: random.Random) -> list[Unit]:
    """Clauses joined by commas, stops and "and"; what is filler stands in a sentence of its own."""
    units, before_is_filler, first = list(head), False, True
    for clause in clauses:
        is_filler = all(attribute is None for _, attribute in clause)
        link = "." if is_filler or before_is_filler else rng.choice(("with",) if first else (",", ",", "and", "."))
        if link in ",.":
            units[-1] = (units[-1][0] + link, units[-1][1])
        else:
            units.append((link, None))
        starts = link == "."
        units += [(clause[0][0].capitalize() if starts else clause[0][0], clause[0][1]), *clause[1:]]
        before_is_filler, first = is_filler, False
    units[-1] = (units[-1][0] + ".", units[-1][1])
    return [(units[0][0].capitalize(), units[0][1]), *units[1:]]
