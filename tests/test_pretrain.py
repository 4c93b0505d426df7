"""The whole loop on a very small corpus: what it writes, that it resumes bit for bit, that it refuses what it must."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from syncmask import SyncMaskConfig, SyncMaskForPreTraining, SyncMaskProcessor
from syncmask.training import pretrain, resume

SMALL = ("--epochs", "3", "--log_every", "1", "--log_batches", "--checkpoint_every", "2")


@pytest.fixture(scope="module")
def train(pretrain_tiny):
    return lambda folder, *more: pretrain_tiny(folder, *SMALL, *more)


def lines(run, name):
    found = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time_s"} for line in found]


def assert_same_run(one, other):
    for name in ("model", "word_scores"):
        a, b = (load_file(run / "final" / f"{name}.safetensors") for run in (one, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert lines(one, "metrics.jsonl") == lines(other, "metrics.jsonl")
    assert lines(one, "batches.jsonl") == lines(other, "batches.jsonl")


class Killed(Exception):
    pass


def kill_after(monkeypatch, checkpoints):
    """Let the process die right after its n-th checkpoint."""
    done = []
    real = resume.save_checkpoint

    def save(*args, **kwargs):
        real(*args, **kwargs)
        done.append(1)
        if len(done) == checkpoints:
            raise Killed

    monkeypatch.setattr(resume, "save_checkpoint", save)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, train):
    return train(tmp_path_factory.mktemp("finished"), "--no-evaluate")


def test_run_writes_what_the_schema_says(finished):
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    assert settings["about"]["corpus_fingerprint"] and settings["objective"]["mask_strategy"] == "attention"
    for name in ("final/config.json", "final/processor_config.json", "final/word_scores.safetensors", "tokenizer"):
        assert (finished / name).exists(), name
    train_lines = [line for line in lines(finished, "metrics.jsonl") if line["split"] == "train"]
    assert [line["step"] for line in train_lines] == list(range(1, len(train_lines) + 1))
    assert {"itc", "itm", "mlm", "mim", "learning_rate", "mlm_gap"} <= train_lines[0].keys()
    assert train_lines[-1]["mask_strength"] == 1.0 and train_lines[0]["mask_strength"] == 0.0
    validations = [line for line in lines(finished, "metrics.jsonl") if line["split"] == "validation"]
    assert len(validations) == 3 and 0 <= validations[0]["recall_mean"] <= 1


def test_every_row_is_trained_on_once_an_epoch_and_no_batch_repeats_an_item(finished):
    batches = lines(finished, "batches.jsonl")
    for epoch in range(3):
        rows = np.concatenate([line["rows"] for line in batches if line["epoch"] == epoch])
        assert len(np.unique(rows)) == len(rows)
    quality = [line for line in lines(finished, "metrics.jsonl") if line["split"] == "batches"]
    assert len(quality) == 3 and all(line["same_item_pairs"] == 0 for line in quality)


def test_final_folder_gives_the_training_process_embeddings(finished):
    model = SyncMaskForPreTraining.from_pretrained(finished / "final").eval()
    processor = SyncMaskProcessor.from_pretrained(finished / "final")
    newest = sorted((finished / "checkpoints").glob("step_*"))[-1]
    saved = load_file(newest / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    inputs = processor(text=["a red shirt"])
    assert model.syncmask.get_text_features(**inputs).pooler_output.norm().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("checkpoints", [1, 3])
def test_resume_equals_an_uninterrupted_run_bit_for_bit(finished, tmp_path, monkeypatch, checkpoints, train):
    with monkeypatch.context() as patch:
        kill_after(patch, checkpoints)
        with pytest.raises(Killed):
            train(tmp_path, "--no-evaluate")
    assert not (tmp_path / "run" / "final").exists()
    assert_same_run(finished, train(tmp_path, "--no-evaluate", "--resume"))


def test_a_folder_that_holds_a_run_is_refused(finished, train):
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="--resume"):
        train(finished.parent, "--no-evaluate")
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random", "attention", "evidence"])
def test_every_strategy_trains_accumulates_and_evaluates(tmp_path, capsys, strategy, train):
    more = ("--mask_strategy", strategy, "--gradient_accumulation_steps", "2", "--final_weights", "teacher")
    run = train(tmp_path, *more)
    printed = capsys.readouterr().out
    assert "chance" in printed and "text gap" in printed and "rules_1_2" in printed
    assert (run / "report" / "index.html").stat().st_size > 50_000
    assert {path.stem for path in (run / "results").glob("*.json")} == {"items", "co-occurrence"}


@pytest.mark.slow
def test_resume_with_accumulation(tmp_path, monkeypatch, train):
    more = ("--no-evaluate", "--gradient_accumulation_steps", "2", "--mask_strategy", "evidence")
    whole = train(tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            train(tmp_path / "cut", *more)
    assert_same_run(whole, train(tmp_path / "cut", *more, "--resume"))


@pytest.mark.slow
def test_learning_lowers_the_losses(tmp_path, train):
    run = train(tmp_path, "--no-evaluate", "--epochs", "60", "--validate_every_epochs", "60", "--no-augment")
    train_lines = [line for line in lines(run, "metrics.jsonl") if line["split"] == "train"]
    for term in ("itc", "mlm", "mim"):
        first, last = (np.mean([line[term] for line in part]) for part in (train_lines[:10], train_lines[-10:]))
        assert last < 0.8 * first, term


@pytest.mark.parametrize("aligned", [True, False])
def test_a_word_patch_head_that_is_left_out_is_named(tiny_config, tmp_path, caplog, aligned):
    config = SyncMaskConfig.from_dict(tiny_config.to_dict() | {"word_patch_alignment": aligned})
    SyncMaskForPreTraining(config).save_pretrained(tmp_path / "start")
    pretrain.note_left_out(str(tmp_path / "start"))
    assert ("the word-patch head of" in caplog.text and "--wpa_weight 4" in caplog.text) == aligned
