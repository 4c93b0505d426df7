"""A WordPiece tokenizer trained on a corpus's own texts, for when no pretrained one is given."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from transformers import BertTokenizer

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LONGEST = 128


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 8192, seed: int = 0, max_length: int | None = None
) -> BertTokenizer:
    """Train a lower-casing WordPiece tokenizer; the same texts give the same bytes, whatever their order.

    Args:
        texts: the train split's texts; each distinct one counts once, however many photos it has.
        vocab_size: at most so many entries, the special tokens (ids 0 to 4) and single characters included.
        seed: taken so that callers can hand on theirs; the training draws no random number.
        max_length: tokens a text may have ([CLS] and [SEP] included) before it is cut; by default the 99th
            percentile of the texts' lengths, at most 128. Stored as the tokenizer's `model_max_length`.

    Raises:
        ValueError: there is no text, or `vocab_size` is too small for the texts' characters.

    Example:
        >>> tokenizer = train_tokenizer(["a red shirt", "a red skirt"])
        >>> tokenizer.cls_token_id, tokenizer.model_max_length
        (2, 5)
    """
    texts = sorted({text for text in texts if text.strip()})
    if not texts:
        raise ValueError("got no text to train a tokenizer on; pass the train split's texts.")
    tokenizer = BertTokenizer(vocab=_train_vocabulary(texts, vocab_size))
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    tokenizer.model_max_length = max_length or min(LONGEST, int(np.ceil(np.quantile(lengths, 0.99))))
    return tokenizer


def _train_vocabulary(texts: list[str], vocab_size: int) -> dict[str, int]:
    """The vocabulary of the `tokenizers` trainer, with what that leaves to chance pinned down.

    The trainer numbers the pieces "##x" as it meets them in a hash map of words, whose order changes from run
    to run, and breaks ties between merges by these numbers. So all of them are handed over, sorted.
    """
    blank = BertTokenizer().backend_tokenizer
    words = {
        word for text in texts for word, _ in blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(text))
    }
    first = sorted({word[0] for word in words})
    later = sorted({f"##{character}" for word in words for character in word[1:]})
    fixed = SPECIAL_TOKENS + first + later
    if vocab_size < len(fixed):
        raise ValueError(
            f"vocab_size is {vocab_size}, but the texts' single characters and the special tokens alone are "
            f"{len(fixed)}; ask for more entries."
        )
    trained = Tokenizer(WordPiece(unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    return dict(sorted(trained.get_vocab().items(), key=lambda entry: entry[1]))
