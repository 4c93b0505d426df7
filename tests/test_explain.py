"""Heatmaps, support, masks and pictures of one pair; pointing accuracy against the truth of the generated corpus."""

import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from syncmask import (
    SyncMaskConfig,
    SyncMaskForImageTextClassification,
    SyncMaskForImageTextRetrieval,
    SyncMaskForPreTraining,
    SyncMaskModel,
    fusion,
)
from syncmask.evaluation.co_occurrence import region_patches
from syncmask.evaluation.figures import Masks
from syncmask.evaluation.measure import patches_of_top_words
from syncmask.evaluation.result import Result
from syncmask.evaluation.showcase import mask_photos
from syncmask.masks import valid_words
from syncmask.processing.corpus import CorpusIndex
from syncmask.retrieval import heatmaps, pointing
from syncmask.retrieval.cli import app as cli
from syncmask.retrieval.encoder import Encoder
from syncmask.retrieval.explain import Explanation, explain
from syncmask.retrieval.explain_figures import (
    explanation_sheet,
    heat_photo,
    hidden_photo,
    shades,
    support_pieces,
)
from syncmask.retrieval.explain_page import explanation_page, write_explanation
from syncmask.scores import word_alignment, word_evidence

TEXT = "A red hat, with wings. <script>alert(1)</script> ${alert(2)}"


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    ids = {"vocab_size": len(processor.tokenizer), "mask_token_id": processor.tokenizer.mask_token_id}
    model = SyncMaskForPreTraining(SyncMaskConfig.tiny(image_size=32, **ids)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from its start, so that attention is not flat
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def encoder(model, processor):
    return Encoder(model, processor, device="cpu")


def made_up(support=(2.0, -1.0, 0.0, 0.3), kind="evidence", photo=None):
    maps = np.zeros((4, 4, 4), dtype=np.float32)
    for place in range(4):
        maps[place, place, 0] = 1
    return Explanation(
        photo=photo or Image.new("RGB", (60, 80), "white"),
        text="red hat, <b>with wings & more",
        similarity=0.5,
        match=0.25,
        words=["red", "hat", "b>with", "wings"],
        support=np.array(support),
        support_kind=kind,
        support_note="by hand & <i>eye</i>",
        attention=maps,
        gradient=maps[::-1],
        masks=Masks("hidden", np.array([1, 0, 0, 0], bool), np.eye(4, dtype=bool)),
        layer=0,
    )


# --------------------------------------------------------------------------------------------------------- heatmaps


def encoded(model, pairs):
    with torch.no_grad():
        images = model.syncmask.encode_image(pairs["pixel_values"])
        texts = model.syncmask.encode_text(pairs["input_ids"], pairs["attention_mask"])
    return model, images, texts, pairs["attention_mask"], pairs["word_ids"]


def test_attention_of_a_word_sums_to_one(tiny_model, pairs):
    maps = heatmaps.attention_maps(*encoded(tiny_model, pairs))
    valid = valid_words(pairs["word_ids"])
    assert maps.shape == (4, 6, 16)
    torch.testing.assert_close(maps.sum(dim=-1), valid.float())


def test_gradient_maps_match_finite_differences(tiny_model, pairs, monkeypatch):
    """Each attention weight is nudged by hand, and the change of the matching logit is taken."""
    model, layer, step = tiny_model.double(), 0, 2e-3
    pairs = pairs | {"pixel_values": pairs["pixel_values"].double()}
    arguments = encoded(model, pairs)
    found = heatmaps.gradient_maps(*arguments, layer=layer)
    target, plain = model.syncmask.fusion_encoder.layers[layer].cross_attention, fusion.eager_attention_forward
    nudge, kept = {}, {}

    def nudged(module, query, key, value, attention_mask, scaling, **kwargs):
        output, weights = plain(module, query, key, value, attention_mask, scaling, **kwargs)
        if module is not target:
            return output, weights
        kept["weights"], weights = weights, weights.clone()
        if nudge:
            weights[nudge["at"]] += nudge["by"]
        return (weights @ value).transpose(1, 2).contiguous(), weights

    monkeypatch.setattr(fusion, "eager_attention_forward", nudged)
    monkeypatch.setattr(model.syncmask.fusion_encoder.config, "_attn_implementation_internal", "eager")

    @torch.no_grad()
    def logit(row):
        logits = model.itm_logits(arguments[2], arguments[3], arguments[1])[row]
        return float(logits[1] - logits[0])

    logit(0)
    weights, prefix = kept["weights"].clone(), model.syncmask.num_prefix_tokens
    for row, word, patch in ((0, 3, 5), (0, 0, 12), (1, 1, 15), (2, 3, 0)):
        by_piece = []
        for token in (pairs["word_ids"][row] == word).nonzero().flatten().tolist():
            by_head = []
            for head in range(4):
                at = (row, head, token, prefix + patch)
                nudge.update(at=at, by=step)
                above = logit(row)
                nudge["by"] = -step
                slope = (above - logit(row)) / (2 * step)
                by_head.append(float(weights[at]) * max(0.0, slope))
            by_piece.append(np.mean(by_head))
        assert found[row, word, patch].item() == pytest.approx(np.mean(by_piece), rel=5e-3, abs=1e-6)


def test_gradient_maps_leave_the_model_as_it_was(tiny_model, pairs):
    before = tiny_model.syncmask.fusion_encoder.config._attn_implementation
    maps = heatmaps.gradient_maps(*encoded(tiny_model, pairs))
    assert tiny_model.syncmask.fusion_encoder.config._attn_implementation == before == "sdpa"
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
    for parameter in tiny_model.parameters():
        parameter.requires_grad_(False)
    torch.testing.assert_close(heatmaps.gradient_maps(*encoded(tiny_model, pairs)), maps)
    assert (maps >= 0).all() and maps.sum() > 0


def test_a_pair_has_the_same_maps_alone_and_in_a_batch(tiny_model, pairs):
    together = heatmaps.gradient_maps(*encoded(tiny_model, pairs))
    alone = heatmaps.gradient_maps(*encoded(tiny_model, {name: rows[1:2] for name, rows in pairs.items()}))
    torch.testing.assert_close(alone[0], together[1, : alone.shape[1]], rtol=1e-4, atol=1e-7)


def test_layers_that_cannot_be_read_are_refused(tiny_model, pairs):
    with pytest.raises(ValueError, match="last of the fusion encoder"):
        heatmaps.gradient_maps(*encoded(tiny_model, pairs), layer=1)
    for layer in (2, -1):
        with pytest.raises(ValueError, match="layers 0 to 1"):
            heatmaps.gradient_maps(*encoded(tiny_model, pairs), layer=layer)


def test_relative_maps_forget_what_every_word_looks_at():
    maps = torch.tensor([[[0.8, 0.2, 0.0], [0.8, 0.0, 0.2], [0.5, 0.3, 0.2]]])
    word_ids = torch.tensor([[-1, 0, 1, -1]])
    relative = heatmaps.relative_maps(maps, word_ids.new_tensor([[-1, 0, 1, 2]]))
    assert relative.argmax(dim=-1).tolist() == [[1, 2, 1]]
    two = heatmaps.relative_maps(maps[:, :2], word_ids)
    torch.testing.assert_close(two[0, 0], torch.tensor([1.0, 2.0, 0.0]), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- explain


def test_an_explanation_fits_its_text_and_photo(encoder, garments):
    found = explain(encoder, garments[0]["image"], garments[0]["text"])
    assert list(found.words) == garments[0]["words"] or [word.lower() for word in found.words] == garments[0]["words"]
    assert found.attention.shape == found.gradient.shape == (len(found.words), 4, 4)
    assert found.support.shape == found.masks.words.shape == (len(found.words),)
    assert found.masks.patches.shape == (4, 4)
    assert found.masks.patches.sum() == round(0.4 * 16) and found.masks.words.sum() == round(0.3 * len(found.words))
    vectors = encoder.encode_image([garments[0]["image"]]), encoder.encode_text([garments[0]["text"]])
    assert found.similarity == pytest.approx(float((vectors[0] @ vectors[1].T)[0, 0]), abs=1e-5)
    logit = float(encoder.match([garments[0]["image"]], [garments[0]["text"]])[0])
    assert found.match == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
def test_masks_are_those_of_the_mask_view(encoder, model, processor, garments, layer):
    found = explain(encoder, garments[3]["image"], garments[3]["text"], layer=layer)
    shown = mask_photos(model, processor, garments, [3], layer=layer)[0].masks[0]
    np.testing.assert_array_equal(found.masks.words, shown.words)
    np.testing.assert_array_equal(found.masks.patches, shown.patches)


def encoded_rows(encoder, rows, text):
    """All photos of some rows, and one text."""
    batch = encoder.processor(images=list(rows["image"]), text=[text], return_word_ids=True)
    return encoded(encoder.model, batch)


def test_evidence_compares_with_the_photos_that_are_given(encoder, garments):
    photo, text = garments[0]["image"], garments[0]["text"]
    blank = explain(encoder, photo, text)
    against = explain(encoder, photo, text, others=[garments[row]["image"] for row in (20, 40)])
    same = explain(encoder, photo, text, others=[photo])
    assert blank.support_kind == "evidence" and "blank" in blank.support_note
    assert "2 other photos" in against.support_note
    assert not np.allclose(blank.support, against.support)
    np.testing.assert_allclose(same.support, 0, atol=1e-5)  # a photo tells nothing against itself
    _, images, texts, mask, word_ids = encoded_rows(encoder, garments.select([0, 20, 40]), text)
    ids = encoder.processor(text=[text])["input_ids"]
    expected = word_evidence(encoder.model, images, torch.tensor([0]), torch.tensor([[1, 2]]), ids, mask, word_ids)
    np.testing.assert_allclose(against.support, expected[0], atol=1e-4)
    np.testing.assert_allclose(blank.attention, against.attention, atol=1e-6)


def test_without_an_mlm_head_words_are_scored_by_attention(model, processor, garments):
    head = SyncMaskForImageTextRetrieval(model.config).eval()
    found = explain(Encoder(head, processor, device="cpu"), garments[0]["image"], garments[0]["text"])
    assert found.support_kind == "attention" and "no MLM head" in found.support_note
    assert found.support.mean() == pytest.approx(0, abs=1e-4) and found.support.std() == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="MLM head"):
        explain(Encoder(head, processor, device="cpu"), garments[0]["image"], "a hat", strategy="evidence")


def test_alignment_hides_by_its_own_words_and_maps(model, processor, garments):
    aligned = SyncMaskForPreTraining(SyncMaskConfig.from_dict(model.config.to_dict() | {"word_patch_alignment": True}))
    aligned.load_state_dict(model.state_dict(), strict=False)
    encoder = Encoder(aligned.eval(), processor, device="cpu")
    rows = garments.select([0, 20, 40])
    photo, *others = rows["image"]
    text = rows[0]["text"]
    found = explain(encoder, photo, text, others=others, strategy="alignment", word_rate=0.3, patch_rate=0.4)
    # As for a batch of pairs, of which the first is looked at.
    _, images, _, _, _ = encoded_rows(encoder, rows, text)
    batch = processor(text=[text] * 3, return_word_ids=True)
    with torch.no_grad():
        scores, maps = word_alignment(aligned, images, batch["input_ids"], batch["word_ids"])
    hidden = scores[0].topk(round(0.3 * len(found.words))).indices
    assert np.flatnonzero(found.masks.words).tolist() == sorted(hidden.tolist())
    seen = patches_of_top_words(scores[:1], valid_words(batch["word_ids"])[:1], maps[:1], 0.3)[0]
    patches = found.masks.patches.ravel()
    assert seen[patches].min() >= seen[~patches].max()
    with pytest.raises(ValueError, match="needs a word-patch head"):
        explain(Encoder(model, processor, device="cpu"), photo, text, strategy="alignment")


def test_the_last_layer_has_no_gradient(encoder, garments):
    found = explain(encoder, garments[0]["image"], "a red hat", layer=1)
    assert found.gradient is None and found.layer == 1
    assert not np.allclose(found.attention, explain(encoder, garments[0]["image"], "a red hat").attention, atol=1e-4)
    assert explanation_sheet(found).width < explanation_sheet(explain(encoder, garments[0]["image"], "a red hat")).width


def test_one_word_and_very_many(encoder, garments):
    one = explain(encoder, garments[0]["image"], "hat")
    assert one.words == ["hat"] and not one.masks.words.any() and not one.masks.patches.any()
    explanation_sheet(one)
    many = explain(encoder, garments[0]["image"], "red hat " * 2500)
    assert 2 < len(many.words) <= encoder.processor.tokenizer.model_max_length
    assert "".join(piece for piece, _ in support_pieces(many)) == "red hat " * 2500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": " -- !"}, "no word"),
        ({"strategy": "random"}, "attention, evidence"),
        ({"layer": 7}, "layers 0 to 1"),
        ({"photo": b"no photo"}, "cannot be read"),
    ],
)
def test_what_cannot_be_explained_is_said(encoder, garments, options, message):
    arguments = {"photo": garments[0]["image"], "text": "a hat"} | options
    with pytest.raises(ValueError, match=message):
        explain(encoder, arguments.pop("photo"), arguments.pop("text"), **arguments)


def test_a_base_model_has_nothing_to_explain(model, processor, garments):
    with pytest.raises(ValueError, match="matching head"):
        explain(Encoder(SyncMaskModel(model.config), processor, device="cpu"), garments[0]["image"], "a hat")


# --------------------------------------------------------------------------------------------------------- pictures


def test_heat_is_red_where_it_is_hot_and_ringed():
    heat = np.zeros((4, 4))
    heat[1, 2] = 3
    picture = np.asarray(heat_photo(Image.new("RGB", (64, 64), "white"), heat, 200)).astype(int)
    red, _, blue = picture[75, 125]
    assert red - blue > 60
    assert np.ptp(picture[175, 25]) < 12  # far away: grey
    assert picture[75, 101].max() < 60  # the ring, just inside the patch's left edge


def test_a_constant_map_shows_no_heat():
    picture = np.asarray(heat_photo(Image.new("RGB", (64, 64), "grey"), np.full((4, 4), 0.5), 100))
    assert (picture == picture[0, 0]).all() and np.ptp(picture[0, 0].astype(int)) == 0
    with pytest.raises(ValueError, match=r"\(h, w\)"):
        heat_photo(Image.new("RGB", (64, 64)), np.zeros(16))


def test_heat_keeps_the_shape_of_the_photo():
    heat = np.eye(4)
    picture = np.asarray(heat_photo(Image.new("RGB", (20, 80), "black"), heat, 200))
    assert (picture[:, :70] == 255).all() and (picture[:, 130:] == 255).all()
    assert (np.asarray(hidden_photo(made_up(), 200))[:, :20] == 255).all()


def test_shades_say_for_and_against():
    (for_it, _), (against, _), (neutral, ink), (little, _) = shades(made_up())
    assert for_it == "#1763a6" and neutral == "#ffffff" and ink == "#1b1b1b"
    assert int(against[1:3], 16) > int(against[5:7], 16)  # orange
    assert little not in (for_it, neutral)
    assert shades(made_up(kind="attention"))[1][0] == "#ffffff"  # attention speaks against nothing


def test_pieces_give_back_the_text():
    pieces = support_pieces(made_up())
    assert "".join(piece for piece, _ in pieces) == made_up().text
    styles = dict(pieces)
    assert styles["red"] == ("#1763a6", "#ffffff") and "b>with" not in styles  # neutral words stay plain


def test_a_sheet_of_one_word_shows_that_word():
    whole, one = explanation_sheet(made_up()), explanation_sheet(made_up(), word="WINGS")
    assert np.asarray(whole).shape != np.asarray(one).shape
    moved = replace(made_up(), attention=np.roll(made_up().attention, 1, axis=0), gradient=made_up().gradient)
    assert np.any(np.asarray(explanation_sheet(moved, word="wings")) != np.asarray(one))
    with pytest.raises(ValueError, match="red, hat, b>with, wings"):
        explanation_sheet(made_up(), word="boots")


def test_a_page_stands_alone_and_escapes_every_text():
    page = explanation_page(made_up())
    assert "<b>with" not in page and "&lt;" in page and "<i>eye" not in page
    assert not re.search(r"<script|javascript:|https?://|<link|@import|url\(", page)
    assert "b>with" not in page and page.count("b&gt;with") == 3  # in the text, under the masks, over its maps
    assert page.count("<img") == 4 + 2 * 4  # photo, two means, masks; two maps a word
    assert explanation_page(made_up(), word="red").count("<img") == 4 + 2


def test_a_real_text_with_a_script_is_shown_as_text(encoder, garments):
    page = explanation_page(explain(encoder, garments[0]["image"], TEXT))
    assert "<script" not in page and "script&gt;alert(1)&lt;/script" in page


def test_files_are_written_by_their_ending(tmp_path):
    for name in ("a.png", "deep/er/b.html", "c.JPG"):
        path = write_explanation(made_up(), tmp_path / name)
        assert path.is_file() and path.stat().st_size > 1000
    assert Image.open(tmp_path / "a.png").width > 800
    with pytest.raises(ValueError, match=".pdf"):
        write_explanation(made_up(), tmp_path / "d.pdf")


# --------------------------------------------------------------------------------------------------------- pointing


def slow_hits(peaks, regions, grid, size):
    """Own, other and chance hits and their number, word by word, in loops."""
    own, other, chance, number = [], [], [], []
    for peak, boxes in zip(peaks, regions):
        rows = [[], [], []]
        for word, box in enumerate(boxes[: len(peak)]):
            elsewhere = [w for w, b in enumerate(boxes[: len(peak)]) if len(b) and list(b) != list(box)]
            if not len(box) or not elsewhere or region_patches(box, grid, size).mean() >= 0.5:
                continue
            inside = region_patches(box, grid, size)
            rows[0].append(inside[peak[word]])
            rows[1].append(np.mean([inside[peak[w]] for w in elsewhere]))
            rows[2].append(inside.mean())
        for total, values in zip((own, other, chance), rows):
            total.append(sum(values))
        number.append(len(rows[0]))
    return [np.sum(total) / np.sum(number) for total in (own, other, chance)]


def test_scores_of_peaks_match_loops(garments):
    rng = np.random.default_rng(0)
    item_ids = CorpusIndex.from_dataset(garments).item_ids
    peaks = [rng.integers(0, 16, len(words)) for words in garments["words"]]
    found = pointing.score_peaks({"attention": peaks}, garments["regions"], item_ids, (4, 4), 32)
    expected = slow_hits(peaks, garments["regions"], (4, 4), 32)
    for name, value in zip(("hit/attention", "other_word/attention", "hit/chance"), expected):
        assert found[f"pointing/{name}"]["value"] == pytest.approx(value)
    gain = found["pointing/gain/attention"]
    assert gain["value"] == pytest.approx(expected[0] - expected[1]) and gain["low"] < gain["value"] < gain["high"]
    assert gain["n"] <= len(np.unique(item_ids))  # the bootstrap is over items


def test_peaks_in_the_right_place_hit(garments):
    item_ids = CorpusIndex.from_dataset(garments).item_ids
    right = [
        np.array([region_patches(box, (4, 4), 32).argmax() if len(box) else 0 for box in boxes])
        for boxes in garments["regions"]
    ]
    found = pointing.score_peaks({"attention": right}, garments["regions"], item_ids, (4, 4), 32)
    assert found["pointing/hit/attention"]["value"] == 1 and found["pointing/gain/attention"]["low"] > 0.2
    rows = np.arange(len(garments)) < 10
    some = pointing.score_peaks({"attention": right}, garments["regions"], item_ids, (4, 4), 32, rows=rows)
    assert 0 < some["pointing/hit/attention"]["n"] < found["pointing/hit/attention"]["n"]


def test_the_middle_is_drawn_among_the_nearest_patches():
    rows = pointing._middle((4, 4), [2] * 200, seed=0)
    assert {int(row[0]) for row in rows} == {5, 6, 9, 10} and all(row[0] == row[1] for row in rows)
    assert {int(row[0]) for row in pointing._middle((3, 3), [1] * 20, seed=0)} == {4}


def test_pointing_on_the_generated_corpus(model, processor, garments):
    result = pointing.pointing(model, processor, garments, max_rows=40, batch_size=7)
    again = pointing.map_peaks(model, processor, garments.select(range(5)), batch_size=2)
    assert [len(row) for row in again["gradient"]] == [len(words) for words in garments[:5]["words"]]
    for row in range(5):
        found = explain(Encoder(model, processor, device="cpu"), garments[row]["image"], garments[row]["text"])
        for kind in ("attention", "gradient"):
            maps = getattr(found, kind).reshape(len(found.words), -1)
            np.testing.assert_allclose(maps[range(len(maps)), again[kind][row]], maps.max(axis=1), rtol=1e-3)
    for kind in ("attention", "relative", "gradient"):
        low, value, high = (result.metrics[f"pointing/hit/{kind}"][end] for end in ("low", "value", "high"))
        assert 0 <= low <= value <= high <= 1
    assert "centre" in result.table() and "pointing anywhere" in result.table()
    with pytest.raises(ValueError, match="regions"):
        pointing.pointing(model, processor, garments.remove_columns(["regions"]))


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def run(tmp_path_factory, model, processor):
    """A run's folder with a final model, trained on 40 generated items."""
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder / "final")
    processor.save_pretrained(folder / "final")
    data = {"corpus": "garments", "num_items": 40, "corpus_seed": 0, "image_size": 32}
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return folder


def command(*words):
    return CliRunner().invoke(cli, ["explain", *map(str, words)])


def test_the_command_writes_a_picture_or_a_page(run, garments, tmp_path):
    garments[0]["image"].save(tmp_path / "photo.png")
    garments[9]["image"].save(tmp_path / "other.png")
    done = command(run, tmp_path / "photo.png", "a red hat", "--out", tmp_path / "why.png", "--word", "hat")
    assert done.exit_code == 0 and "why.png" in done.output, done.output
    assert Image.open(tmp_path / "why.png").width > 800
    done = command(
        run, tmp_path / "photo.png", TEXT, "--out", tmp_path / "why.html", "--other", tmp_path / "other.png", "--json"
    )
    found = json.loads(done.stdout)
    assert [word["word"] for word in found["words"]][1:3] == ["red", "hat"] and 0 < found["match"] < 1
    assert "1 other photo?" in (tmp_path / "why.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.png", "a hat"], "does not exist"),
        (["PHOTO", "a hat", "--word", "boots"], "no word 'boots'"),
        (["PHOTO", "a hat", "--layer", "9"], "layers 0 to 1"),
        (["PHOTO", "a hat", "--out", "why.pdf"], ".pdf"),
        (["PHOTO"], "give a photo and a text"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(run, garments, tmp_path, words, message):
    garments[0]["image"].save(tmp_path / "photo.png")
    done = command(run, *(tmp_path / "photo.png" if word == "PHOTO" else word for word in words))
    assert done.exit_code != 0 and message in done.output and "Traceback" not in done.output


def test_pointing_of_a_run_is_filed_with_its_results(run):
    done = command(run, "--pointing", "--max-rows", "30")
    assert done.exit_code == 0 and "centre" in done.output, done.output
    saved = Result.load(run / "results" / "pointing.json")
    assert saved.corpus["split"] == "test" and saved.corpus["rows"] <= 30 and saved.corpus["fusion_layer"] == 0
    assert saved.model["sha256"] and "pointing/gain/gradient" in saved.metrics
    assert "last of the fusion encoder" in command(run, "--pointing", "--layer", "1").output


def test_pointing_needs_a_matching_head(model, processor, tmp_path):
    config = copy.deepcopy(model.config)
    config.label_sets = {"category": ["tops", "skirts"]}
    SyncMaskForImageTextClassification(config).save_pretrained(tmp_path / "labels")
    processor.save_pretrained(tmp_path / "labels")
    with pytest.raises(ValueError, match="SyncMaskForImageTextClassification has no matching head"):
        pointing.pointing_of(tmp_path / "labels", corpus="garments")
