"""After training: the summary that is printed."""

import numpy as np

from syncmask.evaluation.history import TIMES, waiting_share
from syncmask.evaluation.result import Result

from .trainer import Trainer


def split_sizes(corpus) -> dict[str, dict[str, int]]:
    """Count rows and items of every split."""
    return {name: {"rows": len(rows), "items": len(np.unique(rows["item_id"]))} for name, rows in corpus.items()}


def write_summary(trainer: Trainer, corpus, results: dict[str, Result], minutes: float):
    """Print the results' tables and where everything is; keep the same in summary.txt."""
    path = trainer.folder.path
    sizes = split_sizes(corpus).items()
    lines = [
        "",
        "corpus: " + ", ".join(f"{name} {size['rows']} rows of {size['items']} items" for name, size in sizes),
        f"trained {trainer.progress.step} steps in {trainer.progress.epoch} epochs; {minutes:.1f} minutes in all",
        f"waiting for photos: {waiting_share(trainer.folder.lines(TIMES)):.0%} of the time of training",
    ]
    if trainer.progress.substitutes:
        lines.append(
            f"{trainer.progress.substitutes} photos could not be read when they were wanted; other rows stood in for "
            f"them: {path / 'substitutes.jsonl'}"
        )
    for result in results.values():
        lines += ["", result.table()]
    lines += ["", f"model   {path / 'final'}", f"results {path / 'results'}"]
    if (path / "report" / "index.html").is_file():
        lines.append(f"report  {path / 'report' / 'index.html'}")
    text = "\n".join(lines)
    print(text, flush=True)
    (path / "summary.txt").write_text(text + "\n", encoding="utf-8")
