"""WordScores: the running mean of what each word scores over all photos, m[v]."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .gather import num_processes
from .masks import valid_words


class WordScores:
    """Running means of standardised word scores, keyed by the word (its tuple of pieces).

    Sums and counts decay by `decay` a step, so that old teachers' opinions fade; a word that was never measured takes
    the mean of all.

    Args:
        vocabulary: the words' piece ids, in an order that is the same on every process.
        decay: what remains of sums and counts after each update.

    Example:

    ```python
    >>> means = WordScores([(7,), (8, 9)])
    >>> means.update(torch.tensor([[0, 1]]), torch.tensor([[1.0, -1.0]]), torch.tensor([[True, True]]))
    >>> means.means(torch.tensor([[0, 1, -1]]))
    tensor([[ 1., -1.,  0.]])
    ```
    """

    def __init__(self, vocabulary: list[tuple[int, ...]], decay: float = 0.99):
        self.vocabulary = list(vocabulary)
        self.decay = decay
        self.sums = torch.zeros(len(self.vocabulary), dtype=torch.float64)
        self.counts = torch.zeros(len(self.vocabulary), dtype=torch.float64)
        self._index = {pieces: row for row, pieces in enumerate(self.vocabulary)}

    @classmethod
    def from_texts(cls, texts: list[tuple[torch.Tensor, torch.Tensor]], decay: float = 0.99) -> "WordScores":
        """Collect the words of tokenised texts, each (input_ids (L,), word_ids (L,)), in sorted order."""
        words = {pieces for input_ids, word_ids in texts for pieces in _words(input_ids, word_ids)}
        return cls(sorted(words), decay)

    def rows(self, input_ids: torch.Tensor, word_ids: torch.Tensor) -> torch.Tensor:
        """Find each word's row: (B, L), (B, L) -> (B, W), -1 where there is no word or it was never seen."""
        found = torch.full(valid_words(word_ids).shape, -1, dtype=torch.long)
        for row, (ids, words) in enumerate(zip(input_ids.tolist(), word_ids.tolist())):
            for column, pieces in enumerate(_words(ids, words)):
                found[row, column] = self._index.get(pieces, -1)
        return found.to(input_ids.device)

    def means(self, rows: torch.Tensor) -> torch.Tensor:
        """Look up m[v] for rows (B, W) -> (B, W) fp32."""
        overall = self.sums.sum() / self.counts.sum().clamp(min=1e-12)
        means = torch.where(self.counts > 0, self.sums / self.counts.clamp(min=1e-300), overall)
        means = torch.cat([means, overall[None]]).float().to(rows.device)  # row -1 = the mean of all
        return means[rows]

    def update(self, rows: torch.Tensor, scores: torch.Tensor, measured: torch.Tensor):
        """Add one step's standardised scores (B, W) where `measured` (B, W); sums over all processes."""
        measured = measured & (rows >= 0)
        index, values = rows[measured].cpu(), scores[measured].double().cpu()
        step = torch.zeros(2, len(self.vocabulary), dtype=torch.float64)
        step[0].index_add_(0, index, values)
        step[1].index_add_(0, index, torch.ones_like(values))
        if num_processes() > 1:
            step = step.to(scores.device)
            torch.distributed.all_reduce(step)
            step = step.cpu()
        self.sums = self.decay * self.sums + step[0]
        self.counts = self.decay * self.counts + step[1]

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return everything as tensors: pieces (V, P) padded with -1, sums (V,), counts (V,), decay (1,)."""
        width = max((len(pieces) for pieces in self.vocabulary), default=1)
        pieces = [[*word, *[-1] * (width - len(word))] for word in self.vocabulary]
        return {
            "pieces": torch.tensor(pieces, dtype=torch.int64).reshape(len(pieces), width),
            "sums": self.sums.clone(),
            "counts": self.counts.clone(),
            "decay": torch.tensor([self.decay], dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, tensors: dict[str, torch.Tensor]) -> "WordScores":
        """Rebuild from `state_tensors`."""
        vocabulary = [tuple(piece for piece in word if piece >= 0) for word in tensors["pieces"].tolist()]
        scores = cls(vocabulary, float(tensors["decay"][0]))
        scores.sums, scores.counts = tensors["sums"].clone(), tensors["counts"].clone()
        return scores

    def save(self, path: str | Path, settings: dict[str, str] | None = None):
        """Write a safetensors file; `settings` (strategy, layer, weight ...) go into its metadata (`settings_in`)."""
        # As one entry, since safetensors writes several in an order of its own each time.
        save_file(self.state_tensors(), str(path), metadata={"settings": json.dumps(settings or {}, sort_keys=True)})

    @staticmethod
    def settings_in(path: str | Path) -> dict[str, str]:
        """Read the settings that `save` wrote beside the means; {} where there are none."""
        with safe_open(str(path), framework="pt") as file:
            return json.loads((file.metadata() or {}).get("settings", "{}"))

    @classmethod
    def load(cls, path: str | Path) -> "WordScores":
        """Read what `save` wrote."""
        return cls.from_state(load_file(str(path)))


def _words(input_ids, word_ids) -> list[tuple[int, ...]]:
    """List a text's words as tuples of pieces, in order."""
    words: dict[int, list[int]] = {}
    for token, word in zip(_list(input_ids), _list(word_ids)):
        if word >= 0:
            words.setdefault(word, []).append(token)
    return [tuple(words.get(word, ())) for word in range(max(words, default=-1) + 1)]


def _list(values) -> list[int]:
    return values.tolist() if isinstance(values, torch.Tensor) else values
