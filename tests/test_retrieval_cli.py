"""`syncmask index` and `syncmask search` as a user types them, and indexing over two processes."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from syncmask import SyncMaskConfig, SyncMaskForImageTextRetrieval
from syncmask.processing.readers_folder import write_folder
from syncmask.retrieval.catalogue import Catalogue
from syncmask.retrieval.cli import app
from syncmask.retrieval.embed import open_source


@pytest.fixture(scope="module")
def runs(tmp_path_factory, processor):
    """Two runs, a and b, with a final/ folder each."""
    root = tmp_path_factory.mktemp("runs")
    ids = {"vocab_size": len(processor.tokenizer), "mask_token_id": processor.tokenizer.mask_token_id}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = SyncMaskForImageTextRetrieval(SyncMaskConfig.tiny(image_size=32, **ids))
        model.save_pretrained(root / name / "final")
        processor.save_pretrained(root / name / "final")
    return root


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, garments):
    """A folder of photos with metadata, in splits; 30 photos, ground truth and all."""
    import datasets

    root = tmp_path_factory.mktemp("corpus") / "photos"
    parts = {"train": garments.select(range(20)), "test": garments.select(range(20, 30))}
    write_folder(datasets.DatasetDict(parts), root)
    return root


@pytest.fixture(scope="module")
def shop(tmp_path_factory, runs, corpus):
    """A catalogue that no test changes."""
    place = tmp_path_factory.mktemp("shop") / "shop"
    call("index", corpus, place, "--model", runs / "a")
    return place


def call(*arguments, code=0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    assert "Traceback" not in done.output
    return done


def test_a_corpus_becomes_a_catalogue(tmp_path, runs, corpus, garments):
    done = call("index", corpus, tmp_path / "shop", "--model", runs / "a")
    assert "30 added, 0 updated, 0 unchanged, 0 skipped; 30 photos encoded" in done.stdout
    items = len(set(garments.select(range(30))["item_id"]))
    assert f"30 photos of {items} items; searched by exact scan in memory" in done.stdout
    again = call("index", corpus, tmp_path / "shop")
    assert "0 added, 0 updated, 30 unchanged, 0 skipped; 0 photos encoded" in again.stdout
    about = json.loads(call("index", corpus, tmp_path / "shop", "--json").stdout)
    assert about["report"]["unchanged"] == about["catalogue"]["photos"] == 30
    assert {"category", "view"} <= set(about["catalogue"]["filterable"])


def test_hits_as_a_table_as_json_and_as_sheets(shop, tmp_path):
    done = call("search", shop, "a red shirt", "-k", 4)
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all(re.match(r" +\d\. +-?\d\.\d{3} +garment-\d+ +\d photos? ", line) for line in lines)
    found = json.loads(call("search", shop, "a red shirt", "-k", 4, "--json").stdout)
    assert [hit["item_id"] for hit in found["hits"]] == [re.search(r"garment-\d+", line)[0] for line in lines]
    assert all(hit["matching"] is None for hit in found["hits"])
    judged = json.loads(call("search", shop, "a red shirt", "-k", 4, "--rerank", 8, "--json").stdout)["hits"]
    assert [hit["matching"] for hit in judged] == sorted((hit["matching"] for hit in judged), reverse=True)
    for name in ("sheet.png", "sheet.html"):
        assert f"written to {tmp_path / name}" in call("search", shop, "red", "--sheet", tmp_path / name).stdout
    assert Image.open(tmp_path / "sheet.png").width > 500
    assert "<li>" in (tmp_path / "sheet.html").read_text()


def test_photos_and_filters(shop, corpus):
    photo = next((corpus / "train").glob("*.png"))
    found = json.loads(call("search", shop, "--image", photo, "-k", 1, "--json").stdout)["hits"][0]
    assert str(photo) in [each["path"] for each in found["photos"]] and found["vector"] == pytest.approx(1, abs=1e-4)
    category = found["columns"]["category"]
    every = json.loads(call("search", shop, "red", "--filter", f"category={category}", "-k", 50, "--json").stdout)
    assert {hit["columns"]["category"] for hit in every["hits"]} == {category} and every["notes"]
    both = json.loads(call("search", shop, "but blue", "--image", photo, "-k", 50, "--json").stdout)["hits"]
    words = json.loads(call("search", shop, "but blue", "-k", 50, "--json").stdout)["hits"]
    assert len(both) == len(words) > 5 and both[0]["vector"] != words[0]["vector"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["search", "{shop}"], "nothing to search for"),
        (["search", "{shop}", "x", "--filter", "colour=Red"], "no column 'colour'; a filter may use"),
        (["search", "{shop}", "x", "--filter", "1=1; drop table photos"], "no column '1'"),
        (["search", "{shop}", "x", "--filter", "drop table photos"], "is no condition"),
        (["search", "{shop}", "x", "--sheet", "{tmp}/a.pdf"], "is none of them"),
        (["search", "{shop}", "x", "--image", "{tmp}/none.png"], "does not exist"),
        (["search", "{shop}", "x", "--model", "{runs}/b"], "cannot be compared"),
        (["search", "{tmp}/nothing", "x"], "does not exist. Make one: syncmask index"),
        (["search", "{runs}", "x"], "is no catalogue"),
        (["index", "{corpus}", "{tmp}/new"], "name the model"),
        (["index", "{corpus}", "{runs}", "--model", "{runs}/a"], "holds other files"),
        (["index", "{corpus}", "{shop}", "--model", "{runs}/b"], "--model RUN --reembed"),
        (["index", "{corpus}", "{shop}", "--reembed"], "needs the model whose vectors are wanted"),
        (["index", "{corpus}", "{shop}", "--model", "{tmp}"], "holds neither a model"),
        (["index", "{tmp}/empty", "{shop}"], "holds no photos"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(shop, corpus, runs, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"shop": shop, "tmp": tmp_path, "runs": runs, "corpus": corpus}
    done = call(*(argument.format(**places) for argument in arguments), code=1)
    assert message in done.stderr and "Error: " in done.stderr
    assert len(Catalogue.open(shop)) == 30


def test_a_long_text_and_an_injection_are_harmless(shop):
    done = call("search", shop, "red " * 5000, "-k", 1)
    assert "note: the text is longer than the model reads" in done.stderr
    done = call("search", shop, "red", "--filter", "category=' OR 1=1; DROP TABLE photos --")
    assert done.stdout == "" and "10 items were asked for; 0 are there that meet the filter" in done.stderr
    assert len(Catalogue.open(shop)) == 30


def test_a_folder_of_bare_photos(tmp_path, runs, garments):
    photos = tmp_path / "photos"
    for place in range(5):
        path = photos / ("hats" if place < 2 else "") / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        garments[place]["image"].save(path)
    (photos / "notes.txt").write_text("no photo")
    (photos / "broken.jpg").write_bytes(b"no photo")
    done = call("index", photos, tmp_path / "shop", "--model", runs / "a")
    assert "5 added" in done.stdout and "1 skipped" in done.stdout and "skipped broken.jpg" in done.stderr
    found = json.loads(call("search", tmp_path / "shop", "x", "--filter", "folder=hats", "--json").stdout)["hits"]
    assert {hit["item_id"] for hit in found} == {"hats/0.png", "hats/1.png"}


def test_pruning_deletes_what_the_source_no_longer_has(tmp_path, runs, garments):
    photos = tmp_path / "photos"
    photos.mkdir()
    for place in range(4):
        garments[place]["image"].save(photos / f"{place}.png")
    call("index", photos, tmp_path / "shop", "--model", runs / "a")
    (photos / "0.png").unlink()
    (photos / "1.png").write_bytes(b"broken for now")
    call("index", photos, tmp_path / "shop")
    assert len(Catalogue.open(tmp_path / "shop")) == 4
    call("index", photos, tmp_path / "shop", "--prune")
    assert sorted(Catalogue.open(tmp_path / "shop").photo_ids()) == ["1.png", "2.png", "3.png"]


def test_photos_that_are_gone_stop_a_new_model_unless_pruned(tmp_path, runs, garments):
    photos = tmp_path / "photos"
    photos.mkdir()
    for place in range(3):
        garments[place]["image"].save(photos / f"{place}.png")
    call("index", photos, tmp_path / "shop", "--model", runs / "a")
    (photos / "0.png").unlink()
    job = ("index", photos, tmp_path / "shop", "--model", runs / "b", "--reembed")
    assert "Nothing was switched" in call(*job, code=1).stderr
    assert len(Catalogue.open(tmp_path / "shop")) == 3
    call(*job, "--prune")
    assert sorted(Catalogue.open(tmp_path / "shop").photo_ids()) == ["1.png", "2.png"]


def test_a_new_model_takes_over(tmp_path, runs, corpus):
    shop = tmp_path / "shop"
    call("index", corpus, shop, "--model", runs / "a")
    done = call("index", corpus, shop, "--model", runs / "b", "--reembed")
    assert "0 added, 0 updated, 30 unchanged" in done.stdout
    assert Catalogue.open(shop).describe()["model"] == str(runs / "b" / "final")
    call("search", shop, "red")


def test_sources_are_dealt_out_whole(corpus, garments):
    whole = open_source(corpus)
    names = [row["image"]["path"] for row in whole]
    assert whole.total == len(names) == 30
    shares = [[row["image"]["path"] for row in whole.share(number, 3)] for number in range(3)]
    assert sorted(sum(shares, [])) == sorted(names)


def test_help_is_quick_and_shows_commands_that_parse():
    """The commands in the help are taken apart by the command line itself; only their files are not there."""
    runner = CliRunner()
    for command in ("index", "search"):
        text = runner.invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
        examples = re.findall(rf"syncmask {command} (.*)", text.split("Examples:")[1])
        assert len(examples) >= 3
        for example in examples:
            done = runner.invoke(app, [command, *shlex.split(example.strip(" │"))])
            assert done.exit_code == 1 and "Error: " in done.stderr, (example, done.output)
    heavy = "('torch', 'transformers', 'lancedb', 'gradio')"
    code = "import sys; sys.argv[0] = 'syncmask'; import syncmask.retrieval.cli"
    code += f"; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.slow
def test_two_processes_fill_one_table(tmp_path, runs, corpus):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    job = [*launcher, "-m", "syncmask.retrieval.embed", str(corpus), str(tmp_path / "shop"), "--json"]
    done = subprocess.run(
        [*job, "--model", str(runs / "a")], capture_output=True, text=True, env=environment, cwd=Path.home()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["report"]["added"] == report["report"]["encoded"] == report["catalogue"]["photos"] == 30
    again = subprocess.run([*job, "--prune"], capture_output=True, text=True, env=environment, cwd=Path.home())
    assert json.loads(again.stdout)["report"]["unchanged"] == 30
    job += ["--model", str(runs / "b"), "--reembed"]
    other = subprocess.run(job, capture_output=True, text=True, env=environment, cwd=Path.home())
    assert other.returncode == 0, other.stderr[-3000:]
    assert (
        json.loads(other.stdout)["report"]["encoded"] == 0
        and Catalogue.open(tmp_path / "shop").describe()["photos"] == 30
    )
    assert len(Catalogue.open(tmp_path / "shop").search(text="red", k=2)) == 2
