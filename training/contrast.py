"""Contrast and matching across a corpus: the teacher's soft targets, hard negatives, batches of similar pairs."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from syncmask.gather import gather_rows
from syncmask.negatives import choose_negatives, forbidden_pairs

from .arguments import ContrastArguments
from .data import PairData
from .planning import EpochPlanner
from .processes import check_equal
from .sampler import FeatureBank
from .teacher import MomentumTeacher, TeacherOutput

# One match to two negatives: a head that knows nothing but that has this entropy. ITM sits there for the first hundreds
# of steps; batches grouped by features of that time are noise.
ITM_CHANCE = math.log(3) - 2 / 3 * math.log(2)
ITM_LEARNED = ITM_CHANCE - 0.06
ITM_MEMORY = 0.98


class Contrast:
    """Holds what ITC and ITM need beside the model, for pretraining and for training retrieval alike.

    Args:
        settings: weights, soft targets, margin, grouping.
        data: the rows with their texts' overlap.
        teacher: the averaged model. bank: features by row. plan_epoch: (epoch, grouped) -> order and figures.
    """

    def __init__(
        self,
        settings: ContrastArguments,
        data: PairData,
        teacher: MomentumTeacher,
        bank: FeatureBank,
        plan_epoch: EpochPlanner,
    ):
        self.settings, self.data = settings, data
        self.teacher, self.bank, self.plan_epoch = teacher, bank, plan_epoch
        self.itm_average, self.grouped = ITM_CHANCE, False

    def begin_epoch(self, epoch: int):
        """Group batches from this epoch on if matching has begun to learn."""
        # Grouped batches are harder than those that ITM is judged by, so grouping stays on once it has begun.
        learned = epoch > 0 and self.itm_average < ITM_LEARNED
        self.grouped = self.settings.grouping == "grouped" and (self.grouped or learned)

    def order(self, epoch: int) -> tuple[np.ndarray, dict[str, float]]:
        """Return an epoch's order and figures about it."""
        order, figures = self.plan_epoch(epoch, self.grouped)
        return order, {"grouped": self.grouped, **figures}

    def inputs(self, batch: dict[str, Tensor], seen: TeacherOutput, noise: Tensor, step: int) -> tuple[dict, int]:
        """Return the forward's inputs for ITC and ITM, and how many negatives fell back on rule 1.

        Args:
            batch: pixel_values, input_ids, attention_mask, item_ids, text_ids of this slice.
            seen: the teacher's pass. noise: (B, B, 2), uniform. step: optimiser steps done.
        """
        image_negatives, text_negatives, fallbacks = self._negatives(batch, seen, noise)
        names = ("pixel_values", "input_ids", "attention_mask", "item_ids", "text_ids")
        return {name: batch[name] for name in names} | {
            "negative_image_index": image_negatives,
            "negative_text_index": text_negatives,
            "teacher_image_feats": seen.image_feats,
            "teacher_text_feats": seen.text_feats,
            "teacher_temperature": seen.temperature,
            "soft_target_weight": self.soft_target_weight(step),
        }, fallbacks

    def _negatives(self, batch: dict[str, Tensor], seen: TeacherOutput, noise: Tensor):
        """Choose each photo's hard negative text and each text's hard negative photo, within this slice."""
        rows = self.data.texts[batch["text_ids"].cpu().numpy()]
        overlap = torch.from_numpy((rows @ rows.T).toarray()).to(seen.image_feats)
        rule1, rules = forbidden_pairs(batch["item_ids"], batch["text_ids"], overlap, self.data.tau)
        similarity = seen.image_feats @ seen.text_feats.T
        random, margin = noise.to(similarity), self.settings.semi_hard_margin
        texts, fell = choose_negatives(similarity, None, rule1, rules, random[..., 0], seen.temperature, margin)
        images, fell_too = choose_negatives(similarity.T, None, rule1, rules, random[..., 1], seen.temperature, margin)
        return images, texts, int(fell.sum() + fell_too.sum())

    def soft_target_weight(self, step: int) -> float:
        """Share of the teacher in the ITC targets at a step."""
        settings = self.settings
        return settings.soft_target_weight * min(1.0, step / max(1, settings.soft_target_ramp_steps))

    @torch.no_grad()
    def remember(self, batch: dict[str, Tensor], seen: TeacherOutput, itm: float):
        """Keep the features of all processes' rows, and the running mean of the ITM loss."""
        feats = (gather_rows(seen.image_feats).cpu(), gather_rows(seen.text_feats).cpu())
        self.bank.update(gather_rows(batch["row_ids"]).cpu(), *feats)
        self.itm_average = ITM_MEMORY * self.itm_average + (1 - ITM_MEMORY) * itm

    def check(self):
        """Stop the run where processes have different teachers."""
        check_equal("the teacher", self.teacher.model.state_dict())

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint keeps as safetensors."""
        return {"teacher": self.teacher.model.state_dict(), "feature_bank": self.bank.state_tensors()}

    def state(self) -> dict:
        """Return what a checkpoint keeps as JSON."""
        return {"itm_average": self.itm_average, "grouped": self.grouped, "tau": self.data.tau}

    def restore(self, tensors: dict[str, dict[str, Tensor]], state: dict):
        """Take up what `tensors` and `state` returned."""
        self.teacher.model.load_state_dict(tensors["teacher"])
        self.teacher.freeze()
        self.bank.load_state_tensors(tensors["feature_bank"])
        self.itm_average, self.grouped = state["itm_average"], state["grouped"]
