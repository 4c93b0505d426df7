"""`evaluate` module: accuracy and macro-F1 over a fixed label list."""

import datasets
import evaluate

from syncmask.evaluation.recognition import recognition_outcomes

DESCRIPTION = "Accuracy and macro-F1 over the labels of a fixed list that have a row: the same labels for every model."
INPUTS = """
Args:
    predictions: predicted labels (strings of the list).
    references: true labels.
    labels: the fixed list.
    unknown: "error" refuses a true label outside the list; "wrong" makes it a class that is never right.
    seed: of the bootstrap.

Returns:
    accuracy, macro_f1 and macro_f1_union (over labels that are true or predicted, as published tables have it), each
    with _low and _high, the ends of the 95 % interval over rows.

Example: predictions ["a"], references ["b"], labels ["a", "b"] gives macro_f1 = 0.0.
"""


class FixedMacroF1(evaluate.Metric):
    """Accuracy and macro-F1 whose label list no prediction can change."""

    def _info(self):
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=datasets.Features(features)
        )

    def _compute(self, predictions, references, labels, unknown="error", seed=0):
        metrics = recognition_outcomes({"model": predictions}, references, labels, unknown=unknown).metrics(seed)
        found = {}
        for figure in ("accuracy", "macro_f1", "macro_f1_union"):
            metric = metrics[f"category/{figure}/model"]
            found |= {figure: metric["value"], f"{figure}_low": metric["low"], f"{figure}_high": metric["high"]}
        return found
