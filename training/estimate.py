"""What a training step needs in memory, before it is trained: `--estimate`.

Weights, teacher, gradients and AdamW's moments follow from counts and number formats. What forward and backward hold
is measured: two small batches go through the task's own step, every tensor that comes and goes is counted, and since
each moment of a step holds a fixed part and a part for each row, the two tell the peak of any batch. Two lines would
not do: at small batches the peak is where all gradients are there, at large ones where the backward begins.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from syncmask.processing.collator import Collator

from .progress import Progress
from .task import Slice
from .trainer import Trainer

GIB = 2**30
# Behind every warm-up and ramp, where masks and soft targets are in force.
LATE = 10**9
# What is left free, since allocators leave gaps (our choice).
HEADROOM = 0.1
# Gaps in the host's heap, a rule that benchmarks/memory.py and the slow tests hold against measured peaks: freed
# gradients leave places that nothing else fits into, and what layers compute again comes and goes between gradients
# that stay. Large tensors are mapped one by one and leave none, so neither grows with the model. A GPU has its pool.
GRADIENT_GAPS, RECOMPUTED_GAPS = int(0.2 * GIB), int(0.4 * GIB)
RECOMPUTED_SHARE = 0.7


class LiveBytes(TorchDispatchMode):
    """Counts, after each operation, the bytes of the tensors that were made inside and still live; a context.

    `points` has a row for each operation: all of them, and those of them that are gradients of `parameters`. What an
    operation needs inside itself is not seen.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter] = ()):
        super().__init__()
        self.live, self.gradients = 0, 0
        self.points: list[tuple[int, int]] = []
        self._known: dict[int, weakref.ref] = {}
        self._hooks = [
            one.register_post_accumulate_grad_hook(self._note_gradient)
            for one in parameters
            if one.requires_grad and one.grad is None
        ]

    def __exit__(self, *problem):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*problem)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._note((args, kwargs), made_here=False)
        result = func(*args, **kwargs)
        self._note(result, made_here=True)
        self.points.append((self.live, self.gradients))
        return result

    def _note(self, values, made_here: bool):
        for value in tree_iter(values):
            if not isinstance(value, torch.Tensor):
                continue
            storage = value.untyped_storage()
            key, size = storage._cdata, storage.nbytes() if made_here else 0
            if key not in self._known:
                self.live += size
                self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._forget(key, size))

    def _forget(self, key: int, size: int):
        self.live -= size
        del self._known[key]

    def _note_gradient(self, parameter: torch.nn.Parameter):
        self.gradients += parameter.grad.nbytes


@dataclass
class Timeline:
    """The bytes held after each of T operations, for any number of rows: fixed + rows * per_row.

    Args:
        fixed, per_row: (T,). gradients: (T,), the part of `fixed` that are gradients.
    """

    fixed: np.ndarray
    per_row: np.ndarray
    gradients: np.ndarray

    @classmethod
    def through(cls, few: list[tuple[int, int]], rows: int, more: list[tuple[int, int]], more_rows: int) -> Timeline:
        """Lay a line through each moment of two measured runs.

        Example: 30 bytes with 2 rows and 50 with 4 are 10 + 10 a row.
        """
        length = max(len(few), len(more))
        a, b = _stretch(np.asarray(few, dtype=float), length), _stretch(np.asarray(more, dtype=float), length)
        per_row = (b[:, 0] - a[:, 0]) / (more_rows - rows)
        return cls(a[:, 0] - rows * per_row, per_row, a[:, 1])

    def peak(self, rows: int) -> tuple[int, int]:
        """Return the bytes at the highest moment, and how many of them are gradients."""
        held = self.fixed + rows * self.per_row
        highest = int(held.argmax())
        return int(held[highest]), int(self.gradients[highest])

    def largest(self, room: float) -> int:
        """Return the most rows at which no moment holds more than `room` bytes."""
        if (self.fixed > room).any():
            return 0
        growing = self.per_row > 0
        return int(((room - self.fixed[growing]) / self.per_row[growing]).min())


def _stretch(points: np.ndarray, length: int) -> np.ndarray:
    """Bring (T, 2) to (length, 2): a kernel may be chosen by the batch's size, so the two runs may differ in a few."""
    places = np.linspace(0, len(points) - 1, length)
    return np.stack([np.interp(places, np.arange(len(points)), column) for column in points.T], axis=1)


@dataclass
class Estimate:
    """What a step needs; all in bytes.

    Args:
        rows: of a batch. tokens: of a text.
        process: what the process holds beside the model. weights, teacher, moments, gradients: whole.
        step: what forward and backward hold, gradients as they come. probe: what the test of the gate holds.
        room: what the device has for this process.
        on_host: whether the model is in the host's memory. checkpointing: of activations.
        kept_gradients: whether gradients are there all the time, as where several batches make a step.
    """

    rows: int
    tokens: int
    process: int
    weights: int
    teacher: int
    moments: int
    gradients: int
    step: Timeline
    probe: int
    room: float
    on_host: bool = False
    checkpointing: bool = False
    kept_gradients: bool = False

    @property
    def states(self) -> int:
        """What is there all the time."""
        return self.weights + self.teacher + self.moments + self.kept_gradients * self.gradients

    def gaps(self, activations: float) -> int:
        """What the host's heap holds without using it."""
        recomputed = self.checkpointing * min(RECOMPUTED_SHARE * activations, RECOMPUTED_GAPS)
        return int(self.on_host * (min(self.gradients, GRADIENT_GAPS) + recomputed))

    @property
    def step_peak(self) -> int:
        """The highest moment of a step, without what the process holds beside the model."""
        held, gradients = self.step.peak(self.rows)
        return self.states + held + self.gaps(held - gradients)

    @property
    def model_peak(self) -> int:
        """The highest moment without what the process holds beside the model."""
        return max(self.step_peak, self.states + self.probe + self.gaps(0))

    @property
    def peak(self) -> int:
        """The highest moment."""
        return self.process + self.model_peak

    @property
    def largest_batch(self) -> int:
        """The most rows that fit, with some headroom; 0 where not even one does."""
        room = (1 - HEADROOM) * self.room - self.process - self.states - self.gaps(float("inf"))
        return self.step.largest(room) if self.probe <= room else 0

    def table(self) -> str:
        """Return the figures as lines of text."""
        held, gradients = self.step.peak(self.rows)
        activations = held - gradients
        figures = {
            "process (libraries, corpus)": self.process,
            "weights": self.weights,
            "teacher": self.teacher,
            "AdamW's moments": self.moments,
            "gradients at the peak": gradients + self.kept_gradients * self.gradients,
            "activations at the peak": activations,
            "gaps between them": self.gaps(activations),
            "in all": self.process + self.step_peak,
        }
        if self.model_peak > self.step_peak:
            figures["test of the gate, in all"] = self.peak
        lines = [f"memory of a step, {self.rows} rows a batch, texts of {self.tokens} tokens"]
        lines += [f"  {name:<28}{value / GIB:8.2f} GiB" for name, value in figures.items()]
        return "\n".join([*lines, *self._verdict()])

    def _verdict(self) -> list[str]:
        largest = self.largest_batch
        fits = f"largest batch that fits: {largest}" if largest else "no batch fits"
        return [
            f"{fits} ({self.room / GIB:.2f} GiB for this process, a tenth of it left free)",
            "Validation, checkpoints and what a kernel needs inside itself come beside it.",
        ]


def estimate(trainer: Trainer) -> Estimate:
    """Measure two small batches of what a trainer is to train, and tell what its own batches need.

    Nothing is written and no weight moves, but gradients and the task's state do: train with another trainer. The texts
    are the longest of the corpus, so a usual batch stays below.
    """
    task, student = trainer.task, trainer.student
    parameters = list(student.parameters())
    trained = sum(one.nbytes for one in parameters if one.requires_grad)
    weights = sum(one.nbytes for one in parameters)
    teacher = bytes_of(task.tensors().get("teacher", {}).values())
    process, room = machine_memory(trainer.accelerator.device)
    on_host = trainer.accelerator.device.type == "cpu"
    process = max(0, process - weights - teacher) if on_host else process
    accumulates = trainer.arguments.optim.gradient_accumulation_steps > 1
    unit = smallest_batch(trainer)
    probe_rows = task.rehearse(2)
    probe = through(lambda rows: task.rehearse(rows), 2).peak(probe_rows)[0] if probe_rows else 0
    batch = longest_rows(trainer, 2 * unit)
    step = through(lambda rows: run_step(trainer, batch, rows, accumulates), unit, parameters)
    return Estimate(
        rows=trainer.arguments.optim.per_device_batch_size,
        tokens=batch["input_ids"].shape[1] if "input_ids" in batch else 0,
        process=process,
        weights=weights,
        teacher=teacher,
        moments=2 * trained,
        gradients=trained,
        step=step,
        probe=probe,
        room=room,
        on_host=on_host,
        checkpointing=trainer.arguments.run.activation_checkpointing,
        kept_gradients=accumulates,
    )


def through(action: Callable[[int], object], unit: int, parameters: Iterable[torch.nn.Parameter] = ()) -> Timeline:
    """Run an action on `unit` rows and on twice as many, each time without gradients from before."""
    parameters, found = list(parameters), []
    for rows in (unit, 2 * unit):
        with LiveBytes(parameters) as counted:
            action(rows)
        found.append(counted.points)
        for one in parameters:
            one.grad = None
    return Timeline.through(found[0], unit, found[1], 2 * unit)


def run_step(trainer: Trainer, batch: dict[str, torch.Tensor], rows: int, accumulates: bool):
    """Look, forward and backward on some rows, as `Trainer.train_step` does."""
    if accumulates:
        for one in trainer.student.parameters():
            one.grad = torch.zeros_like(one) if one.requires_grad else None
    task, accelerator = trainer.task, trainer.accelerator
    trainer.model.train()
    batch = trainer.to_device({name: tensor[:rows] for name, tensor in batch.items()})
    look = task.look(batch, Progress(step=LATE), Slice(accelerator.process_index, accelerator.num_processes))
    losses = task.losses(trainer.model(**look.inputs))
    accelerator.backward(sum(weight * losses[name] for name, weight in task.weights.items()))


def smallest_batch(trainer: Trainer) -> int:
    """Return the rows of the smaller batch: two, or as many as have one that evidence is measured on."""
    objective = trainer.arguments.objective
    if getattr(objective, "mask_strategy", None) != "evidence":
        return 2
    return max(2, round(1 / objective.evidence_share))


def longest_rows(trainer: Trainer, count: int) -> dict[str, torch.Tensor]:
    """Collate the rows with the longest texts, of different items as far as there are as many."""
    index, task = trainer.task.data.index, trainer.task
    order = np.argsort([-len(index.texts[text]) for text in index.text_ids], kind="stable")
    firsts = np.unique(index.item_ids[order], return_index=True)[1]
    order = np.concatenate([order[np.sort(firsts)], np.delete(order, firsts)])
    rows = np.resize(order, count).tolist()
    return Collator(task.processor)(task.data.photos.__getitems__([(0, row) for row in rows]))


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Sum up tensors, those that share memory once."""
    return sum({one.untyped_storage()._cdata: one.nbytes for one in tensors}.values())


def machine_memory(device: torch.device) -> tuple[int, float]:
    """Return what is taken, of a device beside PyTorch's tensors, of the host by this process, and a process's room."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return whole - free - torch.cuda.memory_reserved(device), whole
    held, here = psutil.Process().memory_info().rss, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return held, min(psutil.virtual_memory().available / here + held, container_limit() / here)


def container_limit(path: Path = Path("/sys/fs/cgroup/memory.max")) -> float:
    """Return the bytes that this container may hold; infinite where nobody says."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # "max", or no such file
        return float("inf")
