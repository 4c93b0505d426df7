"""The task heads: what is new in them, their losses against slow oracles, and what they refuse."""

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForZeroShotImageClassification

from syncmask import (
    SyncMaskConfig,
    SyncMaskForComposedImageRetrieval,
    SyncMaskForImageTextClassification,
    SyncMaskForImageTextRetrieval,
    SyncMaskModel,
)
from syncmask.losses import classification_loss, composed_targets

INPUTS = ("pixel_values", "input_ids", "attention_mask")
LABEL_SETS = {"subcategory": ["jeans", "skirt", "shirt"], "category": ["bottoms", "tops"]}
NEW = {
    SyncMaskForImageTextRetrieval: set(),
    SyncMaskForComposedImageRetrieval: {"query_head.shares", "query_head.dense.weight"},
    SyncMaskForImageTextClassification: {
        "no_image",
        "no_text",
        *(f"classifiers.{index}.{name}" for index in (0, 1) for name in ("weight", "bias")),
    },
}


def settings(kind):
    return {"label_sets": LABEL_SETS} if kind is SyncMaskForImageTextClassification else {}


@pytest.fixture
def inputs(pairs):
    return {name: pairs[name] for name in INPUTS}


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    """The folder of a pretraining checkpoint."""
    tiny_model.save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


@pytest.fixture
def retrieval(checkpoint):
    return SyncMaskForImageTextRetrieval.from_pretrained(checkpoint)


@pytest.fixture
def composed(checkpoint):
    """A query head that is no longer what it starts as."""
    model = SyncMaskForComposedImageRetrieval.from_pretrained(checkpoint)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.query_head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture
def classifier(checkpoint):
    return SyncMaskForImageTextClassification.from_pretrained(checkpoint, label_sets=LABEL_SETS)


def assert_close(one, other, atol=1e-5, rtol=1e-4):
    torch.testing.assert_close(one, other, atol=atol, rtol=rtol)


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", NEW)
def test_only_the_head_is_new(kind, checkpoint, tiny_model, tmp_path):
    model, info = kind.from_pretrained(checkpoint, output_loading_info=True, **settings(kind))
    assert set(info["missing_keys"]) == NEW[kind]
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    theirs = tiny_model.state_dict()
    shared = [name for name in model.state_dict() if name not in NEW[kind]]
    assert all(torch.equal(model.state_dict()[name], theirs[name]) for name in shared)
    # And back: AutoModel gives the base model, without a word about the head.
    model.save_pretrained(tmp_path / "head")
    base, info = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert type(base) is SyncMaskModel and not any(info.values()), info
    assert all(torch.equal(value, theirs[f"syncmask.{name}"]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("kind", NEW)
def test_a_head_loads_from_another_heads_checkpoint(kind, checkpoint, tmp_path):
    for other in NEW:
        folder = tmp_path / other.__name__
        other.from_pretrained(checkpoint, **settings(other)).save_pretrained(folder)
        _, info = kind.from_pretrained(folder, output_loading_info=True, **settings(kind))
        assert not info["unexpected_keys"]
        if other is kind:
            assert not info["missing_keys"]


def test_auto_classes_find_the_heads(checkpoint):
    loaded = AutoModelForZeroShotImageClassification.from_pretrained(checkpoint)
    assert type(loaded) is SyncMaskForImageTextRetrieval
    loaded = AutoModelForImageClassification.from_pretrained(checkpoint, label_sets=LABEL_SETS)
    assert type(loaded) is SyncMaskForImageTextClassification


def test_stand_ins_start_small_and_not_constant(classifier):
    """Built and loaded from a checkpoint that lacks them alike."""
    for model in (classifier, SyncMaskForImageTextClassification(classifier.config)):
        for parameter in (model.no_image, model.no_text):
            assert 0.5 < parameter.std() / model.config.initializer_range < 2


# ----------------------------------------------------------------------------------------------------------- retrieval


@pytest.fixture
def step(pairs, inputs):
    feats = torch.nn.functional.normalize(torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(2)), dim=-1)
    return {
        **inputs,
        "item_ids": pairs["item_ids"],
        "text_ids": pairs["text_ids"],
        "negative_image_index": torch.tensor([1, 0, 3, -1]),
        "negative_text_index": torch.tensor([3, -1, 1, 2]),
        "teacher_image_feats": feats[0],
        "teacher_text_feats": feats[1],
        "teacher_temperature": torch.tensor([0.2]),
        "soft_target_weight": 0.3,
    }


def test_retrieval_has_the_losses_of_pretraining(retrieval, tiny_model, step):
    mine, theirs = retrieval(**step), tiny_model(**step)
    for name in ("itc_loss", "itm_loss", "itm_logits", "image_feats", "text_feats"):
        assert torch.equal(mine[name], theirs[name]), name
    assert_close(mine.loss, mine.itc_loss + mine.itm_loss)


def test_photos_and_texts_are_compared_all_with_all_and_matched_in_pairs(retrieval, tiny_model, inputs):
    output, base = retrieval(**inputs), tiny_model.syncmask(**inputs)
    assert torch.equal(output.logits_per_image, base.logits_per_image)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    wanted = tiny_model.itm_logits(base.text_embeds, inputs["attention_mask"], base.image_embeds)
    assert torch.equal(output.itm_logits, wanted) and output.loss is None
    fewer = retrieval(**{**inputs, "pixel_values": inputs["pixel_values"][:3]})
    assert_close(fewer.logits_per_image, output.logits_per_image[:3])
    assert fewer.itm_logits is None


def test_the_loss_comes_with_what_it_needs_or_on_request(retrieval, inputs, step):
    assert retrieval(**inputs).loss is None
    assert retrieval(**step, return_loss=False).loss is None
    alone = retrieval(**inputs, return_loss=True)
    assert torch.equal(alone.loss, alone.itc_loss) and alone.itm_loss is None
    for name in ("item_ids", "text_ids"):
        assert retrieval(**inputs, **{name: step[name]}).loss is not None


def test_retrieval_takes_what_tokenizers_add(retrieval, inputs):
    seen = retrieval(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"]))
    assert torch.equal(seen.logits_per_image, retrieval(**inputs).logits_per_image)


def test_retrieval_gives_features(retrieval, inputs):
    output = retrieval(**inputs)
    assert torch.equal(retrieval.get_image_features(inputs["pixel_values"]).pooler_output, output.image_feats)
    texts = retrieval.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(texts.pooler_output, output.text_feats)


@pytest.mark.parametrize("extra", [{"return_loss": True}, {"negative_image_index": 0, "negative_text_index": 0}])
def test_losses_and_negatives_need_pairs(retrieval, inputs, extra):
    extra = {name: torch.zeros(3).long() if "index" in name else value for name, value in extra.items()}
    with pytest.raises(ValueError, match="3 photos and 4 texts"):
        retrieval(**{**inputs, "pixel_values": inputs["pixel_values"][:3]}, **extra)


@pytest.mark.parametrize("name", ["negative_image_index", "teacher_text_feats"])
def test_half_of_what_goes_together_is_refused(retrieval, step, name):
    with pytest.raises(ValueError, match=f"{name} not given"):
        retrieval(**{key: value for key, value in step.items() if key != name})


# ------------------------------------------------------------------------------------------------------------ composed


def test_an_untrained_query_is_the_sum_of_both_towers(checkpoint, inputs):
    model = SyncMaskForComposedImageRetrieval.from_pretrained(checkpoint)
    output = model.syncmask(**inputs)
    wanted = torch.nn.functional.normalize(output.image_feats + output.text_feats, dim=-1)
    query = model.get_query_features(**inputs)
    assert_close(query.pooler_output, wanted, atol=1e-6)
    assert_close(query.last_hidden_state[:, 0], output.fused[:, 0])
    fresh = SyncMaskForComposedImageRetrieval(model.config)
    assert fresh.query_head.shares.tolist() == [1, 1] and not fresh.query_head.dense.weight.any()


def test_the_query_is_what_its_equation_says(composed, inputs):
    output, head = composed.syncmask(**inputs), composed.query_head
    for row in range(4):
        query = head.shares[0] * output.image_feats[row] + head.shares[1] * output.text_feats[row]
        query = query + head.dense.weight @ output.fused[row, 0]
        assert_close(composed(**inputs).query_feats[row], query / query.norm())


def test_the_fused_part_learns_from_its_first_step(checkpoint, inputs, pairs):
    model = SyncMaskForComposedImageRetrieval.from_pretrained(checkpoint).train()
    model(**inputs, target_pixel_values=pairs["pixel_values"].flip(0)).loss.backward()
    assert model.query_head.dense.weight.grad.abs().max() > 1e-4


def slow_composed(queries, targets, references, target_ids, reference_ids, temperature):
    """Query by query over all photos, target by target over all queries."""
    rows, photos = len(queries), [*targets, *references]
    ids = [*target_ids, *reference_ids]
    total = 0.0
    for i in range(rows):
        logits = torch.stack([queries[i] @ photo / temperature for photo in photos])
        right = [j for j in range(2 * rows) if ids[j] == target_ids[i]]
        total = total - sum(logits.log_softmax(0)[j] / len(right) for j in right) / rows
        logits = torch.stack([targets[i] @ query / temperature for query in queries])
        right = [j for j in range(rows) if target_ids[j] == target_ids[i]]
        total = total - sum(logits.log_softmax(0)[j] / len(right) for j in right) / rows
    return total / 2


@pytest.mark.parametrize(
    "target_ids, reference_ids",
    [([7, 8, 7, 9], [8, 5, 6, 7]), ([7, 8, 7, 9], None), ([0, 3, 2, 1], [9, 9, 9, 9]), (None, None)],
)
def test_the_composed_loss_equals_the_loop(composed, inputs, target_ids, reference_ids):
    generator = torch.Generator().manual_seed(4)
    photos = torch.randn(4, 3, 32, 32, generator=generator)
    given = {"target_ids": target_ids, "reference_ids": reference_ids}
    given = {name: torch.tensor(ids) for name, ids in given.items() if ids is not None}
    output = composed(**inputs, target_pixel_values=photos, **given)
    references = composed.syncmask.get_image_features(inputs["pixel_values"]).pooler_output
    targets = composed.syncmask.get_image_features(photos).pooler_output
    temperature = composed.syncmask.temperature[0]
    ids = target_ids or [0, 1, 2, 3]
    wanted = slow_composed(output.query_feats, targets, references, ids, reference_ids or [-1] * 4, temperature)
    assert_close(output.loss, wanted)
    assert_close(output.image_feats, targets)
    assert_close(output.logits, output.query_feats @ torch.cat([targets, references]).T / temperature)


def test_composed_targets_share_the_mass_of_equal_ids():
    over_photos, over_queries = composed_targets(torch.tensor([7, 8]), torch.tensor([7, 8]), torch.tensor([8, 9]))
    assert over_photos.tolist() == [[1, 0, 0, 0], [0, 0.5, 0.5, 0]] and over_queries.tolist() == [[1, 0], [0, 1]]


def test_ids_without_what_they_are_of_are_refused(composed, inputs):
    with pytest.raises(ValueError, match="target_ids were given without target_pixel_values"):
        composed(**inputs, target_ids=torch.arange(4))
    with pytest.raises(ValueError, match="reference_ids were given without target_ids"):
        composed(**inputs, target_pixel_values=inputs["pixel_values"], reference_ids=torch.arange(4))


# ------------------------------------------------------------------------------------------------------ classification


def test_a_dropped_side_is_a_missing_side(classifier, inputs):
    photos, texts = {"pixel_values": inputs["pixel_values"]}, {name: inputs[name] for name in INPUTS[1:]}
    drop = torch.tensor([True, False, True, False])
    whole, photo, text = classifier(**inputs), classifier(**photos), classifier(**texts)
    for argument, alone in (("drop_text", photo), ("drop_image", text)):
        seen = classifier(**inputs, **{argument: drop})
        for name in LABEL_SETS:
            assert_close(seen.logits_by_set[name][drop], alone.logits_by_set[name][drop])
            assert_close(seen.logits_by_set[name][~drop], whole.logits_by_set[name][~drop])
            assert (alone.logits_by_set[name] - whole.logits_by_set[name]).abs().max() > 1e-2
    assert_close(classifier(**photos, attention_mask=inputs["attention_mask"]).logits, photo.logits)
    # A photo without text does not look at the text that stands beside it, nor the other way round.
    other = {**inputs, "input_ids": inputs["input_ids"].flip(0), "attention_mask": inputs["attention_mask"].flip(0)}
    assert_close(classifier(**other, drop_text=drop).logits[drop], photo.logits[drop])


def test_logits_are_a_linear_reading_of_the_fused_cls(classifier, inputs):
    fused = classifier.syncmask(**inputs).fused[:, 0]
    output = classifier(**inputs)
    assert list(output.logits_by_set) == list(LABEL_SETS)
    for linear, logits in zip(classifier.classifiers, output.logits_by_set.values()):
        assert_close(logits, fused @ linear.weight.T + linear.bias)
    assert torch.equal(output.logits, output.logits_by_set["subcategory"]) and output.loss is None


def test_dropout_is_the_configurations(classifier, inputs):
    classifier.train()
    assert classifier.dropout.p == 0.1
    assert not torch.equal(classifier(**inputs).logits, classifier(**inputs).logits)


def slow_classification(logits, labels, prior, weights):
    """Row by row: the adjusted probability written out."""
    total, mass = 0.0, 0.0
    for row, label in enumerate(labels.tolist()):
        if label == -100:
            continue
        odds = [float(prior[c]) * logits[row, c].exp().item() for c in range(logits.shape[1])]
        total -= float(weights[label]) * torch.tensor(odds[label] / sum(odds)).log()
        mass += float(weights[label])
    return total / mass if mass else torch.tensor(0.0)


PRIOR, WEIGHTS = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 2.0, 3.0])


@pytest.mark.parametrize("labels", [[0, 2, -100, 1], [1, 1, 1, 1], [-100, -100, -100, 2], [-100] * 4])
@pytest.mark.parametrize("prior, weights", [(None, None), (PRIOR, None), (None, WEIGHTS), (PRIOR, WEIGHTS)])
def test_the_classification_loss_equals_the_loop(labels, prior, weights):
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels, ones = torch.tensor(labels), torch.ones(3)
    loss = classification_loss(logits, labels, None if prior is None else prior.log(), weights)
    wanted = slow_classification(logits, labels, ones if prior is None else prior, ones if weights is None else weights)
    assert_close(loss, wanted)
    loss.backward()  # a batch of which nothing is known has a gradient too, of zeros
    assert torch.isfinite(logits.grad).all() and (logits.grad[labels == -100] == 0).all()


def test_logit_adjustment_asks_more_of_rare_classes():
    flat, log_prior = torch.zeros(1, 2), torch.tensor([0.9, 0.1]).log()
    losses = [classification_loss(flat, torch.tensor([label]), log_prior) for label in (0, 1)]
    assert [loss.exp().item() for loss in losses] == pytest.approx([1 / 0.9, 10], rel=1e-5)


def test_losses_are_those_of_the_sets(classifier, inputs):
    labels = torch.tensor([[0, 1], [2, 0], [1, -100], [-100, 1]])
    priors = (torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.9, 0.1]).log())
    weights = (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0]))
    output = classifier(**inputs, labels=labels, log_priors=priors, class_weights=weights)
    for index, logits in enumerate(output.logits_by_set.values()):
        wanted = slow_classification(logits, labels[:, index], priors[index].exp(), weights[index])
        assert_close(output.losses[index], wanted)
    assert_close(output.loss, sum(output.losses))
    # The loss alone is adjusted, not what is answered.
    assert torch.equal(output.logits, classifier(**inputs).logits)


def test_both_stand_ins_have_a_gradient_though_nothing_is_dropped(classifier, inputs):
    classifier.train()(**inputs, labels=torch.zeros(4, 2).long()).loss.backward()
    assert (classifier.no_image.grad == 0).all() and (classifier.no_text.grad == 0).all()


def test_what_classification_refuses(classifier, inputs, tiny_config):
    with pytest.raises(ValueError, match="neither pixel_values nor input_ids"):
        classifier()
    with pytest.raises(ValueError, match="leave out that of a missing side"):
        classifier(pixel_values=inputs["pixel_values"], drop_text=torch.zeros(4).bool())
    with pytest.raises(ValueError, match=r"labels are \(4,\); wanted \(rows, 2\).*subcategory, category"):
        classifier(**inputs, labels=torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"log_priors have \[2, 3\] classes"):
        classifier(**inputs, log_priors=(torch.zeros(2), torch.zeros(3)))
    with pytest.raises(ValueError, match=r"class_weights have \[3\] classes"):
        classifier(**inputs, class_weights=(torch.zeros(3),))
    with pytest.raises(ValueError, match="label_sets="):
        SyncMaskForImageTextClassification(tiny_config)


# ----------------------------------------------------------------------------------------------------------- label sets


def test_the_label_sets_keep_their_order_and_name_the_logits(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    for config in (classifier.config, SyncMaskConfig.from_pretrained(tmp_path)):
        assert list(config.label_sets.items()) == list(LABEL_SETS.items())  # sorted keys would put category first
        assert config.id2label == {0: "jeans", 1: "skirt", 2: "shirt"} and config.num_labels == 3
        assert config.label2id == {"jeans": 0, "skirt": 1, "shirt": 2}
    loaded = SyncMaskForImageTextClassification.from_pretrained(tmp_path)
    assert [linear.out_features for linear in loaded.classifiers] == [3, 2]


def test_a_configuration_with_label_sets_is_consistent_from_the_start():
    config = SyncMaskConfig.tiny(label_sets={"z": ["one"], "a": ["two", "three"]}, id2label={0: "no", 1: "nor this"})
    assert config.id2label == {0: "one"} and config.label_set_names == ["z", "a"]
    assert SyncMaskConfig.tiny().label_sets is None and SyncMaskConfig.tiny().num_labels == 2


def test_other_label_sets_than_the_checkpoints_are_a_new_head(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    other = {"length": ["short", "long"], "category": ["bottoms", "tops"]}
    with pytest.raises(RuntimeError, match="size"):
        SyncMaskForImageTextClassification.from_pretrained(tmp_path, label_sets=other)
    model = SyncMaskForImageTextClassification.from_pretrained(tmp_path, label_sets=other, ignore_mismatched_sizes=True)
    assert model.config.label_set_names == ["length", "category"] and model.config.id2label[1] == "long"


@pytest.mark.parametrize(
    "label_sets, message",
    [
        ({"category": []}, "label_sets\\['category'\\] has no labels"),
        ({"category": ["tops", "bottoms", "tops"]}, "names 'tops' twice"),
        ({"category": "tops"}, "category|label_sets"),
    ],
)
def test_label_sets_that_make_no_sense_are_refused(label_sets, message, checkpoint):
    with pytest.raises(Exception, match=message):
        SyncMaskConfig.tiny(label_sets=label_sets)
    with pytest.raises(Exception, match=message):
        SyncMaskForImageTextClassification.from_pretrained(checkpoint, label_sets=label_sets)


# ----------------------------------------------------------------------------------------------------------- equalities


HEADS = ("retrieval", "composed", "classifier")


def answers(model, **inputs):
    """What a head says of each row."""
    output = model(**inputs)
    names = [name for name in ("itm_logits", "query_feats", "logits", "image_feats") if output.get(name) is not None]
    return torch.cat([output[name] for name in names], dim=1)


@pytest.mark.parametrize("head", HEADS)
def test_a_batch_equals_its_rows_alone(head, inputs, request):
    model = request.getfixturevalue(head)
    whole = answers(model, **inputs)
    for row, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        alone |= {name: alone[name][:, :length] for name in INPUTS[1:]}
        assert_close(answers(model, **alone)[0], whole[row])


@pytest.mark.parametrize("head", HEADS)
def test_padding_changes_nothing(head, inputs, request):
    model = request.getfixturevalue(head)
    filler = torch.zeros(4, 5, dtype=torch.long)
    longer = {**inputs, **{name: torch.cat([inputs[name], filler], dim=1) for name in INPUTS[1:]}}
    assert_close(answers(model, **longer), answers(model, **inputs))


@pytest.mark.parametrize("head", HEADS)
def test_without_an_attention_mask_all_tokens_are_real(head, inputs, request):
    model = request.getfixturevalue(head)
    whole = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    without = {name: value for name, value in inputs.items() if name != "attention_mask"}
    assert_close(answers(model, **without), answers(model, **whole))


# ------------------------------------------------------------------------------------------------------ many processes


def _one_process_of_two(rank, meeting, model, step, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(minutes=3))
    assert dist.get_world_size() == 2
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(2):  # a parameter without a gradient would make the second step fail
        model.zero_grad()
        loss = wrapped(**{name: value[2 * rank : 2 * rank + 2] for name, value in step.items()}).loss
        loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss)
    if rank == 0:
        gradients = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
        torch.save({"loss": loss / 2, "gradients": gradients}, results)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["composed", "composed without ids", "classifier", "retrieval"])
def test_two_processes_equal_one(head, inputs, pairs, tmp_path, request):
    """Contrast is over the global batch, negatives and labels slice by slice; all is the mean over processes."""
    step = {
        "composed": {
            "target_pixel_values": pairs["pixel_values"].flip(0),
            "target_ids": torch.tensor([7, 8, 7, 9]),
            "reference_ids": torch.tensor([8, 5, 6, 7]),
        },
        "composed without ids": {"target_pixel_values": pairs["pixel_values"].flip(0)},
        "classifier": {"labels": torch.tensor([[0, 1], [2, 0], [1, 1], [0, 1]])},
        "retrieval": {
            "item_ids": pairs["item_ids"],
            "text_ids": pairs["text_ids"],
            "negative_image_index": torch.tensor([1, 0, 1, 0]),
            "negative_text_index": torch.tensor([1, 0, 1, 0]),
        },
    }[head] | inputs
    model = request.getfixturevalue(head.split()[0]).eval()
    alone = copy.deepcopy(model)
    meeting = (tmp_path / "meeting").as_uri()
    mp.spawn(_one_process_of_two, (meeting, model, step, tmp_path / "results.pt"), nprocs=2)
    two = torch.load(tmp_path / "results.pt")
    if head == "retrieval":  # negatives are numbered within a slice
        for name in ("negative_image_index", "negative_text_index"):
            step[name] = step[name] + torch.tensor([0, 0, 2, 2])
    loss = alone(**step).loss
    loss.backward()
    torch.testing.assert_close(two["loss"], loss.detach(), atol=1e-5, rtol=1e-5)
    gradients = {name: parameter.grad for name, parameter in alone.named_parameters() if parameter.requires_grad}
    torch.testing.assert_close(two["gradients"], gradients, atol=2e-5, rtol=1e-3)
