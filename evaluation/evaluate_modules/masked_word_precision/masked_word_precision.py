"""`evaluate` module: do the words that a score would hide occur in the photo?"""

import datasets
import evaluate
import numpy as np

from syncmask.evaluation.co_occurrence import with_intervals, word_tallies

DESCRIPTION = "Precision of the top words of each text against what its photo shows, beside the same for random words."
INPUTS = """
Args:
    predictions: scores of the words, one list a text, larger = rather hidden.
    references: whether the photo shows each word (1) or not (0), one list a text.
    rate: share of the words that is hidden.
    seed: of the bootstrap.

Returns:
    precision, average_precision and random (the precision of random words), and the gain over random with gain_low and
    gain_high, the ends of its 95 % interval over texts. Texts of which all or no words are shown tell nothing.

Example: predictions [[2.0, 1.0]], references [[1, 0]] gives precision = 1.0, random = 0.5.
"""


class MaskedWordPrecision(evaluate.Metric):
    """Precision of hidden words, with its gain over random ones."""

    def _info(self):
        features = {"predictions": datasets.Sequence(datasets.Value("float64"))}
        features["references"] = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=datasets.Features(features)
        )

    def _compute(self, predictions, references, rate=0.3, seed=0):
        shown = [np.asarray(words, dtype=bool) for words in references]
        scores = {"model": [np.asarray(words, dtype=float) for words in predictions]}
        metrics = with_intervals(word_tallies(scores, shown, rate=rate), seed)
        gain = metrics["words/precision_gain/model"]
        return {
            "precision": metrics["words/precision/model"]["value"],
            "average_precision": metrics["words/ap/model"]["value"],
            "random": metrics["words/precision/random"]["value"],
            "gain": gain["value"],
            "gain_low": gain["low"],
            "gain_high": gain["high"],
        }
