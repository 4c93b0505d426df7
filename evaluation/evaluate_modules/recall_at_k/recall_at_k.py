"""`evaluate` module: recall@k of a retrieval, ties against the model."""

import datasets
import evaluate
import numpy as np

from syncmask.evaluation.metrics import ranks, recall_at_k

DESCRIPTION = (
    "Share of queries with a right candidate among the first k; a wrong candidate with an equal score stands above."
)
INPUTS = """
Args:
    predictions: scores of the candidates, one list a query, larger is better.
    references: whether each candidate is right (1) or not (0), one list a query, at least one right.
    k: an integer or a list of them.
    seed: of the bootstrap.

Returns:
    recall@K, with recall@K_low and recall@K_high, the ends of the 95 % interval over queries.

Example: predictions [[0.9, 0.5]], references [[0, 1]], k=1 gives recall@1 = 0.0.
"""


class RecallAtK(evaluate.Metric):
    """Recall@k with a 95 % interval."""

    def _info(self):
        features = {"predictions": datasets.Sequence(datasets.Value("float64"))}
        features["references"] = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=datasets.Features(features)
        )

    def _compute(self, predictions, references, k=(1, 5, 10), seed=0):
        rank = np.array([ranks([scores], [right])[0] for scores, right in zip(predictions, references)])
        found = {}
        for one in [k] if isinstance(k, int) else k:
            metric = recall_at_k(rank, one, seed=seed)
            found |= {f"recall@{one}": metric["value"]}
            found |= {f"recall@{one}_{end}": metric[end] for end in ("low", "high")}
        return found
