import copy
import math

import pytest
import torch

from syncmask import SyncMaskForPreTraining
from syncmask.scores import EVIDENCE_RANGE, attention_scores, word_alignment, word_evidence


@pytest.fixture
def seen(tiny_model, pairs):
    """The tokens of the four pairs: image_embeds, text_embeds, attention_mask."""
    base = tiny_model.syncmask
    with torch.no_grad():
        return (
            base.encode_image(pairs["pixel_values"]),
            base.encode_text(pairs["input_ids"], pairs["attention_mask"]),
            pairs["attention_mask"],
        )


# ---------------------------------------------------------------------------------------------------- attention scores


@pytest.mark.parametrize("layer", [0, 1])
def test_scores_are_those_that_the_layer_attends_with(tiny_model, seen, layer):
    base = tiny_model.syncmask
    base.set_attn_implementation("eager")
    images, texts, mask = seen
    scores = attention_scores(base, images, texts, mask, layer)
    assert scores.shape == (4, 4, 12, 16) and scores.dtype == torch.float32 and not scores.requires_grad
    fused = base.fusion_encoder(texts, mask, encoder_hidden_states=images, output_attentions=True)
    patches = fused.cross_attentions[layer][..., 1:]  # the layer also attends to [CLS], which masks do not look at
    torch.testing.assert_close(scores.softmax(-1), patches / patches.sum(-1, keepdim=True), atol=1e-6, rtol=1e-4)
    # Not only up to a constant of the row: differences of scores are log-ratios of weights.
    torch.testing.assert_close(scores.diff(dim=-1), patches.log().diff(dim=-1), atol=1e-4, rtol=1e-3)


def test_scores_are_the_same_under_every_attention(tiny_model, seen):
    base = tiny_model.syncmask
    images, texts, mask = seen
    results = []
    for implementation in ("eager", "sdpa"):
        base.set_attn_implementation(implementation)
        results.append(attention_scores(base, images, texts, mask, 1))
    torch.testing.assert_close(*results)


def test_padding_changes_no_score_of_a_real_token(tiny_model, pairs, seen):
    images, texts, mask = seen
    scores = attention_scores(tiny_model.syncmask, images, texts, mask, 1)
    for row in range(4):
        length = int(mask[row].sum())
        ids = pairs["input_ids"][row : row + 1, :length]
        alone = tiny_model.syncmask.encode_text(ids)
        single = attention_scores(tiny_model.syncmask, images[row : row + 1], alone, torch.ones_like(ids), 1)
        torch.testing.assert_close(scores[row : row + 1, :, :length], single, atol=1e-5, rtol=1e-4)


def test_the_default_layer_is_the_configurations(tiny_model, seen):
    base = tiny_model.syncmask
    assert base.config.mask_layer == 0
    assert torch.equal(attention_scores(base, *seen), attention_scores(base, *seen, layer=0))
    assert not torch.equal(attention_scores(base, *seen), attention_scores(base, *seen, layer=1))


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_does_not_exist_is_refused(tiny_model, seen, layer):
    with pytest.raises(ValueError, match="layers 0 to 1"):
        attention_scores(tiny_model.syncmask, *seen, layer=layer)


# ------------------------------------------------------------------------------------------------------- word evidence


@torch.no_grad()
def slow_evidence(model, pairs, own, others, span, folds, offset):
    """Mask, encode and score one row, one fold and one photo at a time, unpadded, at every position."""
    base = model.syncmask
    result = torch.zeros(len(own), 6)

    def word_log_probs(row, hidden, photo):
        length = int(pairs["attention_mask"][row].sum())
        ids = pairs["input_ids"][row, :length].clone()
        truth = ids.clone()
        for t in hidden:
            ids[t] = model.config.mask_token_id
        image = base.encode_image(pairs["pixel_values"][photo : photo + 1])
        fused = base.fuse(base.encode_text(ids[None]), None, image)
        logs = model.mlm_head(fused)[0].log_softmax(-1)
        return {t: logs[t, truth[t]].item() for t in hidden}

    for r, row in enumerate(own):
        words = pairs["word_ids"][row].tolist()
        for fold in range(folds):
            hidden = [t for t, w in enumerate(words) if w >= 0 and ((w + offset) // span) % folds == fold]
            if not hidden:
                continue
            mine = word_log_probs(row, hidden, row)
            theirs = [word_log_probs(row, hidden, other) for other in others[r]]
            for word in {words[t] for t in hidden}:
                pieces = [t for t in hidden if words[t] == word]
                gain = sum(mine[t] for t in pieces) - sum(sum(o[t] for t in pieces) for o in theirs) / len(theirs)
                result[r, word] = min(max(gain, -2.0), 4.0)
    return result


@pytest.mark.parametrize("span, folds, offset, count", [(3, 3, 0, 1), (2, 2, 1, 3), (1, 3, 65535, 2)])
def test_evidence_equals_one_row_fold_and_photo_at_a_time(tiny_model, pairs, seen, span, folds, offset, count):
    own = [0, 2, 3]
    others = torch.tensor([[1, 3, 1], [3, 1, 3], [0, 1, 2]])[:, :count]
    fast = word_evidence(
        tiny_model,
        seen[0],
        torch.tensor(own),
        others,
        pairs["input_ids"][own],
        pairs["attention_mask"][own],
        pairs["word_ids"][own],
        span=span,
        folds=folds,
        offset=offset,
    )
    slow = slow_evidence(tiny_model, pairs, own, others.tolist(), span, folds, offset)
    torch.testing.assert_close(fast, slow, atol=2e-4, rtol=1e-3)
    assert slow.abs().max() > 0.05  # the photos do matter to this model
    assert (fast[1, 4:] == 0).all() and (fast[2, 1:] == 0).all()


def test_evidence_of_the_same_photo_is_0_and_is_clipped(tiny_model, pairs, seen):
    rows = torch.arange(4)
    arguments = pairs["input_ids"], pairs["attention_mask"], pairs["word_ids"]
    same = word_evidence(tiny_model, seen[0], rows, rows[:, None], *arguments)
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-5, rtol=0)
    with torch.no_grad():
        tiny_model.mlm_head.decoder.weight.mul_(100)
    low, high = EVIDENCE_RANGE
    sharp = word_evidence(tiny_model, seen[0], rows, rows.flip(0)[:, None], *arguments)
    assert sharp.min() == low and sharp.max() == high


# ------------------------------------------------------------------------------------------------------ word alignment


@pytest.fixture
def aligning(tiny_model):
    """`tiny_model` with a word-patch head."""
    config = copy.deepcopy(tiny_model.config)
    config.word_patch_alignment = True
    torch.manual_seed(3)
    model = SyncMaskForPreTraining(config).eval()
    assert model.load_state_dict(tiny_model.state_dict(), strict=False).missing_keys == [
        "word_patch_head.norm.weight",
        "word_patch_head.norm.bias",
        "word_patch_head.dense.weight",
    ]
    return model


def test_alignment_equals_one_word_photo_and_patch_at_a_time(aligning, pairs, seen):
    head, embeddings = aligning.word_patch_head, aligning.get_input_embeddings().weight.detach()
    fast, looked = word_alignment(aligning, seen[0], pairs["input_ids"], pairs["word_ids"])
    with torch.no_grad():
        looks = [[head.dense(head.norm(patch)) for patch in photo[1:]] for photo in seen[0]]
    for row, words in enumerate(pairs["word_ids"].tolist()):
        for word in range(max(words) + 1):
            scores, maps = [], []
            for piece in (pairs["input_ids"][row, place] for place, one in enumerate(words) if one == word):
                fits = [max(float(look @ embeddings[piece]) for look in photo) for photo in looks]
                scores.append(fits[row] - math.log(sum(map(math.exp, fits)) / 4))
                maps.append(torch.stack([look @ embeddings[piece] for look in looks[row]]).softmax(0))
            assert fast[row, word].item() == pytest.approx(sum(scores) / len(scores), abs=1e-4)
            torch.testing.assert_close(looked[row, word], sum(maps) / len(maps), atol=1e-5, rtol=1e-3)
        assert not fast[row, max(words) + 1 :].any() and not looked[row, max(words) + 1 :].any()
    assert fast.std() > 0.01 and not fast.requires_grad


def test_alignment_needs_its_head(tiny_model, pairs, seen):
    with pytest.raises(ValueError, match="wpa_weight"):
        word_alignment(tiny_model, seen[0], pairs["input_ids"], pairs["word_ids"])
