"""Which figures of a protocol a reader wants first, what they are read against, and what scores mean."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Headline:
    """A figure that a reader wants first, in words, and what it is to be read against."""

    metric: str
    words: str
    against: tuple[str, ...] = ()


_BOTH = "found among the first 10"
HEADLINES: dict[str, tuple[Headline, ...]] = {
    "items": (
        Headline("image_to_text/recall@10/itc", f"a photo's text {_BOTH}", ("image_to_text/recall@10/chance",)),
        Headline(
            "text_to_image/recall@10/itc", f"a photo of a text's item {_BOTH}", ("text_to_image/recall@10/chance",)
        ),
        Headline(
            "photo_to_photo/recall@10/itc", f"another photo of the item {_BOTH}", ("photo_to_photo/recall@10/chance",)
        ),
    ),
    "co-occurrence": tuple(
        line
        for strategy in ("attention", "evidence", "alignment")
        for line in (
            Headline(
                f"words/precision/{strategy}",
                f"words that the teacher would hide by `{strategy}` which the photo does show",
                ("words/precision/random", "words/precision/blind"),
            ),
            Headline(
                f"words/item_auc/{strategy}",
                f"of an item's photos, one that shows a word scores it higher (`{strategy}`)",
                ("words/item_auc/blind",),
            ),
        )
    ),
    "colour-variants": tuple(
        Headline(f"all/recall@{k}/composed", words, tuple(f"all/recall@{k}/{score}" for score in ("sum", "chance")))
        for k, words in (
            (1, "the product in the wanted colour found first"),
            (10, f"the product in the wanted colour {_BOTH}"),
        )
    ),
    "fashiongen-full": (
        Headline("both_ways/mean_recall/itc", "mean of recall@1, 5, 10 both ways", ("both_ways/mean_recall/chance",)),
    ),
    **{
        f"fashiongen-sampled-{unit}": (
            Headline(
                "image_to_text/recall@1/itc", "a photo's text found first of 101", ("image_to_text/recall@1/chance",)
            ),
            Headline(
                "text_to_image/recall@1/itc", "a text's photo found first of 101", ("text_to_image/recall@1/chance",)
            ),
        )
        for unit in ("item", "view")
    },
    **{
        f"fashioniq-{gallery}": (
            Headline(
                "all/mean_recall/composed",
                "mean of recall@10 and @50",
                ("all/mean_recall/sum", "all/mean_recall/chance"),
            ),
        )
        for gallery in ("original", "val")
    },
    **{
        f"recognition-{level}": tuple(
            Headline(
                f"{level}/accuracy/{score}",
                f"{level} told {words}",
                (f"{level}/accuracy/commonest", f"{level}/accuracy/chance"),
            )
            for score, words in (
                ("fused", "from photo and text"),
                ("image_only", "from the photo alone"),
                ("text_only", "from the text alone"),
            )
        )
        for level in ("category", "subcategory")
    },
}
SCORES = {
    "itc": "cosine of the two towers",
    "itm": "the best of itc in the order of the matching head",
    "itc_tolerant": "itc, where any photo or text that is true of the query counts",
    "itm_tolerant": "itm, likewise",
    "composed": "the head that composes photo and text",
    "sum": "features of photo and text added",
    "image_only": "photo alone",
    "text_only": "text alone",
    "fused": "photo and text",
    "zero_shot": "nearest label by name",
    "commonest": "always the commonest label",
    "random": "chosen at random",
    "blind": "how often each vocabulary word is visible, read off the truth",
    "oracle": "the truth's own mask",
}
