"""Comparing two results: the paired bootstrap against loops, what is refused, and what is not distinguishable."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from syncmask.evaluation.cli import app
from syncmask.evaluation.compare import SAME, compare, verdict
from syncmask.evaluation.metrics import bootstrap_mean
from syncmask.evaluation.outcomes import F1, Measure, Outcomes, difference
from syncmask.evaluation.recognition import recognition_outcomes
from syncmask.evaluation.result import Result

CORPUS = {"name": "x", "split": "test", "rows": 300, "items": 100, "fingerprint": "aaa-300-123"}


def outcomes(ranks, swapped=None):
    found = Outcomes(ids={"image_to_text": np.arange(len(ranks)).astype(str)})
    found.add("image_to_text/itc", ranks)
    found.recalls("image_to_text", ["itc"], [1, 10])
    if swapped is not None:
        found.add("image_to_text/itc_swapped", swapped)
        both = ("image_to_text/itc", "image_to_text/itc_swapped")
        found.define("image_to_text/recall@1/both", Measure(both, (1,)))
    return found


def saved(folder, found, **changes):
    about = {"protocol": "items", "version": 1, "corpus": CORPUS, "candidates_sha256": "c"} | changes
    return Result(**about, metrics=found.metrics(), outcomes=found).save(folder)


def draw(rng, chance, n=300):
    return np.where(rng.random(n) < chance, 1, 99)


def test_the_paired_difference_is_that_of_each_query():
    rng = np.random.default_rng(0)
    one, other = draw(rng, 0.5), draw(rng, 0.6)
    change, differ = difference(outcomes(one), outcomes(other), "image_to_text/recall@1/itc")
    by_query = [float(b <= 1) - float(a <= 1) for a, b in zip(one, other)]
    assert change["value"] == pytest.approx(np.mean(by_query)) and differ == np.count_nonzero(by_query)
    means = [np.mean(rng.choice(by_query, size=300)) for _ in range(2000)]
    assert [change["low"], change["high"]] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.02)


def test_ratios_are_compared_on_the_same_resamples():
    """Of AUCs, pointing and the text gap: sums over units, whose weights may differ between the models."""
    rng = np.random.default_rng(3)
    weights = rng.integers(0, 4, size=(2, 200)).astype(float)
    parts = weights * rng.random((2, 200)) * np.array([[0.5], [1.0]])
    pair = []
    for tally in zip(parts, weights):
        found = Outcomes()
        found.ratio("pointing/hit/own_word", tally, np.arange(200).astype(str))
        pair.append(found)
    change, differ = difference(*pair, "pointing/hit/own_word")
    ratios = parts.sum(axis=1) / weights.sum(axis=1)
    metrics = [found.metrics()["pointing/hit/own_word"] for found in pair]
    assert [metric["value"] for metric in metrics] == pytest.approx(ratios)
    assert metrics[0]["n"] == np.count_nonzero(weights[0])
    assert change["value"] == pytest.approx(ratios[1] - ratios[0])
    assert change["n"] == np.count_nonzero(weights.sum(axis=0))
    drawn = []
    for _ in range(2000):
        rows = rng.integers(0, 200, size=200)
        one, other = parts[:, rows].sum(axis=1) / weights[:, rows].sum(axis=1)
        drawn.append(other - one)
    assert [change["low"], change["high"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.02)
    assert verdict(change, differ) == "higher"
    same, differ = difference(pair[0], pair[0], "pointing/hit/own_word")
    assert differ == 0 and same["low"] == same["value"] == same["high"] == 0
    empty = Outcomes()
    empty.ratio("pointing/hit/own_word", (np.zeros(2), np.zeros(2)), np.array(["a", "b"]))
    nothing, differ = difference(empty, empty, "pointing/hit/own_word")
    assert np.isnan(nothing["value"]) and verdict(nothing, differ) == SAME


def test_pairing_takes_out_the_luck_that_both_share():
    rng = np.random.default_rng(1)
    one = draw(rng, 0.5, 1000)
    other = one.copy()
    other[np.flatnonzero(one == 99)[:40]] = 1
    change, differ = difference(outcomes(one), outcomes(other), "image_to_text/recall@1/itc")
    alone = outcomes(one).metrics()["image_to_text/recall@1/itc"]
    assert change["high"] - change["low"] < 0.5 * (alone["high"] - alone["low"])
    assert verdict(change, differ) == "higher"


def test_the_interval_covers_as_often_as_it_says():
    """Of 200 pairs of equally good models about 5 % are called different; of single intervals 95 % cover."""
    rng = np.random.default_rng(2)
    false = covered = 0
    for seed in range(200):
        one, other = outcomes(draw(rng, 0.4)), outcomes(draw(rng, 0.4))
        change, differ = difference(one, other, "image_to_text/recall@1/itc", seed=seed)
        false += verdict(change, differ) != SAME
        metric = bootstrap_mean(draw(rng, 0.4) == 1, seed=seed)
        covered += metric["low"] <= 0.4 <= metric["high"]
    assert 2 <= false <= 20 and 180 <= covered <= 199


def test_few_queries_tell_nothing():
    one, other = outcomes(np.full(5, 99)), outcomes(np.ones(5, dtype=int))
    change, differ = difference(one, other, "image_to_text/recall@1/itc")
    assert change["low"] == 1 and verdict(change, differ) == SAME
    assert verdict(*difference(one, one, "image_to_text/recall@1/itc")) == SAME


def test_scores_of_the_same_queries_are_resampled_together():
    """Two orders of the captions that always hit together vary like one, not like two apart."""
    ranks = draw(np.random.default_rng(3), 0.5, 400)
    found = outcomes(ranks, ranks).metrics()
    one, both = found["image_to_text/recall@1/itc"], found["image_to_text/recall@1/both"]
    assert both["high"] - both["low"] == pytest.approx(one["high"] - one["low"], rel=0.1)


def test_draws_of_one_query_are_one_unit():
    hits = np.tile(np.where(np.arange(50) < 20, 1, 9), 5)
    found = Outcomes(ids={"way": np.arange(50).astype(str)})
    found.add("way/itc", hits, np.tile(np.arange(50), 5))
    found.recalls("way", ["itc"], [1])
    metric, alone = found.metrics()["way/recall@1/itc"], bootstrap_mean(np.arange(50) < 20)
    assert metric["n"] == 50 and metric["value"] == pytest.approx(0.4)
    assert metric["high"] - metric["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.2)


def test_macro_f1_is_compared_on_the_same_rows():
    rng = np.random.default_rng(4)
    labels = list("abcd")
    truth = rng.choice(labels, size=400)
    worse, better = (np.where(rng.random(400) < share, truth, rng.choice(labels, 400)) for share in (0.5, 0.7))
    one, other = (recognition_outcomes({"m": part}, truth.tolist(), labels) for part in (worse, better))
    change, differ = difference(one, other, f"category/{F1}/m")
    gain = other.metrics()[f"category/{F1}/m"]["value"] - one.metrics()[f"category/{F1}/m"]["value"]
    assert change["value"] == pytest.approx(gain) and change["low"] > 0
    assert differ == (worse != better).sum() and verdict(change, differ) == "higher"


def test_two_results_are_compared_from_their_files(tmp_path):
    rng = np.random.default_rng(5)
    ranks = draw(rng, 0.5)
    near = ranks.copy()
    near[:7] = 100 - near[:7]
    paths = [
        saved(tmp_path / name, outcomes(part)) for name, part in (("a", ranks), ("b", near), ("c", draw(rng, 0.9)))
    ]
    same = compare(paths[0], paths[1])
    assert {line.verdict for line in same.lines} == {SAME} and SAME in same.table()
    better = compare(paths[0], paths[2])
    assert {line.name: line.verdict for line in better.lines}["image_to_text/recall@1/itc"] == "higher"
    assert compare(paths[2], paths[0]).lines[0].verdict == "lower"
    shown = CliRunner().invoke(app, ["compare", str(paths[0]), str(paths[1])])
    assert shown.exit_code == 0 and SAME in shown.output
    plain = CliRunner().invoke(app, ["compare", str(paths[0]), str(paths[2]), "--json"])
    assert json.loads(plain.output)["metrics"]["image_to_text/recall@1/itc"]["change"]["low"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "fashiongen-full"}, "protocol is 'items'"),
        ({"version": 2}, "version is 1"),
        ({"candidates_sha256": "d"}, "candidates_sha256"),
        ({"corpus": CORPUS | {"split": "validation"}}, "corpus split"),
        ({"corpus": CORPUS | {"fingerprint": "aaa-300-999"}}, "corpus contents"),
    ],
)
def test_unlike_results_are_refused(tmp_path, changes, message):
    ranks = draw(np.random.default_rng(6), 0.5)
    one, other = saved(tmp_path / "a", outcomes(ranks)), saved(tmp_path / "b", outcomes(ranks), **changes)
    with pytest.raises(ValueError, match=message):
        compare(one, other)
    shown = CliRunner().invoke(app, ["compare", str(one), str(other)])
    assert shown.exit_code == 1 and "not comparable" in shown.output and "Traceback" not in shown.output


def test_a_corpus_that_only_moved_is_the_same(tmp_path):
    ranks = draw(np.random.default_rng(7), 0.5)
    moved = CORPUS | {"fingerprint": "bbb-300-123", "name": "elsewhere"}
    found = compare(saved(tmp_path / "a", outcomes(ranks)), saved(tmp_path / "b", outcomes(ranks), corpus=moved))
    assert any("photos" in remark for remark in found.remarks)


def test_queries_must_belong_to_their_result(tmp_path):
    rng = np.random.default_rng(8)
    one, other = saved(tmp_path / "a", outcomes(draw(rng, 0.5))), saved(tmp_path / "b", outcomes(draw(rng, 0.5)))
    queries = other.with_name("items.queries.npz")
    queries.write_bytes(one.with_name("items.queries.npz").read_bytes())
    with pytest.raises(ValueError, match="another evaluation"):
        compare(one, other)
    queries.unlink()
    with pytest.raises(FileNotFoundError, match=r"items\.queries\.npz"):
        compare(one, other)
    bare = Result("items", 1, corpus=CORPUS, candidates_sha256="c").save(tmp_path / "c")
    with pytest.raises(ValueError, match="single queries"):
        compare(bare, one)


def test_outcomes_survive_a_file(tmp_path):
    found = outcomes(draw(np.random.default_rng(9), 0.5), draw(np.random.default_rng(10), 0.5))
    sha256 = found.save(tmp_path / "q.npz")
    back = Outcomes.load(tmp_path / "q.npz", sha256)
    assert back.metrics() == found.metrics() and back.measures == found.measures
    with pytest.raises(ValueError, match="do not fit"):
        found.add("image_to_text/x", np.zeros(999))
