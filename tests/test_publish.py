"""Publishing to a Hub on this machine, through the real client: what is sent, what is refused, what is gone on with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from syncmask import (
    SyncMaskForComposedImageRetrieval,
    SyncMaskForImageTextClassification,
    SyncMaskForImageTextRetrieval,
    SyncMaskForPreTraining,
)
from syncmask.__main__ import app
from syncmask.hub_cards.check import ask_stranger, draw_photos
from syncmask.hub_cards.publish import Published, Request, publish
from syncmask.hub_cards.staging import MANIFEST, SERVES, files_in
from syncmask.hub_cards.stranger import answers

NAME = "me/garments"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own


@pytest.fixture(scope="module")
def pretrained(make_run, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", SyncMaskForPreTraining)


@pytest.fixture
def run(pretrained, tmp_path):
    """A copy that may be spoiled."""
    return shutil.copytree(pretrained, tmp_path / "tiny")


@pytest.fixture
def quick(monkeypatch):
    """No fresh process: the check has tests of its own."""
    monkeypatch.setattr("syncmask.hub_cards.publish.check", lambda staged, final, serves: 0.0)


def send(hub, run, **options):
    """Publish; returns what came of it, what the Hub received, and what was said."""
    hub.received.clear()
    said = []
    done = publish(Request(run, options.pop("repo_id", NAME), **options), hub.api, said.append)
    return done, list(hub.received), "\n".join(said)


def remote(hub, revision="main", name=NAME):
    return {path: blob.data for path, blob in hub.repos[name].files(revision).items()}


# -------------------------------------------------------------------------------------------------------- what is sent


def test_all_that_is_staged_is_there_in_one_commit(hub, run, quick):
    done, received, said = send(hub, run)
    staged = run / "publish" / "me--garments"
    there = remote(hub)
    assert sorted(there) == sorted([".gitattributes", *files_in(staged)]) == sorted([".gitattributes", *done.sent])
    for name in done.sent:
        assert there[name] == (staged / name).read_bytes(), name
    assert there["README.md"].startswith(b"---\n") and b"me/garments" in there["README.md"]
    assert hub.repos[NAME].messages == ["initial commit", "Publish the model"] and not hub.repos[NAME].private
    assert done.url == f"{hub.url}/me/garments" and f"publishing as me to {hub.url}/me/garments" in said
    assert len(hub.lfs) == 1 and done.deleted == done.unchanged == []


def test_again_sends_nothing(hub, run, quick):
    first, _, _ = send(hub, run)
    again, received, said = send(hub, run)
    assert received == [] and hub.repos[NAME].messages == ["initial commit", "Publish the model"]
    assert again.sent == again.deleted == [] and again.unchanged == sorted(first.sent) and again.url == first.url
    assert "nothing changed" in said


def test_what_changed_is_sent_alone(hub, run, quick):
    send(hub, run)
    tokenizer = run / "final" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"model_max_length": 17}))
    done, received, _ = send(hub, run, commit_message="shorter texts")
    assert received == done.sent and set(done.sent) <= {"README.md", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads(remote(hub)["tokenizer_config.json"])["model_max_length"] == 17
    assert hub.repos[NAME].messages[-1] == "shorter texts"


@pytest.mark.slow
def test_what_an_earlier_publish_put_there_goes_and_all_else_stays(hub, run, quick):
    send(hub, run)
    hub.api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.md", repo_id=NAME)
    shutil.rmtree(run / "results")
    done, _, _ = send(hub, run)
    assert done.deleted == ["results/items.json"] and {"README.md", MANIFEST} <= set(done.sent)
    assert remote(hub)["notes.md"] == b"mine" and "results/items.json" not in remote(hub)


def test_a_branch_is_made_and_a_pull_request_opened(hub, run, quick):
    done, _, _ = send(hub, run, revision="v1")
    assert list(remote(hub)) == [".gitattributes"] and "README.md" in remote(hub, "v1")
    assert done.url.endswith("/me/garments/tree/v1")
    again, received, _ = send(hub, run, revision="v1")
    assert received == [] and again.sent == []
    pull, _, _ = send(hub, run, create_pr=True)
    assert pull.url == f"{hub.url}/me/garments/discussions/1"
    assert "README.md" in remote(hub, "refs/pr/1") and list(remote(hub)) == [".gitattributes"]


@pytest.mark.slow
def test_private_stays_private(hub, run, quick):
    send(hub, run, private=True)
    assert hub.repos[NAME].private
    _, received, _ = send(hub, run, private=True)
    assert received == []
    hub.repos[NAME].private = False
    with pytest.raises(ValueError, match="me/garments is public already"):
        send(hub, run, private=True)


@pytest.mark.slow
def test_shards_that_are_no_longer_staged_go(hub, run, quick):
    send(hub, run, max_shard_size="1MB")
    assert "model.safetensors.index.json" in remote(hub)
    done, _, _ = send(hub, run)
    assert "model.safetensors" in done.sent
    assert done.deleted and all(name.startswith(("model-0", "model.safetensors.index")) for name in done.deleted)


@pytest.mark.slow
def test_where_a_run_was_published_is_kept_for_those_finetuned_from_it(hub, run, quick, make_run, tmp_path):
    send(hub, run)
    head = make_run(tmp_path / "head", SyncMaskForImageTextRetrieval, init_from=str(run))
    send(hub, head, repo_id="shop/head")
    card = yaml.safe_load(remote(hub, name="shop/head")["README.md"].decode().split("---\n")[1])
    assert card["base_model"] == NAME


# -------------------------------------------------------------------------------------------------- when it breaks off


def test_an_upload_that_breaks_off_is_gone_on_with(hub, run, quick):
    """Of two LFS files the second fails for good; the next call sends it, and the first not again."""
    hub.break_puts = dict.fromkeys(range(2, 100), 403)
    with pytest.raises(ConnectionError, match="broke off.*is kept.*not sent twice"):
        send(hub, run, max_shard_size="3MB")
    arrived = set(hub.lfs)
    assert len(arrived) == 1 and hub.repos[NAME].messages == ["initial commit"]
    assert (run / "publish" / "me--garments" / "model.safetensors.index.json").is_file()
    hub.break_puts = {}
    done, received, _ = send(hub, run, max_shard_size="3MB")
    assert len(hub.lfs) > 1 and not arrived & set(received)
    assert hub.repos[NAME].messages[1:] == ["Publish the model"]
    for name in done.sent:
        assert remote(hub)[name] == (run / "publish" / "me--garments" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", 503])
def test_a_short_failure_is_tried_again(hub, run, quick, how):
    hub.break_puts = {1: how}
    done, _, _ = send(hub, run)
    assert "model.safetensors" in done.sent and hub.puts == 2


def test_a_hub_that_goes_down_half_way(hub, run, quick, monkeypatch):
    def fall(*_):
        hub.down = 400  # nothing that the client would try again
        return 0.0

    monkeypatch.setattr("syncmask.hub_cards.publish.check", fall)
    with pytest.raises(ConnectionError, match="broke off"):
        send(hub, run)


# ------------------------------------------------------------------------------------------------------ what is refused


def untouched(run):
    return not (run / "publish").exists()


def test_no_token_is_said_before_any_work(hub, run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(ConnectionError, match="no token.*hf auth login.*HF_TOKEN"):
        publish(Request(run, NAME), HfApi(hub.url), print)
    with pytest.raises(ConnectionError, match="does not accept the token"):
        publish(Request(run, NAME), HfApi(hub.url, token="hf_wrong"), print)
    assert untouched(run)


def test_no_network_is_said_before_any_work(hub, run):
    with pytest.raises(ConnectionError, match="http://127.0.0.1:9 cannot be reached"):
        publish(Request(run, NAME), HfApi("http://127.0.0.1:9", token="hf_x"), print)
    assert untouched(run)


def test_who_may_not_write_is_told_before_any_work(hub, run, quick):
    with pytest.raises(ConnectionError, match="cannot write to other/; names that work: me, shop"):
        send(hub, run, repo_id="other/garments")
    hub.role = "read"
    with pytest.raises(ConnectionError, match="may read alone"):
        send(hub, run)
    assert untouched(run)


@pytest.mark.parametrize("name", ["garments", "me/gar ments", "a/b/c", "me/..", ""])
def test_a_bad_name_is_refused_before_any_work(hub, run, name):
    with pytest.raises(ValueError, match="--repo_id"):
        send(hub, run, repo_id=name)
    assert untouched(run) and hub.repos == {}


def test_what_is_no_run_is_refused(hub, run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder"):
        send(hub, tmp_path)
    with pytest.raises(FileNotFoundError, match="no run folder"):
        send(hub, run / "final")


@pytest.mark.slow
def test_a_model_of_another_kind_is_not_overwritten(hub, run, quick):
    hub.api.create_repo(NAME)
    hub.api.upload_file(path_or_fileobj=b'{"model_type": "bert"}', path_in_repo="config.json", repo_id=NAME)
    with pytest.raises(ValueError, match="me/garments holds a model of type 'bert'"):
        send(hub, run)
    assert set(remote(hub)) == {".gitattributes", "config.json"}


@pytest.mark.slow
def test_metadata_that_the_hub_refuses(hub, run, quick, monkeypatch):
    def write(run, staged, repo_id, base_model=None, license=None):
        (staged / "README.md").write_text("---\nlicense: [1]\n---\n")

    monkeypatch.setattr("syncmask.hub_cards.staging.write_model_card", write)
    with pytest.raises(ValueError, match='Invalid metadata in README.md.\n- "license" must be a string'):
        send(hub, run)
    assert hub.lfs == {} and hub.repos[NAME].messages == ["initial commit"]


def test_a_secret_stops_it(hub, run, quick):
    config = run / "final" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hub_token": "hf_" + "aB3d" * 9}))
    with pytest.raises(ValueError, match="tokenizer_config.json:[0-9]+: a Hugging Face token"):
        send(hub, run)
    assert hub.repos == {}


@pytest.mark.slow
def test_a_result_changed_by_hand_stops_it(hub, run, quick):
    result = run / "results" / "items.json"
    result.write_text(result.read_text().replace("0.5", "0.9"))
    with pytest.raises(ValueError, match="items.json was changed"):
        send(hub, run)
    assert hub.repos == {}


# --------------------------------------------------------------------------------------------------------- the command


def command(*arguments):
    return CliRunner().invoke(app, ["publish", *map(str, arguments)])


def test_a_dry_run_needs_neither_token_nor_network(run, monkeypatch, tmp_path):
    monkeypatch.setattr("syncmask.hub_cards.publish.identify", lambda *_: pytest.fail("asked the Hub"))
    monkeypatch.setattr("syncmask.hub_cards.publish.check", lambda *_: 0.0)
    done = command(run, "--repo_id", NAME, "--dry-run", "--staged", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "model.safetensors  " in done.output and "largest difference" in done.output
    assert (tmp_path / "out" / "README.md").is_file() and untouched(run)


def test_the_command_ends_in_one_line(run):
    done = command(run, "--repo_id", "garments", "--dry_run")
    assert done.exit_code == 1 and done.stderr.startswith("Error: --repo_id is 'garments'; wanted owner/name")
    assert "Traceback" not in done.output


def test_a_folder_that_is_staged_in_is_no_run(run, tmp_path):
    """`--staged` is emptied first, so it may not be what holds something else."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    done = command(run, "--repo_id", NAME, "--dry_run", "--staged", tmp_path / "mine")
    assert done.exit_code == 1 and "holds other things" in done.stderr
    assert (tmp_path / "mine" / "thesis.txt").is_file()


# -------------------------------------------------------------------------------------- loaded from the Hub, elsewhere

STRANGER = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("stranger", sys.argv[1])
stranger = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stranger)
job = json.loads(sys.argv[2])
with_package = job.pop("with_package")
if with_package:
    import syncmask
else:
    sys.meta_path.insert(0, stranger.Absent("syncmask"))
import torch
from safetensors.torch import save_file
torch.set_num_threads(1)
save_file(stranger.answers(job["folder"], job, trust_remote_code=not with_package), job["out"])
if not with_package:
    from transformers import AutoImageProcessor, AutoTokenizer
    AutoTokenizer.from_pretrained(job["folder"], trust_remote_code=True)
    AutoImageProcessor.from_pretrained(job["folder"], trust_remote_code=True)
    assert "syncmask" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVES)
def test_anybody_loads_it_from_the_hub(hub, kind, make_run, tmp_path):
    """By its name, in a process without the package (remote code) and in one with it (no remote code): same numbers."""
    run = make_run(tmp_path / "run", kind)
    send(hub, run)
    serves = SERVES[kind]
    texts = ["a red shirt", "blue jeans", "a hat", "a coat"]
    job = {"auto": list(serves.auto), "pipelines": serves.pipelines, "texts": texts}
    job["photos"] = draw_photos(tmp_path, 4)
    wanted = answers(str(run / "final"), job, trust_remote_code=False)
    assert set(job["pipelines"]) <= set(wanted) and "image_feats" in wanted
    for with_package in (False, True):
        out = tmp_path / f"{with_package}.safetensors"
        asked = job | {"folder": NAME, "out": str(out), "with_package": with_package}
        program = Path(sys.modules["syncmask.hub_cards.stranger"].__file__)
        done = subprocess.run(
            [sys.executable, "-c", STRANGER, str(program), json.dumps(asked)],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
            env={
                **os.environ,
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / f"home_{with_package}"),
                "HF_HUB_DISABLE_XET": "1",
            },
        )
        assert done.returncode == 0, done.stderr[-3000:]
        seen = load_file(out)
        assert seen.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(seen[name], wanted[name], atol=1e-5, rtol=1e-5)
    code = tmp_path / "home_False" / "modules" / "transformers_modules" / "me"
    assert list(code.rglob("modeling_syncmask.py")) and not (tmp_path / "home_True" / "modules").exists()


@pytest.mark.slow
def test_a_checkpoint_of_a_run_that_goes_on(hub, run):
    import hashlib

    (run / "publish").mkdir()
    (run / "final").rename(run / "publish" / "skeleton")
    shutil.rmtree(run / "results")
    folder = run / "checkpoints" / "step_00000007"
    folder.mkdir(parents=True)
    weights = load_file(run / "publish" / "skeleton" / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "COMPLETE").write_text(json.dumps({"model.safetensors": digest}))
    send(hub, run, checkpoint="newest")
    assert hub.repos[NAME].messages[-1] == "Publish the model after step 7"
    (run / "got.safetensors").write_bytes(remote(hub)["model.safetensors"])
    got = load_file(run / "got.safetensors")
    assert all(torch.equal(got[name], weights[name] * 1.5) for name in got)


def test_each_head_is_published_by_its_own_class():
    """A new head needs a line in SERVES before it can be published."""
    assert set(SERVES) == {
        SyncMaskForPreTraining,
        SyncMaskForImageTextRetrieval,
        SyncMaskForComposedImageRetrieval,
        SyncMaskForImageTextClassification,
    }


def test_a_run_that_cannot_be_written_to_is_published_all_the_same(run, tmp_path, monkeypatch):
    """Only the note for what is finetuned from it fails, and that after the upload."""

    def read_only(path, text):
        raise PermissionError("read-only")

    sent = Published("http://hub/me/garments", ["config.json"], [], [])
    monkeypatch.setattr("syncmask.hub_cards.publish.identify", lambda api, request: "me")
    monkeypatch.setattr("syncmask.hub_cards.publish.prepare", lambda request, run, say: None)
    monkeypatch.setattr("syncmask.hub_cards.publish.upload", lambda *_: sent)
    monkeypatch.setattr("syncmask.hub_cards.publish.write_text", read_only)
    said = []
    assert publish(Request(run, NAME, staged=tmp_path / "staged"), SimpleNamespace(endpoint="hub"), said.append) is sent
    assert "published, but that cannot be noted" in said[-1] and "--base_model" in said[-1]


def test_a_check_that_does_not_end_is_told_in_a_line(tmp_path, monkeypatch):
    def hangs(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(ValueError, match="nothing is published: .* after 30 minutes"):
        ask_stranger(tmp_path / "staged", {}, tmp_path)
