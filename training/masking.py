"""From the teacher's output to a step's masks: the strategy, the gate, the ramp and the words' running means."""

from dataclasses import dataclass

import torch

from syncmask import SyncMaskConfig, SyncMaskForPreTraining
from syncmask.evaluation.measure import INSTANCE_WEIGHTS
from syncmask.masks import (
    ChoiceRule,
    attention_word_scores,
    blend,
    choose,
    corrupt,
    hidden_positions,
    standardise,
    synchronised_masks,
    valid_words,
    word_attention,
    words_to_tokens,
)
from syncmask.scores import word_alignment, word_evidence
from syncmask.word_scores import WordScores

from .noise import StepNoise
from .teacher import MomentumTeacher, TeacherOutput

DEFAULT_INSTANCE_WEIGHT = {"random": 0.0} | INSTANCE_WEIGHTS


@dataclass
class MaskSettings:
    """The plain settings of masking; see the fields of the same names in `arguments.ObjectiveArguments`."""

    strategy: str
    instance_weight: float | None
    word_rate: float
    patch_rate: float
    temperature: float
    random_share: float
    evidence_share: float
    evidence_span: int
    evidence_folds: int
    evidence_others: int
    gate_threshold: float
    gate_every: int
    gate_max_steps: int
    ramp_steps: int

    def __post_init__(self):
        if self.instance_weight is None:
            self.instance_weight = DEFAULT_INSTANCE_WEIGHT[self.strategy]


@dataclass
class StepMasks:
    """One step's masks.

    Args:
        text_mask: (B, L), patch_mask: (B, N), True = hidden. masked_input_ids: (B, L).
        word_mask: (B, W), for logging.
    """

    text_mask: torch.Tensor
    patch_mask: torch.Tensor
    masked_input_ids: torch.Tensor
    word_mask: torch.Tensor


class Masking:
    """Decides each step's masks and remembers what that needs: m[v], and when the gate opened.

    Masks are random until the teacher's MLM beats itself with a wrong photo (the gate); then scores take over during
    `ramp_steps`.

    Args:
        settings: see [`MaskSettings`].
        word_scores: running means of the train split's words.
        config: of the model.
        kinds: (V,) 0, 1 or 2 for each of those words: common, middling, rare; for the log alone.
    """

    def __init__(self, settings: MaskSettings, word_scores: WordScores, config: SyncMaskConfig, kinds: torch.Tensor):
        self.settings, self.word_scores, self.config, self.kinds = settings, word_scores, config, kinds
        self.opened_at: int | None = None
        self.gap = 0.0

    def strength(self, step: int) -> float:
        """How much scores count at this step: 0 before the gate, rising to 1 over the ramp."""
        if self.settings.strategy == "random" or self.opened_at is None:
            return 0.0
        return min(1.0, (step - self.opened_at) / max(1, self.settings.ramp_steps))

    def test_gate(self, step: int, probe: dict[str, torch.Tensor], teacher: MomentumTeacher):
        """Open the gate when the teacher's gap on the probe pairs exceeds the threshold, or time is up."""
        if self.opened_at is not None or step % self.settings.gate_every:
            return
        self.gap = mlm_gap(teacher.model, probe)
        if self.gap > self.settings.gate_threshold or step >= self.settings.gate_max_steps:
            self.opened_at = step

    def masks(
        self, step: int, batch: dict[str, torch.Tensor], teacher: MomentumTeacher, seen: TeacherOutput, noise: StepNoise
    ) -> StepMasks:
        """Choose what to hide in this batch (input_ids, attention_mask, word_ids (B, L), item_ids (B,))."""
        word_ids, valid = batch["word_ids"], valid_words(batch["word_ids"])
        strength = self.strength(step)
        if strength > 0:
            scores, looks = self._opinion(step, batch, valid, teacher.model, seen, noise)
        else:  # all is drawn at random, whatever they are
            scores = torch.zeros_like(valid, dtype=torch.float32)
            looks = scores.unsqueeze(-1).expand(-1, -1, noise.patches.shape[1] - 1)
        rule = {
            "temperature": self.settings.temperature,
            "random_share": self.settings.random_share,
            "strength": strength,
        }
        device = word_ids.device
        text_mask, patch_mask, words = synchronised_masks(
            scores,
            looks,
            word_ids,
            ChoiceRule(self.settings.word_rate, **rule),
            ChoiceRule(self.settings.patch_rate, **rule),
            noise.words.to(device),
            noise.patches.to(device),
        )
        masked_ids = corrupt(batch["input_ids"], word_ids, text_mask, noise.tokens.to(device), self.config)
        return StepMasks(text_mask, patch_mask, masked_ids, words.mask)

    def _opinion(self, step, batch, valid, model, seen, noise) -> tuple[torch.Tensor, torch.Tensor]:
        """Measure words, move the running means and blend the two: (B, W); and where each word looks: (B, W, N)."""
        rows = self.word_scores.rows(batch["input_ids"], batch["word_ids"])
        raw, looks, measured = self._measure(step, batch, valid, model, seen, noise)
        scores = standardise(raw, valid)
        self.word_scores.update(rows, scores, valid & measured[:, None])
        means = self.word_scores.means(rows)
        return blend(scores, means, self.settings.instance_weight, measured, valid), looks

    def _measure(self, step, batch, valid, model, seen, noise) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ask the strategy: words' scores (B, W), where they look (B, W, N), and which rows were measured (B,)."""
        input_ids, word_ids = batch["input_ids"], batch["word_ids"]
        every_row = torch.ones_like(valid[:, 0])
        if self.settings.strategy == "alignment":
            return *word_alignment(model, seen.image_embeds, input_ids, word_ids), every_row
        looks = word_attention(seen.scores, word_ids)
        if self.settings.strategy == "attention":
            return attention_word_scores(seen.scores, batch["attention_mask"], word_ids), looks, every_row
        raw, measured = self._evidence(step, batch, valid, model, seen, noise)
        return raw, looks, measured

    def _evidence(self, step, batch, valid, model, seen, noise) -> tuple[torch.Tensor, torch.Tensor]:
        """Measure evidence on a share of the rows, in turns: (B, W), and which rows were measured (B,)."""
        batch_size = valid.shape[0]
        stride = max(1, round(1 / self.settings.evidence_share))
        rows = torch.arange(step % stride, batch_size, stride, device=valid.device)
        others, possible = other_photos(batch["item_ids"], noise.others.to(valid.device), self.settings.evidence_others)
        rows = rows[possible[rows]]
        raw = torch.zeros_like(valid, dtype=torch.float32)
        measured = torch.zeros(batch_size, dtype=torch.bool, device=valid.device)
        if len(rows):
            evidence = word_evidence(
                model,
                seen.image_embeds,
                rows,
                others[rows],
                batch["input_ids"][rows],
                batch["attention_mask"][rows],
                batch["word_ids"][rows],
                span=self.settings.evidence_span,
                folds=self.settings.evidence_folds,
                offset=noise.offset,
            )
            raw[rows, : evidence.shape[1]] = evidence
            measured[rows] = True
        return raw, measured

    def figures(self, batch: dict[str, torch.Tensor], masks: StepMasks) -> dict[str, float]:
        """Return mask rates by kind of word: the corpus's commonest, middling and rarest third of words."""
        rows = self.word_scores.rows(batch["input_ids"], batch["word_ids"])
        known, kinds = rows >= 0, self.kinds.to(rows.device)[rows.clamp(min=0)]
        rates = {}
        for number, name in enumerate(("common", "middling", "rare")):
            these = known & (kinds == number)
            rates[f"mask_rate_{name}"] = float(masks.word_mask[these].float().mean()) if these.any() else float("nan")
        means = self.word_scores.means(torch.arange(len(self.word_scores.vocabulary)))
        seen = means[self.word_scores.counts > 0]
        rates["word_mean_lowest"] = float(seen.min()) if len(seen) else 0.0
        rates["word_mean_highest"] = float(seen.max()) if len(seen) else 0.0
        return rates

    def state(self) -> dict:
        """What a checkpoint keeps beside m[v]."""
        return {"opened_at": self.opened_at, "gap": self.gap}

    def load_state(self, state: dict):
        """Take up what `state` returned."""
        self.opened_at, self.gap = state["opened_at"], state["gap"]


def other_photos(item_ids: torch.Tensor, noise: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw rows of other items for each row.

    Args:
        item_ids: (B,). noise: (B, B) uniform. count: K.

    Returns:
        (B, K) row indices, repeated where there are fewer than K, and (B,) bool, False where there is none.
    """
    allowed = item_ids[:, None] != item_ids
    order = noise.masked_fill(~allowed, -1).argsort(dim=1, descending=True)
    available = allowed.sum(dim=1)
    column = torch.arange(count, device=item_ids.device) % available.clamp(min=1)[:, None]
    return order.gather(1, column), available > 0


def probe_masks(batch: dict[str, torch.Tensor], rate: float, seed: int) -> torch.Tensor:
    """Hide words at random once and for all, for the gate: (B, L) bool."""
    valid = valid_words(batch["word_ids"])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(valid.shape[0], 1 + valid.shape[1], 2, generator=generator)
    rule = ChoiceRule(rate, random_share=0.0, strength=0.0)
    words = choose(torch.zeros_like(valid, dtype=torch.float32), valid, rule, noise)
    return words_to_tokens(words.mask, batch["word_ids"])


@torch.no_grad()
def mlm_gap(model: SyncMaskForPreTraining, probe: dict[str, torch.Tensor]) -> float:
    """Return how much likelier hidden tokens are with their own photo than with another item's, in nats a token.

    Args:
        model: in eval mode.
        probe: pixel_values, input_ids, attention_mask (B, ...), text_mask (B, L) and other_index (B,), a row of another
            item for each row.
    """
    base, ids, mask, hidden = model.syncmask, probe["input_ids"], probe["attention_mask"], probe["text_mask"]
    image_embeds = base.encode_image(probe["pixel_values"])
    text_embeds = base.encode_text(ids.masked_fill(hidden, model.config.mask_token_id), mask)
    positions, real = hidden_positions(hidden)
    targets = ids.gather(1, positions).unsqueeze(-1)

    def log_prob(image_index):
        logits = model.mlm_logits(text_embeds, mask, image_embeds, positions, image_index)
        return logits.float().log_softmax(-1).gather(-1, targets).squeeze(-1)[real].mean()

    return float(log_prob(None) - log_prob(probe["other_index"]))
