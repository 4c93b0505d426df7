"""What the report's parts say is right: masks over time, mistakes and their verdicts, batches, maps, curves, counts."""

import json

import numpy as np
import pytest
from PIL import Image

from syncmask.evaluation import batch_sheets, glance, history, word_maps
from syncmask.evaluation import confusions as conf
from syncmask.evaluation import masks_over_time as time
from syncmask.evaluation.head_views import confusion_table
from syncmask.evaluation.measure import relative_attention, score_pairs, word_peaks
from syncmask.evaluation.metrics import ranks
from syncmask.evaluation.ranking import Direction
from syncmask.evaluation.showcase import spread_rows
from syncmask.processing.corpus import CorpusIndex
from syncmask.processing.garments import GarmentTruth


def state(step, words, patches=((0,),), strength=0.0, lengths=(4,)):
    photos = [f"p{place}" for place in range(len(words))]
    every = [list(part) for part in words], [list(part) for part in patches]
    return time.MaskState(step, step, "attention", strength, (2, 2), photos, list(lengths), *every)


# ------------------------------------------------------------------------------------------------- masks over time


def test_masks_come_back_from_their_record(tmp_path):
    states = [state(0, [[0, 1]], [[0, 3]]), state(5, [[1, 2]], [[1, 3]])]
    lines = "".join(json.dumps(one.line()) + "\n" for one in states)
    (tmp_path / time.RECORD).write_text(lines + '{"step": 9, "ep')
    back = time.read_mask_states(tmp_path)
    assert [one.line() for one in back] == json.loads(json.dumps([one.line() for one in states]))
    masks = back[1].masks(0)
    assert masks.words.tolist() == [False, True, True, False] and masks.patches.tolist() == [
        [False, True],
        [False, True],
    ]
    assert [one.name for one in back] == ["untrained", "epoch 5"] and time.read_mask_states(tmp_path / "no") == []


def test_agreement_and_visible_share_are_of_all_photos():
    one, other = state(0, [[0, 1], [2]], [[0], [0]]), state(1, [[1, 2], [3]], [[0], [0]])
    assert time.agreement(one, other) == pytest.approx(1 / 3) and time.agreement(one, one) == 1
    assert time.visible_share(one, [[True, False, True, True], [False, False, True, False]]) == pytest.approx(2 / 3)


def test_curves_have_the_levels_of_random_masks():
    states = [state(step, [[0, 1]], lengths=(5,)) for step in (0, 1, 2)]
    agree, shown = time.panels(states, [[True, False, False, False, True, True]])  # the last word was cut off
    assert agree.level == pytest.approx(40) and list(agree.lines["agreement"][0]) == [1, 2]
    assert shown.level == pytest.approx(40) and shown.lines["masks"] == ([0, 1, 2], [50.0] * 3)
    assert time.panels(states[:1]) == [] and len(time.panels(states)) == 1


def test_shown_moments_are_spread_from_first_to_last():
    states = [state(step, [[0]]) for step in range(30)]
    steps = [one.step for one in time.spread_states(states, 7)]
    assert steps[0] == 0 and steps[-1] == 29 and len(steps) == 7 and max(np.diff(steps)) - min(np.diff(steps)) <= 1
    assert time.spread_states(states[:3], 7) == states[:3]


def test_the_note_tells_until_when_masks_were_random():
    photo, text = Image.new("RGB", (8, 8)), "a red hat on"
    late = [state(0, [[0]]), state(4, [[1]], strength=0.5)]
    part = time.masks_over_time(late, [photo], [text], None)
    assert "before epoch 4 ended" in part.note and set(part.pictures) == {"masks_over_time"}
    assert "never opened" in time.masks_over_time(late[:1], [photo], [text], None).note
    assert time.hidden_words(text, np.array([0, 1, 1, 0], bool), np.array([1, 1, 0, 0], bool)) == [
        ("red", "right"),
        ("hat", "wrong"),
    ]


# ------------------------------------------------------------------------------------------------------- mistakes


def unit(rng, *shape):
    values = rng.normal(size=shape).astype(np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def test_confusions_are_the_queries_that_are_not_ranked_first():
    rng = np.random.default_rng(0)
    queries, gallery = unit(rng, 40, 8), unit(rng, 30, 8)
    right = rng.random((40, 30)) < 0.1
    right[:, 0] |= ~right.any(axis=1)
    found = conf.confusions(Direction(queries, gallery, {"": lambda rows: right[rows]}))
    scores = queries.astype(np.float64) @ gallery.astype(np.float64).T
    assert {one.query for one in found} == set(np.flatnonzero(ranks(scores, right) > 1))
    margins = [one.margin for one in found]
    assert margins == sorted(margins, reverse=True) and min(margins) > 0
    for one in found:
        assert not right[one.query, one.hit] and right[one.query, one.own]
        assert one.margin == pytest.approx(scores[one.query, one.hit] - scores[one.query, one.own])
        assert scores[one.query, one.hit] == scores[one.query][~right[one.query]].max()


def test_verdicts_follow_the_truth(garments):
    index, rng = CorpusIndex.from_dataset(garments), np.random.default_rng(1)
    feats = unit(rng, len(garments), 8), unit(rng, len(index.texts), 8)
    shown, counts = conf.find_confusions(*feats, garments, index, count=30)
    truth = GarmentTruth.from_dataset(garments)
    assert {case.verdict for case in shown} <= {True, False} and len(shown) > 20
    for case in shown:
        assert (case.why == []) == case.verdict
    for way, of in counts.items():
        assert of.queries == len(feats[way == "text_to_image"]) and of.false_negatives <= of.mistakes <= of.queries
    scores = feats[1].astype(np.float64) @ feats[0].astype(np.float64).T
    first = scores.argmax(axis=1)
    rows = np.unique(index.text_ids, return_index=True)[1]
    wrong = index.item_ids[first] != index.item_of_text
    false = [truth.text_true_of_photo(photo, text) for photo, text in zip(first[wrong], rows[wrong])]
    assert counts["text_to_image"].mistakes == wrong.sum() and counts["text_to_image"].false_negatives == sum(false)
    blind = garments.remove_columns("claimed")
    unknown, counts = conf.find_confusions(*feats, blind, index)
    assert {case.verdict for case in unknown} == {None} and counts["text_to_image"].false_negatives is None
    assert "no ground truth" in conf.confusion_part(unknown, counts).note


# -------------------------------------------------------------------------------------------------------- batches


def test_a_batch_is_described_as_slow_loops_would(garments, tmp_path):
    index, rng, truth = (
        CorpusIndex.from_dataset(garments),
        np.random.default_rng(2),
        GarmentTruth.from_dataset(garments),
    )
    images, texts = unit(rng, len(garments), 6), unit(rng, len(garments), 6)
    order, names = rng.permutation(len(garments)), [f"n{row}" for row in range(len(garments))]
    found = batch_sheets.describe(order, 16, names, index.item_ids, images, texts, truth)
    batches, hardest, same, wrong, other = order[: len(order) // 16 * 16].reshape(-1, 16), [], 0, 0, 0
    for rows in batches:
        best = []
        for photo in rows:
            others = [text for text in rows if index.item_ids[text] != index.item_ids[photo]]
            best.append(max(float(images[photo] @ texts[text]) for text in others))
            same += sum(index.item_ids[text] == index.item_ids[photo] for text in rows) - 1
            wrong += sum(bool(truth.text_true_of_photo(photo, text)) for text in others)
            other += len(others)
        hardest.append(np.mean(best))
    assert found.hardest == pytest.approx(np.mean(hardest), abs=1e-5) and found.same_item_pairs == same > 0
    assert found.false_share == pytest.approx(wrong / other) and found.batches == len(batches)
    assert found.photos == [f"n{row}" for row in batches[0]]
    assert found.cosines[2][5] == round(100 * float(images[batches[0][2]] @ texts[batches[0][5]]))
    assert all(index.item_ids[batches[0][i]] != index.item_ids[batches[0][j]] for i, j in found.false_negatives)
    batch_sheets.save_batches(tmp_path, {"random": found}, used=True)
    assert batch_sheets.read_batches(tmp_path) == ({"random": found}, True)
    assert batch_sheets.read_batches(tmp_path / "no") == ({}, False)


def test_false_negatives_are_framed_and_dotted():
    plain = batch_sheets.Batch(["a", "b"], [[0, 0], [0, 0]], [], 0, 0.1, 0.5, 0.0, 1, 2)
    marked = batch_sheets.Batch(["a", "b"], [[0, 0], [0, 0]], [[1, 0]], 0, 0.1, 0.5, 0.5, 1, 2)
    photos, orange = [Image.new("RGB", (4, 4))] * 2, (194, 84, 10)

    def count(picture):
        return (np.asarray(picture) == orange).all(axis=2)

    assert (
        not count(batch_sheets.contact_sheet(plain, photos)).any() and not count(batch_sheets.cosine_table(plain)).any()
    )
    assert count(batch_sheets.contact_sheet(marked, photos)).any()
    dots = count(batch_sheets.cosine_table(marked))
    half = len(dots) // 2
    assert dots[half:, :half].any() and not dots[:half].any() and not dots[:, half:].any()  # photo 1, text 0


# ------------------------------------------------------------------------------------------------------ word maps


def test_maps_peak_where_the_protocol_says(garments, processor):
    import torch

    from syncmask import SyncMaskConfig, SyncMaskForPreTraining
    from syncmask.evaluation.embedding import batches

    torch.manual_seed(0)
    ids = {"vocab_size": len(processor.tokenizer), "mask_token_id": processor.tokenizer.mask_token_id}
    model = SyncMaskForPreTraining(SyncMaskConfig.tiny(image_size=32, **ids)).eval()
    rows = spread_rows(garments, 4)
    found = word_maps.look(model, processor, garments, rows)
    batch = next(batches(processor, garments, rows, 4))
    pairs = score_pairs(model, batch, np.arange(4), ["attention"])
    looks = pairs.looks["attention"]
    peaks, words = word_peaks(looks, pairs.valid), garments.select(rows)["words"]
    assert torch.equal(relative_attention(looks, pairs.valid).argmax(-1), peaks) and found
    for item in found:
        row = list(garments.select(rows)["text"]).index(item.text)
        regions = garments[int(rows[row])]["regions"]
        assert 1 <= len(item.maps) <= word_maps.WORDS
        for one in item.maps:
            size = item.photo.size[0]
            places = [p for p, box in enumerate(regions) if len(box) and np.allclose(np.array(box) / size, one.box)]
            same = [p for p in places if words[row][p] == one.word.lower() and one.heat.argmax() == peaks[row, p]]
            assert same
            y, x = np.unravel_index(one.heat.argmax(), one.heat.shape)
            middle = (x + 0.5) / one.heat.shape[1], (y + 0.5) / one.heat.shape[0]
            if one.box[0] < middle[0] < one.box[2] and one.box[1] < middle[1] < one.box[3] and one.heat.size > 4:
                assert one.hit or min(one.box[2] - one.box[0], one.box[3] - one.box[1]) < 0.25
    blind = word_maps.look(model, processor, garments.remove_columns("regions"), rows)
    assert len(blind) == 4 and all(one.hit is None and len(one.word) >= 3 for item in blind for one in item.maps)


def test_the_true_part_is_outlined_in_the_photos_own_shape():
    photo, green = Image.new("RGB", (20, 40), "white"), (26, 127, 55)
    heat = np.zeros((4, 4))
    heat[0, 0] = 1
    one = word_maps.WordMap("hat", heat, [0.0, 0.5, 1.0, 1.0], True)
    picture = np.asarray(word_maps.map_picture(photo, one, 200))
    rows, columns = np.nonzero((picture == green).all(axis=2))
    assert 98 <= rows.min() <= 101 and 48 <= columns.min() <= 51 and 148 <= columns.max() <= 152
    missed = word_maps.WordMap("hat", heat, [0.0, 0.5, 1.0, 1.0], False)
    assert not (np.asarray(word_maps.map_picture(photo, missed, 200)) == green).all(axis=2).any()


# -------------------------------------------------------------------------------------------------------- history


def train(step, **more):
    return {"step": step, "epoch": 0, "split": "train", "time_s": float(step), "itc": 2.0, "mlm": 3.0, **more}


def test_the_gate_is_marked_where_it_opened():
    lines = [train(step, mask_strength=max(0.0, min(1.0, (step - 20) / 20))) for step in range(0, 80, 10)]
    assert history.gate(lines) == {"marks": ((20, "gate opens"),), "span": (20, 40, "masks take over")}
    slow = [train(step, mask_strength=max(0.0, min(1.0, (step - 24) / 50))) for step in range(0, 80, 10)]
    assert history.gate(slow)["span"] == (24, 74, "masks take over")  # between logged steps
    assert history.gate([train(1, mask_strength=0.0)]) == {} == history.gate([train(1)])


def test_losses_stand_beside_knowing_nothing():
    settings = {"optim": {"per_device_batch_size": 32}, "about": {"processes": 2}}
    lines = [{"step": 8, "split": "batches", "grouped": True}, *map(train, (10, 20))]
    itc, mlm = history.loss_panels(lines, settings)
    assert itc.level == pytest.approx(np.log(64)) and itc.marks == ((8, "batches are grouped"),)
    assert mlm.level is None and mlm.marks == ()
    assert history.training_part([train(1)], settings).missing


def test_each_way_has_its_own_chance():
    def line(step):
        ways = {"image_to_text": 0.5, "text_to_image": 0.2}
        found = {f"{way}/recall@10/itc": 0.6 for way in ways}
        return {"step": step, "split": "validation", **found, **{f"{w}/recall@10/chance": c for w, c in ways.items()}}

    panels = history.validation_panels([line(1), line(2), train(3)])
    assert [panel.level for panel in panels] == [50.0, 20.0]
    assert "from 60 to 60; chance 50 %" in panels[0].words


def test_labels_of_any_column_have_curves():
    lines = [train(step, season=0.5) | {"season/accuracy/fused": 0.6} for step in (1, 2)]
    tested = [line | {"split": "validation", "season/accuracy/chance": 0.25} for line in lines]
    (panel,) = history.validation_panels(tested)
    assert panel.title.endswith("season") and panel.level == 25.0 and "photo and text" in panel.lines
    titles = [panel.title for panel in history.loss_panels(lines, {"objective": {"label_columns": ["season", "x"]}})]
    assert titles[-1] == "season: which label" and len(titles) == 3


def test_speed_is_of_training_alone():
    settings = {"optim": {"per_device_batch_size": 8, "gradient_accumulation_steps": 2}, "about": {"processes": 2}}
    lines = [train(10), train(20), {"step": 20, "split": "validation", "time_s": 90.0}, train(30, time_s=100.0)]
    assert history.speeds(lines, settings) == ([20], [10 * 32 / 10])
    assert history.speeds([train(10), train(20, time_s=1.0)], settings) == ([], [])  # the clock began anew: a resume
    reading = {"step": 4, "seconds": 10.0, "waiting_s": 1.0, "planning_s": 2.0, "validating_s": 3.0, "saving_s": 0.0}
    times = [{**reading, "pairs": 50}, {**reading, "pairs": 0}]
    assert history.speeds(lines, settings, times) == ([4], [10.0])
    assert (
        history.phase_seconds(times)["training"] == pytest.approx(8)
        and sum(history.phase_seconds(times).values()) == 20
    )


def test_usage_is_told_in_words():
    usage = {"wall_s": 120.0, "peak_rss_bytes": 2e9, "energy": {"cpu": {"joules": 7200.0}, "gpu": {"joules": None}}}
    rows = dict(history.usage_rows(usage))
    assert list(rows.values()) == ["2.00", "2.00", "2.00"] and "energy of the CPU, Wh" in rows


def test_history_survives_a_line_that_was_cut_short(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "it', encoding="utf-8")
    assert history.read_history(tmp_path) == [{"step": 1}] and history.read_history(tmp_path / "nowhere") == []


# --------------------------------------------------------------------------------------------- counts, label tables


def test_the_corpus_is_counted(garments):
    from datasets import DatasetDict

    found = glance.glance(DatasetDict({"train": garments.select(range(60)), "test": garments.select(range(60, 80))}))
    assert found.splits["train"][0] == 60 and sum(found.photos_an_item) == 80 == len(found.words_a_text)
    assert sum(found.words_a_text) == sum(len(words) for words in garments.select(range(80))["words"])
    assert sum(found.categories.values()) == 80 and found.texts == len(set(garments.select(range(80))["text"]))


def test_rare_labels_go_together():
    counts, names = confusion_table(["a", "a", "a", "b", "b", "c", "d"], ["a", "b", "c", "b", "x", "c", "a"], most=2)
    assert names == ["a", "b", "all others"] and counts.tolist() == [[1, 1, 1], [0, 1, 1], [1, 0, 1]]
    assert confusion_table(["a", "b"], ["b", "b"])[1] == ["a", "b"]
