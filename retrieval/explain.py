"""Why a photo and a text go together: where each word looks, which words the photo supports, what SyncMask would hide.

`explain` gives plain data; `explain_figures.py` draws it and `explain_page.py` makes one HTML page of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from syncmask.evaluation.figures import Masks
from syncmask.evaluation.measure import patches_of_top_words, top
from syncmask.masks import attention_word_scores, standardise, valid_words
from syncmask.processing.processing_syncmask import open_image, split_words, to_rgb
from syncmask.scores import attention_scores, word_alignment, word_evidence

from .encoder import Encoder, Photo
from .heatmaps import attention_maps, gradient_maps, resolve_layer

STRATEGIES = ("attention", "evidence", "alignment")


@dataclass(frozen=True)
class Explanation:
    """What a model's fusion encoder says of one photo and one text.

    Attributes:
        photo: upright, RGB.
        text: as it was given; words beyond the model's reach have no maps.
        similarity: cosine of both vectors.
        match: probability of a match by the matching head.
        words: (W,) those that the model read, as written.
        support: (W,) how much the photo supports each word, see `support_kind`.
        support_kind: "evidence" (log-likelihood ratio in nats, -2 to 4: does this photo make the word likelier than
            other photos do?) or "attention" (standardised dual-softmax score: do the word and a patch pick each other
            out?).
        support_note: one sentence that says how it was measured.
        attention: (W, h, w), where each word looks, each sums to 1.
        gradient: (W, h, w), the same weighted by what the match gains from it; None in a model's last fusion layer.
        masks: the words and patches that SyncMask would hide.
        layer: the fusion layer that was read.
    """

    photo: Image.Image
    text: str
    similarity: float
    match: float
    words: Sequence[str]
    support: np.ndarray
    support_kind: str
    support_note: str
    attention: np.ndarray
    gradient: np.ndarray | None
    masks: Masks
    layer: int

    def content(self) -> dict:
        """What goes into JSON: both scores, and of each word its support and whether it would be hidden."""
        words = zip(self.words, self.support.tolist(), self.masks.words.tolist())
        return {
            "text": self.text,
            "match": self.match,
            "similarity": self.similarity,
            "fusion_layer": self.layer,
            "support": self.support_kind,
            "words": [{"word": word, "support": support, "hidden": hidden} for word, support, hidden in words],
        }

    def find(self, word: str) -> list[int]:
        """Places of a word in the text, in any case.

        Raises:
            ValueError: the text does not have it, or has it where the model no longer reads.
        """
        places = [place for place, known in enumerate(self.words) if known.lower() == word.strip().lower()]
        if not places:
            raise ValueError(f"the model read no word {word!r} in this text; its words are: {', '.join(self.words)}")
        return places


def explain(
    encoder: Encoder,
    photo: Photo,
    text: str,
    *,
    others: Sequence[Photo] = (),
    layer: int | None = None,
    strategy: str = "attention",
    word_rate: float = 0.3,
    patch_rate: float = 0.4,
) -> Explanation:
    """Explains one pair.

    Args:
        encoder: of a model with a matching head; with an MLM head too, words are coloured by their evidence.
        photo: a PIL image, a path or the bytes of an image file.
        text: what the photo is compared with.
        others: photos of other items that evidence and alignment compare with (three or more tell most); none = a blank
            one.
        layer: fusion layer that is read; `config.mask_layer` when None.
        strategy: which scores choose the hidden words: "attention", "evidence" with an MLM head, or "alignment" with a
            word-patch head.
        word_rate: share of the words that would be hidden.
        patch_rate: share of the patches.

    Raises:
        ValueError: a text without a word, an unreadable photo, an unknown layer or strategy, a model without the head.
        FileNotFoundError: a path without a file.
    """
    model = encoder.model
    _check(model, text, strategy)
    layer = resolve_layer(model, layer)
    pictures = [to_rgb(open_image(one)) for one in (photo, *others)]
    batch = encoder.processor(images=pictures, text=[text], return_word_ids=True).to(encoder.device)
    ids, mask, word_ids = batch["input_ids"], batch["attention_mask"], batch["word_ids"]
    with torch.no_grad():
        images = model.syncmask.encode_image(_with_another(batch["pixel_values"].to(model.dtype)))
        texts = model.syncmask.encode_text(ids, mask)
        match = model.itm_logits(texts, mask, images[:1]).float().softmax(dim=-1)[0, 1]
        similarity = model.syncmask.project_image(images[:1]) @ model.syncmask.project_text(texts, mask).T
    maps = (model, images[:1], texts, mask, word_ids, layer)
    looks, scores = attention_maps(*maps), _word_scores(model, images, texts, ids, mask, word_ids, layer)
    # Alignment has maps of its own; with the other two, patches are hidden by cross-attention.
    opinion = _aligned(model, images, ids, word_ids) if strategy == "alignment" else (scores[strategy], looks)
    kind = "evidence" if "evidence" in scores else "attention"
    spans = split_words(text)[: looks.shape[1]]
    return Explanation(
        photo=pictures[0],
        text=text,
        similarity=float(similarity),
        match=float(match),
        words=[text[start:end] for start, end in spans],
        support=scores[kind][0].cpu().numpy(),
        support_kind=kind,
        support_note=_note(kind, len(others)),
        attention=_on_grid(model, looks),
        gradient=_on_grid(model, gradient_maps(*maps)) if layer < _layers(model) - 1 else None,
        masks=_masks(model, *opinion, word_ids, strategy, word_rate, patch_rate),
        layer=layer,
    )


def _check(model, text: str, strategy: str) -> None:
    if not hasattr(model, "itm_logits"):
        raise ValueError(
            f"{type(model).__name__} has no matching head to explain; wanted SyncMaskForPreTraining or "
            "SyncMaskForImageTextRetrieval"
        )
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; wanted one of {', '.join(STRATEGIES)}")
    if strategy == "evidence" and not hasattr(model, "mlm_logits"):
        raise ValueError(f"evidence needs an MLM head and {type(model).__name__} has none; take strategy 'attention'")
    if strategy == "alignment" and getattr(model, "word_patch_head", None) is None:
        raise ValueError(
            f"alignment needs a word-patch head and this {type(model).__name__} has none; take strategy 'attention' "
            "or a model that was trained with wpa_weight above 0"
        )
    if not split_words(text):
        raise ValueError(f"the text {text[:40]!r} holds no word; give at least one")


def _with_another(pixel_values: torch.Tensor) -> torch.Tensor:
    """The photos (1 + K, 3, S, S); a lone one gets a blank one beside it (mid-grey: zeros after normalisation)."""
    if len(pixel_values) > 1:
        return pixel_values
    return torch.cat([pixel_values, torch.zeros_like(pixel_values)])


@torch.no_grad()
def _word_scores(model, images, texts, ids, mask, word_ids, layer: int) -> dict[str, torch.Tensor]:
    """Scores (1, W) of the words: "attention" always (standardised), "evidence" (nats) with an MLM head."""
    raw = attention_scores(model.syncmask, images[:1], texts, mask, layer)
    scores = {"attention": standardise(attention_word_scores(raw, mask, word_ids), valid_words(word_ids))}
    if hasattr(model, "mlm_logits"):
        own, other = torch.zeros_like(ids[:, 0]), torch.arange(1, len(images), device=ids.device)[None]
        scores["evidence"] = word_evidence(model, images, own, other, ids, mask, word_ids)
    return scores


@torch.no_grad()
def _aligned(model, images, ids, word_ids) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (1, W) and maps (1, W, N) of the first photo's words, against the other photos."""
    return word_alignment(model, images, ids, word_ids)


def _masks(model, scores, looks, word_ids, strategy: str, word_rate: float, patch_rate: float) -> Masks:
    """What the method would hide at T = 0 and without its random share; nothing where the text is one word."""
    valid = valid_words(word_ids)
    words = top(scores, valid, word_rate)
    attended = patches_of_top_words(scores, valid, looks, word_rate)
    patches = top(attended, torch.ones_like(attended, dtype=torch.bool), patch_rate) & words.any()
    return Masks(f"hidden together ({strategy})", words[0].cpu().numpy(), _on_grid(model, patches)[0])


def _note(kind: str, others: int) -> str:
    if kind == "attention":
        return "Words by how sharply they and a patch pick each other out (this model has no MLM head for evidence)."
    against = f"{others} other photo{'s' if others > 1 else ''}" if others else "a blank photo"
    return f"Words by evidence: is the word likelier with this photo than with {against}?"


def _on_grid(model, maps: torch.Tensor) -> np.ndarray:
    """The first pair's maps (1, W, N) or (1, N) on the grid of patches: (W, h, w) or (1, h, w)."""
    return maps[0].reshape(-1, *model.syncmask.grid).cpu().numpy()


def _layers(model) -> int:
    return len(model.syncmask.fusion_encoder.layers)
