"""`--push_to_hub` while training: refused early, never in the way, and published at the end."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from syncmask import SyncMaskForPreTraining
from syncmask.hub_cards.staging import SKELETON as READ_FROM
from syncmask.hub_cards.staging import head_of
from syncmask.training.arguments import ModelArguments, RunArguments, TrainArguments
from syncmask.training.faults import RunStopped
from syncmask.training.publishing import LOG, SKELETON, Publisher, check_publishing, quiet_environment
from syncmask.training.run_folder import RunFolder


def settings(**run):
    return TrainArguments(run=RunArguments(push_to_hub=True, hub_model_id="me/x", **run))


@pytest.fixture
def publisher(tmp_path, monkeypatch):
    """A publisher whose command is a program of the test's: `publisher.program(text)`."""
    made = Publisher(settings(hub_strategy="checkpoint"), RunFolder(tmp_path))
    made.options = []

    def program(text):
        def command(*options):
            made.options.append(options)
            return [sys.executable, "-c", text]

        monkeypatch.setattr(made, "command", command)

    made.program = program
    yield made
    if made.process is not None:
        made.process.kill()
        made.process.wait()


def test_a_name_is_needed():
    for name in (None, "x", "a/b/c"):
        with pytest.raises(ValueError, match="hub_model_id is .*; wanted owner/name"):
            RunArguments(push_to_hub=True, hub_model_id=name)
    RunArguments(hub_model_id=None)


def test_a_token_is_needed_before_training(monkeypatch):
    monkeypatch.setattr("syncmask.training.publishing.get_token", lambda: None)
    with pytest.raises(RunStopped, match="no token for the Hub.*hf auth login"):
        check_publishing(settings())
    check_publishing(TrainArguments())
    monkeypatch.setattr("syncmask.training.publishing.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    check_publishing(settings())
    adapters = settings(hub_strategy="checkpoint")
    adapters.model = ModelArguments(lora_rank=4)
    with pytest.raises(RunStopped, match="set hub_strategy to end"):
        check_publishing(adapters)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunStopped, match="HF_HUB_OFFLINE"):
        check_publishing(settings())


def test_the_command(tmp_path):
    command = Publisher(settings(hub_private=True), RunFolder(tmp_path)).command("--checkpoint", "newest")
    assert command[1:] == [
        *("-m", "syncmask", "publish", str(tmp_path), "--repo_id", "me/x", "--private", "--checkpoint", "newest")
    ]


def test_what_launchers_tell_is_left_out(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    seen = quiet_environment()
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU"} & seen.keys()
    assert seen["HF_TOKEN"] == "hf_x" and seen["CUDA_VISIBLE_DEVICES"] == ""


def test_checkpoints_are_published_one_at_a_time(publisher, tiny_model, processor, tmp_path):
    """A save that comes while a publish runs starts none, and waits for none."""
    saved = []
    task = SimpleNamespace(processor=processor)
    trainer = SimpleNamespace(student=tiny_model, task=task, save=lambda trainer: saved.append(trainer))
    publisher.program(f"import pathlib, time; pathlib.Path({str(tmp_path / 'go')!r}).touch(); time.sleep(60)")
    publisher.follow(trainer)
    trainer.save(trainer)
    first = publisher.process
    trainer.save(trainer)
    assert saved == [trainer, trainer] and publisher.process is first and first.poll() is None
    assert publisher.options == [("--checkpoint", "newest")]
    first.kill()
    first.wait()
    trainer.save(trainer)
    assert publisher.process is not first and len(publisher.options) == 3  # one of them in the warning
    # What publish needs beside a checkpoint's weights lies where it looks for it.
    assert SKELETON == READ_FROM and head_of(tmp_path / SKELETON) is SyncMaskForPreTraining
    assert (tmp_path / SKELETON / "processor_config.json").is_file()


def test_a_failure_is_a_warning(publisher, caplog):
    publisher.program("print('no network'); raise SystemExit(3)")
    publisher.finish()
    assert "publishing failed (3)" in caplog.text and LOG in caplog.text and "do it again by" in caplog.text
    assert "no network" in (publisher.path / LOG).read_text()


def test_what_cannot_be_started_is_a_warning(publisher, caplog, monkeypatch):
    publisher.command = lambda *options: ["/no/such/program"]
    publisher.finish()
    assert "not published" in caplog.text and "No such file" in caplog.text


def test_an_upload_that_never_ends_does_not_hold_the_run(publisher, caplog, monkeypatch):
    monkeypatch.setattr("syncmask.training.publishing.PATIENCE", 0.2)
    publisher.program("import time; time.sleep(60)")
    publisher.start()
    process = publisher.process
    assert not publisher.wait() and "still running" in caplog.text and process.poll() is None
    process.kill()
    process.wait()


def test_the_end_waits_and_says_where(publisher, caplog):
    publisher.program("import time; time.sleep(0.3); print('published at http://hub/me/x')")
    with caplog.at_level(logging.INFO):
        publisher.finish()
    assert "published at http://hub/me/x" in caplog.text


def test_nothing_happens_where_it_is_off(tmp_path):
    for made in (
        Publisher(TrainArguments(), RunFolder(tmp_path)),
        Publisher(settings(hub_strategy="checkpoint"), RunFolder(tmp_path, is_main=False)),
    ):
        made.follow(None)
        made.finish()
        assert made.process is None and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_publishes_its_checkpoints_and_itself(hub, tmp_path):
    """The whole of it: training in a process, publishing in others, a Hub that receives both."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    words = (
        "--config quickstart --num_items 60 --image_size 32 --per_device_batch_size 16 --epochs 2 --no_evaluate "
        "--num_threads 1 --gate_probe_pairs 8 --push_to_hub --hub_model_id me/x --hub_private "
        f"--hub_strategy checkpoint --output_dir {tmp_path} --run_name run"
    )
    done = subprocess.run(
        [sys.executable, "-m", "syncmask.training.pretrain", *words.split()],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=tmp_path,
        env=environment,
    )
    log = tmp_path / "run" / LOG
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"published at {hub.url}/me/x" in done.stderr, log.read_text() + done.stderr[-2000:]
    repo = hub.repos["me/x"]
    assert repo.private and repo.messages[-1] == "Publish the model" and "step" in repo.messages[1]
    files = repo.files()
    assert files["model.safetensors"].data == (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    assert b"syncmask" in files["README.md"].data


def test_publishing_changes_no_bit_of_the_run():
    """So a resumed run may begin or stop to publish."""
    from syncmask.training.resume import FREE_TO_CHANGE

    names = {name for name in vars(RunArguments()) if name.startswith(("hub_", "push_"))}
    assert names <= FREE_TO_CHANGE and len(names) == 4
