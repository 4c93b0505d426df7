"""Accumulation that keeps the whole contrast: one step of K micro batches against one batch of K times the size.

As a script (`torchrun --nproc_per_node 2 tests/test_full_contrast.py FOLDER`) this file is what two processes run.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from syncmask.evaluation.history import global_batch, speeds
from syncmask.training import pretrain, resume
from syncmask.training.estimate import LiveBytes
from syncmask.training.finetune import build_retrieval
from syncmask.training.full_contrast import StandIn, split_rows
from syncmask.training.launch import build_run, start
from syncmask.training.parsing import load_arguments
from syncmask.training.pretrain import build_pretraining
from syncmask.training.run_folder import RunFolder
from syncmask.training.task import Slice

SMALL = [
    *("--corpus", "garments", "--num_items", "40", "--image_size", "32", "--preset", "tiny", "--num_threads", "1"),
    *("--soft_target_ramp_steps", "1", "--no-augment"),
]
OVERRIDES = {"patch_size": 8, "projection_dim": 16}
SIZES = {"whole": ("16", "1"), "plain": ("4", "4", "--no-full_contrast"), "full": ("4", "4", "--full_contrast")}


@pytest.fixture(autouse=True)
def _restore():
    yield
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(reset_partial_state=True)  # number formats differ


def make_trainer(size, *words, task="pretraining", **overrides):
    """A trainer of 16 pairs a step whose student and teacher are far from their start and from each other."""
    rows, batches, *switch = SIZES[size]
    sizes = ["--per_device_batch_size", rows, "--gradient_accumulation_steps", batches, *switch]
    words = [*SMALL, "--model_overrides", json.dumps(OVERRIDES | overrides), *sizes, *words]
    build = build_pretraining if task == "pretraining" else build_retrieval
    arguments = load_arguments(words, task)
    trainer, _ = build_run(arguments, build, start(arguments), RunFolder(Path("nowhere"), is_main=False))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for model in (trainer.student, trainer.task.contrast.teacher.model):
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    if task == "pretraining":
        trainer.task.masking.opened_at = 0
    trainer.sampler.set_order(0, trainer.task.order(0)[0])
    trainer.progress.step = 250  # masks and soft targets are in force
    torch.manual_seed(3)
    return trainer


def step(trainer):
    """The gradients of one optimiser step and the losses that it reports."""
    found, reported = {}, []

    def keep(rows):
        found.update({name: one.grad for name, one in trainer.student.named_parameters() if one.grad is not None})
        return 0.0

    trainer._step = keep
    trainer._log_step = lambda batch, look, norm, agreed: reported.append(agreed)
    for batch in trainer._loader():
        if trainer.train_step(batch):
            break
        trainer.sampler.advance()
    return found, reported[0]


def oracle(trainer):
    """The same of one batch of 16, slowly: ITC of all of it, the other losses slice by slice."""
    batch = next(iter(trainer._loader()))
    batch = trainer.to_device({name: batch[name] for name in batch if name not in ("asked_ids", "reasons")})
    task, model = trainer.task, trainer.model.train()
    looks = [
        task.look({name: tensor[4 * k : 4 * k + 4] for name, tensor in batch.items()}, trainer.progress, Slice(k, 4))
        for k in range(4)
    ]
    outputs = [task.losses(model(**look.inputs)) for look in looks]
    losses = {name: sum(output[name] for output in outputs) / 4 for name in task.weights}
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask", "item_ids", "text_ids")}
    for name in ("teacher_image_feats", "teacher_text_feats"):
        inputs[name] = torch.cat([look.inputs[name] for look in looks])
    for name in ("teacher_temperature", "soft_target_weight"):
        inputs[name] = looks[0].inputs[name]
    losses["itc"] = model(**inputs).itc_loss
    sum(losses.values()).backward()
    gradients = {name: one.grad for name, one in trainer.student.named_parameters() if one.grad is not None}
    return gradients, losses, sum(look.fallbacks for look in looks)


def flat(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def distance(mine, theirs):
    assert mine.keys() == theirs.keys()
    return float((flat(mine) - flat(theirs)).norm() / flat(theirs).norm())


@pytest.mark.parametrize("task", ["pretraining", "retrieval"])
def test_losses_and_gradients_are_those_of_one_big_batch(task):
    expected, losses, fallbacks = oracle(make_trainer("whole", task=task))
    found, reported = step(make_trainer("full", task=task))
    assert distance(found, expected) < 1e-5
    assert reported.losses.keys() == losses.keys() and reported.fallbacks == fallbacks
    for name, loss in losses.items():
        assert reported.losses[name] == pytest.approx(loss.item(), rel=1e-5), name
    # The temperature and the projections alone: nothing else gives them a gradient.
    for name in ("temperature_logit", "vision_projection.weight", "text_projection.bias"):
        torch.testing.assert_close(found[f"syncmask.{name}"], expected[f"syncmask.{name}"], atol=1e-7, rtol=1e-4)


@contextmanager
def recorded(trainer, monkeypatch):
    """What a step's two passes saw: (glances, features of the second pass), micro batch after micro batch."""
    glances, feats, look_ahead, stand_in = [], [], trainer._look_ahead, StandIn.__call__

    def first(parts):
        ahead = look_ahead(parts)
        glances.extend(glance for glance, _ in ahead)
        return ahead

    def second(self, image_feats, text_feats, logit):
        feats.append((image_feats.detach(), text_feats.detach()))
        return stand_in(self, image_feats, text_feats, logit)

    trainer._look_ahead = first
    monkeypatch.setattr(StandIn, "__call__", second)
    yield glances, feats


@pytest.mark.parametrize(
    "words",
    [
        (),
        pytest.param(("--activation_checkpointing",), marks=pytest.mark.slow),
        pytest.param(("--mixed_precision", "bf16"), marks=pytest.mark.slow),
        pytest.param(("--lora_rank", "2"), marks=pytest.mark.slow),
    ],
)
def test_both_passes_draw_the_same_dropout(words, monkeypatch):
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    trainer = make_trainer("full", *words, vision_config=dropout, text_config=dropout, fusion_encoder_config=dropout)
    before = torch.get_rng_state()
    with recorded(trainer, monkeypatch) as (glances, feats):
        step(trainer)
    assert len(glances) == len(feats) == 4
    for glance, (images, texts) in zip(glances, feats):
        assert torch.equal(glance.image_feats, images) and torch.equal(glance.text_feats, texts)
    # Micro batches draw apart, and so does the next step: the generator that checkpoints keep gives seeds alone.
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    seeds = [int(torch.randint(2**63 - 1, ())) for _ in range(4)]
    assert [glance.seed for glance in glances] == seeds and torch.equal(torch.get_rng_state(), after)


def test_a_step_is_one_batch_of_the_sampler_in_contiguous_parts():
    trainer, rows, unsynced = make_trainer("full"), [], []
    accumulate, no_sync = trainer._accumulate, trainer.accelerator.no_sync
    trainer._accumulate = lambda batch, *more: rows.append(batch["row_ids"].tolist()) or accumulate(batch, *more)
    trainer.accelerator.no_sync = lambda model: unsynced.append(len(rows)) or no_sync(model)
    assert trainer.sampler.batch_size == trainer.task.contrast.plan_epoch.batch_size == 16
    whole = make_trainer("whole")
    assert trainer.total_steps == whole.total_steps
    # So a run may go on in micro batches of another size.
    trainer.sampler.load_state_dict(whole.sampler.state_dict(), whole.sampler.state_tensors())
    asked = trainer.sampler.global_batch()
    step(trainer)
    assert [row for part in rows for row in part] == asked and [len(part) for part in rows] == [4] * 4
    assert unsynced == [0, 1, 2] and (trainer.progress.step, trainer.progress.micro_step) == (251, 1)
    assert trainer.task.contrast.bank.seen.sum() == 16 and trainer.stopwatch.pairs == 16


@pytest.mark.slow
def test_memory_is_a_micro_batchs():
    peaks = {}
    for size in SIZES:
        trainer = make_trainer(size)
        with LiveBytes(trainer.student.parameters()) as counted:
            step(trainer)
        peaks[size] = max(live - gradients for live, gradients in counted.points)
    print(peaks)
    assert peaks["full"] < 1.1 * peaks["plain"] < 0.5 * peaks["whole"]


def test_a_stand_in_has_the_value_and_the_gradient_that_it_is_given():
    feats = [torch.randn(3, 2, requires_grad=True) for _ in range(2)] + [torch.zeros(1, requires_grad=True)]
    gradients = [torch.randn_like(one) for one in feats]
    loss = StandIn(torch.tensor(3.0), *gradients)(*feats)
    assert float(loss.detach()) == 3
    assert all(map(torch.equal, torch.autograd.grad(loss, feats), gradients))


def test_rows_are_cut_in_order():
    batch = {"row_ids": torch.arange(5), "input_ids": torch.arange(10).view(5, 2)}
    parts = split_rows(batch, 2)
    assert [part["row_ids"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert parts[2]["input_ids"].tolist() == [[8, 9]] and len(split_rows(batch, 5)) == 1


@pytest.mark.parametrize(
    ("task", "words"), [("classification", ()), ("composed", ()), ("retrieval", ("--itc_weight", "0"))]
)
def test_without_a_contrast_it_is_refused(task, words, capsys):
    with pytest.raises(SystemExit):
        load_arguments(["--full_contrast", *words], task)
    assert "pretraining and for the task retrieval, with itc_weight above 0" in " ".join(
        capsys.readouterr().err.split()
    )


def test_reports_and_cards_know_what_is_compared():
    settings = {"per_device_batch_size": 8, "gradient_accumulation_steps": 2, "full_contrast": True}
    settings = {"optim": settings, "about": {"processes": 2}}
    assert global_batch(settings) == 32
    history = [{"split": "train", "step": step, "time_s": float(step)} for step in (1, 2)]
    assert speeds(history, settings) == ([2], [32.0])


# --------------------------------------------------------------------------------------------------------- whole runs

RUN = [
    *("--corpus", "garments", "--num_items", "40", "--image_size", "32", "--preset", "tiny", "--num_threads", "1"),
    *("--per_device_batch_size", "4", "--full_contrast", "--warmup_steps", "2", "--learning_rate", "1e-3"),
    *("--gate_every", "2", "--gate_max_steps", "2", "--mask_ramp_steps", "2", "--teacher_momentum", "0.9"),
    *("--log_every", "1", "--log_batches", "--deterministic", "--checkpoint_every", "2", "--no-evaluate"),
    *("--epochs", "2", "--max_steps", "5", "--validate_every_epochs", "99", "--run_name", "run"),
]


def train(folder, *words, **overrides):
    pretrain.main([*RUN, "--model_overrides", json.dumps(OVERRIDES | overrides), "--output_dir", str(folder), *words])
    return folder / "run"


def lines(run, name="metrics.jsonl"):
    found = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time_s"} for line in found]


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_bit_for_bit(tmp_path, monkeypatch):
    settings = {"text_config": {"hidden_dropout_prob": 0.1}}
    words = ("--gradient_accumulation_steps", "4", "--mask_strategy", "evidence")
    whole = train(tmp_path / "whole", *words, **settings)
    real = resume.save_checkpoint

    def save_and_die(*args, **kwargs):
        real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resume, "save_checkpoint", save_and_die)
        train(tmp_path / "cut", *words, **settings)
    cut = train(tmp_path / "cut", *words, "--resume", **settings)
    a, b = (load_file(run / "final" / "model.safetensors") for run in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert lines(whole) == lines(cut) and lines(whole, "batches.jsonl") == lines(cut, "batches.jsonl")


@pytest.mark.slow
def test_in_bf16_gradients_stay_near_those_of_fp32():
    plain, _ = step(make_trainer("full"))
    AcceleratorState._reset_state()
    half, _ = step(make_trainer("full", "--mixed_precision", "bf16"))
    assert 0 < distance(half, plain) < 0.05


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_micro_batches(tmp_path):
    """Weights of both runs after 5 steps of 16 pairs; a micro batch draws its noise as a process of its own would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(tmp_path / "c")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command = [*launcher, __file__, str(tmp_path / "two")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    runs = [tmp_path / "two" / "run", train(tmp_path / "one", "--gradient_accumulation_steps", "4")]
    assert lines(runs[0], "batches.jsonl") == lines(runs[1], "batches.jsonl")
    logged = [[line for line in lines(run) if line["split"] == "train"] for run in runs]
    assert len(logged[0]) == 5
    for mine, theirs in zip(*logged, strict=True):
        for name in ("itc", "itm", "mlm", "mim", "gradient_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3), (name, mine["step"])
        assert mine["negatives_fell_back"] == theirs["negatives_fell_back"]
    a, b = (load_file(run / "final" / "model.safetensors") for run in runs)
    print(f"after 5 steps the weights differ by {distance(a, b):.1e} of their norm")
    assert distance(a, b) < 1e-5


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == "2"
    train(Path(sys.argv[1]), "--gradient_accumulation_steps", "2")
