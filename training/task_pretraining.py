"""Pretraining: ITC, ITM, MLM, MIM and, where it has a weight, WPA, with synchronised masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from syncmask import SyncMaskForPreTraining, SyncMaskProcessor
from syncmask.evaluation.masks_over_time import MaskState
from syncmask.evaluation.result import Result
from syncmask.word_scores import WordScores

from .arguments import PretrainingArguments
from .contrast import Contrast
from .mask_record import MaskRecord
from .masking import Masking, StepMasks, mlm_gap
from .noise import draw_noise
from .processes import check_equal, gather_padded
from .progress import Progress
from .results import evaluate_pretraining, validate_items
from .task import Look, Slice, Task
from .teacher import TeacherOutput

TERMS = ("itc", "itm", "mlm", "mim")


class Pretraining(Task):
    """The four objectives: the teacher looks at each batch, masks and negatives follow from what it sees.

    Args:
        settings: of the objective. accelerator: precision and processes.
        contrast: teacher, negatives and batches. masking: gate, ramp and m[v].
        probe: the pairs that the gate is tested on.
        validation: rows of items never trained on, or None. final_weights: "student" or "teacher".
        seed: the run's.
    """

    def __init__(
        self,
        settings: PretrainingArguments,
        accelerator: Accelerator,
        processor: SyncMaskProcessor,
        contrast: Contrast,
        masking: Masking,
        probe: dict[str, torch.Tensor],
        validation,
        final_weights: str,
        seed: int,
    ):
        terms = (*TERMS, "wpa") if settings.wpa_weight else TERMS  # without a weight there is no such head
        super().__init__({term: getattr(settings, f"{term}_weight") for term in terms}, contrast.data, processor)
        self.settings, self.accelerator = settings, accelerator
        self.contrast, self.masking, self.probe = contrast, masking, probe
        self.validation, self.final_weights, self.seed = validation, final_weights, seed
        self.mask_record = MaskRecord(validation, processor, seed)

    @property
    def teacher(self):
        """The averaged model."""
        return self.contrast.teacher

    def begin_epoch(self, epoch: int):
        """Decide whether batches are grouped."""
        self.contrast.begin_epoch(epoch)

    def order(self, epoch: int) -> tuple[np.ndarray, dict[str, float]]:
        """Return an epoch's order and figures about it."""
        return self.contrast.order(epoch)

    def before_step(self, progress: Progress):
        """Let the main process decide on the gate for all: devices of several kinds might measure apart."""
        was = self.masking.state()
        self.masking.test_gate(progress.step, self.probe, self.teacher)
        if was["opened_at"] is None and progress.step % self.masking.settings.gate_every == 0:
            self.masking.load_state(broadcast_object_list([self.masking.state()])[0])

    def rehearse(self, rows: int) -> int:
        """Let scores make the masks from now on, and test the gate on some of the probe's pairs."""
        probe = {name: tensor[:rows] for name, tensor in self.probe.items()}
        probe["other_index"] = probe["other_index"] % len(probe["other_index"])
        mlm_gap(self.teacher.model, probe)
        self.masking.opened_at = 0
        return len(self.probe["other_index"])

    def look(self, batch: dict[str, torch.Tensor], progress: Progress, part: Slice) -> Look:
        """Let the teacher look at the unmasked pairs; masks and negatives follow from what it sees."""
        grid = self.teacher.model.syncmask.grid
        noise = draw_noise(
            self.seed,
            progress.micro_step,
            len(batch["row_ids"]),
            self.processor.tokenizer.model_max_length,
            grid[0] * grid[1],
            part.rank,
            part.processes,
        )
        with self.accelerator.autocast():
            seen = self.teacher(batch)
            masks = self.masking.masks(progress.step, batch, self.teacher, seen, noise)
            words = self._hidden_words(batch, seen, masks) if self.settings.mlm_soft_targets else None
        inputs, fallbacks = self.contrast.inputs(batch, seen, noise.negatives, progress.step)
        names = ("text_mask", "masked_input_ids", "patch_mask")
        inputs |= {name: getattr(masks, name) for name in names}
        return Look(inputs | {"teacher_mlm_logits": words}, seen, masks, fallbacks)

    def _hidden_words(self, batch: dict[str, torch.Tensor], seen: TeacherOutput, masks: StepMasks) -> torch.Tensor:
        texts = (masks.masked_input_ids, batch["attention_mask"], masks.text_mask)
        return self.teacher.hidden_words(*texts, seen.image_embeds)

    def after_step(self, student: SyncMaskForPreTraining):
        """Let the teacher follow."""
        self.teacher.update(student)

    def remember(self, batch: dict[str, torch.Tensor], look: Look, losses: dict[str, float]):
        """Keep features and the running mean of ITM."""
        self.contrast.remember(batch, look.seen, losses["itm"])

    def figures(self, batch: dict[str, torch.Tensor], look: Look, student: SyncMaskForPreTraining, step: int) -> dict:
        """Return temperature, gate, ramp and mask rates by kind of word."""
        shared = {"input_ids": gather_padded(batch["input_ids"], 0), "word_ids": gather_padded(batch["word_ids"], -1)}
        masks = StepMasks(None, None, None, gather_padded(look.masks.word_mask, 0).bool())
        return {
            "temperature": float(student.syncmask.temperature.detach()),
            "mask_strength": self.masking.strength(step),
            "mlm_gap": self.masking.gap,
            **self.masking.figures(shared, masks),
        }

    def check(self):
        """Stop the run where processes have different teachers or running means."""
        self.contrast.check()
        check_equal("the running means of words", self.masking.word_scores.state_tensors())

    def validate(self, model: SyncMaskForPreTraining) -> dict[str, float]:
        """Recall on the validation items."""
        return validate_items(model, self.processor, self.validation, self.seed)

    def mask_state(self, progress: Progress) -> MaskState | None:
        """Return what the teacher would hide now in the photos that are followed."""
        return self.mask_record.state(progress.step, progress.epoch, self.teacher, self.masking)

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return teacher, feature bank and m[v]."""
        return self.contrast.tensors() | {"word_scores": self.masking.word_scores.state_tensors()}

    def state(self) -> dict:
        """Return the states of grouping and gate."""
        return {"contrast": self.contrast.state(), "masking": self.masking.state()}

    def restore(self, tensors: dict[str, dict[str, torch.Tensor]], state: dict):
        """Take up what `tensors` and `state` returned; SystemExit where the words are another corpus's."""
        self.contrast.restore(tensors, state["contrast"])
        words = WordScores.from_state(tensors["word_scores"])
        if words.vocabulary != self.masking.word_scores.vocabulary:
            raise SystemExit(
                "the checkpoint's words are not this corpus's: resume with the corpus that the run began with."
            )
        self.masking.word_scores = words
        self.masking.load_state(state["masking"])

    def save_final(self, student: SyncMaskForPreTraining, final: Path):
        """Write student or teacher, and the words' running means beside it."""
        super().save_final(student if self.final_weights == "student" else self.teacher.model, final)
        settings = {
            "strategy": self.masking.settings.strategy,
            "instance_weight": str(self.masking.settings.instance_weight),
            "layer": str(self.teacher.layer),
            "weights": self.final_weights,
        }
        self.masking.word_scores.save(final / "word_scores.safetensors", settings)

    def evaluate(self, folder: Path, student: SyncMaskForPreTraining, corpus, name: str) -> dict[str, Result]:
        """Score the student's retrieval and the teacher's masks; write results/ and report/."""
        return evaluate_pretraining(self, folder, student, corpus, name)
