"""Every head through `load_checkpoint` and the protocols: what it has is scored, what it lacks is said."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from syncmask import (
    SyncMaskConfig,
    SyncMaskForComposedImageRetrieval,
    SyncMaskForImageTextClassification,
    SyncMaskForImageTextRetrieval,
    SyncMaskForPreTraining,
)
from syncmask.evaluation.cli import app
from syncmask.evaluation.compare import SAME, compare
from syncmask.evaluation.composed import distinct_photos, query_encoder, retrieve_variants
from syncmask.evaluation.loading import load_checkpoint
from syncmask.evaluation.protocol_names import Protocol
from syncmask.evaluation.recognition import head_scorers, read_labels
from syncmask.evaluation.result import Result
from syncmask.evaluation.running import Request, run_protocol
from syncmask.processing.corpus import CorpusIndex
from syncmask.processing.garments_variants import make_garment_variants

HEADS = {
    "pretraining": SyncMaskForPreTraining,
    "retrieval": SyncMaskForImageTextRetrieval,
    "composed": SyncMaskForComposedImageRetrieval,
    "classification": SyncMaskForImageTextClassification,
}
UNSEEN = "dress"  # a label that the classification model does not know


@pytest.fixture(scope="module")
def models(processor, garments):
    ids = {"vocab_size": len(processor.tokenizer), "mask_token_id": processor.tokenizer.mask_token_id}
    labels = sorted(set(garments["category"]) - {UNSEEN})[::-1]  # in an order of its own
    found = {}
    for name, head in HEADS.items():
        torch.manual_seed(0)
        sets = {"label_sets": {"category": labels}} if name == "classification" else {}
        found[name] = head(SyncMaskConfig.tiny(image_size=32, **ids, **sets)).eval()
    return found


@pytest.fixture(scope="module")
def runs(models, processor, garments, tmp_path_factory):
    """A run folder a head, as training leaves it, with a corpus of splits."""
    root = tmp_path_factory.mktemp("runs")
    halves = {"train": garments.select(range(60)), "test": garments.select(range(60, len(garments)))}
    for name, rows in halves.items():
        rows.select_columns(["image", "text", "item_id", "view", "category"]).to_parquet(
            root / "shop" / f"{name}-00000-of-00001.parquet"
        )
    for name, model in models.items():
        model.save_pretrained(root / name / "final")
        processor.save_pretrained(root / name / "final")
        (root / name / "config.yaml").write_text(f"data:\n  corpus: {root / 'shop'}\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def triplets(tmp_path_factory):
    return make_garment_variants(12, image_size=32, cache_dir=str(tmp_path_factory.mktemp("variants")))


# ------------------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("name", HEADS)
def test_each_head_loads_as_what_it_is(name, runs, models):
    for path in (runs / name, runs / name / "final"):
        loaded = load_checkpoint(path)
        assert type(loaded.model) is HEADS[name] and loaded.teacher is loaded.model and not loaded.model.training
        assert loaded.run == runs / name and "none kept" in loaded.about["teacher"] and loaded.word_means == {}
        for key, tensor in models[name].state_dict().items():
            assert torch.equal(loaded.model.state_dict()[key], tensor), key


def test_a_checkpoint_of_finetuning_gives_its_own_weights(runs, models, tmp_path):
    run = shutil.copytree(runs / "composed", tmp_path / "composed")
    folder = run / "checkpoints" / "step_00000003"
    folder.mkdir(parents=True)
    changed = {name: tensor + 1 for name, tensor in models["composed"].state_dict().items()}
    save_file(changed, folder / "model.safetensors")
    loaded = load_checkpoint(folder)
    assert torch.equal(loaded.model.query_head.shares, torch.full((2,), 2.0)), "final/ was loaded instead"
    assert loaded.teacher is loaded.model
    assert loaded.about["sha256"] != load_checkpoint(run).about["sha256"]


def test_a_teacher_is_taken_where_one_was_kept(runs, models, tmp_path):
    run = shutil.copytree(runs / "pretraining", tmp_path / "pretraining")
    folder = run / "checkpoints" / "step_00000003"
    folder.mkdir(parents=True)
    weights = models["pretraining"].state_dict()
    weights.pop("mlm_head.decoder.weight")  # tied, so it is kept once
    for name, shift in (("model", 1), ("teacher", 2)):
        save_file({key: tensor + shift for key, tensor in weights.items()}, folder / f"{name}.safetensors")
    incomplete = load_checkpoint(run)
    assert incomplete.teacher is incomplete.model
    (folder / "COMPLETE").write_text("")
    loaded = load_checkpoint(run)
    bias = models["pretraining"].itm_head.bias
    assert torch.equal(loaded.model.itm_head.bias, bias) and torch.equal(loaded.teacher.itm_head.bias, bias + 2)
    own = load_checkpoint(folder)
    assert torch.equal(own.model.itm_head.bias, bias + 1) and torch.equal(own.teacher.itm_head.bias, bias + 2)


def test_other_models_are_refused(tmp_path, models):
    models["composed"].syncmask.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="base is a SyncMaskModel; wanted one of SyncMaskForPreTraining, "):
        load_checkpoint(tmp_path / "base")


# ----------------------------------------------------------------------------------------------------- colour variants


def test_the_gallery_holds_every_photo_once(triplets):
    shuffled = triplets.select(np.random.default_rng(0).permutation(len(triplets)))
    gallery, place = distinct_photos(shuffled)
    assert sorted(gallery["item_id"]) == sorted(triplets["item_id"]), "each variant is a target once"
    for row, at in zip(shuffled, place):
        shown = gallery[int(at)]
        assert shown["item_id"] == row["candidate_id"]
        assert np.array_equal(np.asarray(shown["image"]), np.asarray(row["candidate"]))


def test_variants_are_retrieved_by_the_query_head(models, processor, triplets, monkeypatch):
    model = models["composed"]
    found = retrieve_variants(model, processor, triplets, batch_size=7)
    assert found.corpus["gallery"] == found.corpus["items"] == len(triplets) and found.corpus["products"] == 12
    # An untrained head is the sum of both towers.
    assert found.metrics["all/recall@5/composed"] == found.metrics["all/recall@5/sum"]
    assert found.value("all/recall@1/image_only") == 0, "the reference stays in the gallery"
    assert found.value("all/recall@1/chance") == pytest.approx(1 / len(triplets))
    feats = {row["item_id"]: embed(model, processor, row["image"]) for row in triplets}
    with torch.no_grad():
        model.query_head.dense.weight.normal_(generator=torch.Generator().manual_seed(0))
    try:
        found = retrieve_variants(model, processor, triplets, batch_size=7)
        hits = []
        for row in triplets:
            query = query_encoder(model, processor)([row["candidate"]], [row["text"]])[0]
            scores = {item: float(query @ one) for item, one in feats.items()}
            hits.append(sum(score >= scores[row["item_id"]] - 1e-6 for score in scores.values()) <= 5)
        assert found.value("all/recall@5/composed") == pytest.approx(np.mean(hits))
        shuffled = triplets.select(np.random.default_rng(1).permutation(len(triplets)))
        again = retrieve_variants(model, processor, shuffled, batch_size=50)
        assert again.candidates_sha256 == found.candidates_sha256 and again.metrics == found.metrics
    finally:
        with torch.no_grad():
            model.query_head.dense.weight.zero_()


def embed(model, processor, photo):
    with torch.no_grad():
        pixels = processor(images=[photo])["pixel_values"]
        return model.syncmask.get_image_features(pixels).pooler_output[0].numpy()


def test_variants_without_a_query_head_give_the_baselines(models, processor, triplets):
    found = retrieve_variants(models["pretraining"], processor, triplets, max_rows=20)
    assert {name.split("/")[2] for name in found.metrics} == {"image_only", "text_only", "sum", "chance"}
    assert found.corpus["rows"] <= 20 and found.corpus["products"] < 12


def test_variants_need_triplets(models, processor, triplets, garments):
    with pytest.raises(ValueError, match="no columns candidate and candidate_id.*--variants PRODUCT_COLUMN"):
        retrieve_variants(models["composed"], processor, garments)
    with pytest.raises(ValueError, match="no product of it has two colours"):
        retrieve_variants(models["composed"], processor, triplets.select([]))


def test_fashioniq_takes_the_query_head(runs, write_fashioniq, garments, tmp_path):
    loaded = load_checkpoint(runs / "composed")
    loaded.settings = {"data": {"corpus": str(write_fashioniq(tmp_path / "fashioniq", garments))}}
    found = run_protocol(loaded, Request(Protocol.FASHIONIQ_VAL))
    for score in ("", "_swapped", "_both_orders"):
        one, other = (found.metrics[f"all/mean_recall/{name}{score}"] for name in ("composed", "sum"))
        assert one == other


# --------------------------------------------------------------------------------------------------------- recognition


def test_a_classification_head_is_scored_by_photo_text_and_both(models, processor, garments):
    model, rows = models["classification"], garments.select(range(9))
    scorers = head_scorers(model, processor, "category", batch_size=4)
    found = {name: scorer(rows) for name, scorer in scorers.items()}
    inputs = processor(images=[row["image"] for row in rows], text=list(rows["text"]))
    drop = torch.ones(9, dtype=torch.bool)
    with torch.no_grad():
        wanted = {
            "fused": model(**inputs).logits,
            "image_only": model(**inputs, drop_text=drop).logits,
            "text_only": model(**inputs, drop_image=drop).logits,
        }
    assert found.keys() == wanted.keys()
    for name, logits in wanted.items():
        np.testing.assert_allclose(found[name], logits, atol=1e-5, err_msg=name)


def test_recognition_goes_by_the_models_own_labels(runs, models, garments, caplog):
    loaded = load_checkpoint(runs / "classification")
    with caplog.at_level(logging.WARNING):
        found = run_protocol(loaded, Request(Protocol.RECOGNITION_CATEGORY))
    labels = models["classification"].config.label_sets["category"]
    assert found.candidates.arrays["labels"].tolist() == found.corpus["label_list"] == labels
    assert found.corpus["label_source"] == "the model"
    truth = garments.select(range(60, len(garments)))["category"]
    unknown = sum(label == UNSEEN for label in truth)
    assert unknown and found.corpus["unknown_labels"] == {UNSEEN: unknown}
    assert f"'{UNSEEN}' ({unknown} rows)" in caplog.text
    scores = {name.split("/")[2] for name in found.metrics}
    assert scores == {"fused", "image_only", "text_only", "zero_shot", "commonest", "chance"}
    assert found.value("category/accuracy/chance") == pytest.approx(1 / len(labels))
    kept = found.outcomes.values["category/fused"]
    assert (kept[kept[:, 0] >= len(labels)][:, 1] < len(labels)).all(), "unknown labels are never right"


def test_models_without_labels_take_a_file_or_the_train_split(runs, tmp_path):
    loaded = load_checkpoint(runs / "retrieval")
    found = run_protocol(loaded, Request(Protocol.RECOGNITION_CATEGORY))
    assert found.corpus["label_source"] == "the train split"
    labels = found.candidates.arrays["labels"].tolist()
    (tmp_path / "labels.txt").write_text("\n".join([*labels[::-1], "kilt", ""]))
    given = run_protocol(loaded, Request(Protocol.RECOGNITION_CATEGORY, labels=tmp_path / "labels.txt"))
    assert given.candidates.arrays["labels"].tolist() == [*labels[::-1], "kilt"]
    assert given.corpus["label_source"].endswith("labels.txt")
    with pytest.raises(ValueError, match="own, which its head is for"):
        asked = Request(Protocol.RECOGNITION_CATEGORY, labels=tmp_path / "labels.txt")
        run_protocol(load_checkpoint(runs / "classification"), asked)
    with pytest.raises(ValueError, match="tells apart category, not subcategory"):
        run_protocol(load_checkpoint(runs / "classification"), Request(Protocol.RECOGNITION_SUBCATEGORY))


def test_label_files(tmp_path):
    def read(content):
        (tmp_path / "labels").write_text(content, encoding="utf-8")
        return read_labels(tmp_path / "labels")

    assert read('["b", "a b"]') == read("b\n a b \n\n") == ["b", "a b"]
    for content, message in (
        ("[1, 2]", "more than strings"),
        ("[a", "none: "),
        ("a\nb\na", "'a'.* twice"),
        ("\n", "no label"),
    ):
        with pytest.raises(ValueError, match=message):
            read(content)


# -------------------------------------------------------------------------------------------- what a head cannot do


@pytest.mark.parametrize("name", HEADS)
def test_items_without_a_matching_head_is_itc_alone(name, runs, caplog):
    with caplog.at_level(logging.WARNING):
        found = run_protocol(load_checkpoint(runs / name), Request(Protocol.ITEMS, rerank_k=2, max_rows=20))
    matches = name in ("pretraining", "retrieval")
    assert any(metric.endswith("/itm") for metric in found.metrics) is matches
    assert ("no matching head" in caplog.text) is not matches
    assert "both_ways/mean_recall/itc" in found.metrics


def test_heads_can_be_compared_by_what_they_share(runs, tmp_path):
    request = Request(Protocol.ITEMS, rerank_k=2, max_rows=20)
    paths = [run_protocol(load_checkpoint(runs / n), request).save(tmp_path / n) for n in ("retrieval", "composed")]
    found = compare(*paths)
    assert found.lines and all("itm" not in line.name for line in found.lines)
    assert all("itm" in name for name in found.left_out)
    assert {line.verdict for line in found.lines} == {SAME}, "both have the same towers"


@pytest.mark.parametrize("name", ["retrieval", "composed", "classification"])
def test_co_occurrence_is_of_pretraining(name, runs):
    with pytest.raises(ValueError, match="measures the masks of pretraining.*Evaluate the pretraining run"):
        run_protocol(load_checkpoint(runs / name), Request(Protocol.CO_OCCURRENCE))


def test_a_broken_photo_is_named_with_its_mend(runs, tmp_path, garments):
    for number, row in enumerate(garments.select(range(8))):
        row["image"].save(tmp_path / f"{number}.png")
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:200])
    lines = [{"file_name": f"{n}.png", "text": f"text {n}", "item_id": str(n)} for n in range(8)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    corpus = tmp_path / "train"
    corpus.mkdir()
    done = [
        CliRunner().invoke(app, ["evaluate", str(runs / "retrieval"), "--corpus", str(tmp_path), "--split", split])
        for split in ("train", "validation", "test")
    ]
    (failed,) = [one for one in done if one.exit_code and "5.png" in one.output]
    assert "convert SOURCE OUT --verify" in failed.output and "Traceback" not in failed.output


# ------------------------------------------------------------------------------------------------------- command line


def test_from_the_command_line(runs, triplets, tmp_path):
    triplets.save_to_disk(tmp_path / "triplets")
    done = CliRunner().invoke(
        app,
        ["evaluate", str(runs / "composed"), "--protocol", "colour-variants", "--corpus", str(tmp_path / "triplets")],
    )
    assert done.exit_code == 0 and "composed" in done.output, done.output
    result = Result.load(runs / "composed" / "results" / "colour-variants.json")
    assert result.corpus["name"] == str(tmp_path / "triplets") and result.queries_sha256

    def fail(*options):
        done = CliRunner().invoke(app, ["evaluate", str(runs / "composed"), *options])
        assert done.exit_code == 1 and "Traceback" not in done.output, done.output
        return done.output

    assert "no label list" in fail("--labels", "x.txt")
    assert "leave --variants away" in fail("--variants", "a,b")
    assert "need the column 'sku'" in fail("--protocol", "colour-variants", "--variants", "sku,color")
    assert len(CorpusIndex.from_dataset(triplets).item_ids) == len(triplets)
