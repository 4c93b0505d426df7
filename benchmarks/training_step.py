"""A pretraining step against the published code's plain form: `python -m benchmarks.training_step [--quick] [--json]`.

ViT-S/16 at 224 pixels, a text tower and a fusion encoder of 6 layers, 384 wide, 30,522 words, batches of 4 texts of 25
tokens. Both sides start from the same weights and get the same photos, texts, masks and negatives. CPU seconds, in
turns, medians count; work is counted, not timed; memory is the peak of a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from syncmask import SyncMaskConfig, SyncMaskForPreTraining
from syncmask.training.masking import Masking
from syncmask.training.noise import draw_noise
from syncmask.training.optim import make_optimizer
from syncmask.training.teacher import MomentumTeacher
from syncmask.word_scores import WordScores

from .measure import Row, arguments, in_turns, peak_memory, print_rows, timed_row
from .plain_step import PlainStep, StepInputs

BATCH, LENGTH, HIDDEN = 4, 25, 4


def small_model(**overrides) -> SyncMaskForPreTraining:
    """The preset that all figures are of, seeded."""
    torch.manual_seed(0)
    return SyncMaskForPreTraining(SyncMaskConfig.small(vocab_size=30_522, **overrides))


def draw_inputs(model: SyncMaskForPreTraining, batch: int = BATCH, length: int = LENGTH) -> StepInputs:
    """Noise photos and words, HIDDEN words of each text hidden; every row's negative is the next one."""
    generator = torch.Generator().manual_seed(1)
    side, words = model.config.vision_config.image_size, model.config.text_config.vocab_size
    ids = torch.randint(200, words, (batch, length), generator=generator)
    hidden = torch.zeros(batch, length, dtype=torch.bool)
    places = torch.rand(batch, length - 2, generator=generator).argsort(dim=1)[:, :HIDDEN] + 1
    hidden.scatter_(1, places, True)
    other = torch.arange(batch).roll(1)
    return StepInputs(
        pixel_values=torch.randn(batch, 3, side, side, generator=generator),
        input_ids=ids,
        masked_input_ids=ids.masked_fill(hidden, model.config.mask_token_id),
        attention_mask=torch.ones_like(ids),
        text_mask=hidden,
        negative_image_index=other,
        negative_text_index=other,
    )


class OurStep:
    """Our model, teacher and optimiser, with ALBEF's losses or with SyncMask's.

    Args:
        model: copied by nobody; it is trained. full: masks from the teacher's attention, and MIM as well; else the
            given masks, and MLM's targets softened by the teacher, as ALBEF does. bf16: autocast, as the trainer does.
        soft_target_weight: the teacher's share in the targets.
    """

    def __init__(self, model: SyncMaskForPreTraining, full: bool = False, bf16: bool = False, soft_target_weight=0.4):
        self.model, self.full, self.alpha = model.train(), full, soft_target_weight
        if bf16:
            # Here, since what it imports is no part of a step whose memory is measured.
            from syncmask.training.build import write_out_attention

            write_out_attention(model, "cpu", "bf16")
        if not full:
            model.mim_decoder = None  # ALBEF has none; nothing else asks for it
        self.teacher = MomentumTeacher(model, 0.995, model.config.mask_layer if full else None)
        self.optimizer = make_optimizer(model, 1e-4, 0.02)
        self.precision = partial(torch.autocast, "cpu", torch.bfloat16) if bf16 else nullcontext
        self.masking = None

    def step(self, inputs: StepInputs) -> dict[str, torch.Tensor]:
        """Losses, backward, optimiser, teacher; returns the losses."""
        losses = self.losses(inputs)
        sum(losses.values()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.teacher.update(self.model)
        return losses

    def losses(self, inputs: StepInputs) -> dict[str, torch.Tensor]:
        """ITC, ITM and MLM, and MIM where it is asked, unweighted."""
        batch = {name: getattr(inputs, name) for name in ("pixel_values", "input_ids", "attention_mask")}
        with self.precision():
            seen = self.teacher(batch)
            more = self._synchronised(batch, seen) if self.full else self._given(inputs, seen)
            output = self.model(
                **batch,
                **more,
                negative_image_index=inputs.negative_image_index,
                negative_text_index=inputs.negative_text_index,
                teacher_image_feats=seen.image_feats,
                teacher_text_feats=seen.text_feats,
                teacher_temperature=seen.temperature,
                soft_target_weight=self.alpha,
            )
        terms = ("itc", "itm", "mlm", "mim") if self.full else ("itc", "itm", "mlm")
        return {term: output[f"{term}_loss"] for term in terms}

    def _given(self, inputs: StepInputs, seen) -> dict:
        texts = (inputs.masked_input_ids, inputs.attention_mask, inputs.text_mask)
        masks = {"text_mask": inputs.text_mask, "masked_input_ids": inputs.masked_input_ids}
        return masks | {"teacher_mlm_logits": self.teacher.hidden_words(*texts, seen.image_embeds)}

    def _synchronised(self, batch: dict[str, torch.Tensor], seen) -> dict:
        """Masks of `attention`, every token a word; what the trainer does at each step once the ramp is over."""
        size, length = batch["input_ids"].shape
        word_ids = torch.arange(-1, length - 1).expand(size, -1).clone()
        word_ids[:, -1] = -1
        batch = batch | {"word_ids": word_ids, "item_ids": torch.arange(size)}
        if self.masking is None:
            from syncmask.training.arguments import PretrainingArguments
            from syncmask.training.build import mask_settings

            scores = WordScores.from_texts(list(zip(batch["input_ids"], word_ids)), 0.99)
            settings = mask_settings(PretrainingArguments(mask_strategy="attention", mask_ramp_steps=1))
            self.masking = Masking(settings, scores, self.model.config, torch.zeros(len(scores.vocabulary)))
            self.masking.opened_at = 0
        rows, columns = self.model.syncmask.grid
        masks = self.masking.masks(1, batch, self.teacher, seen, draw_noise(0, 1, size, length, rows * columns, 0, 1))
        return {name: getattr(masks, name) for name in ("text_mask", "masked_input_ids", "patch_mask")}


# ---------------------------------------------------------------------------------------------------------- measuring


def count_flops(action: Callable[[], object]) -> int:
    """Floating point operations of matrix products and attention, two a multiply-add."""
    aten = torch.ops.aten
    ours = {  # the counter does not know the CPU's kernels
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *rest, **more: (
            sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        action()
    return counter.get_total_flops()


def work_row() -> Row:
    """FLOPs of the two, exact."""
    model = small_model()
    inputs = draw_inputs(model)
    plain, ours = PlainStep(model), OurStep(model)
    found = [count_flops(partial(side.step, inputs)) / 1e9 for side in (ours, plain)]
    return Row("work of a step, ALBEF's losses", "GFLOP", *found, 0.86, 0.80, at_most=True)


def time_rows(rounds: int) -> list[Row]:
    """The same step in fp32 and bf16, and SyncMask's own step in bf16, against the plain step in fp32."""
    model = small_model()
    inputs = draw_inputs(model)
    plain = PlainStep(model)
    sides = [OurStep(small_model()), OurStep(small_model(), bf16=True), OurStep(small_model(), full=True, bf16=True)]
    fp32, bf16, full, peer = in_turns(*(partial(side.step, inputs) for side in (*sides, plain)), rounds=rounds)
    return [
        timed_row("the same step, fp32 with dropout", fp32, peer, 1.05, 1.4),
        timed_row("the same step, bf16 autocast", bf16, peer, 1.7, 2.75),
        timed_row("SyncMask's whole step, bf16 autocast", full, peer, 1.2, 1.6),
    ]


def memory_row() -> Row:
    """Peak resident memory of three steps, each side in a process of its own."""
    found = [_peak_of(side) for side in ("ours", "plain")]
    return Row("peak memory of that step", "GiB", *found, 0.90, 0.70, at_most=True)


def _peak_of(side: str) -> float:
    command = [sys.executable, "-m", __spec__.name if __spec__ else "benchmarks.training_step", "--peak_of", side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(side: str) -> None:
    """Run three steps of one side and print the GiB at the peak."""
    model = small_model()
    inputs = draw_inputs(model)
    runner = OurStep(model) if side == "ours" else PlainStep(model)
    if side == "plain":
        del model
    for _ in range(3):
        runner.step(inputs)
    print(peak_memory() / 2**30)


def rows(quick: bool, threads: int = 1) -> list[Row]:
    """All rows of this benchmark; those that are timed, on more threads than one."""
    timed = time_rows(3 if quick else 7)
    return timed if threads > 1 else [work_row(), *timed, memory_row()]


def main(argv: list[str] | None = None) -> int:
    """Run and print; returns the exit code, 1 where a floor was missed."""
    parser = arguments(__doc__)
    parser.add_argument("--peak_of", choices=("ours", "plain"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    if given.peak_of:
        print_peak(given.peak_of)
        return 0
    return print_rows(rows(given.quick, given.threads), given.json)


if __name__ == "__main__":
    sys.exit(main())
