"""From benchmarks/ablations.yaml to runs: what is trained, what is compared, and what a finished run depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import syncmask.evaluation
import syncmask.processing
import syncmask.training
from syncmask.evaluation.result import library_versions
from syncmask.processing.corpus import corpus_of_run, fingerprint
from syncmask.training.parsing import load_arguments, read_config

PLANS = Path(__file__).with_name("ablations.yaml")
BUDGETS = ("steps", "cpu")
# Arms whose steps cost this much more or less than the reference's are of equal cost: no second run for them.
EQUAL_COST = 0.02


@dataclass(frozen=True)
class Arm:
    """One way of training: settings of the objective that differ from the plan's, and why."""

    name: str
    why: str
    objective: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A weighted sum of arms in one metric, and what it is held against.

    Attributes:
        name: as in the YAML. claim: the hypothesis that it belongs to. what: in words.
        metric: a name of `ablation_readings.METRICS`.
        of: arm -> weight.
        ratio: weights are powers, so {"b": 1, "a": -1} is b / a, held against 1.
        level: what the sum is held against otherwise.
    """

    name: str
    claim: str
    what: str
    metric: str
    of: Mapping[str, float]
    ratio: bool = False
    level: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A part of the YAML: which arms are trained for how long, and which comparisons were registered.

    Attributes:
        name: its key.
        config: a packaged config that its settings start from. settings: what differs, by section.
        steps: of the reference arm in every budget, and of every arm in the budget `steps`.
        seeds: of training; data and queries are the same for all.
        budgets: of BUDGETS. reference: the arm that others are drawn against.
        arms: by name.
        families: comparisons that are adjusted together, by name; "primary" holds the registered claims.
    """

    name: str
    config: str
    steps: int
    seeds: tuple[int, ...]
    budgets: tuple[str, ...]
    reference: str
    arms: Mapping[str, Arm]
    families: Mapping[str, tuple[Comparison, ...]]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """What all runs of a plan are trained and scored on: its contents' name, and whether truth is known."""

    fingerprint: str
    truth: bool


@dataclass(frozen=True, eq=False)
class Run:
    """One training: an arm, a seed, a number of steps.

    Attributes:
        folder: holds the harness's records, and the run folder `run`.
        settings: as a config file, by section.
        identity: all that a figure of it depends on; a finished run with another one is another run.
        protocols: whose results it must end with.
    """

    arm: str
    seed: int
    steps: int
    folder: Path
    settings: Mapping[str, Mapping[str, Any]]
    identity: Mapping[str, Any]
    protocols: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The run folder that training writes."""
        return self.folder / "run"

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}, {self.steps} steps"


def read_plan(name: str, path: Path = PLANS, real: str | None = None) -> Plan:
    """Read a plan of the YAML; `real` is the folder of photos of a plan for real ones.

    Raises:
        ValueError: an unknown plan or arm; an arm that changes more than the objective; a comparison of arms that the
            plan does not train.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if name not in content["plans"]:
        raise ValueError(f"{path.name} has no plan {name!r}; it has {', '.join(content['plans'])}")
    part = content["plans"][name]
    names = list(content["arms"]) if part["arms"] == "all" else part["arms"]
    arms = {arm: _arm(arm, content["arms"]) for arm in names}
    families = {
        kind: tuple(Comparison(one, **content["comparisons"][one]) for one in part.get(kind, ()))
        for kind in ("primary", "secondary")
    }
    families |= _switches(arms, families["primary"], **part["switches"]) if "switches" in part else {}
    for comparison in (one for family in families.values() for one in family):
        if missing := set(comparison.of) - set(arms):
            raise ValueError(
                f"{name}: {comparison.name} compares {', '.join(sorted(missing))}, which it does not train"
            )
    if part["reference"] not in arms or set(part["budgets"]) - set(BUDGETS):
        raise ValueError(f"{name}: the reference must be one of its arms, and budgets of {', '.join(BUDGETS)}")
    settings = dict(part.get("settings", {}))
    if real is not None:
        settings["data"] = {**settings.get("data", {}), "data_dir": str(Path(real).expanduser().resolve())}
    return Plan(
        name=name,
        config=part["config"],
        steps=part["steps"],
        seeds=tuple(part["seeds"]),
        budgets=tuple(part["budgets"]),
        reference=part["reference"],
        arms=arms,
        families=families,
        settings=settings,
    )


def _arm(name: str, arms: Mapping[str, Mapping]) -> Arm:
    if name not in arms:
        raise ValueError(f"there is no arm {name!r}; there are {', '.join(arms)}")
    if more := set(arms[name]) - {"why", "objective"}:
        raise ValueError(
            f"arm {name!r} has {', '.join(sorted(more))}; an arm changes `objective` alone, so that all else is equal"
        )
    return Arm(name, **arms[name])


def _switches(arms: Mapping[str, Arm], primary, against: str, metrics: list[str]) -> dict[str, tuple[Comparison, ...]]:
    """Every arm that no primary comparison is about, less one arm; a family a metric."""
    known = {arm for one in primary for arm in one.of} | {against}
    others = [arm for arm in arms.values() if arm.name not in known]
    return {
        f"switches, {metric}": tuple(
            Comparison(f"{arm.name}_{metric}", "switches", arm.why, metric, {arm.name: 1, against: -1})
            for arm in others
        )
        for metric in metrics
    }


# ----------------------------------------------------------------------------------------------------------- settings


def settings_of(plan: Plan, arm: str, seed: int, steps: int) -> dict[str, dict[str, Any]]:
    """Every setting of a run by section, checked by training's own parser.

    Raises:
        ValueError: a setting that training does not take, with the reason it gives.
    """
    wanted = read_config(plan.config, "pretraining")
    merged = {name: {**wanted.get(name, {}), **plan.settings.get(name, {})} for name in {*wanted, *plan.settings}}
    merged["objective"] = {**merged.get("objective", {}), **plan.arms[arm].objective}
    merged["optim"] = {**merged.get("optim", {}), "max_steps": steps, "epochs": steps}
    # One thread, so that runs side by side do not slow one another, and figures do not depend on the machine's cores.
    fixed = {"seed": seed, "num_threads": 1, "keep_last": 1, "checkpoint_every": 100, "evaluate": True}
    # Validation would take a tenth of the time, and nothing is chosen by it.
    fixed |= {"validate_every_epochs": steps}
    merged["run"] = {**merged.get("run", {}), **fixed}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.yaml"
        file.write_text(yaml.safe_dump(merged), encoding="utf-8")
        return dataclasses.asdict(_parsed(file, f"{plan.name}, arm {arm}"))


def _parsed(file: Path, whose: str):
    try:
        return load_arguments(["--config", str(file)])
    except SystemExit as problem:
        raise ValueError(f"{whose}: training refuses these settings (see above)") from problem


def make_run(plan: Plan, arm: str, seed: int, steps: int, corpus: Corpus, root: Path, code: str) -> Run:
    """Make one run under `root`; its folder's name tells arm, seed and a hash of its identity."""
    settings = settings_of(plan, arm, seed, steps)
    identity = {
        "settings": settings,
        "corpus": corpus.fingerprint,
        "code": code,
        "versions": library_versions(),
    }
    folder = root / plan.name / arm / f"seed_{seed}_{key_of(identity)}"
    # Where it lies changes no figure, so that is no part of the identity.
    placed = settings | {"run": settings["run"] | {"output_dir": str(folder), "run_name": "run"}}
    protocols = ("items", "co-occurrence") if corpus.truth else ("items",)
    return Run(arm, seed, steps, folder, placed, identity, protocols)


def make_runs(plan: Plan, steps: Mapping[str, int], corpus: Corpus, root: Path, code: str) -> list[Run]:
    """Make the runs of a budget, given each arm's steps: seed by seed, so that whole comparisons finish early."""
    return [make_run(plan, arm, seed, count, corpus, root, code) for seed in plan.seeds for arm, count in steps.items()]


def equal_cost_steps(plan: Plan, seconds: Mapping[str, float]) -> dict[str, int]:
    """Steps of each arm in the CPU time of the reference's, given CPU seconds a step by arm.

    Arms of about the same cost keep the plan's steps, so their runs serve both budgets.
    """
    own = seconds[plan.reference]
    shares = {arm: own / cost for arm, cost in seconds.items()}
    return {
        arm: plan.steps if abs(share - 1) <= EQUAL_COST else max(1, round(plan.steps * share))
        for arm, share in shares.items()
    }


# ----------------------------------------------------------------------------------------------------------- identity


def key_of(identity: Mapping[str, Any]) -> str:
    """Ten hex digits of the hash of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


def code_sha256() -> str:
    """A hash of the source of the four rooms that a figure comes from: model, processing, training, evaluation."""
    digest = hashlib.sha256()
    for room in (syncmask, syncmask.processing, syncmask.training, syncmask.evaluation):
        home = Path(room.__file__).parent
        for file in sorted(home.glob("*.py")):
            digest.update(f"{room.__name__}/{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def read_corpus(plan: Plan) -> Corpus:
    """Read (or generate) the plan's corpus once, before any run does.

    Raises:
        ValueError, FileNotFoundError: there is no such corpus.
    """
    data = settings_of(plan, plan.reference, plan.seeds[0], plan.steps)["data"]
    splits = corpus_of_run(data)
    # The first part of a fingerprint changes whenever the same corpus is read anew.
    names = [f"{split}:{fingerprint(rows).partition('-')[2]}" for split, rows in splits.items()]
    return Corpus(" ".join(names), "visible" in splits["train"].column_names)
