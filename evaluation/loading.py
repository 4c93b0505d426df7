"""From a path to a model that can be scored: a final folder, a checkpoint, or a run that holds both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from syncmask import (
    SyncMaskConfig,
    SyncMaskForComposedImageRetrieval,
    SyncMaskForImageTextClassification,
    SyncMaskForImageTextRetrieval,
    SyncMaskForPreTraining,
    SyncMaskProcessor,
    register_auto_classes,
)
from syncmask.word_scores import WordScores

MODEL, TEACHER = "model.safetensors", "teacher.safetensors"
HEADS = (
    SyncMaskForPreTraining,
    SyncMaskForImageTextRetrieval,
    SyncMaskForComposedImageRetrieval,
    SyncMaskForImageTextClassification,
)
Model = (
    SyncMaskForPreTraining
    | SyncMaskForImageTextRetrieval
    | SyncMaskForComposedImageRetrieval
    | SyncMaskForImageTextClassification
)


@dataclass
class Loaded:
    """A model in eval mode with what it needs to be scored.

    Attributes:
        model: the student (what users load), with the head that its config names; each has `.syncmask`.
        teacher: the EMA teacher of the newest complete checkpoint, or the model where none was kept, as in finetuning.
        processor: of both.
        word_means: m[v] of the strategy that the run trained with, by that strategy; empty for other models.
        about: {path, sha256, teacher} for a result.
        run: the run's folder, if the path belongs to one.
        settings: config.yaml of that run.
    """

    model: Model
    teacher: Model
    processor: SyncMaskProcessor
    word_means: dict[str, WordScores]
    about: dict[str, str]
    run: Path | None = None
    settings: dict = field(default_factory=dict)


def load_checkpoint(path: str | Path) -> Loaded:
    """Loads a run folder, its final/ folder, one of its checkpoints, or the name of a model on the Hub.

    Raises:
        FileNotFoundError: a run without a final model.
        ValueError: a model of another kind, or without a head.
    """
    register_auto_classes()  # the `syncmask` command leaves it to those who need it
    path = Path(path)
    run = find_run(path)
    own = path if _is_checkpoint(path) else None
    home = model_folder(path if own is None or run is None else run)
    head = _head(home)
    model = teacher = head.from_pretrained(home, dtype=torch.float32).eval()
    if own is not None:
        _load_weights(model, own / MODEL, run)
    kept = _kept_teacher(own, run)
    if kept is not None:
        teacher = head.from_pretrained(home, dtype=torch.float32).eval()
        _load_weights(teacher, kept, run)
    weights = (own or Path(home)) / MODEL
    about = {"path": str(path), "sha256": sha256(weights) if weights.exists() else ""}
    settings = _settings(run)
    return Loaded(
        model=model,
        teacher=teacher,
        processor=SyncMaskProcessor.from_pretrained(home),
        word_means=_word_means(Path(home), settings),
        about=about | {"teacher": str(kept.parent) if kept else "none kept: the model itself"},
        run=run,
        settings=settings,
    )


def model_folder(name: str | Path) -> Path | str:
    """Where config, weights and processor are: of a run its final/, else the folder itself, or a name on the Hub.

    Raises:
        FileNotFoundError: a folder that holds no model, or a path at which there is none.
    """
    path = Path(name).expanduser()
    for folder in (path, path / "final"):
        if (folder / "config.json").is_file():
            return folder
    if path.exists():
        raise FileNotFoundError(
            f"{path} holds neither a model (config.json) nor a run's final/ folder; give a run that has ended (a "
            "stopped one goes on with --resume), a model's folder, or a model's name on the Hub"
        )
    if path.is_absolute() or len(path.parts) > 2 or str(name).startswith("."):
        raise FileNotFoundError(f"there is no folder {path}; give a run, a model's folder, or a name on the Hub")
    return str(name)


def find_run(path: Path) -> Path | None:
    """The run folder that holds `path` (itself, its parent or grandparent), known by its config.yaml."""
    candidates = (path, path.absolute().parent, path.absolute().parent.parent)
    return next((folder for folder in candidates if (folder / "config.yaml").is_file()), None)


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_checkpoint(path: Path) -> bool:
    """Checkpoints of a run have weights, but no config.json: that is in the run's final folder."""
    return (path / MODEL).is_file() and not (path / "config.json").is_file()


def _kept_teacher(own: Path | None, run: Path | None) -> Path | None:
    """The teacher of the checkpoint itself, or of the newest complete one of the run; None where none was kept."""
    if own is not None:
        return own / TEACHER if (own / TEACHER).is_file() else None
    found = sorted(run.glob(f"checkpoints/step_*/{TEACHER}")) if run else []
    complete = [file for file in found if (file.parent / "COMPLETE").is_file()]
    return complete[-1] if complete else None


def _head(home: Path | str) -> type[Model]:
    """The class that the config names."""
    named = SyncMaskConfig.from_pretrained(home).architectures or []
    for head in HEADS:
        if head.__name__ in named:
            return head
    raise ValueError(
        f"{home} is a {' or '.join(named) or 'model of unknown kind'}; wanted one of "
        f"{', '.join(head.__name__ for head in HEADS)}. Give a run of this project, or a model saved by one of them"
    )


def merge_adapters(weights: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Undo low-rank adapters (LoRA), as peft names them: W + scale B A in place of W, B and A.

    Args:
        weights: by name. scale: alpha / rank.
    """
    merged = {}
    for name, value in weights.items():
        adapted, _, part = name.partition(".base_layer.")
        if part == "weight":
            down, up = (weights[f"{adapted}.lora_{kind}.default.weight"] for kind in "AB")
            value = value + scale * up @ down
        if ".lora_" not in name:
            merged[name.replace(".base_layer.", ".")] = value
    return merged


def _load_weights(model: Model, file: Path, run: Path | None) -> None:
    """Strict but for tied weights, which a file may hold once; a checkpoint's adapters are merged."""
    weights, settings = load_file(str(file)), _settings(run).get("model", {})
    if settings.get("lora_rank"):
        weights = merge_adapters(weights, settings["lora_alpha"] / settings["lora_rank"])
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys)
    lost = [name for name in missing if name not in tied]
    if lost or unexpected:
        raise ValueError(f"{file} does not fit the model: missing {lost[:3]}, unexpected {list(unexpected)[:3]}")
    model.tie_weights()


def _word_means(home: Path, settings: dict) -> dict[str, WordScores]:
    file = home / "word_scores.safetensors"
    strategy = settings.get("objective", {}).get("mask_strategy", "attention")
    return {strategy: WordScores.load(file)} if file.is_file() and strategy != "random" else {}


def _settings(run: Path | None) -> dict:
    if run is None:
        return {}
    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}
