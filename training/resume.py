"""Saving all that a trainer holds, and taking it up again."""

import dataclasses
import logging
from pathlib import Path

import torch
import yaml
from accelerate.utils import gather_object

from .checkpoint import Checkpoint, load_checkpoint, newest_complete, save_checkpoint
from .faults import RunStopped
from .processes import on_main
from .progress import Progress
from .trainer import Trainer

logger = logging.getLogger(__name__)

# Settings that change neither weights nor records.
FREE_TO_CHANGE = {
    *("resume", "overwrite", "output_dir", "run_name", "num_workers", "keep_last", "log_with", "evaluate"),
    *("push_to_hub", "hub_model_id", "hub_private", "hub_strategy", "activation_checkpointing", "profile", "estimate"),
    *("prefetch_factor", "decoded_cache"),
}


def save_trainer(trainer: Trainer):
    """Write a checkpoint; every process must call it, the main one writes.

    Raises:
        RunStopped, OSError: where nothing could be written; what was saved before is whole.
    """
    random_states = gather_object([random_state()])
    on_main(lambda: write(trainer, random_states))
    trainer.folder.usage.save(trainer.accelerator, trainer.progress.step)


def write(trainer: Trainer, random_states: list[dict[str, torch.Tensor]]):
    """Save what the main process holds, and every process's random states."""
    tensors = tensors_of(trainer)
    bad = [name for name, tensor in tensors["model"].items() if not tensor.isfinite().all()]
    if bad:
        raise RunStopped(
            f"{len(bad)} tensors of the model, such as {bad[0]}, are not finite after step {trainer.progress.step}; "
            "they are not saved. Go on from the last checkpoint with --resume and a lower --learning_rate."
        )
    save_checkpoint(
        trainer.folder.path / "checkpoints",
        tensors | {"random": flatten(random_states)},
        state_of(trainer),
        trainer.optimizer.state_dict(),
        keep_last=trainer.arguments.run.keep_last,
        best=trainer.progress.best_step,
    )


def tensors_of(trainer: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    """Collect what is saved as safetensors, by file stem."""
    return {
        "model": trainer.student.state_dict(),
        "sampler": trainer.sampler.state_tensors(),
        **trainer.task.tensors(),
    }


def state_of(trainer: Trainer) -> dict:
    """Collect what is saved as JSON."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    return {
        "step": trainer.progress.step,
        "progress": dataclasses.asdict(trainer.progress),
        "sampler": trainer.sampler.state_dict(),
        "schedule": {key: value for key, value in trainer.schedule.state_dict().items() if key != "lr_lambdas"},
        "task": trainer.task.state(),
        "record_bytes": trainer.folder.sizes(),
        "processes": trainer.accelerator.num_processes,
        "scaler": scaler.state_dict() if scaler is not None else None,
    }


def resume_newest(trainer: Trainer):
    """Go on from the newest complete checkpoint; start anew, and say so, where there is none.

    Raises:
        RunStopped: where this process cannot see what the main one found.
    """
    path = on_main(lambda: newest_complete(trainer.folder.path / "checkpoints"))
    if path is None:
        if trainer.accelerator.is_main_process:
            logger.warning("%s holds no complete checkpoint; training starts from step 0", trainer.folder.path)
        trainer.folder.rewind({})
        return
    if not path.is_dir():
        raise RunStopped(
            f"process {trainer.accelerator.process_index} cannot see {path}: --output_dir must lie on a disk that all "
            "machines share."
        )
    saved = load_checkpoint(path, check=False)
    restore(trainer, saved)
    trainer.folder.rewind(saved.state["record_bytes"])
    if trainer.accelerator.is_main_process:
        logger.info("resumed from %s (step %d, epoch %d)", path, trainer.progress.step, trainer.progress.epoch)


def changes(before: Path, sections: dict[str, dict], about: dict) -> list[str]:
    """List how a run's settings differ from those it was started with, as its config.yaml tells.

    Args:
        before: the config.yaml that lies in the run's folder. sections: the settings now. about: what makes them now.

    Returns:
        Lines such as "seed: 0 -> 1"; [] where nothing differs or nothing can be read.
    """
    try:
        old = yaml.safe_load(before.read_text(encoding="utf-8"))
        then, made_by = {}, old.get("about", {})
        for values in old.values():
            then |= values
    except (OSError, yaml.YAMLError, AttributeError, TypeError):
        return []
    now = {name: value for values in sections.values() for name, value in values.items()}
    for name in ("corpus_fingerprint", "processes", "threads", "versions"):
        now[name], then[name] = about.get(name), made_by.get(name)
    # The first part changes whenever datasets reads the same corpus anew; what follows is rows and a hash of them.
    for settings in (now, then):
        settings["corpus_fingerprint"] = str(settings["corpus_fingerprint"]).partition("-")[2]
    return [
        f"{name}: {then[name]} -> {value}"
        for name, value in now.items()
        if name in then and then[name] != value and name not in FREE_TO_CHANGE
    ]


def restore(trainer: Trainer, saved: Checkpoint):
    """Bring every part of the trainer to where the checkpoint was."""
    tensors, state = saved.tensors, saved.state
    trainer.student.load_state_dict(tensors["model"])
    trainer.optimizer.load_state_dict(saved.optimizer_state)
    trainer.schedule.load_state_dict({**trainer.schedule.state_dict(), **state["schedule"]})
    trainer.task.restore(tensors, state["task"])
    trainer.sampler.load_state_dict(state["sampler"], tensors["sampler"])
    trainer.progress = Progress(**state["progress"])
    if state["scaler"] is not None and trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    restore_random_state(trainer, tensors["random"], state["processes"])


def random_state() -> dict[str, torch.Tensor]:
    """Return this process's generators' states (dropout draws from them)."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def flatten(random_states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Name each process's states: {"cpu_0": ..., "cpu_1": ...}."""
    return {f"{kind}_{rank}": state for rank, states in enumerate(random_states) for kind, state in states.items()}


def restore_random_state(trainer: Trainer, saved: dict[str, torch.Tensor], processes: int):
    """Set this process's generators; another number of processes cannot have the same dropout, and says so."""
    accelerator = trainer.accelerator
    if processes != accelerator.num_processes:
        logger.warning(
            "resuming on %d process(es) what was saved on %d: batches and masks go on as they were, but each process's "
            "slice, its ITM negatives and its dropout differ",
            accelerator.num_processes,
            processes,
        )
        return
    torch.set_rng_state(saved[f"cpu_{accelerator.process_index}"])
    if torch.cuda.is_available() and f"cuda_{accelerator.process_index}" in saved:
        torch.cuda.set_rng_state(saved[f"cuda_{accelerator.process_index}"])
