"""Two processes against one that does ITC on the global batch and the rest slice by slice.

As a script (`torchrun --nproc_per_node 2 tests/test_processes.py FOLDER`) this file is what the two processes run.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from syncmask.gather import gather_rows
from syncmask.training import launch, pretrain
from syncmask.training.task import Look, Slice
from syncmask.training.task_pretraining import TERMS
from syncmask.training.teacher import TeacherOutput
from syncmask.training.trainer import Trainer

GLOBAL_BATCH = 16
STEPS = 50
SETTINGS = [
    *("--corpus", "garments", "--num_items", "40", "--image_size", "32", "--preset", "tiny"),
    *("--model_overrides", '{"patch_size": 8, "projection_dim": 16}', "--max_steps", str(STEPS), "--epochs", "25"),
    *("--warmup_steps", "5", "--learning_rate", "1e-3", "--gradient_accumulation_steps", "2"),
    *("--gate_every", "2", "--gate_max_steps", "4", "--mask_ramp_steps", "4", "--teacher_momentum", "0.9"),
    *("--num_threads", "1", "--log_every", "1", "--log_batches", "--deterministic", "--validate_every_epochs", "99"),
    *("--no-evaluate", "--overwrite", "--output_dir"),
]


def keep_gradients(trainer, path, steps=(0, 1, 10)):
    """Write the gradients of some optimiser steps to files, as they are after the mean over processes."""
    step = trainer.optimizer.step

    def first_write(*args, **kwargs):
        if trainer.progress.step in steps and trainer.accelerator.is_main_process:
            grads = {name: p.grad.clone() for name, p in trainer.student.named_parameters() if p.grad is not None}
            save_file(grads, path / f"gradients_{trainer.progress.step}.safetensors")
        return step(*args, **kwargs)

    trainer.optimizer.step = first_write


class TwoProcesses(Trainer):
    """The trainer as it is, which also notes what the processes hold."""

    def fit(self):
        assert self.accelerator.num_processes == 2 and torch.distributed.get_world_size() == 2
        keep_gradients(self, self.folder.path.parent)
        self.slices = []
        super().fit()
        rank = self.accelerator.process_index
        (self.folder.path.parent / f"slices_{rank}.json").write_text(json.dumps(self.slices))
        save_file(
            dict(self.task.teacher.model.named_parameters()), self.folder.path.parent / f"teacher_{rank}.safetensors"
        )

    def train_step(self, batch):
        self.slices.append(batch["row_ids"].tolist())
        assert gather_rows(batch["row_ids"]).tolist() == self.sampler.global_batch()
        return super().train_step(batch)


class Reference(Trainer):
    """One process that holds the global batch: ITC on all of it, the rest in two slices, each with its noise."""

    def fit(self):
        assert self.accelerator.num_processes == 1
        keep_gradients(self, self.folder.path.parent)
        super().fit()

    def _losses(self, batch):
        half = len(batch["row_ids"]) // 2
        looks = []
        for rank in range(2):
            part = {name: tensor[rank * half : (rank + 1) * half] for name, tensor in batch.items()}
            looks.append(self.task.look(part, self.progress, Slice(rank, 2)))
        outputs = [self.model(**look.inputs) for look in looks]
        seen, masks, inputs = ([getattr(look, name) for look in looks] for name in ("seen", "masks", "inputs"))
        teacher = {name: torch.cat([i[name] for i in inputs]) for name in ("teacher_image_feats", "teacher_text_feats")}
        names = ("pixel_values", "input_ids", "attention_mask", "item_ids", "text_ids")
        whole = self.model(
            **{name: batch[name] for name in names},
            **teacher,
            teacher_temperature=seen[0].temperature,
            soft_target_weight=self.task.contrast.soft_target_weight(self.progress.step),
        )
        losses = {"itc": whole.itc_loss}
        losses |= {term: torch.stack([output[f"{term}_loss"] for output in outputs]).mean() for term in TERMS[1:]}
        feats = [torch.cat([getattr(part, name) for part in seen]) for name in ("image_feats", "text_feats")]
        saw = TeacherOutput(None, None, *feats, None, seen[0].temperature)
        width = max(part.word_mask.shape[1] for part in masks)
        masks[0].word_mask = torch.cat(
            [torch.nn.functional.pad(part.word_mask, (0, width - part.word_mask.shape[1])) for part in masks]
        )
        return losses, Look({}, saw, masks[0], sum(look.fallbacks for look in looks))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The run of two processes beside the reference's."""
    folder = tmp_path_factory.mktemp("two")
    torchrun(2, [__file__, str(folder)], folder)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory, two):
    folder = tmp_path_factory.mktemp("one")
    run_reference(folder, two)
    return folder


def run_reference(folder, two):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(two / "cache")}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def torchrun(processes, arguments, folder, timeout=300, check=True):
    """Start processes as users do; return what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command = [*launcher, "--master_port", str(port), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    if check:
        assert done.returncode == 0, done.stderr[-4000:]
    return done


def records(folder, name="metrics.jsonl", split=None):
    lines = [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]
    return [line for line in lines if split is None or line["split"] == split]


@pytest.mark.slow
def test_two_processes_train_on_disjoint_slices_of_the_same_global_batches(two, one):
    batches = [line["rows"] for line in records(two, "batches.jsonl")]
    assert batches == [line["rows"] for line in records(one, "batches.jsonl")] and len(batches) == 2 * STEPS
    slices = [json.loads((two / f"slices_{rank}.json").read_text()) for rank in range(2)]
    half = GLOBAL_BATCH // 2
    for batch, first, second in zip(batches, *slices, strict=True):
        assert first == batch[:half] and second == batch[half:] and not set(first) & set(second)


@pytest.mark.slow
def test_losses_and_gradients_equal_the_reference(two, one):
    for mine, theirs in zip(records(two, split="train")[:12], records(one, split="train")[:12]):
        for term in TERMS:
            assert mine[term] == pytest.approx(theirs[term], rel=2e-4), (term, mine["step"])
        for name in ("gradient_norm", "mask_rate_common", "mask_rate_rare"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3), name
        assert mine["negatives_fell_back"] == theirs["negatives_fell_back"]
    for step, tolerance in ((0, 1e-5), (1, 1e-5), (10, 1e-4)):
        mine, theirs = (load_file(folder / f"gradients_{step}.safetensors") for folder in (two, one))
        assert mine.keys() == theirs.keys()
        a, b = (torch.cat([grads[name].flatten() for name in sorted(grads)]) for grads in (mine, theirs))
        print(f"step {step}: gradients differ by {float((a - b).norm() / b.norm()):.1e} of their norm")
        assert (a - b).norm() <= tolerance * b.norm(), step


@pytest.mark.slow
def test_weights_agree_after_fifty_steps_and_teachers_are_equal(two, one):
    a, b = (load_file(folder / "run" / "final" / "model.safetensors") for folder in (two, one))
    flat = [torch.cat([weights[name].flatten().double() for name in sorted(weights)]) for weights in (a, b)]
    gap = float((flat[0] - flat[1]).norm() / flat[1].norm())
    print(f"after {STEPS} steps the weights differ by {gap:.1e} of their norm")
    assert gap < 1e-4
    teachers = [load_file(two / f"teacher_{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(tensor, teachers[1][name]) for name, tensor in teachers[0].items())


@pytest.mark.slow
def test_metrics_hold_each_step_once(two):
    assert [line["step"] for line in records(two, split="train")] == list(range(1, STEPS + 1))
    epochs = [line["epoch"] for line in records(two, split="batches")]
    assert epochs == list(range(len(epochs)))
    assert np.isfinite([line["mask_rate_common"] for line in records(two, split="train")]).all()


if __name__ == "__main__":
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    launch.Trainer = TwoProcesses if processes == 2 else Reference
    batch = ["--per_device_batch_size", str(GLOBAL_BATCH // processes)]
    pretrain.main([*SETTINGS, str(Path(sys.argv[1])), "--run_name", "run", *batch])
