"""The loop: `Trainer.fit` runs epochs of `train_step`, validates, checkpoints and plans the next epoch's batches."""

import math
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm

from syncmask import SyncMaskForPreTraining, SyncMaskProcessor
from syncmask.gather import gather_rows
from syncmask.negatives import choose_negatives, forbidden_pairs
from syncmask.processing.collator import Collator

from .arguments import PretrainArguments
from .build import TrainData, to_pixels
from .checkpoint import step_folders
from .faults import StopSignals, outlive_signals
from .masking import Masking, StepMasks
from .noise import StepNoise, draw_noise
from .processes import check_equal, gather_padded, on_main, stop_all
from .progress import ITM_LEARNED, ITM_MEMORY, TERMS, Agreed, Progress
from .run_folder import RunFolder
from .sampler import FeatureBank, GroupedBatchSampler
from .substitutes import BatchesInContext, SubstitutingCollator, SubstitutingPhotos
from .teacher import MomentumTeacher, TeacherOutput


class Trainer:
    """Holds what moves while a model is trained.

    Args:
        arguments: of the run. accelerator: devices, precision and processes.
        model, optimizer: prepared by the accelerator. schedule: of the learning rate, stepped once an optimiser step.
        teacher, masking, processor: see their classes.
        data: the rows that are trained on. probe: the pairs that the gate is tested on.
        sampler, bank: order of batches, and the features it is planned from.
        plan_epoch: (epoch, grouped) -> order of rows and figures about it.
        validate: model -> figures on items never trained on. save: writes a checkpoint of this trainer.
        folder: where metrics go.
    """

    def __init__(
        self,
        arguments: PretrainArguments,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        teacher: MomentumTeacher,
        masking: Masking,
        processor: SyncMaskProcessor,
        data: TrainData,
        probe: dict[str, torch.Tensor],
        sampler: GroupedBatchSampler,
        bank: FeatureBank,
        plan_epoch: Callable[[int, bool], tuple],
        validate: Callable[[SyncMaskForPreTraining], dict[str, float]],
        save: Callable[["Trainer"], None],
        folder: RunFolder,
        total_steps: int,
    ):
        self.arguments, self.accelerator = arguments, accelerator
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.teacher, self.masking, self.processor = teacher, masking, processor
        self.data, self.probe, self.sampler, self.bank = data, probe, sampler, bank
        self.plan_epoch, self.validate, self.save, self.folder = plan_epoch, validate, save, folder
        self.total_steps = total_steps
        self.progress = Progress()
        self.started = time.monotonic()
        # Agreed on by all processes after each batch: whether to end early, and by which signal.
        self.late, self.stop_signal = False, 0
        self.signals = StopSignals()
        self.shown: dict[str, str] = {}  # losses beside the progress bar

    @property
    def student(self) -> SyncMaskForPreTraining:
        """The trained model without its wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def fit(self):
        """Train until the steps, the epochs or the minutes are used up; can be called again after a resume.

        Raises:
            RunStopped: on SIGINT or SIGTERM, once the running step is done and saved; where a loss is not finite.
        """
        loader = self._loader()
        with (
            self.signals,
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
                    self._start_epoch(self.arguments.objective.grouping == "grouped")
                self._run_epoch(loader, bar)
                if self._epoch_is_over():
                    self._end_epoch(self.arguments.run.validate_every_epochs)
                else:
                    self.save(self)
                if self.stop_signal:
                    self._stop_by_signal()

    def _loader(self) -> DataLoader:
        workers = self.arguments.data.num_workers
        return DataLoader(
            SubstitutingPhotos(self.data.photos, self.data.index, self.arguments.run.seed),
            batch_sampler=BatchesInContext(self.sampler),
            collate_fn=SubstitutingCollator(Collator(self.processor)),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=outlive_signals,
            # Its own: each pass draws a number, which a resumed run would otherwise take from dropout's generator.
            generator=torch.Generator(),
        )

    def _start_epoch(self, may_group: bool):
        progress = self.progress
        # Grouped batches are harder than those that ITM is judged by, so grouping stays on once it has begun.
        learned = progress.epoch > 0 and progress.itm_average < ITM_LEARNED
        progress.grouped = may_group and (progress.grouped or learned)
        order, figures = on_main(lambda: self.plan_epoch(progress.epoch, progress.grouped))
        self.sampler.set_order(progress.epoch, order)
        self._log("batches", {"grouped": progress.grouped, **figures})

    def _run_epoch(self, loader: DataLoader, bar: tqdm):
        """Train on what is left of the epoch, or until the run is to end."""
        every = self.arguments.run.checkpoint_every
        for batch in loader:
            stepped = self.train_step(batch)
            self.sampler.advance()
            if not stepped:
                continue
            bar.update()
            bar.set_postfix(self.shown, refresh=False)
            step = self.progress.step
            if step >= self.total_steps or self.late or self.stop_signal:
                return
            if every and step % every == 0 and not self._epoch_is_over():
                self.save(self)

    def _end_epoch(self, validate_every: int):
        self.progress.epoch += 1
        check_equal("the teacher", self.teacher.model.state_dict())
        check_equal("the running means of words", self.masking.word_scores.state_tensors())
        last = self.progress.step >= self.total_steps
        if self.progress.epoch % validate_every == 0 or last:
            figures = on_main(lambda: self.validate(self.student))
            self._log("validation", figures)
            self._note_best(figures)
        self.save(self)

    def _note_best(self, figures: dict[str, float]):
        name = self.arguments.run.best_metric
        if not figures:
            return
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

    def _epoch_is_over(self) -> bool:
        return len(self.sampler.order) > 0 and len(self.sampler) == 0

    def _out_of_time(self) -> bool:
        limit = self.arguments.optim.max_minutes
        return limit is not None and time.monotonic() - self.started > 60 * limit

    def train_step(self, batch: dict[str, torch.Tensor]) -> bool:
        """Run one batch; return whether the optimiser stepped (it does every `gradient_accumulation_steps`)."""
        progress, optim = self.progress, self.arguments.optim
        self.model.train()
        self._note_substitutes(batch.pop("asked_ids"), batch["row_ids"], batch.pop("reasons"))
        batch = self._to_device(batch)
        self._test_gate()
        stepping = self._is_last_of_step()
        with nullcontext() if stepping else self.accelerator.no_sync(self.model):
            losses, seen, masks, fallbacks = self._terms(batch)
            agreed = self._agree(losses, fallbacks)
            if not agreed.finite:
                self._stop_not_finite(batch["row_ids"], agreed.losses)
            # 3. Backward, and a step of the optimiser once enough batches are in.
            loss = sum(getattr(self.arguments.objective, f"{term}_weight") * losses[term] for term in TERMS)
            self.accelerator.backward(loss / optim.gradient_accumulation_steps)
        if stepping:
            norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), optim.max_grad_norm))
            # fp16's scaler leaves such a step out by itself.
            if not math.isfinite(norm) and self.accelerator.scaler is None:
                self._stop_not_finite(batch["row_ids"], {"gradient norm": norm})
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.teacher.update(self.student)

        # 4. What remembers: the feature bank and the running mean of ITM.
        self._remember(batch, seen, agreed.losses["itm"])
        progress.micro_step += 1
        if stepping:
            progress.step += 1
            self._log_step(batch, masks, norm, agreed)
        return stepping

    def _terms(self, batch: dict[str, torch.Tensor]):
        """Compute the objectives of this process's slice.

        Returns:
            The unweighted losses by name, what the teacher saw, the masks, and the negatives that fell back on rule 1.
        """
        inputs, seen, masks, fallbacks = self._look(batch, self._noise(len(batch["row_ids"])))
        # 2. Forward: all objectives in one call.
        output = self.model(**inputs)
        return {term: output[f"{term}_loss"] for term in TERMS}, seen, masks, fallbacks

    def _look(self, batch: dict[str, torch.Tensor], noise: StepNoise):
        """Return the model's inputs, what the teacher saw, the masks, and the negatives that fell back on rule 1."""
        # 1. The teacher looks at the unmasked pairs; masks and negatives follow from what it sees.
        with self.accelerator.autocast():
            seen = self.teacher(batch)
            masks = self.masking.masks(self.progress.step, batch, self.teacher, seen, noise)
        image_negatives, text_negatives, fallbacks = self._negatives(batch, seen, noise)
        names = ("pixel_values", "input_ids", "attention_mask", "item_ids", "text_ids")
        inputs = {name: batch[name] for name in names} | {
            "text_mask": masks.text_mask,
            "masked_input_ids": masks.masked_input_ids,
            "patch_mask": masks.patch_mask,
            "negative_image_index": image_negatives,
            "negative_text_index": text_negatives,
            "teacher_image_feats": seen.image_feats,
            "teacher_text_feats": seen.text_feats,
            "teacher_temperature": seen.temperature,
            "soft_target_weight": self._soft_target_weight(),
        }
        return inputs, seen, masks, fallbacks

    def _test_gate(self):
        """Let the main process decide on the gate for all: devices of several kinds might measure apart."""
        was = self.masking.state()
        self.masking.test_gate(self.progress.step, self.probe, self.teacher)
        if was["opened_at"] is None and self.progress.step % self.masking.settings.gate_every == 0:
            self.masking.load_state(broadcast_object_list([self.masking.state()])[0])

    def _agree(self, losses: dict[str, torch.Tensor], fallbacks: int) -> Agreed:
        """Share losses, signals and the clock with all processes; one small gather a batch."""
        mine = torch.stack([losses[term].detach().float() for term in TERMS])
        more = mine.new_tensor([fallbacks, self.signals.number, self._out_of_time()])
        shared = gather_rows(torch.cat([mine, more])[None]).cpu()
        self.stop_signal = int(shared[:, -2].max())
        self.late = bool(shared[:, -1].any())
        means = shared[:, : len(TERMS)].mean(dim=0)
        return Agreed(dict(zip(TERMS, means.tolist())), bool(means.isfinite().all()), int(shared[:, len(TERMS)].sum()))

    def _is_last_of_step(self) -> bool:
        """Tell whether the optimiser steps after this batch; the end of an epoch ends a step, so none is left open."""
        batch = self.sampler.consumed + 1
        return batch % self.arguments.optim.gradient_accumulation_steps == 0 or batch == self.sampler.batches

    def _to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        batch = {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        return batch | {"pixel_values": to_pixels(batch["pixel_values"], self.processor)}

    def _noise(self, rows: int) -> StepNoise:
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        grid = self.student.syncmask.grid
        return draw_noise(
            self.arguments.run.seed,
            self.progress.micro_step,
            rows,
            self.processor.tokenizer.model_max_length,
            grid[0] * grid[1],
            rank,
            processes,
        )

    def _negatives(self, batch: dict[str, torch.Tensor], seen: TeacherOutput, noise: StepNoise):
        """Choose each photo's hard negative text and each text's hard negative photo, within this slice."""
        rows = self.data.texts[batch["text_ids"].cpu().numpy()]
        overlap = torch.from_numpy((rows @ rows.T).toarray()).to(seen.image_feats)
        rule1, rules = forbidden_pairs(batch["item_ids"], batch["text_ids"], overlap, self.data.tau)
        similarity = seen.image_feats @ seen.text_feats.T
        random, margin = noise.negatives.to(similarity), self.arguments.objective.semi_hard_margin
        texts, fell = choose_negatives(similarity, None, rule1, rules, random[..., 0], seen.temperature, margin)
        images, fell_too = choose_negatives(similarity.T, None, rule1, rules, random[..., 1], seen.temperature, margin)
        return images, texts, int(fell.sum() + fell_too.sum())

    def _soft_target_weight(self) -> float:
        objective = self.arguments.objective
        return objective.soft_target_weight * min(1.0, self.progress.step / max(1, objective.soft_target_ramp_steps))

    @torch.no_grad()
    def _remember(self, batch: dict[str, torch.Tensor], seen: TeacherOutput, itm: float):
        rows = gather_rows(batch["row_ids"])
        self.bank.update(rows.cpu(), gather_rows(seen.image_feats).cpu(), gather_rows(seen.text_feats).cpu())
        self.progress.itm_average = ITM_MEMORY * self.progress.itm_average + (1 - ITM_MEMORY) * itm
        self.folder.log_rows(self.progress.step, self.progress.epoch, rows)

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

    def _log_step(self, batch: dict[str, torch.Tensor], masks: StepMasks, norm: float, agreed: Agreed):
        progress = self.progress
        self.shown = {term: f"{value:.2f}" for term, value in agreed.losses.items()}
        if progress.step % self.arguments.run.log_every:
            return
        shared = {"input_ids": gather_padded(batch["input_ids"], 0), "word_ids": gather_padded(batch["word_ids"], -1)}
        masks = StepMasks(None, None, None, gather_padded(masks.word_mask, 0).bool())
        figures = {
            **agreed.losses,
            "learning_rate": self.schedule.get_last_lr()[0],
            "gradient_norm": norm,
            "temperature": float(self.student.syncmask.temperature.detach()),
            "mask_strength": self.masking.strength(progress.step),
            "mlm_gap": self.masking.gap,
            "negatives_fell_back": agreed.fallbacks,
            **self.masking.figures(shared, masks),
        }
        self._log("train", figures)
        self.accelerator.log(figures, step=progress.step)

    def _stop_not_finite(self, rows: torch.Tensor, figures: dict[str, float]):
        bad = ", ".join(name for name, value in figures.items() if not math.isfinite(value))
        stop_all(
            f"{bad} is not finite in the batch after step {self.progress.step} (rows {gather_rows(rows).tolist()}); "
            f"nothing of it is kept. Last good checkpoint: {self._last_checkpoint()}. Go on from it with --resume and "
            "a lower --learning_rate or --max_grad_norm, or with bf16 instead of fp16."
        )
