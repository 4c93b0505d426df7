import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from syncmask import SyncMaskForPreTraining
from syncmask.masks import hidden_positions, split_patches

TERMS = ("itc_loss", "itm_loss", "mlm_loss", "mim_loss")


@pytest.fixture
def step(pairs):
    """Everything that one training step gives the forward."""
    generator = torch.Generator().manual_seed(2)
    text_mask = (torch.rand(4, 12, generator=generator) < 0.4) & (pairs["word_ids"] >= 0)
    text_mask[1] = False  # a text of which nothing is hidden
    order = torch.rand(4, 16, generator=generator).argsort(dim=1)
    feats = torch.nn.functional.normalize(torch.randn(2, 4, 24, generator=generator), dim=-1)
    masked = torch.where(text_mask, torch.randint(5, 60, (4, 12), generator=generator), pairs["input_ids"])
    return {
        **{name: pairs[name] for name in ("pixel_values", "input_ids", "attention_mask", "item_ids", "text_ids")},
        "text_mask": text_mask,
        "masked_input_ids": masked,
        "patch_mask": order < 6,
        "negative_image_index": torch.tensor([1, 0, 3, -1]),
        "negative_text_index": torch.tensor([3, -1, 1, 2]),
        "teacher_image_feats": feats[0],
        "teacher_text_feats": feats[1],
        "teacher_temperature": torch.tensor([0.2]),
        "soft_target_weight": 0.3,
    }


# ------------------------------------------------------------------------------------------------------ slow oracles


def slow_itc(model, step):
    """Each direction, row by row: targets shared by item or text, mixed with the teacher's softmax."""
    base = model.syncmask
    images = base.get_image_features(step["pixel_values"]).pooler_output
    texts = base.get_text_features(step["input_ids"], step["attention_mask"]).pooler_output
    teacher_images, teacher_texts = step["teacher_image_feats"], step["teacher_text_feats"]
    total = 0
    for own, other, own_teacher, other_teacher in (
        (images, texts, teacher_images, teacher_texts),
        (texts, images, teacher_texts, teacher_images),
    ):
        for i in range(4):
            same = torch.tensor(
                [
                    float(step["item_ids"][i] == step["item_ids"][j] or step["text_ids"][i] == step["text_ids"][j])
                    for j in range(4)
                ]
            )
            soft = (other_teacher @ own_teacher[i] / step["teacher_temperature"]).softmax(0)
            weight = step["soft_target_weight"]
            targets = (1 - weight) * same / same.sum() + weight * soft
            total = total - (targets * (other @ own[i] / base.temperature).log_softmax(0)).sum() / 4
    return total / 2


def slow_fused(model, step, text_row, photo_row, input_ids=None):
    """Fuse one text, without its padding, with one photo, by the encoder's whole forward."""
    base, length = model.syncmask, int(step["attention_mask"][text_row].sum())
    ids = (step["input_ids"] if input_ids is None else input_ids)[text_row : text_row + 1, :length]
    image_embeds = base.encode_image(step["pixel_values"][photo_row : photo_row + 1])
    return base.fuse(base.encode_text(ids), None, image_embeds)[0]


def slow_itm(model, step):
    """Positives, then each text with its negative photo, then each photo with its negative text; -1 left out."""
    pairs = [(row, row, 1) for row in range(4)]
    pairs += [(row, int(other), 0) for row, other in enumerate(step["negative_image_index"]) if other >= 0]
    pairs += [(int(other), row, 0) for row, other in enumerate(step["negative_text_index"]) if other >= 0]
    logs = [
        model.itm_head(slow_fused(model, step, text, photo)[0]).log_softmax(-1)[match] for text, photo, match in pairs
    ]
    return -sum(logs) / len(logs)


def slow_mlm(model, step):
    """The head at every position of the masked text; the hidden ones count."""
    logs = []
    for row in range(4):
        logits = model.mlm_head(slow_fused(model, step, row, row, step["masked_input_ids"]))
        for token in step["text_mask"][row].nonzero()[:, 0]:
            logs.append(logits[token].log_softmax(-1)[step["input_ids"][row, token]])
    return -sum(logs) / len(logs)


def slow_mim(model, step):
    """Photo by photo: encode the kept patches, decode, compare with the hidden windows' pixels."""
    base, errors = model.syncmask, []
    for row in range(4):
        pixels, length = step["pixel_values"][row : row + 1], int(step["attention_mask"][row].sum())
        keep = torch.tensor([[n for n in range(16) if not step["patch_mask"][row, n]]])
        hidden = torch.tensor([[n for n in range(16) if step["patch_mask"][row, n]]])
        text = base.encode_text(step["input_ids"][row : row + 1, :length])
        predicted = model.mim_decoder(base.encode_image(pixels, keep=keep), keep, hidden, text)[0]
        for place, patch in enumerate(hidden[0].tolist()):
            top, left = 8 * (patch // 4), 8 * (patch % 4)
            window = pixels[0, :, top : top + 8, left : left + 8]
            errors.append((predicted[place] - window.flatten()).square().mean())
    return sum(errors) / len(errors)


def slow_wpa(model, step):
    """Each token of each text that is not in all of them: its best patch of each photo, softmax over the photos."""
    base, head = model.syncmask, model.word_patch_head
    patches = [base.encode_image(step["pixel_values"][row : row + 1])[0, 1:] for row in range(4)]
    texts = [set(ids[real.bool()].tolist()) for ids, real in zip(step["input_ids"], step["attention_mask"])]
    losses = []
    for token in set.union(*texts) - set.intersection(*texts):
        embedding = base.get_input_embeddings().weight[token]
        logs = torch.stack([(head.dense(head.norm(photo)) @ embedding).max() for photo in patches]).log_softmax(0)
        losses += [-logs[row] for row in range(4) if token in texts[row]]
    return sum(losses) / len(losses)


def test_word_patch_alignment_equals_the_slow_objective(tiny_config, step):
    tiny_config.word_patch_alignment = True
    torch.manual_seed(0)
    model = SyncMaskForPreTraining(tiny_config).eval()
    output = model(**step)
    slow = slow_wpa(model, step)
    torch.testing.assert_close(output.wpa_loss, slow, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.loss, sum(output[term] for term in (*TERMS, "wpa_loss")))
    wanted = [p for name, p in model.named_parameters() if "vision_model" in name or "word_patch_head" in name]
    wanted.append(model.get_input_embeddings().weight)
    for mine, theirs in zip(torch.autograd.grad(output.wpa_loss, wanted), torch.autograd.grad(slow, wanted)):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-3)


ORACLES = dict(zip(TERMS, (slow_itc, slow_itm, slow_mlm, slow_mim)))


@pytest.mark.parametrize("term", TERMS)
def test_each_term_and_its_gradients_equal_the_slow_objective(tiny_model, step, term):
    fast, slow = tiny_model(**step)[term], ORACLES[term](tiny_model, step)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    names, parameters = zip(*tiny_model.named_parameters())
    mine = torch.autograd.grad(fast, parameters, allow_unused=True)
    theirs = torch.autograd.grad(slow, parameters, allow_unused=True)
    for name, one, other in zip(names, mine, theirs):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_the_loss_is_the_sum_of_its_terms(tiny_model, step):
    output = tiny_model(**step)
    torch.testing.assert_close(output.loss, sum(output[term] for term in TERMS))
    assert output.itm_logits.shape == (12, 2) and output.mim_predictions.shape == (4, 6, 192)
    assert output.mlm_logits.shape == (int(step["text_mask"].sum()), 60)
    torch.testing.assert_close(output.image_feats.norm(dim=-1), torch.ones(4))


# -------------------------------------------------------------------------------------------------- what it must not do


def test_forward_is_deterministic_and_mutates_nothing(tiny_model, step):
    tiny_model.train()
    weights, inputs = copy.deepcopy(tiny_model.state_dict()), copy.deepcopy(step)
    first = tiny_model(**step)
    first.loss.backward()
    second = tiny_model(**step)
    for term in TERMS:
        assert torch.equal(first[term], second[term])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tiny_model.state_dict().items())
    for name, value in step.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(inputs[name])), name


def test_every_parameter_has_a_gradient_when_all_terms_are_on(tiny_model, step):
    tiny_model.train()
    tiny_model(**step).loss.backward()
    without = [name for name, parameter in tiny_model.named_parameters() if parameter.grad is None]
    assert without == []


def test_every_parameter_has_a_gradient_when_nothing_is_hidden_or_allowed(tiny_model, step):
    """A batch without words or negatives must not hang DDP: zero gradients, not missing ones."""
    nothing = {
        "text_mask": torch.zeros(4, 12, dtype=torch.bool),
        "negative_image_index": torch.full((4,), -1),
        "negative_text_index": torch.full((4,), -1),
    }
    output = tiny_model(**{**step, **nothing})
    assert output.mlm_loss == 0 and torch.isfinite(output.loss)
    output.loss.backward()
    assert [name for name, parameter in tiny_model.named_parameters() if parameter.grad is None] == []


# ------------------------------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize(
    "left_out, gone",
    [
        (("patch_mask",), ("mim_loss", "mim_predictions")),
        (("text_mask", "masked_input_ids"), ("mlm_loss", "mlm_logits")),
        (("negative_image_index", "negative_text_index"), ("itm_loss", "itm_logits")),
        (
            ("negative_image_index", "negative_text_index", "text_mask", "masked_input_ids", "patch_mask"),
            ("itm_loss", "itm_logits", "mlm_loss", "mlm_logits", "mim_loss", "mim_predictions"),
        ),
    ],
)
def test_terms_without_inputs_are_skipped_and_the_others_unchanged(tiny_model, step, left_out, gone):
    whole = tiny_model(**step)
    part = tiny_model(**{name: value for name, value in step.items() if name not in left_out})
    assert all(getattr(part, name) is None for name in gone)
    left = [term for term in TERMS if term not in gone]
    for term in left:
        torch.testing.assert_close(part[term], whole[term])
    torch.testing.assert_close(part.loss, sum(part[term] for term in left))


def test_without_a_teacher_targets_are_hard(tiny_model, step):
    alone = {name: value for name, value in step.items() if "teacher" not in name}
    torch.testing.assert_close(tiny_model(**alone).itc_loss, slow_itc(tiny_model, {**step, "soft_target_weight": 0.0}))


def test_without_ids_every_row_is_its_own(tiny_model, step):
    own = {"item_ids": torch.arange(4), "text_ids": torch.arange(4)}
    given = tiny_model(**{**step, **own}).itc_loss
    without = tiny_model(**{name: value for name, value in step.items() if name not in own}).itc_loss
    torch.testing.assert_close(without, given)


def test_without_masked_ids_every_hidden_token_is_the_mask(tiny_model, step):
    plain = {**step, "masked_input_ids": step["input_ids"].masked_fill(step["text_mask"], 4)}
    default = tiny_model(**{name: value for name, value in step.items() if name != "masked_input_ids"})
    torch.testing.assert_close(default.mlm_loss, tiny_model(**plain).mlm_loss)


def test_without_an_attention_mask_all_tokens_are_real(tiny_model, step):
    without = tiny_model(**{name: value for name, value in step.items() if name != "attention_mask"})
    given = tiny_model(**{**step, "attention_mask": torch.ones(4, 12, dtype=torch.long)})
    torch.testing.assert_close(without.loss, given.loss)


def test_negatives_that_are_not_allowed_are_left_out(tiny_model, step):
    """A pair of -1 has no influence, whatever stands in its place."""
    negatives = {**step, "negative_image_index": torch.tensor([1, -1, -1, 2])}
    loss = tiny_model(**negatives).itm_loss
    torch.testing.assert_close(loss, slow_itm(tiny_model, negatives), atol=1e-5, rtol=1e-4)
    none = {**step, "negative_image_index": torch.full((4,), -1), "negative_text_index": torch.full((4,), -1)}
    torch.testing.assert_close(tiny_model(**none).itm_loss, slow_itm(tiny_model, none), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["negative_image_index", "negative_text_index"])
def test_one_kind_of_negatives_alone_is_refused(tiny_model, step, name):
    with pytest.raises(ValueError, match="negative_image_index.*negative_text_index"):
        tiny_model(**{key: value for key, value in step.items() if key != name})


@pytest.mark.parametrize("name", ["teacher_image_feats", "teacher_text_feats", "teacher_temperature"])
def test_half_a_teacher_is_refused(tiny_model, step, name):
    with pytest.raises(ValueError, match=name):
        tiny_model(**{key: value for key, value in step.items() if key != name})


def test_rows_that_hide_different_numbers_of_patches_are_refused(tiny_model, step):
    uneven = step["patch_mask"].clone()
    uneven[2, int(uneven[2].nonzero()[0, 0])] = False
    with pytest.raises(ValueError, match="between 5 and 6 patches; every row must hide the same number"):
        tiny_model(**{**step, "patch_mask": uneven})


def test_padding_changes_no_term(tiny_model, step):
    longer = dict(step)
    for name, filler in {"input_ids": 0, "attention_mask": 0, "masked_input_ids": 0, "text_mask": False}.items():
        longer[name] = torch.cat([step[name], step[name].new_full((4, 5), filler)], dim=1)
    short, long = tiny_model(**step), tiny_model(**longer)
    for term in TERMS:
        torch.testing.assert_close(long[term], short[term], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_rows_of_one_photo_share_its_keys_without_an_index(tiny_model, step, implementation):
    tiny_model.set_attn_implementation(implementation)
    base = tiny_model.syncmask
    images = base.encode_image(step["pixel_values"])[:2].detach().requires_grad_()
    texts = base.encode_text(step["input_ids"], step["attention_mask"]).detach()
    index = torch.tensor([0, 0, 1, 1])
    found, gradients = [], []
    for given in (None, index):
        found.append(base.fuse(texts, step["attention_mask"], images, given))
        gradients.append(torch.autograd.grad(found[-1].square().sum(), images)[0])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    mixed = base.fuse(texts, step["attention_mask"], images, index[-2:])  # the first two rows see a photo each
    whole = base.fuse(texts, step["attention_mask"], images, torch.tensor([0, 1, 1, 1]))
    torch.testing.assert_close(mixed, whole, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="4 rows for 3 others"):
        base.fuse(texts, step["attention_mask"], images[[0, 1, 1]])
    with pytest.raises(ValueError, match="4 rows for 2 others with a mask"):
        base.fusion_encoder(
            texts,
            step["attention_mask"],
            encoder_hidden_states=images,
            encoder_attention_mask=torch.ones(images.shape[:2]),
        )


# --------------------------------------------------------------------------------------------------- parts of a step


def test_the_heads_alone_give_what_forward_uses(tiny_model, step):
    base, output = tiny_model.syncmask, tiny_model(**step)
    images = base.encode_image(step["pixel_values"])
    texts = base.encode_text(step["input_ids"], step["attention_mask"])
    torch.testing.assert_close(
        tiny_model.itm_logits(texts, step["attention_mask"], images), output.itm_logits[:4], atol=1e-5, rtol=1e-4
    )
    positions, real = hidden_positions(step["text_mask"])
    masked = base.encode_text(step["masked_input_ids"], step["attention_mask"])
    logits = tiny_model.mlm_logits(masked, step["attention_mask"], images, positions)
    torch.testing.assert_close(logits[real], output.mlm_logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        tiny_model.predict_patches(step["pixel_values"], step["patch_mask"], texts, step["attention_mask"]),
        output.mim_predictions,
    )


def test_split_patches_and_hidden_positions():
    keep, hidden = split_patches(torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]]).bool())
    assert keep.tolist() == [[0, 2], [2, 3]] and hidden.tolist() == [[1, 3], [0, 1]]
    positions, real = hidden_positions(torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]).bool())
    assert positions[real].tolist() == [1, 3, 2] and real.sum(dim=1).tolist() == [2, 0, 1]
    nothing, none = hidden_positions(torch.zeros(2, 3, dtype=torch.bool))
    assert nothing.shape == (2, 1) and not none.any()


def test_temperature_starts_where_the_configuration_says_and_stays_in_range(tiny_model, tiny_config):
    from syncmask import SyncMaskModel

    assert SyncMaskModel(tiny_config).temperature.item() == pytest.approx(0.07)
    for logit, wanted in ((-100.0, 0.001), (100.0, 0.5)):
        with torch.no_grad():
            tiny_model.syncmask.temperature_logit.fill_(logit)
        assert tiny_model.syncmask.temperature.item() == pytest.approx(wanted)


# --------------------------------------------------------------------------------------------------- many processes


def _half(step, rank):
    """Return one process's slice: its rows, and negatives numbered within them."""
    rows = slice(2 * rank, 2 * rank + 2)
    return {
        name: value[rows] if isinstance(value, torch.Tensor) and len(value) == 4 else value
        for name, value in step.items()
    }


def _one_process_of_two(rank, meeting, model, step, with_ids, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(minutes=3))
    assert dist.get_world_size() == 2
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    mine = _half(step, rank)
    if not with_ids:
        mine = {name: value for name, value in mine.items() if name not in ("item_ids", "text_ids")}
    output = wrapped(**mine)
    output.loss.backward()
    losses = torch.stack([output[term].detach() for term in TERMS])
    dist.all_reduce(losses)
    if rank == 0:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.save({"losses": losses / 2, "gradients": gradients}, results)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("with_ids", [True, False])
def test_two_processes_equal_one(tiny_model, step, with_ids, tmp_path):
    """ITC on the global batch, the rest slice by slice; losses and gradients are means over processes."""
    step["negative_image_index"] = torch.tensor([1, 0, 1, -1])
    step["negative_text_index"] = torch.tensor([1, -1, 1, 0])
    step["text_mask"][1, 1] = True
    meeting, results = (tmp_path / "meeting").as_uri(), tmp_path / "results.pt"
    mp.spawn(_one_process_of_two, (meeting, tiny_model, step, with_ids, results), nprocs=2)
    two = torch.load(results)

    if not with_ids:
        step.update(item_ids=torch.arange(4), text_ids=torch.arange(4))
    itc = tiny_model(**step).itc_loss
    slices = [tiny_model(**_half(step, rank)) for rank in range(2)]
    losses = torch.stack([itc, *[sum(part[term] for part in slices) / 2 for term in TERMS[1:]]])
    torch.testing.assert_close(two["losses"], losses.detach(), atol=1e-5, rtol=1e-5)
    tiny_model.zero_grad()
    losses.sum().backward()
    for name, parameter in tiny_model.named_parameters():
        torch.testing.assert_close(
            two["gradients"][name], parameter.grad, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_soft_targets_are_exact_under_autocast(tiny_model, monkeypatch):
    from syncmask import modeling_pairs

    generator = torch.Generator().manual_seed(3)
    base = torch.randn(1, 16, generator=generator)
    # Nearly equal features: in bf16 their cosines would tie.
    feats = torch.nn.functional.normalize(base + 1e-3 * torch.randn(4, 16, generator=generator), dim=-1)
    seen = []
    monkeypatch.setattr(
        modeling_pairs, "soften_targets", lambda targets, similarity, weight: seen.append(similarity) or targets
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tiny_model.contrast(feats, feats, None, None, modeling_pairs.Teacher(feats, feats, torch.tensor([0.07]), 1.0))
    assert [similarity.dtype for similarity in seen] == [torch.float32, torch.float32]
    torch.testing.assert_close(seen[0], feats @ feats.T / 0.07)
