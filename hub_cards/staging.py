"""A run folder -> the folder that is uploaded: weights, settings, processor, code, results, card, and nothing else."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from safetensors import SafetensorError
from transformers import Pipeline, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from syncmask import (
    SyncMaskComposedRetrievalPipeline,
    SyncMaskConfig,
    SyncMaskForComposedImageRetrieval,
    SyncMaskForImageTextClassification,
    SyncMaskForImageTextRetrieval,
    SyncMaskForPreTraining,
    SyncMaskImageProcessor,
    SyncMaskModel,
    SyncMaskProcessor,
    SyncMaskRetrievalPipeline,
)
from syncmask.evaluation.loading import MODEL, TEACHER, sha256
from syncmask.pipeline_syncmask import saved_with_code
from syncmask.word_scores import WordScores

from .card import write_model_card

WORD_SCORES = "word_scores.safetensors"
# Lists what an earlier publish put there, so that a later one may delete what is no longer staged, and nothing else.
MANIFEST = ".published_files"
# Of a run, written by training where checkpoints are published: config and processor, which checkpoints lack.
SKELETON = Path("publish") / "skeleton"


@dataclass(frozen=True)
class Serves:
    """What a published model of one class can be loaded as.

    Attributes:
        auto: name of an Auto class -> the class that it gives; AutoModel gives the base model, as with the package.
        custom: the project's pipelines, which are staged with it. stock: transformers' own that it serves.
    """

    auto: dict[str, type[PreTrainedModel]]
    custom: tuple[type[Pipeline], ...] = ()
    stock: tuple[str, ...] = ()

    @property
    def pipelines(self) -> list[str]:
        """All tasks of `transformers.pipeline`."""
        return [*self.stock, *(kind.registered_task for kind in self.custom)]


BASE = {"AutoModel": SyncMaskModel}
MATCHING = {"AutoModelForZeroShotImageClassification": SyncMaskForImageTextRetrieval}
ZERO_SHOT = "zero-shot-image-classification"
# A pretraining checkpoint holds all that retrieval needs. There is no Auto class for composed retrieval: its pipeline
# finds the class by itself.
SERVES: dict[type[PreTrainedModel], Serves] = {
    SyncMaskForPreTraining: Serves(
        {**BASE, "AutoModelForPreTraining": SyncMaskForPreTraining, **MATCHING},
        (SyncMaskRetrievalPipeline,),
        (ZERO_SHOT,),
    ),
    SyncMaskForImageTextRetrieval: Serves({**BASE, **MATCHING}, (SyncMaskRetrievalPipeline,), (ZERO_SHOT,)),
    SyncMaskForComposedImageRetrieval: Serves(BASE, (SyncMaskComposedRetrievalPipeline,)),
    SyncMaskForImageTextClassification: Serves(
        {**BASE, "AutoModelForImageClassification": SyncMaskForImageTextClassification},
        stock=("image-classification",),
    ),
}


def stage(
    run: Path,
    staged: Path,
    repo_id: str,
    base_model: str | None = None,
    license: str = "apache-2.0",
    max_shard_size: str = "5GB",
) -> Serves:
    """Build `staged` anew from a finished run; the same run gives the same bytes.

    Everything is written by a saver that knows what it writes; nothing of the run is copied as it is, so that what
    lies about in it (its config.yaml, say) stays there.

    Raises:
        FileNotFoundError: the run has no final/.
        ValueError: its model is of an unknown class, cannot be read, or lacks weights; a result was changed by hand;
            `staged` holds other things.
    """
    final = run / "final"
    kind = head_of(final)
    empty(staged)
    save_model(load_whole(kind, final), SERVES[kind], staged, max_shard_size)
    processor = SyncMaskProcessor.from_pretrained(final)
    parts = {SyncMaskProcessor: "AutoProcessor", SyncMaskImageProcessor: "AutoImageProcessor"}
    with saved_with_code(parts):
        processor.save_pretrained(staged)
    if (final / WORD_SCORES).is_file():
        stage_word_scores(final / WORD_SCORES, staged / WORD_SCORES)
    write_model_card(run, staged, repo_id, base_model=base_model or published_base(run), license=license)
    (staged / MANIFEST).write_text("".join(f"{name}\n" for name in files_in(staged)), encoding="utf-8")
    return SERVES[kind]


def empty(staged: Path) -> None:
    """Make an empty folder of what was staged before.

    Raises:
        ValueError: it holds something that no publish put there.
    """
    before = files_in(staged) if staged.is_dir() else []
    if before and MANIFEST not in before:
        raise ValueError(f"{staged} holds other things, such as {before[0]}; stage in a new folder")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    (staged / MANIFEST).touch()  # so that it is known again when this breaks off


def head_of(final: Path) -> type[PreTrainedModel]:
    """Return the class that final/config.json names.

    Raises:
        FileNotFoundError: there is no final/. ValueError: no class that can be published.
    """
    if not (final / "config.json").is_file():
        raise FileNotFoundError(
            f"{final.parent} has no final/config.json: give the folder of a run that has ended (a stopped one goes on "
            "with --resume; --checkpoint newest publishes what a running one has saved)"
        )
    named = json.loads((final / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    for kind in SERVES:
        if kind.__name__ in named:
            return kind
    raise ValueError(
        f"{final / 'config.json'} names {' or '.join(named) or 'no class'}; wanted one of "
        f"{', '.join(kind.__name__ for kind in SERVES)}. Give a run of this project"
    )


def load_whole(kind: type[PreTrainedModel], final: Path) -> PreTrainedModel:
    """Load a model from files, in the number format that it was saved in.

    Fresh, since a model that was saved with its code in this process carries that in its config.

    Raises:
        ValueError: weights that cannot be read, are missing, or fit no part of the model.
    """
    try:
        model, found = kind.from_pretrained(final, output_loading_info=True)
    except (OSError, SafetensorError, RuntimeError, KeyError) as problem:
        raise ValueError(
            f"{final} cannot be loaded as {kind.__name__}: {problem}. Take a whole run, or "
            "--checkpoint newest, which takes the weights of its last complete checkpoint"
        ) from problem
    lacking = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if lacking:
        raise ValueError(
            f"{final / MODEL} lacks {len(lacking)} weights of {kind.__name__}, such as {lacking[0]}; they would be "
            "random numbers. Take a whole run"
        )
    return model


def save_model(model: PreTrainedModel, serves: Serves, staged: Path, max_shard_size: str) -> None:
    """Write weights and config.json, which names the code files beside it, and these files."""
    kinds = [SyncMaskConfig, *serves.auto.values(), *serves.custom, type(model)]
    model.config.auto_map = {name: impl(kind) for name, kind in {"AutoConfig": SyncMaskConfig, **serves.auto}.items()}
    if serves.custom:
        model.config.custom_pipelines = {
            kind.registered_task: {"impl": impl(kind), "pt": [kind.auto_model.__name__]} for kind in serves.custom
        }
    model.save_pretrained(staged, max_shard_size=max_shard_size)
    for kind in kinds:
        stage_code(kind, staged)


def impl(kind: type) -> str:
    """Name a class as config.json does.

    Example:
        >>> impl(SyncMaskModel)
        'modeling_syncmask.SyncMaskModel'
    """
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"


def stage_code(kind: type, staged: Path) -> None:
    """Copy the file of a class, and those of its folder that it imports."""
    file = sys.modules[kind.__module__].__file__
    for needed in (file, *get_relative_import_files(file)):
        shutil.copyfile(needed, staged / Path(needed).name)


def stage_word_scores(source: Path, target: Path) -> None:
    """Copy the words' running means, and of the file's own notes the known ones alone."""
    known = ("strategy", "instance_weight", "layer", "weights")
    notes = WordScores.settings_in(source)
    WordScores.load(source).save(target, {name: notes[name] for name in known if name in notes})


def files_in(folder: Path) -> list[str]:
    """Names of all files below a folder, sorted, with `/` between their parts."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def settings_of(run: Path) -> dict:
    """Read a run's config.yaml.

    Raises:
        FileNotFoundError: there is none, so that the folder is no run.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"{run} is no run folder: it has no config.yaml. Give the folder that training made")
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def published_base(run: Path) -> str | None:
    """Name, on the Hub, what a run started from, where that is another run that was published; None = unknown.

    A start that was a name on the Hub already is told by the run's record, and the card takes it from there.
    """
    start = settings_of(run).get("model", {}).get("init_from")
    folder = Path(start).expanduser() if start else None
    if folder is None or not folder.exists():
        return None
    folder = folder.parent if folder.name == "final" else folder
    records = sorted(folder.glob("publish/*.json"), key=lambda file: file.stat().st_mtime)
    return json.loads(records[-1].read_text(encoding="utf-8"))["repo_id"] if records else None


# --------------------------------------------------------------------------------------------------------- checkpoints


@contextmanager
def run_of_checkpoint(run: Path, name: str) -> Iterator[tuple[Path, int]]:
    """Lay out a checkpoint as if it were a finished run, without results; give that folder and the step.

    Args:
        run: of which training may still go on. name: `newest`, or a checkpoint's such as step_00000120.

    Raises:
        FileNotFoundError: no such checkpoint that is complete, or nothing to tell what model it is of.
    """
    settings = settings_of(run)
    checkpoint = complete_checkpoint(run, name)
    skeleton = next((path for path in (run / "final", run / SKELETON) if (path / "config.json").is_file()), None)
    if skeleton is None:
        raise FileNotFoundError(
            f"{run} has neither final/ nor {SKELETON}/, which tell what model its checkpoints are of: train with "
            "--push_to_hub --hub_strategy checkpoint, or publish the run once it has ended"
        )
    # Beside the run, not in the system's temporary folder, which may be too small for a model.
    with TemporaryDirectory(prefix=".publish-", dir=run) as folder:
        whole = Path(folder) / run.resolve().name
        (whole / "final").mkdir(parents=True)
        for file in ("config.yaml", "metrics.jsonl", "usage.json"):
            if (run / file).is_file():
                shutil.copyfile(run / file, whole / file)
        for file in skeleton.iterdir():
            if file.suffix != ".safetensors":
                shutil.copyfile(file, whole / "final" / file.name)
        teacher = settings.get("run", {}).get("final_weights") == "teacher"
        shutil.copyfile(checkpoint / (TEACHER if teacher else MODEL), whole / "final" / MODEL)
        if (checkpoint / WORD_SCORES).is_file():
            shutil.copyfile(checkpoint / WORD_SCORES, whole / "final" / WORD_SCORES)
        yield whole, int(checkpoint.name.removeprefix("step_"))


def complete_checkpoint(run: Path, name: str) -> Path:
    """Find a checkpoint whose files are as its COMPLETE says; see `run_of_checkpoint`."""
    wanted = "step_*" if name == "newest" else name
    found = [path for path in (run / "checkpoints").glob(wanted) if path.name.removeprefix("step_").isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True):
        if is_whole(path):
            return path
    broken = ", ".join(sorted(path.name for path in found))
    raise FileNotFoundError(
        f"{run / 'checkpoints'} has no complete checkpoint {name!r}"
        + (f" ({broken}: broken)" if broken else "")
        + "; training writes one at the end of each epoch and every --checkpoint_every steps"
    )


def is_whole(checkpoint: Path) -> bool:
    """Tell whether the files that are published have the sha256 that COMPLETE tells."""
    try:
        digests = json.loads((checkpoint / "COMPLETE").read_text(encoding="utf-8"))
        ours = [name for name in (MODEL, TEACHER, WORD_SCORES) if name in digests]
        return MODEL in ours and all(sha256(checkpoint / name) == digests[name] for name in ours)
    except (OSError, ValueError):
        return False
