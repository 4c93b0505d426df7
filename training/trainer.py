"""The loop: `Trainer.fit` runs epochs of `train_step`, validates, checkpoints and plans the next epoch's batches."""

import logging
import math
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from syncmask.gather import gather_rows
from syncmask.processing.collator import Collator

from .arguments import TrainArguments
from .checkpoint import step_folders
from .data import to_pixels
from .faults import StopSignals, outlive_signals
from .full_contrast import Glance, StandIn, contrast_as_one, draws, split_rows
from .processes import on_main, stop_all
from .profiling import StepProfile
from .progress import Agreed, Progress
from .run_folder import RunFolder
from .sampler import GroupedBatchSampler
from .stopwatch import StallMeter, Stopwatch
from .substitutes import BatchesInContext, SubstitutingCollator, SubstitutingPhotos
from .task import Look, Slice, Task

logger = logging.getLogger(__name__)


class Trainer:
    """Holds what moves while a model is trained.

    Args:
        arguments: of the run. accelerator: devices, precision and processes.
        task: what is trained: rows, inputs, losses, memory, evaluation.
        model, optimizer: prepared by the accelerator. schedule: of the learning rate, stepped once an optimiser step.
        sampler: order of batches.
        save: writes a checkpoint of this trainer.
        folder: where metrics go.
    """

    def __init__(
        self,
        arguments: TrainArguments,
        accelerator: Accelerator,
        task: Task,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        sampler: GroupedBatchSampler,
        save: Callable[["Trainer"], None],
        folder: RunFolder,
        total_steps: int,
    ):
        self.arguments, self.accelerator, self.task = arguments, accelerator, task
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.sampler, self.save, self.folder = sampler, save, folder
        self.total_steps = total_steps
        self.progress = Progress()
        self.started, self.stopwatch = time.monotonic(), Stopwatch()
        self.stalls = StallMeter()
        # Agreed on by all processes after each batch: whether to end early, and by which signal.
        self.late, self.stop_signal = False, 0
        self.signals = StopSignals()
        self.profile = StepProfile(arguments.run.profile if accelerator.is_main_process else None, folder.path)
        self.shown: dict[str, str] = {}  # losses and waiting, beside the progress bar

    @property
    def student(self) -> PreTrainedModel:
        """The trained model without its wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def fit(self):
        """Train until the steps, the epochs or the minutes are used up; can be called again after a resume.

        Raises:
            RunStopped: on SIGINT or SIGTERM, once the running step is done and saved; where a loss is not finite.
        """
        loader = self._loader()
        self.stopwatch.restart()
        with (
            self.signals,
            self.profile,
            tqdm(
                total=self.total_steps,
                initial=self.progress.step,
                unit="step",
                dynamic_ncols=True,
                disable=not self.accelerator.is_local_main_process,
            ) as bar,
        ):
            while self.progress.step < self.total_steps and not self.late:
                if len(self.sampler) == 0:
                    self._start_epoch()
                self._run_epoch(loader, bar)
                if self._epoch_is_over():
                    self._end_epoch(self.arguments.run.validate_every_epochs)
                else:
                    self._save()
                if self.stop_signal:
                    self._stop_by_signal()

    def _loader(self) -> DataLoader:
        workers = self.arguments.data.num_workers
        return DataLoader(
            SubstitutingPhotos(self.task.data.photos, self.task.data.index, self.arguments.run.seed),
            batch_sampler=BatchesInContext(self.sampler),
            collate_fn=SubstitutingCollator(Collator(self.task.processor)),
            num_workers=workers,
            prefetch_factor=self.arguments.data.prefetch_factor if workers else None,
            persistent_workers=workers > 0,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=outlive_signals,
            # Its own: each pass draws a number, which a resumed run would otherwise take from dropout's generator.
            generator=torch.Generator(),
        )

    def _start_epoch(self):
        epoch = self.progress.epoch
        self.task.begin_epoch(epoch)
        if self.progress.step == 0:
            self._log_masks()
        with self.stopwatch.phase("planning"):
            order, figures = self.task.order(epoch)
        self.sampler.set_order(epoch, order)
        self._log("batches", figures)

    def _run_epoch(self, loader: DataLoader, bar: tqdm):
        """Train on what is left of the epoch, or until the run is to end."""
        every = self.arguments.run.checkpoint_every
        for batch in self.stopwatch.waits(loader):
            stepped = self.train_step(batch)
            self.sampler.advance()
            if not stepped:
                continue
            bar.update()
            self.profile.step()
            bar.set_postfix(self.shown, refresh=False)
            step = self.progress.step
            if step >= self.total_steps or self.late or self.stop_signal:
                return
            if every and step % every == 0 and not self._epoch_is_over():
                self._save()

    def _end_epoch(self, validate_every: int):
        self.progress.epoch += 1
        self.task.check()
        last = self.progress.step >= self.total_steps
        if self.progress.epoch % validate_every == 0 or last:
            with self.stopwatch.phase("validating"):
                figures = on_main(lambda: self.task.validate(self.student))
            self._log("validation", figures)
            self._note_best(figures)
        self._log_masks()
        self._save()

    def _log_masks(self):
        """Keep what would be hidden now, for the report."""
        with self.stopwatch.phase("validating"):
            self.folder.log_masks(on_main(lambda: self.task.mask_state(self.progress)))

    def _save(self):
        with self.stopwatch.phase("saving"):
            self.save(self)
        self._log_times()

    def _note_best(self, figures: dict[str, float]):
        name = self.arguments.run.best_metric
        if not figures:
            return
        name = name or next(iter(figures))
        if name not in figures:
            stop_all(f"best_metric={name!r} is no validation figure; choose one of {', '.join(sorted(figures))}")
        if self.progress.best_value is None or figures[name] > self.progress.best_value:
            self.progress.best_step, self.progress.best_value = self.progress.step, figures[name]

    def _stop_by_signal(self):
        stop_all(
            f"stopped by {signal.Signals(self.stop_signal).name} after step {self.progress.step}/{self.total_steps}; "
            f"saved in {self._last_checkpoint()}. The same command with --resume (and without --overwrite) goes on "
            "from there.",
            128 + self.stop_signal,
        )

    def _last_checkpoint(self) -> str:
        saved = step_folders(self.folder.path / "checkpoints")
        return str(saved[-1]) if saved else "no checkpoint"

    def _log(self, split: str, figures: dict):
        self.folder.log(self.progress.step, self.progress.epoch, split, figures)

    def _log_times(self):
        reading = self.stopwatch.read()
        self.stalls.add(reading)
        self.folder.log_times(self.progress.step, self.progress.epoch, reading)

    def _note_waiting(self):
        """Work out how much of the time went by waiting for photos; say what helps where that stays much."""
        data = self.arguments.data
        if self.stalls.close() and self.accelerator.is_main_process:
            helps = ["more --num_workers"] + ["--fast_decode"] * (not data.fast_decode)
            helps += ["--decoded_cache FOLDER"] * (data.decoded_cache is None)
            logger.warning(
                "waiting for photos: %.0f %% of the time. What helps: %s", 100 * self.stalls.share, " or ".join(helps)
            )

    def _epoch_is_over(self) -> bool:
        return len(self.sampler.order) > 0 and len(self.sampler) == 0

    def _out_of_time(self) -> bool:
        limit = self.arguments.optim.max_minutes
        return limit is not None and time.monotonic() - self.started > 60 * limit

    def train_step(self, batch: dict[str, torch.Tensor]) -> bool:
        """Run one batch of the loader; return whether the optimiser stepped (it does every `batches_per_step`).

        With `full_contrast` such a batch is a whole step's and is cut into micro batches here.
        """
        progress, optim = self.progress, self.arguments.optim
        self.model.train()
        self._note_substitutes(batch.pop("asked_ids"), batch["row_ids"], batch.pop("reasons"))
        self.task.before_step(progress)
        stepping = self._is_last_of_step()
        parts, done = split_rows(batch, optim.per_device_batch_size), []
        known = self._look_ahead(parts) if len(parts) > 1 else [None]
        for part, ahead in zip(parts, known, strict=True):
            last = stepping and len(done) + 1 == len(parts)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                part = self.to_device(part)
                look, agreed = self._accumulate(part, ahead, len(parts) * optim.batches_per_step)
            done.append(agreed)
        rows = gather_rows(batch["row_ids"].to(self.accelerator.device))
        norm = self._step(rows) if stepping else None
        self.folder.log_rows(progress.step, progress.epoch, rows)
        self.stopwatch.pairs += len(rows)
        progress.micro_step += 1
        if stepping:
            progress.step += 1
            self.stopwatch.steps += 1
            self._log_step(part, look, norm, Agreed.mean(done))
        return stepping

    def _accumulate(
        self, batch: dict[str, torch.Tensor], ahead: tuple[Glance, StandIn] | None, count: int
    ) -> tuple[Look, Agreed]:
        """Run forward and backward of one of the `count` micro batches of a step."""
        losses, look = self._losses(batch) if ahead is None else self._losses_ahead(batch, *ahead)
        agreed = self._agree(losses, look.fallbacks)
        if not agreed.finite:
            self._stop_not_finite(gather_rows(batch["row_ids"]), agreed.losses)
        # 3. Backward; the optimiser steps once enough micro batches are in.
        loss = sum(weight * losses[name] for name, weight in self.task.weights.items())
        self.accelerator.backward(loss / count)
        # 4. What remembers: features, running means.
        self.task.remember(batch, look, agreed.losses)
        return look, agreed

    def _losses(self, batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Look]:
        """Compute the unweighted losses of this process's slice."""
        # 1. The task looks at the batch: teacher, masks, negatives, labels, whatever its forward wants.
        look = self.task.look(batch, self.progress, self._slice())
        # 2. Forward: all objectives in one call.
        return self.task.losses(self.model(**look.inputs)), look

    def _look_ahead(self, parts: list[dict[str, torch.Tensor]]) -> list[tuple[Glance, StandIn]]:
        """Look at all micro batches of a step and contrast them as one, before the first of their forwards."""
        glances = []
        for number, part in enumerate(parts):
            look = self.task.look(self.to_device(part), self.progress, self._slice(number, len(parts)))
            with self.accelerator.autocast():
                glances.append(Glance.at(self.student.syncmask, look))
        return list(zip(glances, contrast_as_one(self.student, glances)))

    def _losses_ahead(
        self, batch: dict[str, torch.Tensor], glance: Glance, itc: StandIn
    ) -> tuple[dict[str, torch.Tensor], Look]:
        """Compute the losses of a micro batch that was looked at; its own ITC gives way to the whole step's."""
        with draws(glance.seed, self.accelerator.device):
            output = self.model(**glance.look.inputs, pixel_values=batch["pixel_values"])
        whole = itc(output.image_feats, output.text_feats, self.student.syncmask.temperature_logit)
        return self.task.losses(output) | {"itc": whole}, glance.look

    def _step(self, rows: torch.Tensor) -> float:
        """Let the optimiser step, and what follows it; return the norm of the gradients of these rows' batches."""
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.optim.max_grad_norm))
        # fp16's scaler leaves such a step out by itself.
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            self._stop_not_finite(rows, {"gradient norm": norm})
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.task.after_step(self.student)
        return norm

    def _slice(self, part: int = 0, parts: int = 1) -> Slice:
        """A micro batch draws its noise as a process of its own would."""
        return Slice(self.accelerator.process_index * parts + part, self.accelerator.num_processes * parts)

    def _agree(self, losses: dict[str, torch.Tensor], fallbacks: int) -> Agreed:
        """Share losses, signals and the clock with all processes; one small gather a batch."""
        mine = torch.stack([loss.detach().float() for loss in losses.values()])
        more = mine.new_tensor([fallbacks, self.signals.number, self._out_of_time()])
        shared = gather_rows(torch.cat([mine, more])[None]).cpu()
        self.stop_signal = int(shared[:, -2].max())
        self.late = bool(shared[:, -1].any())
        means = shared[:, : len(losses)].mean(dim=0)
        fallbacks = int(shared[:, len(losses)].sum())
        return Agreed(dict(zip(losses, means.tolist())), bool(means.isfinite().all()), fallbacks)

    def _is_last_of_step(self) -> bool:
        """Tell whether the optimiser steps after this batch; the end of an epoch ends a step, so none is left open."""
        batch = self.sampler.consumed + 1
        return batch % self.arguments.optim.batches_per_step == 0 or batch == self.sampler.batches

    def to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Bring a batch to this process's device, photos standardised there."""
        batch = {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        pixels = {name: to_pixels(batch[name], self.task.processor) for name in batch if name.endswith("pixel_values")}
        return batch | pixels

    def _note_substitutes(self, asked: torch.Tensor, used: torch.Tensor, reasons: dict[int, str]):
        """Count and list, on all processes, the rows whose photos could not be read."""
        pairs = gather_rows(torch.stack([asked, used], dim=1).to(self.accelerator.device)).tolist()
        replaced = [(row, substitute) for row, substitute in pairs if row != substitute]
        if not replaced:
            return
        reasons = {row: reason for part in gather_object([reasons]) for row, reason in part.items()}
        for row, substitute in replaced:
            self.folder.log_substitute(self.progress.step, self.progress.epoch, row, substitute, reasons[row])
        self.progress.substitutes += len(replaced)

    def _log_step(self, batch: dict[str, torch.Tensor], look: Look, norm: float, agreed: Agreed):
        step = self.progress.step
        self.shown = {name: f"{value:.2f}" for name, value in agreed.losses.items()}
        if self.stalls.share is not None:
            self.shown["waiting"] = f"{self.stalls.share:.0%}"
        if step % self.arguments.run.log_every:
            return
        figures = {
            **agreed.losses,
            "learning_rate": self.schedule.get_last_lr()[0],
            "gradient_norm": norm,
            "negatives_fell_back": agreed.fallbacks,
            **self.task.figures(batch, look, self.student, step),
        }
        self._log("train", figures)
        self._log_times()
        self._note_waiting()
        # Not in metrics.jsonl: a clock's reading, and its lines can be compared bit for bit.
        self.accelerator.log(figures | {"waiting_share": self.stalls.share}, step=step)

    def _stop_not_finite(self, rows: torch.Tensor, figures: dict[str, float]):
        bad = ", ".join(name for name, value in figures.items() if not math.isfinite(value))
        stop_all(
            f"{bad} is not finite in the batch after step {self.progress.step} (rows {rows.tolist()}); "
            f"nothing of it is kept. Last good checkpoint: {self._last_checkpoint()}. Go on from it with --resume and "
            "a lower --learning_rate or --max_grad_norm, or with bf16 instead of fp16."
        )
