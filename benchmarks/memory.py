"""Memory of a training step: `python -m benchmarks.memory [--quick] [--json]`.

The preset base at 256 pixels with 30,522 words, a batch of 8 and checkpointed activations, must stay below 12 GiB: one
real step of the trainer (teacher, masks, four losses, backward, AdamW, teacher's update), its optimiser's moments made
beforehand, in a process of its own. Beside it what `--estimate` says of the same run. Two minutes of one core; --quick
takes the preset small instead and leaves the 12 GiB out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from .measure import Row, peak_memory, print_rows

GIB = 2**30
LIMIT = 12.0
CORPUS = ("--corpus", "garments", "--num_items", "40")
BASE = ("--preset", "base", "--image_size", "256", "--per_device_batch_size", "8", "--activation_checkpointing")
SMALL = ("--preset", "small", "--image_size", "224", "--per_device_batch_size", "16")
WORDS = ("--model_overrides", '{"vocab_size": 30522}')


def measure(words: list[str]) -> dict[str, float]:
    """GiB of one step of pretraining with these settings, here and now: measured and estimated, and its losses.

    `measured` is how far resident memory rises above what the process held beside weights and teacher; `estimated` is
    the same from `--estimate`. `in_all` is the process's peak.
    """
    from syncmask.training.estimate import LATE, bytes_of, estimate, longest_rows, machine_memory
    from syncmask.training.launch import build_run, start
    from syncmask.training.parsing import load_arguments
    from syncmask.training.pretrain import build_pretraining
    from syncmask.training.run_folder import RunFolder

    arguments = load_arguments([*CORPUS, *words])
    accelerator = start(arguments)
    trainer, _ = build_run(arguments, build_pretraining, accelerator, RunFolder(Path("nowhere"), is_main=False))
    model = bytes_of(trainer.student.parameters()) + bytes_of(trainer.task.teacher.model.parameters())
    process = machine_memory(accelerator.device)[0] - model
    make_moments(trainer)
    trainer.task.rehearse(2)
    trainer.progress.step = LATE
    batches = arguments.optim.batches_per_step
    batch = longest_rows(trainer, arguments.optim.rows_of_process)
    forget_peak()
    for _ in range(batches):
        trainer.train_step(batch | {"asked_ids": batch["row_ids"], "reasons": {}})
        trainer.sampler.consumed += 1
    peak = peak_memory()
    found = estimate(trainer)
    return {
        "measured": (peak - process) / GIB,
        "estimated": found.model_peak / GIB,
        "in_all": peak / GIB,
        "largest_batch": found.largest_batch,
    }


def make_moments(trainer) -> None:
    """Bring AdamW to where it is after a first step, without a forward."""
    for one in trainer.student.parameters():
        one.grad = torch.zeros_like(one) if one.requires_grad else None
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def forget_peak() -> None:
    """Let the highest resident memory be counted from here on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def in_a_process(words: tuple[str, ...]) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", json.dumps(words)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout.splitlines()[-1])


def error_row(name: str, found: dict[str, float]) -> Row:
    """How far the estimate is off, in percent of what was measured, against the 15 that are allowed."""
    error = 100 * abs(found["estimated"] / found["measured"] - 1)
    notes = f"estimated {found['estimated']:.2f} GiB, measured {found['measured']:.2f} GiB above the bare process"
    return Row(name, "%", error, 15.0, 1.0, 0.5, at_most=True, notes=notes)


def rows(quick: bool) -> list[Row]:
    """All rows of this benchmark."""
    if quick:
        return [error_row("estimate of a step, small", in_a_process((*SMALL, *WORDS)))]
    base = in_a_process((*BASE, *WORDS))
    limit = Row("a step of base, batch 8", "GiB", base["in_all"], LIMIT, 1.0, 0.75, at_most=True)
    return [
        limit,
        error_row("estimate of a step, base", base),
        error_row("estimate of a step, small", in_a_process((*SMALL, *WORDS))),
    ]


def main(argv: list[str] | None = None) -> int:
    """Run and print; returns the exit code, 1 where a floor was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the preset small alone")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    if given.measure:
        print(json.dumps(measure(["--num_threads", "1", *given.measure])))
        return 0
    return print_rows(rows(given.quick), given.json)


if __name__ == "__main__":
    sys.exit(main())
