"""The claims, measured: `python -m benchmarks.ablations [--quick | --real FOLDER | --plan NAME] [--write-docs]`.

Masks that co-occur help; semi-hard grouping avoids false negatives. What is trained, compared and how it is judged
stands in benchmarks/ablations.yaml, written before arms were compared. `--quick` trains 4 arms x 3 seeds, about four
minutes each on one core; without it, all arms, for hours. `--real FOLDER` trains on real photos, `--plan` what the YAML
has under that name. A finished run is never run again, an interrupted one goes on: give the same command again.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .ablation_plan import (
    Corpus,
    Plan,
    Run,
    code_sha256,
    equal_cost_steps,
    make_runs,
    read_corpus,
    read_plan,
)
from .ablation_readings import Finished
from .ablation_report import Summary, content, markdown, picture, summarise, write_section
from .ablation_runs import Train, cpu_by_arm, is_complete, run_all, start_training

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "ablations.md"
TITLES = {"steps": "equal steps", "cpu": "equal CPU time"}


def main(argv: list[str] | None = None, train: Train = start_training) -> int:
    """Train what is missing, then print what follows; returns the exit code, 1 where a run failed or is missing.

    Args:
        argv: the command line. train: trains one run.
    """
    given = _parser().parse_args(argv)
    logging.getLogger("syncmask.processing.splits").setLevel(logging.ERROR)
    name = "real" if given.real else "quick" if given.quick else given.plan
    plan = read_plan(name, given.plans, given.real)
    say = (
        (lambda line: print(line, file=sys.stderr, flush=True))
        if given.json
        else (lambda line: print(line, flush=True))
    )
    corpus, root, code = read_corpus(plan), Path(given.output_dir), code_sha256()
    summaries, missing = {}, 0
    for budget in plan.budgets:
        steps = steps_of(plan, budget, corpus, root, code)
        if not steps:
            say(f"{TITLES[budget]}: no run of {plan.reference} has been timed yet, so nothing can be made equal to it")
            continue
        runs = make_runs(plan, steps, corpus, root, code)
        say(f"{plan.name}, {TITLES[budget]}: {len(steps)} arms x {len(plan.seeds)} seeds in {root / plan.name}")
        failed = {} if given.analyse else run_all(runs, given.jobs, train=train, say=say)
        missing += sum(not is_complete(run) for run in runs)
        if any(is_complete(run) for run in runs):
            summary = summary_of(plan, budget, runs, failed, _command(given))
            summaries[budget] = content(summary)
            show(summary, root / plan.name, f"{plan.name}_{budget}", say, given.write_docs)
    if given.json:
        print(json.dumps(summaries, indent=2))
    return int(missing > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="the plan `quick`: 4 arms x 3 seeds, minutes each")
    what.add_argument("--real", metavar="FOLDER", help="the plan `real`, on the photos of a folder with metadata")
    what.add_argument("--plan", default="full", help="a plan of the YAML, such as `alignment`")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--output_dir", default="runs/ablations", help="where runs and results go")
    parser.add_argument("--analyse", action="store_true", help="train nothing; read the runs that are finished")
    parser.add_argument("--write-docs", action="store_true", help="put tables and pictures into docs/ablations.md")
    parser.add_argument("--json", action="store_true", help="print JSON alone; progress goes to stderr")
    parser.add_argument(
        "--plans", type=Path, default=ROOT / "benchmarks" / "ablations.yaml", help="another file of plans"
    )
    return parser


def _command(given: argparse.Namespace) -> str:
    which = " --quick" if given.quick else " --real FOLDER" if given.real else ""
    which = which or ("" if given.plan == "full" else f" --plan {given.plan}")
    return f"python -m benchmarks.ablations{which}"


def steps_of(plan: Plan, budget: str, corpus: Corpus, root: Path, code: str) -> dict[str, int]:
    """Steps by arm: the plan's, or as many as fit into the CPU time that the reference took for them.

    CPU time, not wall time: `max_minutes` would measure how busy the machine was. It is read from the runs of equal
    steps; an arm of which none was timed is left out.
    """
    same = dict.fromkeys(plan.arms, plan.steps)
    if budget == "steps":
        return same
    seconds = cpu_by_arm([run for run in make_runs(plan, same, corpus, root, code) if is_complete(run)])
    return equal_cost_steps(plan, seconds) if plan.reference in seconds else {}


def summary_of(plan: Plan, budget: str, runs: Sequence[Run], failed: Mapping[Run, str], made_by: str) -> Summary:
    """Read the finished runs of a budget and say what follows from them."""
    done = [run for run in runs if is_complete(run)]
    found = {arm: {run.seed: Finished(run.path) for run in done if run.arm == arm} for arm in plan.arms}
    seconds = cpu_by_arm(done)
    cost = {run.arm: (run.steps, seconds.get(run.arm)) for run in done}
    about = done[0].identity
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    remarks = [
        f"{len(done)} of {len(runs)} runs, seeds {', '.join(map(str, plan.seeds))}, one thread each; {_rows(about)}; "
        f"code {about['code'][:12]}, {versions}."
    ]
    remarks += [f"Missing: {run} ({failed.get(run, 'not trained yet')})." for run in runs if run not in done]
    title = f"Plan `{plan.name}`, {TITLES[budget]}"
    return summarise(plan, found, title=title, made_by=made_by, remarks=remarks, cost=cost)


def _rows(identity: Mapping) -> str:
    """The corpus of a run in words: "garments: train 5,500 photos, ..."."""
    splits = (split.split(":") for split in identity["corpus"].split())
    counts = ", ".join(f"{name} {int(rest.split('-')[0]):,} photos" for name, rest in splits)
    return f"corpus {identity['settings']['data']['corpus']}: {counts}"


def show(summary: Summary, folder: Path, name: str, say, write_docs: bool):
    """Print a summary; write Markdown, JSON and picture into `folder`, and into the docs where that is asked for."""
    drawn = picture(summary)
    drawn.save(folder / f"{name}.png")
    text = markdown(summary, f"{name}.png")
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(content(summary), indent=2) + "\n", encoding="utf-8")
    say(f"\n{text}\n\nwritten to {folder / name}.md, .json, .png")
    if write_docs:
        drawn.save(PAGE.parent / f"ablations_{name}.png")
        write_section(PAGE, name, markdown(summary, f"ablations_{name}.png"))
        say(f"and to {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
