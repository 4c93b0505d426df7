"""The protocols: the pure parts against loops and known values, then whole runs on a tiny untrained model."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from typer.testing import CliRunner

from syncmask import SyncMaskConfig, SyncMaskForPreTraining
from syncmask.evaluation import co_occurrence as co
from syncmask.evaluation import false_negatives as fn
from syncmask.evaluation import measure
from syncmask.evaluation.cli import app
from syncmask.evaluation.co_occurrence_protocol import co_occurrence, mim_errors
from syncmask.evaluation.compare import SAME, compare
from syncmask.evaluation.embedding import Embedder, batches, by_photo
from syncmask.evaluation.loading import load_checkpoint
from syncmask.evaluation.protocols import items, retrieval_metrics, sample_items
from syncmask.evaluation.reporting import report_run
from syncmask.evaluation.result import Result
from syncmask.evaluation.showcase import Gallery, mask_photos, spread_rows, text_searches
from syncmask.processing.corpus import CorpusIndex
from syncmask.processing.garments import GarmentTruth
from syncmask.processing.overlap import text_rows

IMAGE_ITEMS = np.array([0, 0, 1, 2, 2, 2, 3])
TEXT_ITEMS = np.array([3, 1, 0, 2])


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    ids = {"vocab_size": len(processor.tokenizer), "mask_token_id": processor.tokenizer.mask_token_id}
    return SyncMaskForPreTraining(SyncMaskConfig.tiny(image_size=32, **ids)).eval()


def unit(rng, rows, width=8):
    feats = rng.normal(size=(rows, width)).astype(np.float32)
    return feats / np.linalg.norm(feats, axis=1, keepdims=True)


# ------------------------------------------------------------------------------------------------------- retrieval


def slow_recall(queries, gallery, right, k, ignored=lambda q, g: False):
    hits = []
    for q, query in enumerate(queries):
        scores = [(float(query @ photo), g) for g, photo in enumerate(gallery) if not ignored(q, g)]
        best = max(score for score, g in scores if right(q, g))
        hits.append(sum(score >= best and not right(q, g) for score, g in scores) < k)
    return np.mean(hits)


@pytest.mark.parametrize("seed", range(4))
def test_retrieval_matches_loops(seed):
    rng = np.random.default_rng(seed)
    images, texts = unit(rng, 7), unit(rng, 4)
    found = retrieval_metrics(images, texts, IMAGE_ITEMS, TEXT_ITEMS, ks=(1, 2))

    def text_right(q, g):
        return IMAGE_ITEMS[q] == TEXT_ITEMS[g]

    assert found["image_to_text/recall@1/itc"]["value"] == pytest.approx(slow_recall(images, texts, text_right, 1))
    backwards = slow_recall(texts, images, lambda q, g: text_right(g, q), 2)
    assert found["text_to_image/recall@2/itc"]["value"] == pytest.approx(backwards)
    several = np.array([0, 1, 3, 4, 5])
    photos = slow_recall(
        images[several], images, lambda q, g: IMAGE_ITEMS[several[q]] == IMAGE_ITEMS[g], 1, lambda q, g: several[q] == g
    )
    assert found["photo_to_photo/recall@1/itc"]["value"] == pytest.approx(photos)
    assert found["photo_to_photo/recall@1/itc"]["n"] == 5


def test_chance_levels_are_exact():
    rng = np.random.default_rng(0)
    found = retrieval_metrics(unit(rng, 7), unit(rng, 4), IMAGE_ITEMS, TEXT_ITEMS, ks=(1,))
    assert found["image_to_text/recall@1/chance"]["value"] == pytest.approx(1 / 4)
    assert found["text_to_image/recall@1/chance"]["value"] == pytest.approx((2 + 1 + 3 + 1) / 7 / 4)
    assert found["photo_to_photo/recall@1/chance"]["value"] == pytest.approx((2 * 1 / 6 + 3 * 2 / 6) / 5)
    assert found["both_ways/mean_recall/chance"]["value"] == pytest.approx(1 / 4)


def test_a_perfect_model_is_perfect_and_a_collapsed_one_is_not_lucky():
    texts = np.eye(4, dtype=np.float32)
    images = texts[[2, 2, 1, 3, 3, 3, 0]]
    found = retrieval_metrics(images, texts, IMAGE_ITEMS, TEXT_ITEMS)
    assert all(metric["value"] == 1 for name, metric in found.items() if name.endswith("itc"))
    collapsed = retrieval_metrics(np.ones((7, 4)) / 2, np.ones((4, 4)) / 2, IMAGE_ITEMS, TEXT_ITEMS, ks=(1,))
    assert all(metric["value"] == 0 for name, metric in collapsed.items() if name.endswith("itc"))


def test_equal_texts_are_errors_and_beside_it_hits():
    texts = np.eye(4, dtype=np.float32)
    texts[1] = texts[0]  # items 3 and 1 have one text
    images = np.eye(4, dtype=np.float32)[[2, 2, 0, 3, 3, 3, 0]]
    found = retrieval_metrics(images, texts, IMAGE_ITEMS, TEXT_ITEMS, text_ids=np.array([5, 5, 6, 7]), ks=(1,))
    assert found["image_to_text/recall@1/itc"]["value"] == pytest.approx(5 / 7)
    assert found["image_to_text/recall@1/itc_duplicates"]["value"] == 1


def test_rounding_noise_between_equal_texts_is_a_tie():
    texts = np.eye(4, dtype=np.float32)
    texts[1] = texts[0]
    images = np.eye(4, dtype=np.float32)[[2, 2, 0, 3, 3, 3, 0]]
    for sign in (-1, 1):
        nudged = texts.copy()
        nudged[1, 0] += sign * 1e-7
        found = retrieval_metrics(images, nudged, IMAGE_ITEMS, TEXT_ITEMS, ks=(1,))
        assert found["image_to_text/recall@1/itc"]["value"] == pytest.approx(5 / 7)


def test_tolerant_recall_counts_true_texts_and_never_loses_the_own_one():
    texts = np.eye(4, dtype=np.float32)
    images = np.eye(4, dtype=np.float32)[[0, 2, 1, 3, 3, 3, 0]]  # photo 0 of item 0 looks like item 3

    def true(image, text):
        return (image == 0) & (TEXT_ITEMS[text] == 3)

    found = retrieval_metrics(images, texts, IMAGE_ITEMS, TEXT_ITEMS, true_pairs=true, ks=(1,))
    assert found["image_to_text/recall@1/itc"]["value"] == pytest.approx(6 / 7)
    assert found["image_to_text/recall@1/itc_tolerant"]["value"] == 1


def test_reranking_puts_right_what_is_among_the_k_best_and_nothing_else():
    rng = np.random.default_rng(3)
    images, texts = unit(rng, 7), unit(rng, 4)
    asked = []

    def matching(image, text):
        asked.append(len(image))
        return np.where(IMAGE_ITEMS[image] == TEXT_ITEMS[text], 50.0, -50.0)

    found = retrieval_metrics(images, texts, IMAGE_ITEMS, TEXT_ITEMS, matching=matching, rerank_k=2, ks=(1, 2))
    assert asked == [14, 8]
    for way in ("image_to_text", "text_to_image"):
        # What itc has among its 2 best comes first now; what it has not, cannot be saved.
        assert found[f"{way}/recall@1/itm"]["value"] == found[f"{way}/recall@2/itc"]["value"]
    few = retrieval_metrics(images, texts, IMAGE_ITEMS, TEXT_ITEMS, matching=matching, rerank_queries=3, ks=(1,))
    assert few["image_to_text/recall@1/itm"]["n"] == 3 and few["image_to_text/recall@1/itc"]["n"] == 7


def test_a_matching_head_that_says_the_same_of_all_gets_no_luck():
    texts = np.eye(4, dtype=np.float32)
    images = texts[[2, 2, 1, 3, 3, 3, 0]]
    flat = retrieval_metrics(
        images, texts, IMAGE_ITEMS, TEXT_ITEMS, matching=lambda i, t: np.zeros(len(i)), rerank_k=4, ks=(1,)
    )
    assert flat["image_to_text/recall@1/itm"]["value"] == 0


def test_galleries_must_have_one_text_an_item():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="two texts"):
        retrieval_metrics(unit(rng, 7), unit(rng, 4), IMAGE_ITEMS, np.array([3, 1, 0, 0]))
    with pytest.raises(ValueError, match="without a text"):
        retrieval_metrics(unit(rng, 7), unit(rng, 3), IMAGE_ITEMS, np.array([3, 1, 0]))


def test_one_photo_an_item_leaves_photo_to_photo_out():
    rng = np.random.default_rng(0)
    found = retrieval_metrics(unit(rng, 4), unit(rng, 4), np.arange(4), np.arange(4))
    assert not any(name.startswith("photo_to_photo") for name in found)


def test_samples_hold_whole_items():
    item_ids = np.repeat(np.arange(50), 3)
    rows = sample_items(item_ids, 40, seed=1)
    assert len(rows) == 39 and set(np.bincount(item_ids[rows])) == {0, 3} and (np.diff(rows) > 0).all()
    assert len(sample_items(item_ids, None, 0)) == 150 and len(sample_items(item_ids, 1, 0)) == 3


# --------------------------------------------------------------------------------------------------- co-occurrence


def test_blind_table_is_the_share_of_rows():
    table = co.blind_table([["red", "hat"], ["red", "of"]], [[True, True], [False, False]])
    assert table == {"red": 0.5, "hat": 1.0, "of": 0.0}
    assert co.blind_scores(table, ["hat", "new"]).tolist() == [1.0, 0.5]


def test_word_metrics_know_the_oracle_and_the_opposite():
    visible = [np.array([1, 0, 0, 1, 0, 0, 0, 0, 0, 0], bool), np.ones(4, bool), np.zeros(4, bool)]
    scores = {"good": [v.astype(float) for v in visible], "bad": [-v.astype(float) for v in visible]}
    found = co.with_intervals(co.word_tallies(scores, visible))
    assert found["words/ap/good"]["value"] == found["words/ap/oracle"]["value"] == 1
    assert found["words/precision/good"]["value"] == pytest.approx(2 / 3)
    assert found["words/precision/random"]["value"] == pytest.approx(0.2)
    assert found["words/precision_gain/bad"]["value"] == pytest.approx(-0.2)
    assert found["words/ap/good"]["n"] == 1  # rows where all or none are visible tell nothing


def test_view_metrics_see_the_view_and_only_the_view():
    item_ids, words = np.array([0, 0, 1, 1]), [["red", "zip"]] * 4
    visible = [np.array(v, bool) for v in ([1, 0], [0, 1], [1, 1], [0, 0])]
    scores = {"sees": [v.astype(float) for v in visible], "blind": [np.array([1.0, 0.0])] * 4}
    found = co.with_intervals(co.view_tallies(scores, visible, words, item_ids))
    for auc in ("item_auc", "view_auc"):
        assert found[f"words/{auc}/sees"]["value"] == 1
        assert found[f"words/{auc}/blind"]["value"] == found[f"words/{auc}/random"]["value"] == 0.5
    assert found["words/item_auc/sees"]["n"] == 2


def test_covered_share_counts_the_union_once():
    boxes = [[0, 0, 4, 8], [2, 0, 4, 8], [4, 0, 6, 4]]
    assert co.covered_share(boxes, (2, 2), 8).tolist() == [[1.0, 0.5], [1.0, 0.0]]
    assert co.covered_share([], (2, 2), 8).sum() == 0


def test_patch_metrics_and_centre_prior():
    inside = np.zeros((2, 16), dtype=bool)
    inside[0, [5, 6, 9, 10]] = True  # the middle of a 4 x 4 grid
    found = co.with_intervals(co.patch_tallies({"model": np.tile(np.arange(16.0), (2, 1))}, inside, (4, 4), rate=0.25))
    assert found["patches/precision/centre"]["value"] == found["patches/precision/oracle"]["value"] == 1
    assert found["patches/precision/random"]["value"] == 0.25
    assert found["patches/precision/model"]["value"] == 0 and found["patches/precision/model"]["n"] == 1


def test_pointing_tells_the_own_word_from_the_garment():
    boxes = [[0, 0, 4, 4], [4, 4, 8, 8], [], [0, 0, 8, 8]]
    peaks = {"attention": [np.array([0, 3, 1, 0])], "alignment": [np.array([1, 3, 1, 0])]}
    own = co.with_intervals(co.pointing_tallies(peaks, [boxes], (2, 2), 8))
    assert own["pointing/hit/alignment_own_word"]["value"] == 0.5
    assert own["pointing/hit/own_word"]["value"] == 1 and own["pointing/hit/random"]["value"] == 0.25
    assert own["pointing/hit/other_word"]["value"] == pytest.approx((0.5 + 0) / 2)  # word 3 looks at patch 0
    same = co.with_intervals(co.pointing_tallies({"attention": [np.array([0, 0, 0, 0])]}, [boxes], (2, 2), 8))
    assert same["pointing/hit/own_word"]["value"] == same["pointing/hit/other_word"]["value"] == 0.5


def test_truth_masks_cover_the_shown_words_first():
    visible = [np.array([1, 0, 0], bool), np.zeros(3, bool)]
    regions = [[[0, 0, 4, 4], [], []], [[], [], []]]
    masks = co.truth_masks(visible, regions, (4, 4), 8, patch_rate=0.4)
    assert masks.sum(axis=1).tolist() == [6, 6]
    assert masks[0, [0, 1, 4, 5]].all()
    assert (masks == co.truth_masks(visible, regions, (4, 4), 8, patch_rate=0.4)).all()


def test_text_gap_is_the_relative_rise():
    found = co.with_intervals({"gap": co.text_gap(np.array([1.0, 3.0]), np.array([2.0, 3.0]))})
    assert found["gap"]["value"] == pytest.approx(0.25)


def test_derangement_gives_every_row_another_item():
    item_ids = np.array([4, 4, 7, 7, 7, 9])
    others = co.derangement(item_ids, seed=0)
    assert (item_ids[others] != item_ids).all() and set(item_ids[others]) == {4, 7, 9}
    with pytest.raises(ValueError, match="one item"):
        co.derangement(np.zeros(3), 0)


# ------------------------------------------------------------------------------------------------- false negatives


@pytest.fixture(scope="module")
def truth(garments):
    return GarmentTruth.from_dataset(garments)


def test_pair_rates_match_loops(garments, truth):
    item_ids = CorpusIndex.from_dataset(garments).item_ids
    order = np.random.default_rng(0).permutation(len(item_ids))
    found = fn.pair_rates(truth, {"random": order}, item_ids, batch_size=8)
    wrong = other = same = pairs = 0
    for start in range(0, len(order) - 7, 8):
        batch = order[start : start + 8]
        for photo in batch:
            for text in batch:
                if photo == text:
                    continue
                pairs += 1
                if item_ids[photo] == item_ids[text]:
                    same += 1
                else:
                    other += 1
                    wrong += bool(truth.text_true_of_photo(photo, text))
    assert found["false_negatives/pairs/random"]["value"] == pytest.approx(wrong / other)
    assert found["false_negatives/same_item_pairs/random"]["value"] == pytest.approx(same / pairs)
    assert found["false_negatives/pairs/random"]["n"] == len(order) // 8


def test_itm_negatives_obey_rule_2_where_it_holds(garments):
    index = CorpusIndex.from_dataset(garments)
    rows, order = text_rows(index.texts), np.arange(len(index.item_ids))

    class TrueWhereAlike:
        def text_true_of_photo(self, photos, texts):
            mine, theirs = rows[index.text_ids[photos.ravel()]], rows[index.text_ids[texts.ravel()]]
            return (mine @ theirs.T).toarray() >= 0.2

    feats = unit(np.random.default_rng(0), len(order))
    found = fn.itm_rates(
        TrueWhereAlike(),
        {"rule_1": order, "rules_1_2": order},
        index.item_ids,
        index.text_ids,
        feats,
        feats,
        batch_size=16,
        temperature=0.07,
        text_rows=rows,
        tau=0.2,
    )
    assert found["false_negatives/itm/rule_1"]["value"] > 0
    assert found["false_negatives/itm/rules_1_2"]["value"] == 0


def test_an_order_without_a_whole_batch_is_refused():
    with pytest.raises(ValueError, match="no batch of 8"):
        fn.in_batches(np.arange(7), 8)
    assert fn.in_batches(np.arange(17), 8).shape == (2, 8)


# ---------------------------------------------------------------------------------------------------- with a model


def test_other_rows_are_of_other_items():
    item_ids = np.array([0, 0, 1, 2, 2])
    other = measure.other_rows(item_ids, 3, seed=0)
    assert other.shape == (5, 3) and (item_ids[other] != item_ids[:, None]).all()
    assert all(len(set(row)) == 3 for row in other)
    with pytest.raises(ValueError, match="one item alone"):
        measure.other_rows(np.zeros(4), 1, 0)


def test_mixed_rows_are_a_partition_without_a_tiny_tail():
    parts = measure.mixed_rows(65, 64, seed=0)
    assert sorted(np.concatenate(parts)) == list(range(65)) and [len(part) for part in parts] == [33, 32]


@pytest.mark.parametrize("pairs, limit", [(0, 4), (1, 4), (50, 1), (50, 7), (200, 64)])
def test_pairs_are_split_by_photo_each_once_and_evenly(pairs, limit):
    image_rows = np.random.default_rng(pairs + limit).integers(0, 13, pairs) ** 2
    parts = list(by_photo(image_rows, limit))
    assert all(part.size <= limit for part in parts)
    assert all((image_rows[part] == image_rows[part[:, :1]]).all() for part in parts)
    assert sorted(np.concatenate([part.ravel() for part in parts]) if parts else []) == list(range(pairs))
    whole = sum(len(part) for part in parts)  # photos that are encoded
    assert whole == sum(-(-count // limit) for count in np.unique(image_rows, return_counts=True)[1])


def test_embedder_agrees_with_the_model_on_single_pairs(model, processor, garments):
    rows = garments.select(range(12))
    index = CorpusIndex.from_dataset(rows)
    embedder = Embedder(model, processor, rows, index, batch_size=5)
    images, texts = embedder.image_feats(), embedder.text_feats()
    pairs = [(0, 0), (11, 1), (3, 2), (0, 2)]
    matched = embedder.matching(*np.array(pairs).T)
    for (row, text), score in zip(pairs, matched):
        inputs = processor(images=rows[row]["image"], text=index.texts[text])
        with torch.no_grad():
            out = model.syncmask(**inputs)
            logits = model.itm_logits(out.text_embeds, inputs["attention_mask"], out.image_embeds)[0]
        assert score == pytest.approx(float(logits[1] - logits[0]), abs=1e-4)
        assert images[row] == pytest.approx(out.image_feats[0].numpy(), abs=1e-5)
        assert texts[text] == pytest.approx(out.text_feats[0].numpy(), abs=1e-5)


def test_rows_are_measured_alike_in_any_batch(model, processor, garments):
    rows = garments.select(range(20))
    item_ids, visible = CorpusIndex.from_dataset(rows).item_ids, rows["visible"]
    means = measure.fill_word_means(model, processor, rows, item_ids, ["attention"], batch_size=7)
    weights = {"attention": 0.5}
    big, small = (
        measure.measure_rows(
            model, processor, rows, item_ids, means, visible, instance_weights=weights, batch_size=size
        )
        for size in (20, 6)
    )
    assert set(big.words) == {"attention", "attention_mean", "attention_own"}
    assert set(big.patches) == {"attention", "true_words", "contrast"}
    for name in big.words:
        for one, other in zip(big.words[name], small.words[name]):
            assert one == pytest.approx(other, abs=1e-4)
    assert [len(peaks) for peaks in big.peaks["attention"]] == big.kept == [len(words) for words in rows["words"]]
    assert big.patches["true_words"] == pytest.approx(small.patches["true_words"], rel=1e-3)


def test_word_means_are_plain_means(model, processor, garments):
    rows = garments.select(range(15))
    item_ids = CorpusIndex.from_dataset(rows).item_ids
    means = measure.fill_word_means(model, processor, rows, item_ids, ["attention"], batch_size=4)["attention"]
    batch = next(batches(processor, rows, np.arange(15), 15))
    pairs = measure.score_pairs(model, batch, item_ids, ["attention"])
    found: dict[str, list[float]] = {}
    for row, words in enumerate(rows["words"]):
        for place, word in enumerate(words):
            found.setdefault(word, []).append(float(pairs.scores["attention"][row, place]))
    looked_up = means.means(means.rows(batch["input_ids"], batch["word_ids"]))
    for row, words in enumerate(rows["words"]):
        assert looked_up[row, : len(words)].tolist() == pytest.approx([np.mean(found[w]) for w in words], abs=1e-4)


def test_mim_error_is_that_of_the_hidden_patches_and_of_the_text_given(model, processor, garments):
    rows = garments.select(range(6))
    masks = np.zeros((6, 16), dtype=bool)
    masks[:, :5] = True
    own, other = mim_errors(model, processor, rows, masks, np.array([3, 3, 4, 5, 0, 1]), batch_size=4)
    inputs = processor(images=rows[2]["image"], text=rows[4]["text"])
    with torch.no_grad():
        texts = model.syncmask.encode_text(inputs["input_ids"], inputs["attention_mask"])
        mask = torch.from_numpy(masks[:1])
        predicted = model.predict_patches(inputs["pixel_values"], mask, texts, inputs["attention_mask"])
        wanted = model.patchify(inputs["pixel_values"])[:, :5]
    assert other[2] == pytest.approx(float((predicted - wanted).square().mean()), rel=1e-3)
    assert own.shape == (6,) and (own != other).any()


def test_items_runs_on_a_corpus_with_and_without_truth(model, processor, garments):
    result = items(model, processor, garments, corpus_name="garments", max_rows=40, batch_size=16, rerank_k=4)
    assert result.corpus["rows"] <= 40 and result.corpus["items"] > 5
    for score in ("itc", "itc_duplicates", "itc_tolerant", "itm", "itm_tolerant", "chance"):
        metric = result.metrics[f"image_to_text/recall@10/{score}"]
        assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1
    assert "photo_to_photo/recall@1/itc" in result.metrics
    plain = garments.select_columns(["image", "text", "item_id"])
    without = items(model, processor, plain, max_rows=40, batch_size=16, rerank_k=0)
    name = "text_to_image/recall@5/itc"
    assert without.metrics[name] == result.metrics[name]
    assert not any("tolerant" in name or "itm" in name for name in without.metrics)


def test_co_occurrence_reports_both_strategies_beside_what_they_are_read_against(model, processor, garments):
    train, test = garments.select(range(40)), garments.select(range(40, len(garments)))
    result = co_occurrence(model, processor, train, test, max_rows=40, train_rows=20, batch_size=16, others=1)
    for name in ("attention", "evidence", "evidence_own", "evidence_mean", "blind", "random", "oracle"):
        assert f"words/precision/{name}" in result.metrics
    assert not any("alignment" in name for name in result.metrics)  # there is no head for it
    for name in ("attention", "evidence", "true_words", "contrast", "centre", "random", "oracle"):
        assert f"patches/precision/{name}" in result.metrics
    assert result.value("words/item_auc/evidence_mean") == 0.5
    assert result.value("words/ap/oracle") == pytest.approx(1)
    assert result.value("words/precision/blind") > result.value("words/precision/random")
    assert {"text_gap/relative_rise/truth_masks", "pointing/hit/own_word"} <= set(result.metrics)
    again = co_occurrence(model, processor, train, test, max_rows=40, train_rows=20, batch_size=16, others=1)
    assert json.dumps(again.metrics) == json.dumps(result.metrics)


def test_alignment_is_scored_by_its_own_maps_where_the_model_has_the_head(model, processor, garments):
    train, test = garments.select(range(40)), garments.select(range(40, 80))
    config = copy.deepcopy(model.config)
    config.word_patch_alignment = True
    torch.manual_seed(0)
    aligning = type(model)(config).eval()
    with torch.no_grad():
        aligning.word_patch_head.dense.weight.mul_(30)  # far from its start, where maps are flat
    result = co_occurrence(aligning, processor, train, test, max_rows=40, train_rows=20, batch_size=20, others=1)
    for name in ("alignment", "alignment_own", "alignment_mean"):
        assert f"words/precision/{name}" in result.metrics and f"words/item_auc/{name}" in result.metrics
    assert {"patches/precision/alignment", "pointing/hit/alignment_own_word"} <= set(result.metrics)
    item_ids = CorpusIndex.from_dataset(test).item_ids
    batch = next(batches(processor, test, np.arange(40), 40, "cpu"))
    words, patches, pairs = measure.hard_masks(aligning, batch, item_ids, "alignment", instance_weight=1.0)
    scores, looks = pairs.scores["alignment"], pairs.looks["alignment"]
    torch.testing.assert_close(looks.sum(-1)[pairs.valid], torch.ones(int(pairs.valid.sum())))
    for row in range(40):
        left = pairs.valid[row] & ~words[row]
        assert scores[row, words[row]].min() >= scores[row, left].max()  # equal where a text says a word twice
        relative = looks[row, words[row]].sum(0) / looks[row, pairs.valid[row]].mean(0)
        assert relative[patches[row]].min() >= relative[~patches[row]].max() - 1e-5


def test_co_occurrence_of_two_models_can_be_compared(model, processor, garments, tmp_path):
    train, test = garments.select(range(40)), garments.select(range(40, len(garments)))
    options = {"max_rows": 40, "train_rows": 20, "batch_size": 16, "others": 1}
    torch.manual_seed(5)
    other = type(model)(model.config).eval()
    results = [co_occurrence(one, processor, train, test, **options) for one in (model, other)]
    paths = [result.save(tmp_path / str(number)) for number, result in enumerate(results)]
    same, found = compare(paths[0], paths[0]), compare(*paths)
    assert {line.verdict for line in same.lines} == {SAME}
    lines = {line.name: line for line in found.lines}
    assert lines.keys() | {"words/item_auc/random", "words/view_auc/random"} == results[0].metrics.keys()
    for name, line in lines.items():
        values = [result.value(name) for result in results]
        assert line.change["value"] == pytest.approx(values[1] - values[0], abs=1e-12), name
        assert line.change["low"] <= line.change["value"] <= line.change["high"]
    kept = results[0].outcomes
    items = test.select_columns(["item_id"])[:]["item_id"]
    for quantity in ("words/precision", "patches/precision", "words/item_auc", "pointing/hit"):
        assert {name.split("/")[0] for name in kept.ids[quantity].tolist()} <= set(items), quantity
    assert {"back", "zip"} <= set(kept.ids["words/view_auc"].tolist())


def test_co_occurrence_needs_truth(model, processor, garments):
    plain = garments.select_columns(["image", "text", "item_id"])
    with pytest.raises(ValueError, match="ground truth"):
        co_occurrence(model, processor, garments, plain)


def test_pictures_of_a_model(model, processor, garments):
    rows = spread_rows(garments, 3)
    assert len(set(CorpusIndex.from_dataset(garments).item_ids[rows])) == 3
    for strategy in ("attention", "evidence"):
        pairs = mask_photos(model, processor, garments, rows, strategy=strategy)
        for pair, row in zip(pairs, rows):
            words = len(garments[int(row)]["words"])
            for masks in pair.masks:
                assert masks.words.shape == (words,) and masks.words.sum() == round(0.3 * words)
                assert masks.patches.shape == (4, 4) and masks.patches.sum() == round(0.4 * 16)
    search = text_searches(Gallery.of(model, processor, garments.select(range(20))), count=2, hits=3)[0]
    scores = [hit.score for hit in search.hits]
    assert scores == sorted(scores, reverse=True) and len(scores) == 3
    assert any(hit.right for hit in search.hits) == (search.rank <= 3)


# ------------------------------------------------------------------------------------------------------ run folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, model, processor):
    """A run as training leaves it: a final model, and a teacher that differs from it."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder / "final")
    processor.save_pretrained(folder / "final")
    checkpoint = folder / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}
    state["itm_head.bias"] += 1
    save_file(state, checkpoint / "teacher.safetensors")
    (checkpoint / "COMPLETE").touch()
    settings = "data:\n  corpus: garments\n  num_items: 60\n  image_size: 32\nobjective:\n  mask_strategy: attention\n"
    (folder / "config.yaml").write_text(settings, encoding="utf-8")
    return folder


def test_loading_finds_the_teacher_of_the_newest_complete_checkpoint(run, model):
    loaded = load_checkpoint(run / "final")
    assert loaded.run == run and loaded.settings["data"]["num_items"] == 60
    assert torch.equal(loaded.teacher.itm_head.bias, model.itm_head.bias + 1)
    assert torch.equal(loaded.model.itm_head.bias, model.itm_head.bias)
    embedding = loaded.teacher.syncmask.get_input_embeddings().weight
    assert loaded.teacher.mlm_head.decoder.weight is embedding
    assert len(loaded.about["sha256"]) == 64


def test_an_incomplete_checkpoint_is_not_taken(run, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "step_00000010" / "COMPLETE").unlink()
    loaded = load_checkpoint(copy)
    assert loaded.teacher is loaded.model
    shutil.rmtree(copy / "final")
    with pytest.raises(FileNotFoundError, match="neither a model"):
        load_checkpoint(copy)


def test_the_commands_write_results_and_report(run):
    runner = CliRunner()
    options = ["--max-rows", "20", "--batch-size", "16"]
    first = runner.invoke(app, ["evaluate", str(run), *options])
    assert first.exit_code == 0, first.output
    assert "chance" in first.output
    second = runner.invoke(app, ["evaluate", str(run / "final"), "--protocol", "co-occurrence", "--json", *options])
    assert second.exit_code == 0, second.output
    saved = Result.load(run / "results" / "co-occurrence.json")
    assert saved.model["sha256"] and saved.corpus["split"] == "test"
    third = runner.invoke(app, ["report", str(run)])
    assert third.exit_code == 0, third.output
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "synchronised (attention)" in page and "by chance" in page


def test_commands_end_in_one_line_where_the_user_can_mend_it(run, tmp_path):
    runner = CliRunner()
    wrong_split = runner.invoke(app, ["evaluate", str(run), "--split", "nope"])
    assert wrong_split.exit_code == 1 and "nope" in wrong_split.output
    assert runner.invoke(app, ["report", str(tmp_path)]).exit_code == 2
    empty = runner.invoke(app, ["evaluate", str(tmp_path)])
    assert empty.exit_code == 1 and "config.json" in empty.output and "Traceback" not in empty.output


def test_a_report_can_be_made_of_rows_at_hand(run, garments):
    splits = DatasetDict({"test": garments.select(range(30))})
    path = report_run(run, load_checkpoint(run), splits, summary=["10 steps"])
    assert "10 steps" in path.read_text(encoding="utf-8")
