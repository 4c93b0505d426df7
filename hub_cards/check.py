"""The staged folder in a fresh process without the package: does it load, and does it say what the run says?"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from .staging import Serves
from .stranger import answers

# fp32, the same machine and as many threads: what differs comes from where tensors lie in memory, about 1e-7.
TOLERANCE = 1e-5
PATIENCE = 1800  # seconds; base models take well under a minute
TEXTS = ("a red cotton shirt with long sleeves", "blue jeans", "a black dress with white dots, sleeveless", "hat")


def check(staged: Path, final: Path, serves: Serves) -> float:
    """Return the largest difference between what the staged folder and the run's model give, in fp32; see `compare`.

    Embeddings, outputs of each Auto class, and scores of each pipeline, for four drawn photos and four texts.

    Raises:
        ValueError: it does not load with transformers alone, or differs by more than TOLERANCE.
    """
    with TemporaryDirectory() as folder:
        work = Path(folder)
        job = {"auto": list(serves.auto), "pipelines": serves.pipelines, "texts": list(TEXTS)}
        job["photos"] = draw_photos(work, len(TEXTS))
        wanted = answers(str(final), job, trust_remote_code=False)
        seen = ask_stranger(staged, job, work)
    return compare(seen, wanted)


def draw_photos(folder: Path, number: int) -> list[str]:
    """Write photos of seeded noise over a seeded colour, of several shapes, and return their paths."""
    random, paths = np.random.default_rng(0), []
    for index in range(number):
        size = random.integers(40, 200, size=2)
        pixels = random.integers(0, 256, size=3) * 0.5 + random.random((*size, 3)) * 127
        paths.append(str(folder / f"{index}.png"))
        Image.fromarray(pixels.astype(np.uint8)).save(paths[-1])
    return paths


def ask_stranger(staged: Path, job: dict, work: Path) -> dict[str, torch.Tensor]:
    """Run stranger.py on the staged folder in a process of its own, offline, its modules in a folder of its own.

    Raises:
        ValueError: when it fails, with the last lines that it said.
    """
    out = work / "seen.safetensors"
    job = job | {"folder": str(staged.resolve()), "out": str(out), "threads": torch.get_num_threads()}
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    own = {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", str(Path(__file__).with_name("stranger.py")), str(work / "job.json")]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, cwd=work, env={**os.environ, **own}
        )
    except subprocess.TimeoutExpired as problem:
        raise ValueError(
            f"nothing is published: {staged} had not answered four photos after {PATIENCE / 60:.0f} minutes; is there "
            "memory enough for the model twice?"
        ) from problem
    if done.returncode != 0:
        said = "\n".join(done.stderr.strip().splitlines()[-12:])
        raise ValueError(
            f"nothing is published: {staged} does not load in a process without syncmask, so nobody else could use "
            f"it:\n{said}\nIf the code of the package was changed, files that travel may import only each other and "
            "torch, transformers, PIL, numpy, safetensors, huggingface_hub."
        )
    return load_file(out)


def compare(seen: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two sets of named tensors; of numbers above 1 it is a share of the largest.

    So embeddings, of unit length, are compared as they are, and logits at their own scale.

    Raises:
        ValueError: other names or shapes, numbers that are not finite, or a difference above TOLERANCE.
    """
    if seen.keys() != wanted.keys():
        raise ValueError(f"nothing is published: {sorted(seen.keys() ^ wanted.keys())} is given by one side alone")
    worst, where = 0.0, ""
    for name, tensor in wanted.items():
        same = seen[name].shape == tensor.shape and bool(tensor.isfinite().all())
        difference = float((seen[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1)) if same else math.inf
        if not difference <= worst:
            worst, where = difference, name
    if not worst <= TOLERANCE:
        raise ValueError(
            f"nothing is published: {where} of the staged model differs by {worst:.3g} from the run's (wanted at most "
            f"{TOLERANCE:g}). The code of the package and the weights in final/ do not belong together: publish with "
            "the version that the run was trained with (config.yaml, about.versions)"
        )
    return worst
