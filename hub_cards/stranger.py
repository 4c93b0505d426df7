"""What a stranger does with a published model: load it with transformers alone, and ask it a few things.

Run as a program, `python -P stranger.py JOB.json`, this file answers in a process in which `syncmask` cannot be
imported. check.py calls the same `answers` with the package, to compare. Imports nothing of the project.
"""

import importlib.abc
import json
import sys
from pathlib import Path


class Absent(importlib.abc.MetaPathFinder):
    """Makes a package look as if it were not installed."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        """Refuse the package and its parts; leave all else to those who come next."""
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}: it is not to be used here", name=name)


def answers(folder: str, job: dict, trust_remote_code: bool) -> dict:
    """Load a model by its Auto classes and pipelines, and return the numbers that it gives as {name: tensor}, fp32.

    Args:
        folder: a model's, or its name on the Hub. trust_remote_code: for one that is loaded without the package.
        job: {auto: names of Auto classes, pipelines: tasks, photos: paths, texts: as many}.
    """
    import torch
    import transformers

    trust = {"trust_remote_code": trust_remote_code}
    processor = transformers.AutoProcessor.from_pretrained(folder, **trust)
    inputs = processor(images=job["photos"], text=job["texts"])
    found = {}
    for name in job["auto"]:
        model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, **trust).eval()
        with torch.no_grad():
            collect(found, name, model(**inputs))
            if name == "AutoModel":
                photos = model.get_image_features(pixel_values=inputs["pixel_values"])
                texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
                found["image_feats"], found["text_feats"] = photos.pooler_output, texts.pooler_output
    for task in job["pipelines"]:
        pipe = transformers.pipeline(task, model=folder, dtype=torch.float32, device="cpu", **trust)
        found[task] = torch.tensor(ask(pipe, task, job))
    return {name: tensor.float().contiguous().clone() for name, tensor in found.items()}


def collect(found: dict, name: str, output) -> None:
    """Add all tensors of a model's output, nested ones too."""
    import torch

    if isinstance(output, torch.Tensor):
        found[name] = output
    elif isinstance(output, (list, tuple)) and not hasattr(output, "items"):
        output = dict(enumerate(output))
    if hasattr(output, "items"):
        for key, value in output.items():
            collect(found, f"{name}.{key}", value)


def ask(pipe, task: str, job: dict) -> list[list[float]]:
    """Return a pipeline's scores, a row a query; in the order of candidates or labels, whatever came first."""
    photos, texts = job["photos"], job["texts"]
    if task == "zero-shot-image-classification":
        rows = pipe(photos, candidate_labels=texts, hypothesis_template="{}")
        return [[hit["score"] for hit in sorted(row, key=lambda hit: texts.index(hit["label"]))] for row in rows]
    if task == "image-classification":
        return [[hit["score"] for hit in sorted(row, key=lambda hit: hit["label"])] for row in pipe(photos)]
    both = task == "fashion-composed-retrieval"
    queries = [{"image": photo, "text": text} for photo, text in zip(photos, texts)] if both else texts
    rows = [sorted(hits, key=lambda hit: hit["index"]) for hits in pipe(queries, candidates=photos)]
    return [[hit[key] for hit in row for key in ("vector", "matching") if hit[key] is not None] for row in rows]


def main(job_file: str) -> None:
    """Answer a job: beside answers()'s it names the folder, the threads and the file that the numbers go to."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    sys.meta_path.insert(0, Absent("syncmask"))
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(job["threads"])
    found = answers(job["folder"], job, trust_remote_code=True)
    if any(name.partition(".")[0] == "syncmask" for name in sys.modules):
        raise SystemExit("syncmask was imported although nothing should need it")
    save_file(found, job["out"])


if __name__ == "__main__":
    main(sys.argv[1])
