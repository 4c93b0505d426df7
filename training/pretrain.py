"""Pretrain SyncMask: `accelerate launch -m syncmask.training.pretrain --config quickstart`."""

import dataclasses
import logging
import os
import sys
import time
from datetime import timedelta
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed

from syncmask import register_auto_classes
from syncmask.evaluation.protocols import items
from syncmask.evaluation.result import library_versions
from syncmask.processing.collator import UnreadablePhoto
from syncmask.processing.corpus import fingerprint

from .arguments import PretrainArguments, load_arguments, save_config
from .build import (
    build_masking,
    build_model,
    build_probe,
    build_processor,
    build_train_data,
    read_corpus,
)
from .faults import RunStopped, explain, report
from .finish import evaluate_run, save_final, write_summary
from .optim import make_optimizer, make_schedule
from .planning import EpochPlanner
from .processes import on_main
from .resume import changes, resume_newest, save_trainer
from .run_folder import RunFolder
from .sampler import FeatureBank, GroupedBatchSampler
from .substitutes import readable
from .teacher import MomentumTeacher
from .trainer import Trainer

logger = logging.getLogger(__name__)

# How long a process waits for another: validation and the planning of an epoch run on one while the others wait.
PATIENCE = timedelta(minutes=30)
VALIDATION_ROWS = 1000
VALIDATION_QUERIES = 200


def main(argv: list[str] | None = None):
    """Parse, build, train, evaluate; problems that are known of are explained."""
    register_auto_classes()
    arguments = load_arguments(argv)
    command = " ".join(["python -m syncmask.training.pretrain", *(sys.argv[1:] if argv is None else argv)])
    try:
        run(arguments, command)
    except (Exception, SystemExit) as problem:
        if isinstance(problem, RunStopped) and problem.said or explain(problem) is None:
            raise
        code = problem.code if isinstance(problem, RunStopped) else 1
        raise RunStopped(report(problem), code, said=True) from problem


def run(arguments: PretrainArguments, command: str):
    """Build, train, evaluate."""
    started = time.monotonic()
    accelerator = start(arguments)
    folder = RunFolder(arguments.run.folder, accelerator.is_main_process, arguments.run.log_batches)
    on_main(lambda: folder.prepare(arguments.run.resume, arguments.run.overwrite))
    start_trackers(accelerator, arguments)
    # One process generates or reads the corpus first; the others find it in the cache.
    with accelerator.main_process_first():
        corpus = read_corpus(arguments.data)
    trainer = build_trainer(arguments, accelerator, corpus, folder)
    on_main(lambda: write_config(trainer, corpus, command))
    if arguments.run.resume:
        resume_newest(trainer)
    trainer.fit()
    part(trainer)
    if accelerator.is_main_process:
        save_final(trainer)
        results = evaluate_run(trainer, corpus) if arguments.run.evaluate else {}
        write_summary(trainer, corpus, results, minutes=(time.monotonic() - started) / 60)
    accelerator.end_training()


def part(trainer: Trainer):
    """End what joins the processes: the main one works on alone, however long that takes, and the others may go."""
    accelerator = trainer.accelerator
    trainer.model = trainer.student
    # The wrappers go first, together: one that ended later would wait for processes that are gone.
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()


def start(arguments: PretrainArguments) -> Accelerator:
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


def start_trackers(accelerator: Accelerator, arguments: PretrainArguments):
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
    trainer.processor.tokenizer.save_pretrained(trainer.folder.path / "tokenizer")


def build_trainer(arguments: PretrainArguments, accelerator: Accelerator, corpus, folder: RunFolder) -> Trainer:
    """Put the parts of a run together."""
    data_args, objective, optim, seed = arguments.data, arguments.objective, arguments.optim, arguments.run.seed
    processor = build_processor(data_args, corpus["train"]["text"], seed)
    set_seed(seed)  # weights depend on the seed alone, not on what was drawn before
    model = build_model(arguments.model, data_args.image_size, processor.tokenizer)
    layer = model.config.mask_layer if objective.mask_layer is None else objective.mask_layer
    teacher = MomentumTeacher(model.to(accelerator.device), objective.teacher_momentum, layer)
    data = build_train_data(corpus["train"], data_args, objective, seed, processor.image_processor.resample)
    global_batch = optim.per_device_batch_size * accelerator.num_processes
    sampler = GroupedBatchSampler(
        len(data.rows), global_batch, rank=accelerator.process_index, world_size=accelerator.num_processes
    )
    bank = FeatureBank(len(data.rows), model.config.projection_dim)
    size = data_args.image_size
    total_steps = optim.epochs * -(-sampler.batches // optim.gradient_accumulation_steps)
    total_steps = min(total_steps, optim.max_steps or total_steps)
    optimizer = make_optimizer(model, learning_rate=optim.learning_rate, weight_decay=optim.weight_decay)
    schedule = make_schedule(optimizer, optim.warmup_steps, total_steps, optim.learning_rate_floor)
    model, optimizer = accelerator.prepare(model, optimizer)
    validate = partial(validate_items, processor=processor, dataset=corpus.get("validation"), seed=seed)
    return Trainer(
        arguments=arguments,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        teacher=teacher,
        masking=build_masking(objective, teacher.model.config, processor, data.index.texts),
        processor=processor,
        data=data,
        probe=build_probe(
            readable(data.probe_rows), processor, size, objective.word_mask_rate, seed, accelerator.device
        ),
        sampler=sampler,
        bank=bank,
        plan_epoch=EpochPlanner(data, bank, seed, global_batch, objective.semi_hard_margin, objective.grouped_share),
        validate=validate,
        save=save_trainer,
        folder=folder,
        total_steps=total_steps,
    )


def validate_items(model, *, processor, dataset, seed: int) -> dict[str, float]:
    """Recall both ways on items never trained on, by ITC and re-ranked by ITM; empty without a validation split."""
    if dataset is None or not len(dataset):
        return {}
    training = model.training
    model.eval()
    options = {"max_rows": VALIDATION_ROWS, "rerank_queries": VALIDATION_QUERIES, "seed": seed}
    try:
        result = items(model, processor, dataset, split="validation", **options)
    except UnreadablePhoto:
        # A photo that went bad must not end a run that only looks on.
        result = items(model, processor, readable(dataset), split="validation", **options)
    model.train(training)
    figures = {name: metric["value"] for name, metric in result.metrics.items()}
    return {"recall_mean": figures["both_ways/mean_recall/itc"], **figures}


if __name__ == "__main__":
    main()
