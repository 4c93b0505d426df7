"""training/masking.py, training/noise.py, training/teacher.py: from the teacher's look at a batch to its masks."""

import copy
from types import SimpleNamespace

import pytest
import torch

from syncmask.masks import attention_word_scores, blend, relative_patch_scores, standardise, valid_words, word_attention
from syncmask.scores import attention_scores, word_alignment, word_evidence
from syncmask.training.masking import (
    DEFAULT_INSTANCE_WEIGHT,
    Masking,
    MaskSettings,
    mlm_gap,
    other_photos,
    probe_masks,
)
from syncmask.training.noise import draw_noise
from syncmask.training.teacher import MomentumTeacher
from syncmask.word_scores import WordScores

SETTINGS = {
    "strategy": "attention",
    "instance_weight": None,
    "word_rate": 0.3,
    "patch_rate": 0.4,
    "temperature": 0.25,
    "random_share": 0.25,
    "evidence_share": 0.5,
    "evidence_span": 3,
    "evidence_folds": 3,
    "evidence_others": 2,
    "gate_threshold": 0.05,
    "gate_every": 10,
    "gate_max_steps": 100,
    "ramp_steps": 20,
}


@pytest.fixture
def tiny_config(tiny_config):
    """With the head that the strategy alignment asks."""
    tiny_config.word_patch_alignment = True
    return tiny_config


@pytest.fixture
def teacher(tiny_model):
    return MomentumTeacher(tiny_model, momentum=0.9, layer=0)


@pytest.fixture
def masking_of(tiny_model, pairs):
    def make(**settings):
        words = WordScores.from_texts(list(zip(pairs["input_ids"], pairs["word_ids"])))
        kinds = torch.arange(len(words.vocabulary)) % 3
        return Masking(MaskSettings(**{**SETTINGS, **settings}), words, tiny_model.config, kinds)

    return make


def noise_of(step=0, rows=4, rank=0, processes=1):
    return draw_noise(seed=5, step=step, rows=rows, max_length=24, patches=16, rank=rank, processes=processes)


# -------------------------------------------------------------------------------------------------------- the teacher


def test_teacher_returns_what_its_model_says(teacher, tiny_model, pairs):
    seen, base = teacher(pairs), tiny_model.syncmask
    with torch.no_grad():
        plain = base(pairs["pixel_values"], pairs["input_ids"], pairs["attention_mask"])
    for name in ("image_embeds", "text_embeds", "image_feats", "text_feats"):
        torch.testing.assert_close(getattr(seen, name), plain[name])
    assert torch.equal(
        seen.scores, attention_scores(base, seen.image_embeds, seen.text_embeds, pairs["attention_mask"], 0)
    )
    assert torch.equal(seen.temperature, base.temperature)
    assert not any(tensor.requires_grad for tensor in vars(seen).values())


def test_teacher_is_a_frozen_copy_in_eval_mode(tiny_model):
    tiny_model.train()
    teacher = MomentumTeacher(tiny_model, momentum=0.9, layer=0)
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert tiny_model.training and all(parameter.requires_grad for parameter in tiny_model.parameters())
    own = {parameter.data_ptr() for parameter in teacher.model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in tiny_model.parameters()}


def test_freeze_mends_what_loading_thaws(teacher, tmp_path):
    teacher.model.save_pretrained(tmp_path)
    teacher.model = type(teacher.model).from_pretrained(tmp_path).train()
    teacher.freeze()
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())


def test_update_is_the_moving_average(teacher, tiny_model):
    before = copy.deepcopy(teacher.model.state_dict())
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.add_(torch.randn_like(parameter))
    student = copy.deepcopy(tiny_model.state_dict())
    teacher.update(tiny_model)
    teacher.update(tiny_model)
    for name, value in teacher.model.state_dict().items():
        torch.testing.assert_close(value, 0.81 * before[name] + 0.19 * student[name])
        assert torch.equal(tiny_model.state_dict()[name], student[name])
    # The tied matrix stays tied, so it moves once and not twice.
    assert teacher.model.mlm_head.decoder.weight is teacher.model.get_input_embeddings().weight


def test_a_teacher_of_another_model_is_refused(teacher, tiny_model):
    tiny_model.itm_head = torch.nn.Linear(32, 2, bias=False)
    with pytest.raises(ValueError, match="itm_head.bias"):
        teacher.update(tiny_model)


# ---------------------------------------------------------------------------------------------------------- the noise


def test_noise_is_the_same_for_a_row_on_any_number_of_processes():
    whole = noise_of(step=3, rows=4)
    for rank in range(2):
        part, rows = noise_of(step=3, rows=2, rank=rank, processes=2), slice(2 * rank, 2 * rank + 2)
        for name in ("words", "patches", "tokens"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name
        assert part.offset == whole.offset


def test_noise_repeats_with_its_step_and_differs_between_steps_seeds_and_ranks():
    same = noise_of(step=3)
    for name, value in vars(noise_of(step=3)).items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(getattr(same, name)))
    other_seed = draw_noise(6, 3, 4, 24, 16)
    for other in (noise_of(step=4), other_seed, noise_of(step=3, rank=1, processes=2)):
        assert not torch.equal(other.words, same.words) and not torch.equal(other.negatives, same.negatives)


def test_noise_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    noise = noise_of()
    assert torch.equal(torch.get_rng_state(), before)
    assert noise.words.shape == (4, 25, 2) and noise.patches.shape == (4, 17, 2) and noise.tokens.shape == (4, 24, 2)
    assert noise.negatives.shape == (4, 4, 2) and noise.others.shape == (4, 4)


# ------------------------------------------------------------------------------------------------- the gate and ramp


def test_strength_is_0_before_the_gate_and_ramps_in(masking_of):
    masking = masking_of()
    assert masking.strength(1000) == 0
    masking.opened_at = 40
    assert [masking.strength(step) for step in (40, 45, 60, 1000)] == [0, 0.25, 1, 1]
    random = masking_of(strategy="random")
    random.opened_at = 40
    assert random.strength(1000) == 0


def test_the_gate_opens_by_gap_or_by_time(masking_of, teacher, monkeypatch):
    gaps = {"value": 0.01}
    monkeypatch.setattr("syncmask.training.masking.mlm_gap", lambda model, probe: gaps["value"])
    masking = masking_of()
    masking.test_gate(0, {}, teacher)
    assert masking.opened_at is None and masking.gap == 0.01
    gaps["value"] = 0.5
    masking.test_gate(15, {}, teacher)  # not a step at which it is tested
    assert masking.opened_at is None
    masking.test_gate(20, {}, teacher)
    assert masking.opened_at == 20
    gaps["value"] = -1.0
    masking.test_gate(30, {}, teacher)
    assert masking.opened_at == 20 and masking.gap == 0.5  # once open, it stays open
    late = masking_of()
    late.test_gate(90, {}, teacher)
    assert late.opened_at is None
    late.test_gate(100, {}, teacher)
    assert late.opened_at == 100


def test_state_is_taken_up_again(masking_of):
    masking, resumed = masking_of(), masking_of()
    masking.opened_at, masking.gap = 40, 0.2
    resumed.load_state(masking.state())
    assert (resumed.opened_at, resumed.gap, resumed.strength(45)) == (40, 0.2, 0.25)


@torch.no_grad()
def test_the_gap_equals_one_pair_at_a_time(tiny_model, pairs):
    text_mask = probe_masks(pairs, 0.3, seed=0)
    probe = {**pairs, "text_mask": text_mask, "other_index": torch.tensor([1, 0, 3, 2])}
    base, own, other = tiny_model.syncmask, [], []
    for row in range(4):
        length = int(pairs["attention_mask"][row].sum())
        ids, hidden = pairs["input_ids"][row : row + 1, :length], text_mask[row : row + 1, :length]
        text = base.encode_text(ids.masked_fill(hidden, 4))
        for photo, logs in ((row, own), (int(probe["other_index"][row]), other)):
            fused = base.fuse(text, None, base.encode_image(pairs["pixel_values"][photo : photo + 1]))
            log_probs = tiny_model.mlm_head(fused)[0].log_softmax(-1)
            logs += [log_probs[token, ids[0, token]] for token in hidden[0].nonzero()[:, 0]]
    slow = sum(own) / len(own) - sum(other) / len(other)
    assert mlm_gap(tiny_model, probe) == pytest.approx(slow.item(), abs=1e-4)
    same = {**probe, "other_index": torch.arange(4)}
    assert mlm_gap(tiny_model, same) == pytest.approx(0, abs=1e-6)


def test_probe_masks_are_fixed_and_hide_whole_words(pairs):
    mask = probe_masks(pairs, 0.3, seed=0)
    assert torch.equal(mask, probe_masks(pairs, 0.3, seed=0))
    assert any(not torch.equal(mask, probe_masks(pairs, 0.3, seed=seed)) for seed in range(1, 5))
    for row in range(4):
        words = pairs["word_ids"][row]
        hidden = {int(word) for word in words[mask[row]]}
        assert -1 not in hidden and len(hidden) == [2, 1, 1, 0][row]
        assert torch.equal(mask[row], torch.tensor([int(word) in hidden for word in words]))


# ----------------------------------------------------------------------------------------------------- a step's masks


@pytest.mark.parametrize("strategy", ["random", "attention", "evidence", "alignment"])
@pytest.mark.parametrize("opened", [None, 0])
def test_masks_keep_their_budgets(masking_of, teacher, pairs, strategy, opened):
    masking, seen = masking_of(strategy=strategy), teacher(pairs)
    masking.opened_at = opened
    masks = masking.masks(30, pairs, teacher, seen, noise_of(30))
    assert masks.patch_mask.sum(dim=1).tolist() == [6, 6, 6, 6]
    assert masks.word_mask.sum(dim=1).tolist() == [2, 1, 1, 0]
    assert not (masks.text_mask & (pairs["word_ids"] < 0)).any()
    untouched = masks.masked_input_ids == pairs["input_ids"]
    assert untouched[~masks.text_mask].all()
    again = masking_of(strategy=strategy)
    again.opened_at = opened
    repeated = again.masks(30, pairs, teacher, seen, noise_of(30))
    for name, value in vars(masks).items():
        assert torch.equal(value, getattr(repeated, name)), name


def test_before_the_gate_no_score_matters(masking_of, teacher, pairs):
    seen = teacher(pairs)
    flat = SimpleNamespace(**{**vars(seen), "scores": torch.zeros_like(seen.scores)})
    one, other = (masking_of().masks(0, pairs, teacher, look, noise_of()) for look in (seen, flat))
    assert torch.equal(one.text_mask, other.text_mask) and torch.equal(one.patch_mask, other.patch_mask)
    random = masking_of(strategy="random").masks(0, pairs, teacher, seen, noise_of())
    assert torch.equal(one.text_mask, random.text_mask) and torch.equal(one.patch_mask, random.patch_mask)


@pytest.mark.parametrize("strategy", ["random", "attention"])
def test_before_the_gate_masks_are_random_at_temperature_0_too(masking_of, teacher, pairs, strategy):
    masking, seen = masking_of(strategy=strategy, temperature=0.0), teacher(pairs)
    steps = [masking.masks(step, pairs, teacher, seen, noise_of(step)) for step in range(200)]
    words = torch.stack([masks.word_mask[0] for masks in steps]).float().mean(dim=0)
    patches = torch.stack([masks.patch_mask[0] for masks in steps]).float().mean(dim=0)
    assert (words - 2 / 6).abs().max() < 0.2 and (patches - 6 / 16).abs().max() < 0.2


@pytest.mark.parametrize("strategy", ["attention", "alignment"])
def test_strategies_are_their_formulas(masking_of, teacher, pairs, strategy):
    """T = 0 without a random share: the top words of the blended scores and the top patches of those words."""
    masking = masking_of(strategy=strategy, temperature=0.0, random_share=0.0, instance_weight=0.6)
    seen = teacher(pairs)
    masking.opened_at = 0
    masks = masking.masks(50, pairs, teacher, seen, noise_of())
    valid = valid_words(pairs["word_ids"])
    if strategy == "attention":
        raw = attention_word_scores(seen.scores, pairs["attention_mask"], pairs["word_ids"])
        looks = word_attention(seen.scores, pairs["word_ids"])
    else:
        raw, looks = word_alignment(teacher.model, seen.image_embeds, pairs["input_ids"], pairs["word_ids"])
    scores = standardise(raw, valid)
    means = WordScores(masking.word_scores.vocabulary)
    rows = means.rows(pairs["input_ids"], pairs["word_ids"])
    means.update(rows, scores, valid)
    blended = blend(scores, means.means(rows), 0.6, torch.ones(4, dtype=torch.bool), valid)
    for row, count in enumerate([2, 1, 1]):
        best = blended[row].masked_fill(~valid[row], -9e9).topk(count).indices
        assert set(masks.word_mask[row].nonzero()[:, 0].tolist()) == set(best.tolist())
        patches = relative_patch_scores(looks, masks.word_mask, valid)[row].topk(6).indices
        assert set(masks.patch_mask[row].nonzero()[:, 0].tolist()) == set(patches.tolist())
    assert torch.equal(masking.word_scores.sums, means.sums)


def test_evidence_is_measured_on_its_share_of_rows_in_turns(masking_of, teacher, pairs):
    masking, seen = masking_of(strategy="evidence"), teacher(pairs)
    masking.opened_at, valid = 0, valid_words(pairs["word_ids"])
    rows = masking.word_scores.rows(pairs["input_ids"], pairs["word_ids"])
    wanted = WordScores(masking.word_scores.vocabulary)
    for step, measured in ((30, [0, 2]), (31, [1, 3])):
        noise = noise_of(step)
        masking.masks(step, pairs, teacher, seen, noise)
        others, _ = other_photos(pairs["item_ids"], noise.others, 2)
        raw = torch.zeros(4, 6)
        for row in measured:
            scores = word_evidence(
                teacher.model,
                seen.image_embeds,
                torch.tensor([row]),
                others[row : row + 1],
                pairs["input_ids"][row : row + 1],
                pairs["attention_mask"][row : row + 1],
                pairs["word_ids"][row : row + 1],
                offset=noise.offset,
            )[0]
            raw[row, : len(scores)] = scores
        mine = torch.zeros(4, 1, dtype=torch.bool)
        mine[measured] = True
        wanted.update(rows, standardise(raw, valid), valid & mine)
        torch.testing.assert_close(masking.word_scores.sums, wanted.sums, atol=1e-3, rtol=1e-3)
        assert torch.equal(masking.word_scores.counts, wanted.counts)


def test_evidence_in_a_batch_of_one_item_measures_nothing(masking_of, teacher, pairs):
    masking, batch = masking_of(strategy="evidence"), {**pairs, "item_ids": torch.zeros(4, dtype=torch.long)}
    masking.opened_at = 0
    masks = masking.masks(30, batch, teacher, teacher(batch), noise_of())
    assert masking.word_scores.counts.sum() == 0 and masks.word_mask.sum(dim=1).tolist() == [2, 1, 1, 0]


def test_other_photos_are_other_items_each_once_before_any_twice():
    items = torch.tensor([0, 0, 1, 2, 2, 2])
    index, possible = other_photos(items, torch.rand(6, 6, generator=torch.Generator().manual_seed(0)), 4)
    assert possible.all() and index.shape == (6, 4)
    for row in range(6):
        others = index[row].tolist()
        assert all(items[other] != items[row] for other in others)
        assert len(set(others)) == min(4, int((items != items[row]).sum()))
    _, possible = other_photos(torch.zeros(3, dtype=torch.long), torch.rand(3, 3), 2)
    assert not possible.any()


def test_a_slice_of_the_batch_gets_the_masks_of_the_whole(masking_of, teacher, pairs):
    """Without running means (weight 1), two processes choose what one would."""
    whole = masking_of(instance_weight=1.0)
    whole.opened_at = 0
    together = whole.masks(30, pairs, teacher, teacher(pairs), noise_of(30))
    for rank in range(2):
        rows = slice(2 * rank, 2 * rank + 2)
        batch = {name: tensor[rows] for name, tensor in pairs.items()}
        part = masking_of(instance_weight=1.0)
        part.opened_at = 0
        alone = part.masks(30, batch, teacher, teacher(batch), noise_of(30, rows=2, rank=rank, processes=2))
        assert torch.equal(alone.text_mask, together.text_mask[rows])
        assert torch.equal(alone.patch_mask, together.patch_mask[rows])
        assert torch.equal(alone.masked_input_ids, together.masked_input_ids[rows])


def test_figures_are_rates_by_kind_of_word(masking_of, teacher, pairs):
    masking = masking_of()
    masking.opened_at = 0
    masks = masking.masks(30, pairs, teacher, teacher(pairs), noise_of())
    figures = masking.figures(pairs, masks)
    rows = masking.word_scores.rows(pairs["input_ids"], pairs["word_ids"])
    for number, name in enumerate(("common", "middling", "rare")):
        hidden = [
            bool(masks.word_mask[b, w])
            for b in range(4)
            for w in range(6)
            if rows[b, w] >= 0 and rows[b, w] % 3 == number
        ]
        assert figures[f"mask_rate_{name}"] == pytest.approx(sum(hidden) / len(hidden))
    means = masking.word_scores.means(torch.arange(len(masking.word_scores.vocabulary)))
    assert figures["word_mean_lowest"] == pytest.approx(means.min().item())
    assert figures["word_mean_highest"] == pytest.approx(means.max().item())


def test_default_weights():
    assert DEFAULT_INSTANCE_WEIGHT == {"random": 0.0, "attention": 1.0, "evidence": 0.5, "alignment": 0.5}
    for strategy, weight in DEFAULT_INSTANCE_WEIGHT.items():
        assert MaskSettings(**{**SETTINGS, "strategy": strategy}).instance_weight == weight
    assert MaskSettings(**{**SETTINGS, "instance_weight": 0.0}).instance_weight == 0.0
