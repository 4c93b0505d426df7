"""Stock pipelines with the task heads, and the project's own: retrieval and composed retrieval."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import pipeline

from syncmask import (
    SyncMaskComposedRetrievalPipeline,
    SyncMaskConfig,
    SyncMaskForComposedImageRetrieval,
    SyncMaskForImageTextClassification,
    SyncMaskForImageTextRetrieval,
    SyncMaskForPreTraining,
    SyncMaskRetrievalPipeline,
)

LABEL_SETS = {"subcategory": ["jeans", "skirt", "shirt"], "category": ["bottoms", "tops"]}


@pytest.fixture(scope="module")
def photos(garments):
    """Six photos of different items."""
    first = {item: row for row, item in reversed(list(enumerate(garments["item_id"])))}
    return [garments[row]["image"] for row in sorted(first.values())[:6]]


@pytest.fixture(scope="module")
def texts(garments):
    return list(dict.fromkeys(garments["text"]))[:3]


@pytest.fixture(scope="module")
def checkpoint(processor, tmp_path_factory):
    """A pretraining checkpoint with its processor; weights far from their start, so that scores differ."""
    layers = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = SyncMaskConfig.tiny(
        image_size=32,
        vocab_size=len(processor.tokenizer),
        max_position_embeddings=64,
        mask_token_id=processor.tokenizer.mask_token_id,
        projection_dim=24,
        vision_config=layers,
        text_config=layers,
        fusion_encoder_config={**layers, "encoder_hidden_size": 32},
        mim_decoder_config={**layers, "hidden_size": 16, "num_attention_heads": 2, "encoder_hidden_size": 32},
    )
    torch.manual_seed(0)
    model = SyncMaskForPreTraining(config)
    return save(disturbed(model), processor, tmp_path_factory.mktemp("pretrained"))


def disturbed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def save(model, processor, folder):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def composed_checkpoint(checkpoint, processor, tmp_path_factory):
    model = SyncMaskForComposedImageRetrieval.from_pretrained(checkpoint)
    return save(disturbed(model), processor, tmp_path_factory.mktemp("composed"))


@pytest.fixture(scope="module")
def search(checkpoint):
    return pipeline("fashion-retrieval", model=checkpoint)


@pytest.fixture(scope="module")
def compose(composed_checkpoint):
    return pipeline("fashion-composed-retrieval", model=composed_checkpoint)


def assert_same_hits(seen, wanted):
    """Equal indices, and scores to float tolerance."""
    assert [hit["index"] for hit in seen] == [hit["index"] for hit in wanted]
    for one, other in zip(seen, wanted):
        assert one == pytest.approx(other, abs=1e-5)


# ----------------------------------------------------------------------------------------------------- stock pipelines


def test_zero_shot_image_classification(checkpoint, processor, photos, capfd):
    """It hands the tokenizer's token_type_ids on, which the model must take."""
    classify = pipeline("zero-shot-image-classification", model=checkpoint)
    labels = ["a red shirt", "a long blue skirt with dots", "shoes"]
    seen = classify(photos[:2], candidate_labels=labels, hypothesis_template="{}")
    model = SyncMaskForImageTextRetrieval.from_pretrained(checkpoint)
    with torch.no_grad():
        logits = model(**processor(images=photos[:2], text=labels)).logits_per_image
    for hits, wanted in zip(seen, logits.softmax(dim=1).tolist()):
        assert {hit["label"]: hit["score"] for hit in hits} == pytest.approx(dict(zip(labels, wanted)), abs=1e-5)
    batched = classify(photos[:2], candidate_labels=labels, hypothesis_template="{}", batch_size=2)
    for one, other in zip(batched, seen):
        assert [hit["label"] for hit in one] == [hit["label"] for hit in other]
    assert "not supported" not in capfd.readouterr().err


def test_image_classification(checkpoint, processor, photos, tmp_path, capfd):
    """A photo alone; the labels are the first set's. A batch must come apart, dictionary of logits and all."""
    model = SyncMaskForImageTextClassification.from_pretrained(checkpoint, label_sets=LABEL_SETS)
    folder = save(model, processor, tmp_path)
    capfd.readouterr()
    classify = pipeline("image-classification", model=folder)
    with torch.no_grad():
        wanted = model(**processor(images=photos[:3])).logits_by_set["subcategory"].softmax(dim=1)
    for batch_size in (1, 2):
        for hits, row in zip(classify(photos[:3], batch_size=batch_size), wanted.tolist(), strict=True):
            names = LABEL_SETS["subcategory"]
            assert {hit["label"]: hit["score"] for hit in hits} == pytest.approx(dict(zip(names, row)), abs=1e-5)
    assert "not supported" not in capfd.readouterr().err


# ----------------------------------------------------------------------------------------------------------- retrieval


def slow_ranking(checkpoint, processor, text, photos, rerank_k):
    """Score photo by photo; the first by cosine are put in the order of the matching head."""
    model = SyncMaskForImageTextRetrieval.from_pretrained(checkpoint).eval()
    hits = []
    for index, photo in enumerate(photos):
        with torch.no_grad():
            output = model(**processor(images=[photo], text=[text]))
        cosine, logits = (output.image_feats @ output.text_feats.T).item(), output.itm_logits[0]
        matching, probability = (logits[1] - logits[0]).item(), logits.softmax(dim=0)[1].item()
        hits.append({"index": index, "vector": cosine, "matching": matching, "probability": probability})
    hits.sort(key=lambda hit: -hit["vector"])
    first, rest = hits[:rerank_k], [{**hit, "matching": None, "probability": None} for hit in hits[rerank_k:]]
    return sorted(first, key=lambda hit: -hit["matching"]) + rest


@pytest.mark.parametrize("top_k, rerank_k", [(6, 4), (3, 6), (10, 10), (2, 1), (6, 0)])
def test_retrieval_equals_the_loop(search, checkpoint, processor, photos, texts, top_k, rerank_k):
    assert type(search) is SyncMaskRetrievalPipeline and not search.model.training
    for text in texts:
        wanted = slow_ranking(checkpoint, processor, text, photos, rerank_k)[:top_k]
        assert_same_hits(search(text, candidates=photos, top_k=top_k, rerank_k=rerank_k), wanted)


def test_many_queries_one_gallery(search, photos, texts):
    alone = [search(text, candidates=photos) for text in texts]
    gallery = search.encode_gallery(photos, batch_size=4)
    assert len(gallery) == 6 and gallery.image_feats.shape == (6, 24)
    for batch_size in (1, 2, 3):
        for seen, wanted in zip(search(texts, candidates=gallery, batch_size=batch_size), alone, strict=True):
            assert_same_hits(seen, wanted)
    assert [len(hits) for hits in search((text for text in texts), candidates=gallery, top_k=2)] == [2, 2, 2]


def test_photos_may_be_paths_or_bytes(search, photos, texts, tmp_path):
    wanted = search(texts[0], candidates=photos[:2])
    data = io.BytesIO()
    photos[0].save(data, "PNG")
    photos[1].save(tmp_path / "photo.png")
    assert_same_hits(search(texts[0], candidates=[data.getvalue(), tmp_path / "photo.png"]), wanted)
    assert_same_hits(search(texts[0], candidates=[photos[0], str(tmp_path / "photo.png")]), wanted)


def test_a_photo_as_a_query_finds_itself(search, photos, tmp_path):
    photos[3].save(tmp_path / "photo.png")
    queries = [photos[3], tmp_path / "photo.png", {"image": str(tmp_path / "photo.png")}]
    for hits in search(queries, candidates=photos):
        assert hits[0]["index"] == 3 and hits[0]["vector"] == pytest.approx(1)
        assert all(hit["matching"] is None and hit["probability"] is None for hit in hits)


def test_a_model_in_training_is_put_in_eval_mode(checkpoint, processor):
    model = SyncMaskForImageTextRetrieval.from_pretrained(checkpoint).train()
    assert not SyncMaskRetrievalPipeline(model=model, processor=processor).model.training


def test_a_text_may_be_named_as_such(search, photos, texts):
    assert_same_hits(search({"text": texts[0]}, candidates=photos), search(texts[0], candidates=photos))


def test_what_retrieval_refuses(search, photos, texts, checkpoint):
    with pytest.raises(ValueError, match="at least one photo"):
        search(texts[0], candidates=[])
    with pytest.raises(ValueError, match="candidates are str"):
        search(texts[0], candidates="photo.jpg")
    with pytest.raises(ValueError, match="empty list of queries"):
        search([], candidates=photos)
    with pytest.raises(ValueError, match=r"\['image', 'text'\].*composed"):
        search({"image": photos[0], "text": texts[0]}, candidates=photos)
    with pytest.raises(ValueError, match="top_k=0"):
        search(texts[0], candidates=photos, top_k=0)
    with pytest.raises(TypeError, match="topk"):
        search(texts[0], candidates=photos, topk=1)
    with pytest.raises(ValueError, match="SyncMaskProcessor"):
        SyncMaskRetrievalPipeline(model=SyncMaskForImageTextRetrieval.from_pretrained(checkpoint))


# -------------------------------------------------------------------------------------------------- composed retrieval


def test_composed_retrieval_equals_the_model(compose, composed_checkpoint, processor, photos):
    """The task's name alone: AutoModel gives the base model, and the query head is still found."""
    assert type(compose) is SyncMaskComposedRetrievalPipeline and hasattr(compose.model, "query_head")
    model = SyncMaskForComposedImageRetrieval.from_pretrained(composed_checkpoint)
    queries = [{"image": photos[0], "text": "the same in blue"}, {"image": photos[1], "text": "longer, with stripes"}]
    with torch.no_grad():
        gallery = model.syncmask.get_image_features(**processor(images=photos)).pooler_output
        for query in queries:
            inputs = processor(images=[query["image"]], text=[query["text"]])
            scores = (model.get_query_features(**inputs).pooler_output @ gallery.T)[0]
            order = scores.argsort(descending=True)[:4].tolist()
            hits = compose(query, candidates=photos, top_k=4)
            assert [hit["index"] for hit in hits] == order
            assert [hit["vector"] for hit in hits] == pytest.approx(scores[order].tolist(), abs=1e-5)
            assert {hit["matching"] for hit in hits} == {None}
    alone = [compose(query, candidates=photos) for query in queries]
    for batch_size in (1, 2):
        for seen, wanted in zip(compose(queries, candidates=photos, batch_size=batch_size), alone, strict=True):
            assert_same_hits(seen, wanted)


def test_what_composed_retrieval_refuses(compose, photos, processor, checkpoint):
    for query in ("in blue", {"image": photos[0]}):
        with pytest.raises(ValueError, match="wanted {'image': photo, 'text': what should differ}"):
            compose(query, candidates=photos)
    homeless = SyncMaskForPreTraining(SyncMaskConfig.from_pretrained(checkpoint))
    with pytest.raises(ValueError, match="SyncMaskForPreTraining has no query head"):
        SyncMaskComposedRetrievalPipeline(model=homeless, processor=processor)


# ----------------------------------------------------------------------------------------------------- saved with code


def test_a_saved_pipeline_names_its_code(search, tmp_path):
    search.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    named = [config["custom_pipelines"]["fashion-retrieval"]["impl"], *config["auto_map"].values()]
    named += json.loads((tmp_path / "processor_config.json").read_text())["auto_map"].values()
    assert len(named) >= 4
    for name in named:
        module, kind = name.split(".")
        assert f"class {kind}(" in (tmp_path / f"{module}.py").read_text()
    # Saving with code is this call's alone: a model saved later is saved without.
    assert SyncMaskForImageTextRetrieval._auto_class is None and SyncMaskConfig._auto_class is None


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """A place of this test's own for remote code, not the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] == "transformers_modules":
            del sys.modules[name]


def test_a_saved_pipeline_loads_beside_the_package(search, compose, photos, texts, tmp_path, own_modules):
    """With the package's own code, so nothing of the folder's has to be trusted, even where it is."""
    queries = {search: texts[0], compose: {"image": photos[0], "text": texts[1]}}
    for name, (saved, query) in zip("ab", queries.items()):
        saved.save_pretrained(tmp_path / name)
        for trust in (None, True):
            loaded = pipeline(saved.registered_task, model=str(tmp_path / name), trust_remote_code=trust)
            assert type(loaded) is type(saved)
            assert_same_hits(loaded(query, candidates=photos), saved(query, candidates=photos))
    assert not list((tmp_path / "modules").rglob("pipeline_syncmask.py"))


STRANGER = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "syncmask":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
torch.set_num_threads(1)
from transformers import pipeline

results = []
for task, folder, query, candidates in json.loads(sys.argv[1]):
    for again in (folder, folder + "_again"):  # what a stranger saves loads too
        loaded = pipeline(task, model=again, trust_remote_code=True)
        results.append(loaded(query, candidates=candidates))
        loaded.save_pretrained(folder + "_again")
print(json.dumps(results))
"""


@pytest.mark.slow
def test_a_saved_pipeline_loads_in_a_process_without_the_package(search, compose, photos, texts, tmp_path):
    paths = [str(tmp_path / f"{index}.png") for index in range(6)]
    for photo, path in zip(photos, paths):
        photo.save(path)
    tasks = []
    for saved, query in ((search, texts[0]), (compose, {"image": paths[0], "text": texts[1]})):
        folder = str(tmp_path / saved.registered_task)
        saved.save_pretrained(folder)
        tasks.append((saved.registered_task, folder, query, paths))
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, json.dumps(tasks)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    for saved, (_, _, query, _), rankings in zip((search, compose), tasks, (seen[:2], seen[2:])):
        for ranking in rankings:
            assert_same_hits(ranking, saved(query, candidates=paths))
