"""Kill -9 at twenty seeded moments, saves included: whatever was killed goes on and ends with the same bits.

`python tests/test_kill.py [--seed 0]` prints the table; the test runs the same. One process that has imported
everything forks the runs, as a launcher would start them, so that a kill costs seconds.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# Dropout, accumulation, evidence (which moves the words' running means) and a checkpoint a step: all that has a state.
SETTINGS = [
    *(
        "--corpus",
        "garments",
        "--num_items",
        "40",
        "--image_size",
        "32",
        "--preset",
        "tiny",
        "--mask_strategy",
        "evidence",
    ),
    *(
        "--model_overrides",
        json.dumps({"patch_size": 8, "projection_dim": 16, "text_config": {"hidden_dropout_prob": 0.1}}),
    ),
    *("--epochs", "5", "--warmup_steps", "2", "--learning_rate", "1e-3", "--gradient_accumulation_steps", "2"),
    *("--gate_every", "2", "--gate_max_steps", "2", "--mask_ramp_steps", "2", "--teacher_momentum", "0.9"),
    *("--num_threads", "1", "--log_every", "1", "--log_batches", "--deterministic", "--checkpoint_every", "1"),
    *("--no-evaluate", "--output_dir"),
]
STAGES = (
    "first file written",
    "before a sync",
    "before a hash",
    "before the name",
    "after the name",
    "old one half deleted",
)
KILLS = {1: 11, 2: 9}


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_save(stage, save):
    """Kill this process within its n-th save."""
    from syncmask.training import checkpoint, resume

    real, count = resume.save_checkpoint, [0]

    def patched(*args, **kwargs):
        count[0] += 1
        if count[0] == save:
            place, remove = checkpoint.put_in_place, checkpoint.shutil.rmtree
            if stage == "first file written":
                checkpoint.flush = die
            elif stage == "before a sync":
                write = checkpoint.flush
                checkpoint.flush = lambda path: die() if path.name == "COMPLETE" else write(path)
            elif stage == "before a hash":
                checkpoint.sha256 = die
            elif stage == "before the name":
                checkpoint.put_in_place = die
            elif stage == "after the name":
                checkpoint.put_in_place = lambda *paths: (place(*paths), die())
            else:
                checkpoint.shutil.rmtree = lambda path, **_: (
                    (next(Path(path).iterdir()).unlink(), die()) if Path(path).exists() else remove(path, **_)
                )
        return real(*args, **kwargs)

    resume.save_checkpoint = patched


def child(argv, rank, processes, port, log, in_save):
    """Be one process of a run; never returns."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if processes > 1:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
            os.environ.update({name: str(value) for name, value in own.items()})
        from syncmask.training import contrast, pretrain, trainer

        contrast.ITM_LEARNED = 10.0  # grouped batches from the second epoch on
        if in_save and rank == 0:
            die_in_save(*in_save)
        fit = trainer.Trainer.fit

        def counted_fit(self):
            assert self.accelerator.num_processes == processes
            fit(self)

        trainer.Trainer.fit = counted_fit
        pretrain.main(argv)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def launch(argv, processes, log, kill_after=None, victim=0, in_save=None):
    """Start the processes of a run, kill -9 one if asked, then the rest as a launcher does; tell whether."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            child(argv, rank, processes, port, log, in_save)
        pids.append(pid)
    deadline, left, statuses = time.monotonic() + (kill_after or 120), set(pids), {}
    killed = False
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.discard(pid)
                statuses[pid] = status
                if status:
                    [os.kill(other, signal.SIGKILL) for other in left]
        if left and time.monotonic() > deadline and not killed:
            killed = True
            os.kill(pids[victim] if pids[victim] in left else min(left), signal.SIGKILL)
        time.sleep(0.005)
    failures = [status for status in statuses.values() if status]
    if failures and os.waitstatus_to_exitcode(failures[0]) != -signal.SIGKILL:
        raise AssertionError(f"a run failed by itself: {Path(log).read_text()[-2000:]}")
    return bool(failures)


def records(run):
    found = {}
    for name in ("metrics.jsonl", "batches.jsonl"):
        lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
        found[name] = [{key: value for key, value in line.items() if key != "time_s"} for line in lines]
    return found


def differences(run, whole):
    """List what a run has other than the uninterrupted one; [] = the same bits."""
    mine, theirs = records(run), records(whole)
    different = [name for name in mine if mine[name] != theirs[name]]
    for name in ("final/model.safetensors", "final/word_scores.safetensors"):
        # Tensor by tensor: safetensors writes its settings in any order.
        a, b = (load_file(folder / name) for folder in (run, whole))
        same = a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        different += [] if same else [name]
    return different


def newest(run):
    saved = sorted(path.name for path in (run / "checkpoints").glob("step_*") if path.name[5:].isdigit())
    return saved[-1] if saved else "none"


def kill_runs(folder, seed, only=None):
    """Kill, resume and compare; return the table's rows, each with what differed in the end."""
    random.seed(seed)
    rows = []
    for processes, kills in KILLS.items():
        if only not in (None, processes):
            continue
        batch = ["--per_device_batch_size", str(16 // processes)]
        base, log = folder / f"{processes}", folder / f"{processes}.log"
        launch([*SETTINGS, str(base), *batch, "--run_name", "whole"], processes, log)  # makes the corpus
        begun = time.monotonic()
        launch([*SETTINGS, str(base), *batch, "--run_name", "whole", "--overwrite"], processes, log)
        seconds, number = time.monotonic() - begun, 0
        pending = []
        kill = 0
        while kill < kills:
            run = base / f"cut{number}"
            argv = [*SETTINGS, str(base), *batch, "--run_name", run.name, *(["--resume"] if run.exists() else [])]
            if kill % 2:
                stage, save = STAGES[(kill // 2 + 3 * (processes - 1)) % len(STAGES)], random.randint(1, 2)
                killed = launch(argv, processes, log, in_save=(stage, save + (stage == STAGES[-1])))
                victim, moment = 0, f"save {save}, {stage}"
            else:
                delay, victim = random.uniform(0.3, 0.95) * seconds, random.randrange(processes)
                killed, moment = launch(argv, processes, log, delay, victim), f"{delay:.2f} s after start"
            # A run that ended before its kill is compared too, and the kill is tried on a new one.
            pending += [[processes, moment, victim, newest(run)]] if killed else []
            kill += killed
            seconds *= 1 if killed else 0.7  # the machine was busier when it was timed
            if not killed or kill == kills or kill % 4 == 0:
                argv = [*argv[: argv.index("--run_name") + 2], "--resume"]
                assert not launch(argv, processes, log), log.read_text()[-2000:]
                rows += [[*row, run.name, differences(run, base / "whole")] for row in pending]
                pending, number = [], number + 1
    return rows


def table(rows):
    lines = [f"{'#':>2}  processes  {'kill -9':<36} rank  newest checkpoint  run   weights, metrics, batches"]
    for number, (processes, moment, victim, saved, run, different) in enumerate(rows, 1):
        verdict = f"DIFFER: {', '.join(different)}" if different else "equal"
        lines.append(f"{number:>2}  {processes:>9}  {moment:<36} {victim:>4}  {saved:<17}  {run:<5} {verdict}")
    return "\n".join(lines)


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    command = [sys.executable, __file__, "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(" equal") == sum(KILLS.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--processes", type=int, default=None, choices=KILLS)
    given = parser.parse_args()
    place = given.folder or Path(tempfile.mkdtemp())
    place.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(place / "cache"), "TQDM_DISABLE": "1"}
    import syncmask.training.pretrain  # noqa: F401  what every run needs, imported once

    results = kill_runs(place, given.seed, given.processes)
    print(table(results))
    sys.exit(any(row[-1] for row in results))
