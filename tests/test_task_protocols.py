"""The protocols of the field: pure parts against loops on random scores with ties, then whole runs on a tiny model."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from syncmask import SyncMaskConfig, SyncMaskForPreTraining
from syncmask.evaluation import ranking
from syncmask.evaluation.candidates import WAYS, Candidates, draw_by_item, draw_by_view
from syncmask.evaluation.cli import app
from syncmask.evaluation.compare import SAME, compare
from syncmask.evaluation.composed import Gallery, Queries, composed_outcomes, fashioniq, joined_captions
from syncmask.evaluation.fashiongen import fashiongen_sampled, pool_of, sampled_outcomes
from syncmask.evaluation.protocols import BOTH, fashiongen_full, items, retrieval_outcomes
from syncmask.evaluation.recognition import label_list, recognition, recognition_outcomes, zero_shot
from syncmask.evaluation.result import Result
from syncmask.processing.readers_fashioniq import load_fashioniq


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    ids = {"vocab_size": len(processor.tokenizer), "mask_token_id": processor.tokenizer.mask_token_id}
    return SyncMaskForPreTraining(SyncMaskConfig.tiny(image_size=32, **ids)).eval()


@pytest.fixture(scope="module")
def shop(garments):
    """The generated corpus with labels, as FashionGen has them."""
    return garments.add_column("subcategory", [kind.upper() for kind in garments["category"]])


def coarse(rng, rows, width=3):
    """Unit-length features of few distinct directions: their cosines are full of ties."""
    feats = rng.integers(-1, 2, size=(rows, width)).astype(np.float32)
    feats[:, 0] += 0.5
    return feats / np.linalg.norm(feats, axis=1, keepdims=True)


def slow_rank(scores, right):
    best = max(score for score, good in zip(scores, right) if good)
    return 1 + sum(score >= best - 1e-6 and not good for score, good in zip(scores, right))


# -------------------------------------------------------------------------------------------------- whole galleries


@pytest.mark.parametrize("seed", range(5))
def test_whole_galleries_match_loops_with_ties(seed):
    rng = np.random.default_rng(seed)
    photo_items = np.sort(np.concatenate([np.arange(12), rng.integers(0, 12, size=20)]))
    images, texts, text_ids = coarse(rng, 32), coarse(rng, 12), rng.integers(0, 8, size=12)
    texts = texts[text_ids]  # equal texts, equal features
    found = retrieval_outcomes(images, texts, photo_items, np.arange(12), text_ids=text_ids, directions=BOTH)
    for photo, item in enumerate(photo_items):
        scores = [float(images[photo].astype(float) @ text) for text in texts.astype(float)]
        own = [other == item for other in range(12)]
        equal = [text_ids[other] == text_ids[item] for other in range(12)]
        assert found.values["image_to_text/itc"][photo] == slow_rank(scores, own)
        assert found.values["image_to_text/itc_duplicates"][photo] == slow_rank(scores, equal)
    for item in range(12):
        scores = [float(image @ texts[item].astype(float)) for image in images.astype(float)]
        assert found.values["text_to_image/itc"][item] == slow_rank(scores, [one == item for one in photo_items])
    metrics = found.metrics()
    ranks = found.values["image_to_text/itc"], found.values["text_to_image/itc"]
    six = np.mean([[np.mean(rank <= k) for k in (1, 5, 10)] for rank in ranks])
    assert metrics["both_ways/mean_recall/itc"]["value"] == pytest.approx(six)
    assert not any("photo_to_photo" in name for name in metrics)


def test_neither_chunks_nor_the_order_of_rows_change_a_rank(monkeypatch):
    rng = np.random.default_rng(0)
    items_of = np.repeat(np.arange(150), 3)
    images, texts = rng.normal(size=(450, 64)), rng.normal(size=(150, 64))
    images = (images / np.linalg.norm(images, axis=1, keepdims=True)).astype(np.float32)
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    whole = retrieval_outcomes(images, texts, items_of, np.arange(150))
    monkeypatch.setattr(ranking, "CHUNK_SCORES", 1000)
    order, turned = rng.permutation(450), rng.permutation(150)
    parts = retrieval_outcomes(images[order], texts[turned], items_of[order], turned)
    assert (parts.values["image_to_text/itc"] == whole.values["image_to_text/itc"][order]).all()
    assert (parts.values["text_to_image/itc"] == whole.values["text_to_image/itc"][turned]).all()
    assert (parts.values["photo_to_photo/itc"] == whole.values["photo_to_photo/itc"][order]).all()


SIZE = """
import re, time
from pathlib import Path
import numpy as np
from syncmask.evaluation.protocols import BOTH, retrieval_outcomes
rng = np.random.default_rng(0)
items = np.sort(np.concatenate([np.arange(7500), rng.integers(0, 7500, 32528 - 7500)]))
images, texts = (rng.normal(size=(rows, 256)).astype(np.float32) / 16 for rows in (32528, 7500))
start = time.process_time()
metrics = retrieval_outcomes(images, texts, items, np.arange(7500), text_ids=np.arange(7500), directions=BOTH).metrics()
seconds = time.process_time() - start
# Not ru_maxrss: a process inherits that of the one which started it.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(seconds, peak / 2**20)
"""


@pytest.mark.slow
def test_the_full_fashiongen_ranking_fits_a_small_machine():
    done = subprocess.run([sys.executable, "-c", SIZE], capture_output=True, text=True, timeout=600, check=True)
    seconds, gigabytes = map(float, done.stdout.split())
    assert gigabytes < 1 and seconds < 120, f"{seconds:.0f} CPU seconds (two cores: a minute), {gigabytes:.2f} GiB"


# ------------------------------------------------------------------------------------------------- 1 + 100 candidates


@pytest.mark.parametrize("draw", [draw_by_item, draw_by_view])
@pytest.mark.parametrize("seed", range(3))
def test_sampled_ranks_match_loops_with_ties(shop, draw, seed):
    rng = np.random.default_rng(seed)
    pool = pool_of(shop)
    lists = draw(pool, queries=15, negatives=12, draws=3, seed=seed)
    images, texts = coarse(rng, len(pool.photos)), coarse(rng, len(pool.items))
    text_ids = rng.integers(0, 20, size=len(pool.items))

    def matching(photo, item):
        return np.round(np.sin(photo * 7.0 + item * 3.0), 1)

    found = sampled_outcomes(
        images,
        texts,
        lists,
        item_of_photo=pool.item_of_photo,
        text_ids=text_ids,
        matching=matching,
        rerank_k=13,
        ks=(1, 5),
    )
    for way in WAYS:
        queries, listed = (lists.arrays[f"{way}/{kind}"] for kind in ("queries", "candidates"))
        expected = {"itc": [], "itc_duplicates": [], "itm": []}
        for query, row in zip(queries.reshape(-1), listed.reshape(-1, 13)):
            forward = way == "image_to_text"
            mine, theirs = (images[query], texts[row]) if forward else (texts[query], images[row])
            cosines = [float(one) for one in theirs.astype(float) @ mine.astype(float)]
            kinds = text_ids[row if forward else pool.item_of_photo[row]]
            expected["itc"].append(slow_rank(cosines, [True] + [False] * 12))
            expected["itc_duplicates"].append(slow_rank(cosines, kinds == kinds[0]))
            # All 13 are re-ranked, so the matching head alone decides.
            matched = [matching(query, one) if forward else matching(one, query) for one in row]
            expected["itm"].append(slow_rank(matched, [True] + [False] * 12))
        for score, ranks in expected.items():
            assert found.values[f"{way}/{score}"].tolist() == ranks, (way, score)
        by_draw = (np.array(expected["itc"]).reshape(3, -1) <= 5).mean(axis=1)
        metrics = found.metrics()
        assert metrics[f"{way}/recall@5/itc"]["value"] == pytest.approx(by_draw.mean())
        assert metrics[f"{way}/recall@5_sd/itc"]["value"] == pytest.approx(by_draw.std(ddof=1))
        assert metrics[f"{way}/recall@5/chance"]["value"] == pytest.approx(5 / 13)
        assert metrics[f"{way}/recall@5/itc"]["n"] == len(set(queries.reshape(-1).tolist()))


def test_random_features_hit_by_chance(shop):
    rng, pool = np.random.default_rng(0), pool_of(shop)
    lists = draw_by_view(pool, negatives=19, draws=20)
    feats = [rng.normal(size=(len(ids), 16)) for ids in (pool.photos, pool.items)]
    feats = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in feats]
    own = np.arange(len(pool.items))
    metric = sampled_outcomes(*feats, lists, item_of_photo=pool.item_of_photo, text_ids=own).metrics()
    found = metric["image_to_text/recall@5/itc"]
    assert found["low"] <= 0.25 <= found["high"]


@pytest.mark.parametrize("name", ["fashiongen-sampled-item", "fashiongen-sampled-view"])
def test_sampled_protocols_run_and_their_lists_can_be_used_again(model, processor, shop, tmp_path, name):
    result = fashiongen_sampled(name, model, processor, shop, corpus_name="garments", rerank_k=3, max_rows=60)
    path = result.save(tmp_path)
    assert 0 < result.corpus["same_subcategory"] <= 1 and result.corpus["draws"] == 5
    frozen = Candidates.load(path.with_name(f"{name}.candidates.npz"))
    assert frozen.sha256 == result.candidates_sha256
    shuffled = shop.select(np.random.default_rng(0).permutation(len(shop)))
    options = {"rerank_k": 3, "max_rows": 60}
    again = fashiongen_sampled(name, model, processor, shuffled, candidates=frozen, seed=0, batch_size=7, **options)
    assert again.candidates_sha256 == result.candidates_sha256
    assert again.metrics["both_ways/mean_recall/chance"] == result.metrics["both_ways/mean_recall/chance"]
    queries = again.save(tmp_path / "again")
    assert {line.verdict for line in compare(path, queries).lines} == {SAME}
    with pytest.raises(ValueError, match="another corpus"):
        fashiongen_sampled(name, model, processor, shop.select(range(12)), candidates=frozen)


def test_whole_protocols_do_not_change_with_the_order_of_rows_or_the_batch(model, processor, shop):
    one_view = shop.select(np.unique([f"{i}/{v}" for i, v in zip(shop["item_id"], shop["view"])], return_index=True)[1])
    shuffled = one_view.select(np.random.default_rng(1).permutation(len(one_view)))
    for protocol in (items, fashiongen_full):
        one = protocol(model, processor, one_view, max_rows=50, rerank_k=4, rerank_queries=5, batch_size=50)
        other = protocol(model, processor, shuffled, max_rows=50, rerank_k=4, rerank_queries=5, batch_size=9)
        assert one.candidates_sha256 == other.candidates_sha256
        assert json.dumps(one.metrics) == json.dumps(other.metrics)
        assert one.corpus["fingerprint"].split("-")[1:] == other.corpus["fingerprint"].split("-")[1:]
    assert one.protocol == "fashiongen-full" and not any("tolerant" in name for name in one.metrics)


# ------------------------------------------------------------------------------------------------- composed retrieval


def composed_case(seed):
    rng = np.random.default_rng(seed)
    galleries = {
        kind: Gallery(np.array([f"{kind}{n:02d}" for n in rng.permutation(size)]), coarse(rng, size))
        for kind, size in (("dress", 30), ("shirt", 60))
    }
    kinds = rng.choice(["dress", "shirt"], size=25)
    targets = np.array([rng.choice(galleries[kind].ids) for kind in kinds])
    references = np.array([rng.choice(galleries[kind].ids) for kind in kinds])
    return Queries(references, targets, kinds), galleries, coarse(rng, 25), coarse(rng, 25)


@pytest.mark.parametrize("seed", range(4))
def test_composed_retrieval_matches_loops_with_ties(seed):
    queries, galleries, feats, swapped = composed_case(seed)
    found = composed_outcomes({"composed": feats, "composed_swapped": swapped}, queries, galleries).metrics()
    recalls = {}
    for score, part in (("composed", feats), ("composed_swapped", swapped)):
        for kind in ("dress", "shirt"):
            gallery = galleries[kind]
            ranks = [
                slow_rank(list(gallery.feats.astype(float) @ part[row].astype(float)), gallery.ids == target)
                for row, target in enumerate(queries.targets)
                if queries.categories[row] == kind
            ]
            for k in (10, 50):
                recalls[score, kind, k] = np.mean(np.array(ranks) <= k)
                assert found[f"{kind}/recall@{k}/{score}"]["value"] == pytest.approx(recalls[score, kind, k])
        six = np.mean([value for (name, _, _), value in recalls.items() if name == score])
        assert found[f"all/mean_recall/{score}"]["value"] == pytest.approx(six)
    assert found["all/mean_recall/composed_both_orders"]["value"] == pytest.approx(np.mean(list(recalls.values())))
    assert found["dress/recall@10/chance"]["value"] == pytest.approx(1 / 3)
    assert found["dress/recall@50/chance"]["value"] == 1


def test_the_order_of_queries_and_galleries_changes_nothing():
    queries, galleries, feats, swapped = composed_case(9)
    one = composed_outcomes({"composed": feats, "composed_swapped": swapped}, queries, galleries)
    order = np.random.default_rng(0).permutation(25)
    turned = Queries(queries.references[order], queries.targets[order], queries.categories[order])
    mixed = {kind: Gallery(gallery.ids[::-1], gallery.feats[::-1]) for kind, gallery in galleries.items()}
    other = composed_outcomes({"composed": feats[order], "composed_swapped": swapped[order]}, turned, mixed)
    assert one.metrics() == other.metrics()


def test_any_photo_of_the_wanted_item_is_a_hit_and_families_are_resampled_together():
    rng = np.random.default_rng(4)
    items = np.array([f"item{n // 3}" for n in range(30)])
    gallery = {"all": Gallery(np.array([f"photo{n:02d}" for n in range(30)]), coarse(rng, 30), items)}
    targets, families = rng.choice(items, size=24), np.array([f"family{n % 5}" for n in range(24)])
    queries = Queries(rng.choice(gallery["all"].ids, size=24), targets, np.full(24, "all"), families)
    feats = coarse(rng, 24)
    outcomes = composed_outcomes({"composed": feats}, queries, gallery, ks=(1, 5, 40))
    order = np.argsort(queries.names, kind="stable")
    ranks = [
        slow_rank(list(gallery["all"].feats.astype(float) @ feats[row].astype(float)), items == targets[row])
        for row in order
    ]
    assert outcomes.values["all/composed"].tolist() == ranks
    assert outcomes.ids["all_queries"].tolist() == queries.names[order].tolist()
    assert outcomes.ids["all"][outcomes.units["all/composed"]].tolist() == families[order].tolist()
    found = outcomes.metrics()
    assert found["all/recall@5/composed"]["value"] == pytest.approx(np.mean(np.array(ranks) <= 5))
    assert found["all/recall@5/composed"]["n"] == 5, "five families, not 24 queries"
    misses = np.prod([(27 - drawn) / (30 - drawn) for drawn in range(5)])
    assert found["all/recall@5/chance"]["value"] == pytest.approx(1 - misses)
    assert found["all/recall@40/chance"]["value"] == 1
    assert [name for name in found if name.endswith("composed")] == [
        f"all/{figure}/composed" for figure in ("recall@1", "recall@5", "recall@40", "mean_recall")
    ]


def test_a_model_that_returns_the_reference_gains_nothing():
    ids = np.array(["a", "b", "c"])
    gallery = {"dress": Gallery(ids, np.eye(3, dtype=np.float32))}
    queries = Queries(ids, np.array(["b", "c", "a"]), np.full(3, "dress"))
    found = composed_outcomes({"image_only": np.eye(3, dtype=np.float32)}, queries, gallery, ks=(1,)).metrics()
    assert found["dress/recall@1/image_only"]["value"] == 0, "the reference stays in the gallery"


def test_galleries_are_checked():
    queries, galleries, feats, _ = composed_case(0)
    with pytest.raises(ValueError, match="not in the gallery"):
        short = {kind: Gallery(gallery.ids[:2], gallery.feats[:2]) for kind, gallery in galleries.items()}
        composed_outcomes({"x": feats}, queries, short)
    with pytest.raises(ValueError, match="only galleries of"):
        composed_outcomes({"x": feats}, queries, {"dress": galleries["dress"]})
    with pytest.raises(ValueError, match="twice"):
        twice = {kind: Gallery(np.full(60, "z"), gallery.feats) for kind, gallery in galleries.items()}
        composed_outcomes({"x": feats}, queries, twice)


def test_captions_are_joined_in_both_orders():
    joined = joined_captions([["is red", "is long "], ["", "is blue"]])
    assert joined == {"": ["is red and is long", "is blue"], "_swapped": ["is long and is red", "is blue"]}


@pytest.fixture(scope="module")
def fashioniq_folder(garments, tmp_path_factory):
    """A folder in FashionIQ's layout: 30 gallery photos a category, 12 validation triplets, one photo missing."""
    root = tmp_path_factory.mktemp("fashion_iq")
    for name in ("captions", "image_splits", "images"):
        (root / name).mkdir()
    for number, kind in enumerate(("dress", "shirt", "toptee")):
        ids = [f"{kind}{row:02d}" for row in range(30)]
        for row, one in enumerate(ids[:-1]):
            garments[number * 30 + row]["image"].save(root / "images" / f"{one}.png")
        for split, first in (("train", 12), ("val", 0)):
            entries = [
                {"candidate": ids[row + 1], "target": ids[row], "captions": ["is red", f"has {row} buttons"]}
                for row in range(first, first + 12)
            ]
            (root / "captions" / f"cap.{kind}.{split}.json").write_text(json.dumps(entries))
            (root / "image_splits" / f"split.{kind}.{split}.json").write_text(json.dumps(ids))
    return root


def test_fashioniq_runs_with_baselines_and_with_a_composing_model(model, processor, fashioniq_folder):
    data, asked = load_fashioniq(fashioniq_folder), []

    def encode_query(photos, texts):
        asked.extend(texts)
        return np.full((len(photos), model.config.projection_dim), model.config.projection_dim**-0.5)

    found = fashioniq("fashioniq-val", model, processor, data, encode_query=encode_query, batch_size=5)
    assert found.corpus["gallery"] == {"dress": 13, "shirt": 13, "toptee": 13}
    assert "is red and has 3 buttons" in asked and "has 3 buttons and is red" in asked
    for score in ("composed", "composed_both_orders", "image_only", "text_only_swapped", "sum_both_orders", "chance"):
        assert 0 <= found.value(f"all/recall@10/{score}") <= 1
    assert found.value("dress/recall@10/chance") == pytest.approx(10 / 13)
    recalls = [found.value(f"{kind}/recall@{k}/image_only") for kind in found.corpus["gallery"] for k in (10, 50)]
    assert found.value("all/mean_recall/image_only") == pytest.approx(np.mean(recalls))


def test_the_original_gallery_is_larger_and_missing_photos_are_told(model, processor, fashioniq_folder):
    data = load_fashioniq(fashioniq_folder)
    small, large = (fashioniq(f"fashioniq-{name}", model, processor, data) for name in ("val", "original"))
    assert large.corpus["gallery"] == {"dress": 29, "shirt": 29, "toptee": 29}
    assert large.corpus["missing_photos"] == 3 and large.corpus["comparable"] is False
    assert small.candidates_sha256 != large.candidates_sha256
    for score in ("image_only", "sum_both_orders", "chance"):
        assert large.value(f"all/recall@10/{score}") <= small.value(f"all/recall@10/{score}")


# -------------------------------------------------------------------------------------------------------- recognition


def test_recognition_counts_unknown_labels_as_wrong_and_never_as_class_0():
    truth, labels = ["a", "b", "b", "corset"], ["a", "b", "c"]
    logits = np.array([[2, 1, 0], [0, 3, 1], [0, 1, 3], [9, 0, 0]], dtype=np.float32)
    with pytest.raises(ValueError, match="corset"):
        recognition_outcomes({"fused": logits}, truth, labels)
    found = recognition_outcomes({"fused": logits}, truth, labels, unknown="wrong").metrics()
    assert found["category/accuracy/fused"]["value"] == pytest.approx(2 / 4)
    f1 = {"a": 2 * 1 / (1 + 2), "b": 2 * 1 / (2 + 1), "corset": 0}
    assert found["category/macro_f1/fused"]["value"] == pytest.approx(np.mean(list(f1.values())))
    assert found["category/macro_f1_union/fused"]["value"] == pytest.approx(np.mean([*f1.values(), 0]))
    assert found["category/accuracy/commonest"]["value"] == 0.5
    assert found["category/accuracy/chance"]["value"] == pytest.approx(1 / 3)


def test_the_denominator_of_macro_f1_does_not_move_with_the_model():
    truth, labels = ["a"] * 5 + ["b"] * 5, list("abcdefgh")
    right = np.array(truth)
    stray = right.copy()
    stray[:4] = ["c", "d", "e", "f"]
    found = recognition_outcomes({"right": right, "stray": stray}, truth, labels).metrics()
    assert found["category/macro_f1/right"]["value"] == 1
    assert found["category/macro_f1/stray"]["value"] == pytest.approx((2 * 1 / 6 + 1) / 2)
    assert found["category/macro_f1_union/stray"]["value"] == pytest.approx((2 * 1 / 6 + 1) / 6)
    flat = recognition_outcomes({"flat": np.zeros((10, 8))}, truth, labels).metrics()
    assert flat["category/accuracy/flat"]["value"] == 0, "a collapsed model gets no luck"


def test_predictions_are_checked():
    with pytest.raises(ValueError, match="not in the list"):
        recognition_outcomes({"x": np.array(["a", "z"])}, ["a", "a"], ["a", "b"])
    with pytest.raises(ValueError, match="one column a label"):
        recognition_outcomes({"x": np.zeros((2, 3))}, ["a", "a"], ["a", "b"])


def test_recognition_runs_without_a_head(model, processor, shop):
    labels, commonest = label_list(shop, "subcategory")
    assert labels == sorted(set(shop["subcategory"])) and commonest in labels
    scorers = {"zero_shot": zero_shot(model, processor, labels[1:])}
    result = recognition("recognition-subcategory", shop, labels[1:], scorers, max_rows=40)
    assert result.corpus["labels"] == len(labels) - 1 and set(result.corpus["unknown_labels"]) <= {labels[0]}
    assert 0 <= result.value("subcategory/accuracy/zero_shot") <= 1
    shuffled = shop.select(np.random.default_rng(0).permutation(len(shop)))
    again = recognition("recognition-subcategory", shuffled, labels[1:], scorers, max_rows=40)
    assert again.candidates_sha256 == result.candidates_sha256
    with pytest.raises(ValueError, match="needs a column 'category'"):
        recognition("recognition-category", shop.remove_columns("category"), labels, scorers)
    with pytest.raises(ValueError, match="no label list"):
        label_list(shop.remove_columns("category"), "category")


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def run(tmp_path_factory, model, processor, shop):
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder / "final")
    processor.save_pretrained(folder / "final")
    (folder / "config.yaml").write_text("objective:\n  mask_strategy: random\n", encoding="utf-8")
    parquet = folder / "shop"
    parquet.mkdir()
    halves = {"train": shop.select(range(60)), "validation": shop.select(range(60, len(shop)))}
    for name, rows in halves.items():
        rows.select_columns(["image", "text", "item_id", "view", "category", "subcategory"]).to_parquet(
            parquet / f"{name}-00000-of-00001.parquet"
        )
    return folder


def test_fashioniq_runs_from_the_command_line(run, fashioniq_folder):
    command = ["evaluate", str(run), "--protocol", "fashioniq-original", "--corpus", str(fashioniq_folder)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "sum_both_orders" in done.output, done.output
    assert Result.load(run / "results" / "fashioniq-original.json").model["sha256"]
    refused = CliRunner().invoke(app, [*command, "--max-rows", "5"])
    assert refused.exit_code == 1 and "all of validation" in refused.output


@pytest.mark.parametrize(
    "protocol",
    ["fashiongen-full", "fashiongen-sampled-item", "fashiongen-sampled-view", "recognition-subcategory"],
)
def test_every_protocol_runs_from_the_command_line(run, protocol):
    command = ["evaluate", str(run), "--protocol", protocol, "--corpus", str(run / "shop"), "--rerank-k", "2"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    result = Result.load(run / "results" / f"{protocol}.json")
    assert result.corpus["split"] == "validation" and result.queries_sha256 and len(result.candidates_sha256) == 64
    assert (run / "results" / f"{protocol}.candidates.npz").is_file()


def test_the_command_line_says_what_is_wrong(run):
    def fail(*options):
        done = CliRunner().invoke(app, ["evaluate", str(run), *options])
        assert done.exit_code == 1 and "Traceback" not in done.output, done.output
        return done.output

    shop = str(run / "shop")
    assert "say which" in fail("--protocol", "items")
    assert "--corpus" in fail("--protocol", "fashioniq-val")
    assert "draws no candidates" in fail("--protocol", "items", "--corpus", shop, "--candidates", "x.npz")
    assert "does not exist" in fail("--protocol", "fashiongen-sampled-item", "--corpus", shop, "--candidates", "x.npz")
    assert "--split" in fail("--corpus", shop, "--split", "nope")
