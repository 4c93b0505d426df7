"""Secrets and absolute paths: each kind is found where it stands, and what only looks like one is left alone."""

import json

import pytest
import torch
from safetensors.torch import save_file

from syncmask import SyncMaskForImageTextRetrieval
from syncmask.hub_cards.scan import masked, paths_in, refuse, scan, secrets_in
from syncmask.hub_cards.staging import stage

TOKEN = "hf_" + "aB3d" * 9  # put together here, so that no scanner takes this file for a leak
SECRETS = [
    ("a Hugging Face token", f"use {TOKEN} to log in"),
    ("a Hugging Face token", f'"--hub_token={TOKEN}"'),
    ("a GitHub token", "ghp_" + "a1B2" * 9),
    ("a GitHub token", "github_pat_" + "11AAAA_" * 5),
    ("an AWS key", "key AKIA" + "IOSFODNN7EXAMPLE"),
    ("a Weights & Biases key", "WANDB_API_KEY=" + "0123456789" * 4),
    ("an API key", "sk-" + "proj-abcDEF123456789ghij"),
    ("a private key", "-----BEGIN " + "OPENSSH PRIVATE KEY-----"),
    ("a name and password in an address", "https://someone:secret1@example.com/x"),
    ("a bearer token", "Authorization: Bearer " + "abcdef0123456789abcd"),
    ("a password", 'password: "correct"'),
    ("a password", "'db_password' = 'horse'"),
    ("a secret on a command line", "python train.py --wandb_api_key abcdef123"),
    ("a secret", '"api_key": "' + "q1w2e3r4t5y6u7i8" + '"'),
    ("a secret", "AUTH_TOKEN=" + "q1w2e3r4t5y6u7i8o9"),
    ("a secret", "my_secret: " + "abcdefabcdefabcdef12"),
]
HARMLESS = [
    '"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "<unk>", "bos_token": "<|startoftext|>",',
    "mask_token_id: int | None = None",
    "mask_token_id=processor.tokenizer.mask_token_id,",
    "tokens: (B, L), each token = batch.input_ids[row, column]",
    "tokenizer_class: BertTokenizer",
    '"mim_decoder.mask_token": "model-00001-of-00005.safetensors",',
    '"sha256": "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"',
    "commit 0123456789012345678901234567890123456789 of main",
    "hf_hub_download, hf_raise_for_status",
    "--tokenizer google-bert/bert-base-uncased --max_tokens 128 --mask_token [MASK]",
    "see https://example.com:8080/a@b",
    '"password" is no setting of this model',
]


@pytest.mark.parametrize(("what", "line"), SECRETS)
def test_secrets_are_found(what, line):
    found = dict(secrets_in(line, {}))
    assert what in found
    assert found[what].endswith("...") and len(found[what]) <= 9


@pytest.mark.parametrize("line", HARMLESS)
def test_what_only_looks_like_a_secret(line):
    assert list(secrets_in(line, {})) == []


def test_secrets_of_this_machine_are_found_by_their_values(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOP_TOKEN", "plain words here")
    monkeypatch.setenv("SHOP_NAME", "a shop of shirts")
    (tmp_path / "a.md").write_text("a shop of shirts\nplain words here\n")
    (finding,) = scan(tmp_path, tmp_path / "run")
    assert (finding.file, finding.line, finding.what) == ("a.md", 2, "the value of $SHOP_TOKEN")


PATHS = [
    '"path": "/home/someone/runs/x"',
    "see (/Users/ann/shop/photos).",
    "--corpus=/mnt/cluster/photos --x",
    "file:///home/someone/x.png",
    "PATH=/x/y:/scratch/me/bin",
    r'"C:\\Users\\ann\\photos"',
    r"D:\shop\photos",
    "C:/shop/photos",
]
NO_PATHS = [
    "runs/quickstart/final and ../shop/photos",
    "https://huggingface.co/home/user/x",
    "image/png, and/or, km/h/s, B/L/D",
    "#!/usr/bin/env python  > /dev/null, read from /sys/class/net",
    "/no/such/folder_anywhere",
    "a / b / c",
    '    "/usr/local": 1234,',
    "</div><br/><p/>",
    "12:30: x\\y\\z",
]


@pytest.mark.parametrize("line", PATHS)
def test_absolute_paths_are_found(line):
    assert {what for what, _ in paths_in(line)} == {"an absolute path"}


@pytest.mark.parametrize("line", NO_PATHS)
def test_what_only_looks_like_a_path(line):
    assert list(paths_in(line)) == []


def test_paths_that_are_here_are_found_and_the_runs_own_place(tmp_path, monkeypatch):
    monkeypatch.setattr("syncmask.hub_cards.scan.PRIVATE_ROOTS", set())
    (tmp_path / "shop").mkdir()
    staged, run = tmp_path / "staged", tmp_path / "my run"
    staged.mkdir()
    (staged / "a.txt").write_text(f"fine\nof {tmp_path}/shop.\nof {tmp_path}/gone\nof {run}/final\n/no/such/place\n")
    found = [(finding.line, finding.shown) for finding in scan(staged, run)]
    # The folder that something is gone from is still here; a place with a space is known by its whole name.
    assert {line for line, _ in found} == {2, 3, 4} and (4, str(run)) in found


def test_every_text_and_the_notes_of_weights_are_read(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "noname").write_text(f"ok\n\n{TOKEN}\n")
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"note": TOKEN})
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0" + TOKEN.encode())
    found = [(finding.file, finding.line) for finding in scan(tmp_path, tmp_path / "run")]
    assert found == [("a.safetensors", 1), ("deep/er/noname", 3)]


def test_findings_stop_and_say_where(tmp_path):
    refuse([])
    (tmp_path / "a.txt").write_text(f"{TOKEN}\n" * 30)
    with pytest.raises(ValueError, match="found .30.") as caught:
        refuse(scan(tmp_path, tmp_path / "run"))
    said = str(caught.value)
    assert "a.txt:1: a Hugging Face token: hf_aB3..." in said and "and 10 more" in said and "revoke" in said
    assert TOKEN not in said


def test_short_secrets_are_masked_too():
    assert masked("abcd") == "ab..."


@pytest.mark.parametrize(
    ("file", "plant"),
    [
        ("tokenizer_config.json", {"hub_token": TOKEN}),
        ("tokenizer_config.json", {"name_or_path": "/home/someone/models/bert"}),
        ("processor_config.json", {"note": f"made with {TOKEN}"}),
        ("config.json", {"note": "/home/someone/runs/x"}),
    ],
)
def test_what_is_planted_in_a_run_never_passes(make_run, tmp_path, file, plant):
    """A saver may drop what it does not know; what it hands on is found."""
    run = make_run(tmp_path / "run", SyncMaskForImageTextRetrieval)
    content = json.loads((run / "final" / file).read_text())
    (run / "final" / file).write_text(json.dumps(content | plant))
    stage(run, tmp_path / "staged", "me/x")
    (value,) = plant.values()
    left = [path.name for path in (tmp_path / "staged").rglob("*.json") if value in path.read_text()]
    assert {finding.file for finding in scan(tmp_path / "staged", run)} == set(left)


def test_the_code_that_travels_is_clean(make_run, tmp_path):
    run = make_run(tmp_path / "run", SyncMaskForImageTextRetrieval)
    stage(run, tmp_path / "staged", "me/x")
    assert scan(tmp_path / "staged", run) == []
