import importlib
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import ttest_1samp

from syncmask.evaluation.metrics import exact
from syncmask.evaluation.outcomes import Measure, Outcomes
from syncmask.evaluation.result import Result

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
# The rooms' bare names are banned from imports; benchmarks has no other.
plans, runs, readings, analysis, report = (
    importlib.import_module(f"benchmarks.ablation_{name}")
    for name in ("plan", "runs", "readings", "analysis", "report")
)
ablations = importlib.import_module("benchmarks.ablations")

CORPUS = plans.Corpus("train:8-aa test:4-bb", truth=True)
CONTENT = yaml.safe_load(plans.PLANS.read_text(encoding="utf-8"))


def settings_of(plan, arm):
    return plans.settings_of(plan, arm, 0, plan.steps)


def quick_runs(root, seeds=2, code="code", corpus=CORPUS, **changes):
    plan = replace(plans.read_plan("quick"), seeds=tuple(range(seeds)), **changes)
    arms = {arm: plan.steps for arm in ("neither", "both")}
    return plans.make_runs(plan, arms, corpus, Path(root), code)


def finish(run, gain=0.0, items=6, seed=0, steps=None):
    """Write what a training leaves: ranks of two photos an item, masks' figures, batches, the summary."""
    rng = np.random.default_rng([seed, run.seed])
    names = [f"item-{number}" for number in range(items)]
    photos = np.array([f"{name}/front/{view}" for name in names for view in range(2)])
    results = run.path / "results"
    asked = Outcomes(ids={"image_to_text": photos, "text_to_image": np.array(names)})
    for way, ids in asked.ids.items():
        for reading in ("itc", "itc_tolerant", "itm"):
            asked.add(f"{way}/{reading}", np.where(rng.random(len(ids)) < 0.4 + gain, 3, 30))
        asked.define(f"{way}/recall@10/itc", Measure((f"{way}/itc",), (10,)))
    Result("items", 1, outcomes=asked, metrics=asked.metrics()).save(results)
    seen, errors = Outcomes(), rng.uniform(0.5, 1, len(photos))
    ids = {"words/item_auc": np.array(names)}
    for name in ("words/precision_gain", "patches/precision_gain", "words/item_auc"):
        for strategy in ("attention", "evidence", "alignment"):
            units = ids.get(name, photos)
            seen.ratio(f"{name}/{strategy}", (rng.random(len(units)), np.ones(len(units))), units)
    seen.ratio("text_gap/relative_rise/truth_masks", (errors * (0.1 + gain), errors), photos)
    metrics = seen.metrics() | {
        f"false_negatives/{kind}/{rule}": exact(value, 4)
        for kind in ("pairs", "itm")
        for rule, value in (("rule_1", 0.03), ("rules_1_2", 0.01))
    }
    Result("co-occurrence", 1, outcomes=seen, metrics=metrics).save(results)
    lines = [
        {"step": 0, "split": "batches", "grouped": False, "false_negative_rate": 0.004},
        {"step": 30, "split": "batches", "grouped": True, "false_negative_rate": 0.008},
        {"step": steps or 40, "split": "train", "mask_strength": 1.0},
    ]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.path / "config.yaml").write_text(yaml.safe_dump({"objective": dict(run.settings["objective"])}))
    (run.path / "summary.txt").write_text("done\n")


class Trainer:
    """Stands in for training; remembers what it was asked for."""

    def __init__(self, fails=(), leaves=()):
        self.fails, self.leaves, self.trained = fails, leaves, []

    def __call__(self, run, descriptor):
        self.trained.append((run.arm, run.seed))
        if (run.arm, run.seed) in self.fails:
            (run.folder / "training.log").write_text("step 1\rstep 2\nout of memory\n\n")
            return 1
        if (run.arm, run.seed) not in self.leaves:
            finish(run)
        return 0


def run_all(todo, trainer, jobs=1, code=lambda: "code"):
    said = []
    return runs.run_all(todo, jobs, train=trainer, say=said.append, code=code), said


# ---------------------------------------------------------------------------------------------------------- the YAML


@pytest.mark.parametrize("name", list(CONTENT["plans"]))
def test_every_arm_of_every_plan_is_taken_by_trainings_own_parser(name):
    plan = plans.read_plan(name, real="photos" if name == "real" else None)
    assert len(plan.seeds) >= 3 and plan.families["primary"]
    for arm in plan.arms:
        settings = settings_of(plan, arm)
        assert settings["optim"]["max_steps"] == plan.steps
        assert settings["run"]["num_threads"] == 1 and settings["run"]["evaluate"]
        wanted = plan.arms[arm].objective
        assert {key: settings["objective"][key] for key in wanted} == dict(wanted)


@pytest.mark.parametrize("name", list(CONTENT["plans"]))
def test_arms_differ_in_what_they_are_named_for_and_in_nothing_else(name):
    plan = plans.read_plan(name)
    both = settings_of(plan, "both")
    assert (both["objective"]["mask_strategy"], both["objective"]["grouping"]) == ("attention", "grouped")
    for arm in plan.arms:
        mine = settings_of(plan, arm)
        assert {name: part for name, part in mine.items() if name != "objective"} == {
            name: part for name, part in both.items() if name != "objective"
        }
        changed = {key for key, value in mine["objective"].items() if value != both["objective"][key]}
        assert changed == {k for k, v in plan.arms[arm].objective.items() if v != both["objective"][k]}
        assert changed or arm == "both", f"{arm} changes nothing"
    for arm in ("neither", "masks", "groups", "both", "evidence"):
        if arm in plan.arms:
            rates = settings_of(plan, arm)["objective"]
            assert [rates[f"{kind}_mask_rate"] for kind in ("word", "patch")] == [0.3, 0.4]


def test_the_two_by_two_is_complete():
    plan = plans.read_plan("quick")
    cells = [(arm.objective["mask_strategy"], arm.objective["grouping"]) for arm in plan.arms.values()]
    assert sorted(cells) == sorted((m, g) for m in ("random", "attention") for g in ("random", "grouped"))


def test_comparisons_name_known_metrics_and_weigh_arms_evenly():
    for name in CONTENT["plans"]:
        for family in plans.read_plan(name).families.values():
            for one in family:
                assert readings.METRICS[one.metric].better in ("higher", "lower"), one.name
                total = sum(one.of.values())
                # What is held against a level of its own is a mean of arms, all else a difference.
                assert total == pytest.approx(1 if one.name in ("masks_words", "masks_view", "groups_rule_2") else 0)


def test_every_switch_is_compared_with_both():
    plan = plans.read_plan("full")
    family = plan.families["switches, text_gap"]
    others = set(plan.arms) - {"neither", "masks", "groups", "both"}
    assert {one.of.keys() - {"both"} == {next(iter(one.of))} for one in family} == {True}
    assert {next(iter(one.of)) for one in family} == others


def rewritten(tmp_path, change):
    content = yaml.safe_load(plans.PLANS.read_text(encoding="utf-8"))
    change(content)
    (tmp_path / "plans.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "plans.yaml"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["arms"]["both"].update(optim={"learning_rate": 1}), "changes `objective` alone"),
        (lambda c: c["plans"]["quick"]["arms"].remove("masks"), "compares masks, which it does not train"),
        (lambda c: c["plans"]["quick"]["arms"].append("maks"), "no arm 'maks'"),
        (lambda c: c["plans"]["quick"].update(budgets=["minutes"]), "budgets of steps, cpu"),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path, change, reason):
    with pytest.raises(ValueError, match=reason):
        plans.read_plan("quick", rewritten(tmp_path, change))


def test_settings_that_training_refuses_are_refused_before_any_run(tmp_path, capsys):
    file = rewritten(tmp_path, lambda c: c["arms"]["both"]["objective"].update(mask_strategie="random"))
    plan = plans.read_plan("quick", file)
    with pytest.raises(ValueError, match="quick, arm both"):
        settings_of(plan, "both")
    assert "did you mean mask_strategy" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- identity


def test_the_key_of_a_run_follows_all_that_a_figure_depends_on_and_no_place(tmp_path):
    def key(root="a", **changes):
        return quick_runs(tmp_path / root, **changes)[0].folder.name

    settings = {"settings": {**plans.read_plan("quick").settings, "optim": {"learning_rate": 1e-3}}}
    other = [key(code="other"), key(corpus=replace(CORPUS, fingerprint="x")), key(steps=3), key(**settings)]
    assert len({key(), *other}) == 5
    assert key() == key(root="b")
    first, second = quick_runs(tmp_path)[:2]
    assert first.seed == second.seed and first.folder.name != second.folder.name
    assert len({run.folder for run in quick_runs(tmp_path)}) == 4


def test_the_code_is_all_four_rooms(monkeypatch, tmp_path):
    before = plans.code_sha256()
    assert before == plans.code_sha256()
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr(plans.syncmask.training, "__file__", str(tmp_path / "__init__.py"))
    assert plans.code_sha256() != before


def test_steps_of_equal_cost():
    plan = plans.read_plan("quick")
    seconds = {"neither": 0.4, "masks": 0.404, "groups": 0.5, "both": 0.2}
    steps = plans.equal_cost_steps(plan, seconds)
    assert steps == {"neither": 500, "masks": 500, "groups": 400, "both": 1000}


# --------------------------------------------------------------------------------------------------------------- runs


def test_what_is_finished_is_never_trained_again(tmp_path):
    todo, trainer = quick_runs(tmp_path), Trainer()
    assert run_all(todo, trainer)[0] == {} and len(trainer.trained) == 4
    assert run_all(quick_runs(tmp_path), trainer)[0] == {} and len(trainer.trained) == 4
    # Another seed more trains that seed alone; other code trains everything.
    run_all(quick_runs(tmp_path, seeds=3), trainer)
    assert trainer.trained[4:] == [("neither", 2), ("both", 2)]
    run_all(quick_runs(tmp_path, code="new"), trainer, code=lambda: "new")
    assert len(trainer.trained) == 10


@pytest.mark.parametrize(
    "lost", ["summary.txt", "results/items.json", "results/co-occurrence.json", "../identity.json"]
)
def test_a_run_that_was_cut_short_is_taken_up(tmp_path, lost):
    todo, trainer = quick_runs(tmp_path), Trainer()
    run_all(todo, trainer)
    (todo[1].path / lost).unlink()
    run_all(todo, trainer)
    assert trainer.trained[4:] == [(todo[1].arm, todo[1].seed)]


def test_a_result_cut_short_or_of_another_identity_is_not_read(tmp_path):
    run = quick_runs(tmp_path)[0]
    runs.run_one(run, Trainer(), lambda: "code")
    assert runs.is_complete(run)
    identity = run.folder / "identity.json"
    identity.write_text(identity.read_text().replace("quickstart", "").replace('"code": "code"', '"code": "old"'))
    assert not runs.is_complete(run)
    runs.prepare(run)
    assert runs.is_complete(run)
    (run.path / "results" / "items.json").write_text('{"protocol"')
    assert not runs.is_complete(run)


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_run_that_fails_is_reported_and_stops_no_other(tmp_path, jobs):
    todo = quick_runs(tmp_path)
    trainer = Trainer(fails=[("both", 0)], leaves=[("neither", 1)])
    failed, said = run_all(todo, trainer, jobs)
    assert sorted(trainer.trained) == [("both", 0), ("both", 1), ("neither", 0), ("neither", 1)]
    reasons = {(run.arm, run.seed): reason for run, reason in failed.items()}
    assert set(reasons) == {("both", 0), ("neither", 1)}
    assert "exit code 1: out of memory" in reasons["both", 0]
    assert "without its results" in reasons["neither", 1]
    assert any("FAILED" in line for line in said) and sum("finished" in line for line in said) >= 3


def test_code_that_changes_while_a_run_goes_on_makes_it_worthless(tmp_path):
    run = quick_runs(tmp_path)[0]
    seen = iter(["code", "edited"])
    assert "changed while it ran" in runs.run_one(run, Trainer(), lambda: next(seen))
    assert not runs.is_complete(run)
    trainer = Trainer()
    assert "start it again" in runs.run_one(run, trainer, lambda: "edited") and not trainer.trained


def test_a_run_that_somebody_else_is_training_is_waited_for(tmp_path):
    run, trainer = quick_runs(tmp_path)[0], Trainer()
    with runs.locked(run.folder / "lock"):
        runs.prepare(run)
        thread = threading.Thread(target=runs.run_one, args=(run, trainer, lambda: "code"))
        thread.start()
        time.sleep(0.2)
        assert thread.is_alive() and not trainer.trained
        finish(run)
    thread.join(10)
    assert not trainer.trained and runs.is_complete(run)


def test_a_process_keeps_the_lock_that_it_inherits(tmp_path):
    import fcntl

    with runs.locked(tmp_path / "lock") as descriptor:
        orphan = subprocess.Popen(["sleep", "30"], pass_fds=[descriptor])
    with (tmp_path / "lock").open() as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        orphan.kill()
        orphan.wait()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_progress_tells_how_long_it_takes_at_this_pace(tmp_path):
    todo = quick_runs(tmp_path, steps=100)
    finish(todo[0], steps=100)
    finish(todo[1], steps=60)
    before = dict.fromkeys(todo, 0) | {todo[1]: 20}
    # 140 of 380 steps in 280 seconds: 240 more take 480.
    line = runs.progress(todo, todo[1:], before, elapsed=280)
    assert "1 of 4 done" in line and f"{todo[1].arm}/0 at 60" in line and "about 8 min left" in line
    assert "no pace known yet" in runs.progress(todo[2:], todo[2:], before, elapsed=5)


def test_cpu_seconds_a_step_count_every_step_once_and_survive_a_kill(tmp_path):
    run = quick_runs(tmp_path)[0]
    assert runs.cpu_seconds_a_step(run) is None
    run.path.mkdir(parents=True)
    # Killed at step 50 and taken up again from step 40; a save in between is a reading without steps.
    readings = [(20, 20, 6.0), (40, 20, 6.5), (40, 0, 0.5), (60, 20, 7.0), (80, 20, 4.0)]
    lines = [json.dumps({"step": step, "steps": steps, "cpu_s": cpu}) for step, steps, cpu in readings]
    (run.path / "times.jsonl").write_text("\n".join(lines) + '\n{"step": 100, "st')
    assert runs.cpu_seconds_a_step(run) == pytest.approx(24 / 80)
    assert runs.cpu_by_arm([run]) == {run.arm: pytest.approx(0.3)}


# ----------------------------------------------------------------------------------------------------------- readings


def test_readings_are_sums_by_item(tmp_path):
    run = quick_runs(tmp_path)[-1]
    assert run.arm == "both"
    finish(run)
    done = readings.Finished(run.path)
    kept = done.items
    by_hand = np.mean([np.mean(kept.values[f"{way}/itc"] <= 10) for way in readings.BOTH_WAYS])
    table = readings.table_of("recall_at_10", {"both": {0: done}})
    assert table.parts.shape == (1, 1, 2, 6) and (table.weights[0, 0, 0] == 2).all()
    assert analysis.values(table)[0, 0] == pytest.approx(by_hand)
    gap = done.truth.values["text_gap/relative_rise/truth_masks"]
    for metric, wanted in (
        ("text_gap", gap[:, 0].sum() / gap[:, 1].sum()),
        ("mim_error", gap[:, 1].mean()),
        ("fn_rule_2", -0.02),
        ("fn_trained", (30 * 0.004 + 10 * 0.008) / 40),
        ("grouped_steps", 0.25),
        ("scored_masks", 1.0),
        ("item_auc_attention", done.truth.values["words/item_auc/attention"][:, 0].mean()),
        ("item_auc_masks", done.truth.values["words/item_auc/attention"][:, 0].mean()),
    ):
        table = readings.table_of(metric, {"both": {0: done}})
        assert analysis.values(table)[0, 0] == pytest.approx(wanted), metric


def test_every_metric_is_read_or_missing_and_unlike_queries_are_refused(tmp_path):
    first, second = (run for run in quick_runs(tmp_path) if run.arm == "both")
    finish(first)
    finish(second, items=5)
    done, other = readings.Finished(first.path), readings.Finished(second.path)
    assert all(readings.table_of(metric, {"a": {0: done}}) is not None for metric in readings.METRICS)
    with pytest.raises(ValueError, match="asked other queries"):
        readings.table_of("recall_at_10", {"a": {0: done}, "b": {0: other}})
    chance = next(run for run in quick_runs(tmp_path) if run.arm == "neither")
    finish(chance)
    both = {"neither": {0: readings.Finished(chance.path)}, "both": {0: done}}
    assert readings.table_of("item_auc_attention", both) is not None
    assert readings.table_of("item_auc_masks", both) is None  # random masks have no score
    (first.path / "results" / "co-occurrence.json").unlink()
    bare = readings.Finished(first.path)
    measured = {metric for metric in readings.METRICS if readings.table_of(metric, {"a": {0: bare}}) is not None}
    assert {"recall_at_10", "fn_trained"} <= measured and "text_gap" not in measured


def test_only_seeds_that_every_arm_has_are_compared(tmp_path):
    a, b, c, _ = quick_runs(tmp_path)
    for run in (a, b, c):
        finish(run)
    found = {"a": {0: readings.Finished(a.path), 1: readings.Finished(c.path)}, "b": {0: readings.Finished(b.path)}}
    assert readings.table_of("recall_at_10", found).seeds == (0,)
    assert readings.table_of("recall_at_10", {"a": found["a"], "b": {}}) is None


# ----------------------------------------------------------------------------------------------------------- analysis


def crossed(rng, seeds=3, items=150, effect=0.0, by_seed=0.0, by_item=0.0):
    """Two arms on the same items: their difference has an effect, and luck of seeds, of items, and of both."""
    shared = rng.normal(0, 1, items)
    parts = np.empty((2, seeds, 1, items))
    for arm in range(2):
        own = rng.normal(0, by_item, items)
        for seed in range(seeds):
            parts[arm, seed, 0] = shared + own + rng.normal(0, by_seed) + rng.normal(0, 1, items) + arm * effect
    return readings.Table(("a", "b"), tuple(range(seeds)), parts, np.ones_like(parts))


def test_contrasts_against_loops():
    rng = np.random.default_rng(0)
    parts, weights = rng.uniform(1, 2, (2, 2, 3, 2, 4)).reshape(2, 2, 3, 2, 4)
    table = readings.Table(("a", "b"), (0, 1, 2), parts, weights)
    own = np.empty((2, 3))
    for arm in range(2):
        for seed in range(3):
            own[arm, seed] = np.mean([parts[arm, seed, g].sum() / weights[arm, seed, g].sum() for g in range(2)])
    change = analysis.contrast(table, {"b": 1, "a": -1})
    assert change.by_seed == pytest.approx(own[1] - own[0]) and change.value == pytest.approx((own[1] - own[0]).mean())
    assert change.low < change.value < change.high
    ratio = analysis.contrast(table, {"b": 1, "a": -1}, ratio=True)
    assert ratio.value == pytest.approx(np.exp(np.log(own[1] / own[0]).mean())) and ratio.level == 1
    mean = analysis.contrast(table, {"b": 0.5, "a": 0.5}, level=0.9)
    assert mean.value == pytest.approx(own.mean()) and mean.level == 0.9
    held = analysis.contrast(table, {"b": 0.5, "a": 0.5}, level=own.mean())
    assert held.p == 1 and analysis.contrast(table, {"b": 0.5, "a": 0.5}).p < 0.05
    level = analysis.contrast(
        replace(table, parts=table.parts[[0, 0]], weights=table.weights[[0, 0]]), {"b": 1, "a": -1}, ratio=True
    )
    assert (level.value, level.p) == (1, 1)
    times = np.random.default_rng(5).multinomial(4, [0.25] * 4, size=3)
    resampled = analysis.resample(table, 3, np.random.default_rng(5))
    for draw in range(3):
        groups = [(times[draw] * parts[1, 2, g]).sum() / (times[draw] * weights[1, 2, g]).sum() for g in range(2)]
        assert resampled[draw, 1, 2] == pytest.approx(np.mean(groups))


def test_seeds_decide_the_width_by_students_t():
    # No luck of items: one figure a run.
    d = np.array([0.1, 0.2, 0.6])
    parts = np.stack([np.zeros(3), d])[:, :, None, None]
    found = analysis.contrast(
        readings.Table(("a", "b"), (0, 1, 2), parts, np.ones_like(parts)), {"b": 1, "a": -1}, draws=200_000
    )
    half = 4.3027 * d.std(ddof=1) / np.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.03)
    assert found.p == pytest.approx(0.1835, abs=0.01)  # two-sided, t = 1.964 with 2 degrees of freedom


def test_one_seed_and_metrics_that_are_not_there_give_no_interval():
    table = crossed(np.random.default_rng(0), seeds=1)
    single = analysis.contrast(table, {"b": 1, "a": -1})
    assert np.isfinite(single.value) and np.isnan([single.low, single.high, single.p]).all()
    assert analysis.verdict(single, single.p, "higher") == analysis.SAME
    negative = replace(table, parts=-np.abs(table.parts))
    assert np.isnan(analysis.contrast(negative, {"b": 1, "a": -1}, ratio=True).value)
    # An arm that is not asked for spoils nothing.
    spoilt = replace(table, weights=table.weights * np.array([0, 1])[:, None, None, None])
    assert np.isfinite(analysis.contrast(spoilt, {"b": 1}).value)


def called_something(rate_of, count=200, **luck):
    """Share of corpora without any effect in which p is below .05."""
    rng = np.random.default_rng(3)
    found = [
        analysis.contrast(crossed(rng, **luck), {"b": 1, "a": -1}, draws=300, seed=place) for place in range(count)
    ]
    return np.mean([rate_of(estimate) < 0.05 for estimate in found])


@pytest.mark.parametrize("luck", [{"by_seed": 0.2}, {"by_item": 1.0}, {"by_seed": 0.1, "by_item": 1.0}])
def test_nothing_is_called_something_at_the_nominal_rate(luck):
    assert called_something(lambda estimate: estimate.p, **luck) <= 0.08


def test_luck_of_items_is_counted_once():
    # Were each run's own noise in both the bootstrap and the spread of seeds, nearly nothing would be called something.
    assert 0.02 <= called_something(lambda estimate: estimate.p) <= 0.08
    # Were it in the spread of seeds alone, what all seeds share would be called an effect.
    assert called_something(lambda estimate: ttest_1samp(estimate.by_seed, 0).pvalue, by_item=1.0) > 0.1


@pytest.mark.parametrize(
    ("effect", "better", "word"),
    [(0.8, "higher", "helps"), (0.8, "lower", "hurts"), (-0.8, "higher", "hurts"), (-0.8, "lower", "helps")],
)
def test_a_planted_difference_is_found_and_named(effect, better, word):
    rng = np.random.default_rng(3)
    said, held = [], 0
    for _ in range(20):
        found = analysis.contrast(crossed(rng, effect=effect, by_seed=0.02, by_item=0.5), {"b": 1, "a": -1}, draws=500)
        said.append(analysis.verdict(found, found.p, better))
        held += found.low < effect < found.high
    assert said.count(word) >= 15 and held >= 17


def test_arms_that_are_equal_are_never_called_different():
    # Sums of equal numbers differ in their last bits, and then as surely in every seed.
    parts = np.array([[0.1, 0.2, 0.3], [0.1 + 1e-16, 0.2 + 3e-17, 0.3 + 1e-16]])[:, :, None, None]
    found = analysis.contrast(readings.Table(("a", "b"), (0, 1, 2), parts, np.ones_like(parts)), {"b": 1, "a": -1})
    assert found.p == 1 and analysis.verdict(found, found.p, "higher") == analysis.SAME


def test_holm():
    assert analysis.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert analysis.holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert analysis.holm([]) == []
    with_gap = analysis.holm([0.02, float("nan"), 0.03])
    assert with_gap[0] == pytest.approx(0.04) and np.isnan(with_gap[1]) and with_gap[2] == pytest.approx(0.04)


# ------------------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    plan = plans.read_plan("quick")
    todo = plans.make_runs(plan, dict.fromkeys(plan.arms, plan.steps), CORPUS, tmp_path_factory.mktemp("runs"), "code")
    for run in todo:
        run.folder.mkdir(parents=True)
        runs.prepare(run)
        finish(run, gain=0.3 if run.arm in ("masks", "both") else 0.0, items=60)
    return ablations.summary_of(plan, "steps", todo, {}, "python -m benchmarks.ablations --quick")


def test_the_page_is_worded_by_the_numbers(summary):
    text = report.markdown(summary, "picture.png")
    lines = {line.comparison.name: line for line in summary.families["primary"]}
    assert lines["masks_text_gap"].verdict == "helps" and lines["masks_text_gap"].estimate.value == pytest.approx(0.3)
    assert lines["groups_recall"].verdict == "not distinguishable" and lines["groups_recall"].adjusted_p == 1
    assert lines["groups_rule_2"].estimate.value == pytest.approx(-0.02)
    raw, adjusted = zip(*((line.estimate.p, line.adjusted_p) for line in summary.families["primary"]))
    assert list(adjusted) == analysis.holm(raw) != list(raw)
    assert summary.ratios["masks"].value == pytest.approx(4)
    assert "masks: MIM text gap, synchronised less random masks: +30.0" in text and "**helps**" in text
    assert "`python -m benchmarks.ablations --quick`" in text and "12 of 12 runs" in text
    assert all(f"`{arm}`" in text for arm in ("neither", "masks", "groups", "both"))
    worse = report.Line(
        lines["masks_recall"].comparison, replace(lines["masks_recall"].estimate, value=-0.1), 0.001, "hurts"
    )
    assert "-10.0" in report.sentence(worse) and "**hurts**" in report.sentence(worse)
    json.dumps(report.content(summary), allow_nan=False)


def test_missing_runs_are_named_and_the_rest_is_told(tmp_path):
    plan = plans.read_plan("quick")
    todo = plans.make_runs(plan, dict.fromkeys(plan.arms, plan.steps), CORPUS, tmp_path, "code")
    for run in todo:
        if run.arm in ("masks", "both") and run.seed < 2:
            run.folder.mkdir(parents=True)
            runs.prepare(run)
            finish(run)
    found = ablations.summary_of(plan, "steps", todo, {todo[0]: "exit code 9"}, "command")
    assert "Missing: neither, seed 0, 500 steps (exit code 9)." in found.remarks
    assert {line.comparison.name for line in found.families["primary"]} == {"masks_words", "masks_view"}
    assert not found.ratios and "4 of 12 runs" in found.remarks[0]
    assert "nan" not in report.markdown(found)


def test_the_picture_has_a_row_an_arm_and_the_command(summary):
    drawn = report.picture(summary)
    assert drawn.width > 600 and drawn.height > 300
    wider = report.picture(summary, ("text_gap",))
    assert wider.size != drawn.size


def test_a_section_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    kept = "middle\n<!-- ablations full_cpu -->\nx\n<!-- end -->\n"
    page.write_text(f"# Head\n<!-- ablations quick_steps -->\nold\n<!-- end -->\n{kept}")
    report.write_section(page, "quick_steps", r"new \1 text")
    report.write_section(page, "quick_steps", r"newer \1 text")
    text = page.read_text()
    assert (
        "old" not in text and text.count(r"newer \1 text") == 1 and "\nmiddle\n" in text and "\nx\n<!-- end -->" in text
    )
    with pytest.raises(ValueError, match="no section <!-- ablations real_steps -->"):
        report.write_section(page, "real_steps", "text")


def test_the_docs_have_a_place_for_every_plan():
    page = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
    for name, part in CONTENT["plans"].items():
        for budget in part["budgets"]:
            assert f"<!-- ablations {name}_{budget} -->\n" in page


# --------------------------------------------------------------------------------------------------------- end to end


def tiny(content):
    """Two arms, two seeds, a few steps of a very small model."""
    small = {"patch_size": 8, "projection_dim": 16}
    content["plans"]["quick"] |= {
        "steps": 12,
        "seeds": [0, 1],
        "budgets": ["steps", "cpu"],
        "arms": ["neither", "masks"],
        "primary": [],
        "secondary": [],
        "switches": {"against": "neither", "metrics": ["recall_at_10", "text_gap"]},
        "settings": {
            "data": {"num_items": 60, "image_size": 32},
            "model": {"model_overrides": small},
            "objective": {"gate_every": 1, "gate_max_steps": 2, "mask_ramp_steps": 1},
            "optim": {"per_device_batch_size": 8, "warmup_steps": 2},
            "run": {"log_every": 1},
        },
    }


@pytest.mark.slow
def test_two_arms_and_two_seeds_from_the_command_to_the_tables(tmp_path, capsys):
    words = ["--quick", "--plans", str(rewritten(tmp_path, tiny)), "--output_dir", str(tmp_path / "out"), "--jobs", "2"]
    trained = []

    def once_killed(run, descriptor):
        """The first run is killed as soon as it has trained a step, and then fails."""
        trained.append((run.arm, run.seed))
        if len(trained) == 1:
            thread = threading.Thread(target=kill_when_trained, args=(run,))
            thread.start()
        return runs.start_training(run, descriptor)

    def kill_when_trained(run):
        import psutil

        while not runs.steps_done(run):
            time.sleep(0.05)
        for child in psutil.Process().children():
            if str(run.folder) in " ".join(child.cmdline()):
                child.send_signal(signal.SIGKILL)

    assert ablations.main(words, train=once_killed) == 1
    assert "FAILED: exit code -9" in capsys.readouterr().out
    assert ablations.main(words, train=once_killed) == 0
    assert trained.count(trained[0]) >= 2 and set(trained) == {(a, s) for a in ("neither", "masks") for s in (0, 1)}
    before = len(trained)
    capsys.readouterr()
    assert ablations.main([*words, "--json"], train=once_killed) == 0 and len(trained) == before
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"steps", "cpu"}
    arms = found["steps"]["arms"]
    assert set(arms["text_gap"]) == {"neither", "masks"} and len(arms["recall_at_10"]["masks"]["by_seed"]) == 2
    assert arms["scored_masks"]["neither"]["value"] == 0 < arms["scored_masks"]["masks"]["value"]
    assert found["steps"]["families"]["switches, text_gap"][0]["verdict"] in ("helps", "hurts", "not distinguishable")
    assert found["steps"]["cost"]["neither"][1] > 0
    for name in ("quick_steps.md", "quick_steps.json", "quick_steps.png", "quick_cpu.md"):
        assert (tmp_path / "out" / "quick" / name).is_file()
