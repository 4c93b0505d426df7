"""From settings to a finished run, whatever is trained: start, build, train, evaluate."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from datasets import DatasetDict
from transformers import PreTrainedModel

from syncmask import register_auto_classes
from syncmask.evaluation.result import library_versions
from syncmask.processing.corpus import corpus_of_run, fingerprint, source_kind, source_of_run

from .arguments import ModelArguments, TrainArguments
from .build import checkpoint_activations, compile_layers, write_out_attention
from .estimate import estimate
from .faults import RunStopped, explain, report
from .finish import split_sizes, write_summary
from .optim import make_optimizer, make_schedule
from .parsing import save_config
from .processes import on_main
from .publishing import Publisher, check_publishing
from .resume import changes, resume_newest, save_trainer
from .run_folder import RunFolder
from .sampler import GroupedBatchSampler
from .task import Task
from .trainer import Trainer

logger = logging.getLogger(__name__)

# How long a process waits for another: validation and the planning of an epoch run on one while the others wait.
PATIENCE = timedelta(minutes=30)

# Settings, accelerator and corpus -> the task, and the model on its device.
Build = Callable[[TrainArguments, Accelerator, DatasetDict], tuple[Task, PreTrainedModel]]


def launch(read: Callable[[], TrainArguments], build: Build, program: str, argv: list[str] | None):
    """Run a training program from its command line; problems that are known of are explained.

    Args:
        read: gives the settings. build: makes what is trained. program: the module's name. argv: its words.
    """
    register_auto_classes()
    arguments = read()
    command = " ".join([f"python -m {program}", *(sys.argv[1:] if argv is None else argv)])
    try:
        run(arguments, build, command)
    except (Exception, SystemExit) as problem:
        if isinstance(problem, RunStopped) and problem.said or explain(problem) is None:
            raise
        code = problem.code if isinstance(problem, RunStopped) else 1
        raise RunStopped(report(problem), code, said=True) from problem


def run(arguments: TrainArguments, build: Build, command: str):
    """Build, train, evaluate."""
    started = time.monotonic()
    accelerator = start(arguments)
    if arguments.run.estimate:
        return tell_memory(arguments, build, accelerator)
    on_main(lambda: check_publishing(arguments))
    folder = RunFolder(arguments.run.folder, accelerator.is_main_process, arguments.run.log_batches)
    publisher = Publisher(arguments, folder)
    on_main(lambda: folder.prepare(arguments.run.resume, arguments.run.overwrite))
    start_trackers(accelerator, arguments)
    trainer, corpus = build_run(arguments, build, accelerator, folder)
    on_main(lambda: write_config(trainer, corpus, command))
    publisher.follow(trainer)
    if arguments.run.resume:
        resume_newest(trainer)
    folder.usage.begin(accelerator, trainer.progress.step)
    trainer.fit()
    part(trainer)
    if accelerator.is_main_process:
        trainer.task.save_final(trainer.student, folder.path / "final")
        results = {}
        if arguments.run.evaluate:
            results = trainer.task.evaluate(folder.path, trainer.student.eval(), corpus, arguments.data.corpus)
        folder.usage.close(accelerator, trainer.progress.step)
        write_summary(trainer, corpus, results, minutes=(time.monotonic() - started) / 60)
        publisher.finish()
    accelerator.end_training()


def build_run(
    arguments: TrainArguments, build: Build, accelerator: Accelerator, folder: RunFolder
) -> tuple[Trainer, DatasetDict]:
    """Read the corpus and put together what is trained on it."""
    # One process generates or reads the corpus first; the others find it in the cache.
    with accelerator.main_process_first():
        corpus = read_corpus(arguments)
    task, model = build(arguments, accelerator, corpus)
    return build_trainer(arguments, accelerator, task, model, folder), corpus


def tell_memory(arguments: TrainArguments, build: Build, accelerator: Accelerator):
    """Print what a step would need, and touch no folder."""
    arguments.data.decoded_cache = None
    trainer, _ = build_run(arguments, build, accelerator, RunFolder(arguments.run.folder, is_main=False))
    found = estimate(trainer)
    accelerator.print(found.table())
    accelerator.end_training()


def read_corpus(arguments: TrainArguments) -> DatasetDict:
    """Load the corpus that the settings name, split by item; SystemExit, with the reason alone, where it cannot be."""
    try:
        return corpus_of_run(dataclasses.asdict(arguments.data))
    except (ValueError, FileNotFoundError, ImportError) as problem:
        raise SystemExit(str(problem)) from problem


def part(trainer: Trainer):
    """End what joins the processes: the main one works on alone, however long that takes, and the others may go."""
    accelerator = trainer.accelerator
    trainer.model = trainer.student
    # The wrappers go first, together: one that ended later would wait for processes that are gone.
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()


def start(arguments: TrainArguments) -> Accelerator:
    """Set threads, seeds, precision and processes."""
    run = arguments.run
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Launchers set OMP_NUM_THREADS=1, which would leave a CPU run on one core.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(run.num_threads or max(1, len(os.sched_getaffinity(0)) // here))
    accelerator = Accelerator(
        mixed_precision=run.mixed_precision,
        log_with=run.log_with or None,
        project_dir=str(run.folder),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            # DDP otherwise re-arranges its buckets after the first step, which a resumed run has elsewhere: with three
            # processes or more the sums would be taken in another order.
            DistributedDataParallelKwargs(find_unused_parameters=run.deterministic),
        ],
    )
    set_seed(run.seed)
    if run.deterministic:
        torch.use_deterministic_algorithms(True)
    if accelerator.is_main_process:
        logger.info(
            "%d process(es) on %s, %d CPU thread(s) each, precision %s",
            accelerator.num_processes,
            accelerator.device,
            torch.get_num_threads(),
            accelerator.mixed_precision,
        )
    return accelerator


def start_trackers(accelerator: Accelerator, arguments: TrainArguments):
    """Open the trackers that are asked for, with every setting as text."""
    if arguments.run.log_with:
        flat = {
            f"{section}.{key}": str(value)
            for section, values in dataclasses.asdict(arguments).items()
            for key, value in values.items()
        }
        accelerator.init_trackers("syncmask", config=flat)


def write_config(trainer: Trainer, corpus, command: str):
    """Write config.yaml and the tokenizer; warn where a resumed run has other settings than it began with."""
    arguments, path = trainer.arguments, trainer.folder.path / "config.yaml"
    about = {
        "command": command,
        "corpus_fingerprint": fingerprint(corpus["train"]),
        "corpus_source": source_kind(source_of_run(dataclasses.asdict(arguments.data))),
        "splits": split_sizes(corpus),
        "started_from": hub_starts(arguments.model),
        "versions": library_versions(),
        "processes": trainer.accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }
    if arguments.run.resume:
        for change in changes(path, dataclasses.asdict(arguments), about):
            logger.warning("resumed with another setting, so no longer the same run bit for bit: %s", change)
    partial = path.with_suffix(".partial")
    save_config(partial, arguments, about)
    os.replace(partial, path)
    trainer.task.processor.tokenizer.save_pretrained(trainer.folder.path / "tokenizer")


def hub_starts(model: ModelArguments) -> list[str]:
    """Name what training starts from, where that is on the Hub: a place on this machine means nothing elsewhere."""
    starts = [start for start in (model.init_from, model.vision, model.text) if start]
    return [start for start in dict.fromkeys(starts) if not Path(start).expanduser().exists()]


def build_trainer(
    arguments: TrainArguments, accelerator: Accelerator, task: Task, model: PreTrainedModel, folder: RunFolder
) -> Trainer:
    """Put the parts of a run together."""
    optim, rows = arguments.optim, len(task.data.rows)
    global_batch = optim.rows_of_process * accelerator.num_processes
    sampler = GroupedBatchSampler(
        rows, global_batch, rank=accelerator.process_index, world_size=accelerator.num_processes
    )
    total_steps = optim.epochs * -(-sampler.batches // optim.batches_per_step)
    total_steps = min(total_steps, optim.max_steps or total_steps)
    write_out_attention(model, accelerator.device.type, accelerator.mixed_precision)
    if arguments.run.activation_checkpointing:
        checkpoint_activations(model)
    if arguments.run.compile:
        compile_layers(model)
    optimizer = make_optimizer(model, optim.learning_rate, optim.weight_decay, optim.layer_decay)
    schedule = make_schedule(optimizer, optim.warmup_steps, total_steps, optim.learning_rate_floor)
    model, optimizer = accelerator.prepare(model, optimizer)
    return Trainer(
        arguments=arguments,
        accelerator=accelerator,
        task=task,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        sampler=sampler,
        save=save_trainer,
        folder=folder,
        total_steps=total_steps,
    )
