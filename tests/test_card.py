"""Cards: what they say is in the run's files, nothing else leaves them, and every block of code in them runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml
from huggingface_hub import ModelCardData, metadata_load, parse_eval_result_entries
from huggingface_hub.repocard import RepoCard
from huggingface_hub.repocard_data import DatasetCardData, model_index_to_eval_results
from typer.testing import CliRunner

from syncmask import (
    SyncMaskConfig,
    SyncMaskForComposedImageRetrieval,
    SyncMaskForImageTextClassification,
    SyncMaskForImageTextRetrieval,
    SyncMaskForPreTraining,
)
from syncmask.__main__ import app
from syncmask.evaluation.loading import sha256
from syncmask.evaluation.photo_source import note_photos, photo_source
from syncmask.evaluation.result import Result, check_seal, seal_of
from syncmask.hub_cards.card import HEADS, write_model_card
from syncmask.hub_cards.dataset_card import write_dataset_card
from syncmask.hub_cards.headlines import HEADLINES
from syncmask.hub_cards.markdown import TEMPLATES, plain
from syncmask.hub_cards.public import name_of, public_command, without_places
from syncmask.hub_cards.staging import stage
from syncmask.processing.convert import convert
from syncmask.training.parsing import load_arguments

REPO = "ada/shop-model"
SECRET = "hf_abcdefghijklmnopqrstuv"
KINDS = {
    "pretraining": SyncMaskForPreTraining,
    "retrieval": SyncMaskForImageTextRetrieval,
    "composed": SyncMaskForComposedImageRetrieval,
    "classification": SyncMaskForImageTextClassification,
}
# What each kind of run measures at its end: protocol -> names of metrics.
MEASURED = {
    "pretraining": {
        "items": ["image_to_text/recall@10/itc", "image_to_text/recall@10/itc_duplicates"],
        "co-occurrence": ["words/precision/attention", "words/precision/random", "false_negatives/pairs/rules_1_2"],
    },
    "retrieval": {"items": ["image_to_text/recall@10/itc", "text_to_image/recall@10/itm"]},
    "composed": {"colour-variants": ["all/recall@1/composed", "all/recall@1/sum", "all/recall@10/composed"]},
    "classification": {"recognition-category": ["category/accuracy/fused", "category/accuracy/text_only"]},
}
# Of the Hub's tasks, those that cards name.
TASKS = {"zero-shot-image-classification", "image-classification", "image-feature-extraction"}


def metric(value, n=40):
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "n": n}


def chance(names):
    return {f"{name.rpartition('/')[0]}/chance": {"value": 0.1, "low": 0.1, "high": 0.1, "n": 40} for name in names}


def measure(run, protocol, names, **more):
    """Write a result as a protocol does."""
    about = {"name": "garments", "source": "generated", "fingerprint": "a-9-b", "split": "test", "rows": 9, "items": 3}
    Result(
        protocol=protocol,
        version=1,
        corpus=about | more.pop("corpus", {}),
        model={"path": str(run / "final"), "sha256": sha256(run / "final" / "model.safetensors")},
        metrics={name: metric(0.5) for name in names} | chance(names),
        candidates_sha256="c",
        **{"command": "syncmask evaluate runs/x --protocol items", **more},
    ).save(run / "results")


@pytest.fixture(scope="module")
def models(processor, tmp_path_factory):
    """Folders with a tiny model of each kind, its processor beside it."""
    ids = {"vocab_size": len(processor.tokenizer), "mask_token_id": processor.tokenizer.mask_token_id}
    folders = {}
    for name, kind in KINDS.items():
        torch.manual_seed(0)
        labels = {"label_sets": {"category": ["coat", "tee", "under|wear"]}} if name == "classification" else {}
        folders[name] = tmp_path_factory.mktemp(name) / "final"
        kind(SyncMaskConfig.tiny(image_size=32, **ids, **labels)).save_pretrained(folders[name])
        processor.save_pretrained(folders[name])
    return folders


@pytest.fixture
def make_run(models, tmp_path):
    """The function that lays out a finished run of some kind; keywords replace entries of config.yaml's sections."""

    def make(kind="pretraining", name="run", **sections):
        run = tmp_path / name
        run.mkdir()
        (run / "final").symlink_to(models[kind])
        config = {
            "data": {"corpus": "garments", "data_dir": None, "where": [], "num_items": 40, "corpus_seed": 3},
            "model": {"preset": "tiny", "init_from": None if kind == "pretraining" else f"/home/ada/{SECRET}"},
            "objective": {"mask_strategy": "attention", "word_mask_rate": 0.3, "patch_mask_rate": 0.4},
            "optim": {"learning_rate": 1e-3, "warmup_steps": 5, "per_device_batch_size": 16},
            "run": {"output_dir": "/home/ada/runs", "run_name": SECRET, "seed": 7, "final_weights": "student"},
            "about": {
                "command": f"python -m syncmask.training.pretrain --hub_token {SECRET}",
                "corpus_fingerprint": "a-31-b",
                "splits": {"train": {"rows": 31, "items": 11}, "test": {"rows": 9, "items": 3}},
                "versions": {"python": "3.11.7", "torch": "2.13.0", "ada": "/home/ada"},
                "processes": 1,
            },
        }
        for section, entries in sections.items():
            config[section] |= entries
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        (run / "metrics.jsonl").write_text('{"step": 4, "epoch": 1}\n{"step": 8, "epoch": 2}\n{"step": 12')
        for protocol, names in MEASURED[kind].items():
            measure(run, protocol, names)
        return run

    return make


def card(run, tmp_path, **options):
    return write_model_card(run, tmp_path / "staged", REPO, **options).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ the seal


def test_a_seal_holds_whatever_the_order_and_the_white_space(make_run):
    file = make_run() / "results" / "items.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(content.items()))))
    check_seal(file)
    assert seal_of(content) == content["seal"] == seal_of({**content, "seal": "another"})
    assert Result.load(file).value("image_to_text/recall@10/itc") == 0.5


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["metrics"]["image_to_text/recall@10/itc"].update(value=0.51),
        lambda content: content["corpus"].update(split="train"),
        lambda content: content.update(version=2),
        lambda content: content.update(note="better"),
    ],
)
def test_a_result_that_was_changed_by_hand_is_refused(make_run, tmp_path, edit):
    run = make_run()
    file = run / "results" / "items.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"items.json was changed.*syncmask evaluate RUN --protocol items"):
        card(run, tmp_path)
    assert Result.load(file).protocol == "items"  # reading goes on without


def test_a_result_without_a_seal_is_refused_with_the_way_to_measure_again(make_run, tmp_path):
    run = make_run()
    file = run / "results" / "co-occurrence.json"
    content = json.loads(file.read_text())
    del content["seal"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has no seal.*--protocol co-occurrence"):
        card(run, tmp_path)


@pytest.mark.parametrize("protocol", ["items", "co-occurrence"])
def test_a_result_of_other_weights_is_refused(make_run, tmp_path, protocol):
    run = make_run()
    file = run / "results" / f"{protocol}.json"
    result = Result.load(file)
    result.model["sha256"] = "0" * 64
    result.save(file)
    with pytest.raises(ValueError, match=rf"{protocol}.json was measured on other weights.*000000"):
        card(run, tmp_path)


# ------------------------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_are_what_the_hub_reads(make_run, tmp_path, kind):
    run = make_run(kind)
    text = card(run, tmp_path, base_model="ada/base", license="mit")
    data = metadata_load(tmp_path / "staged" / "README.md")
    assert data["library_name"] == "transformers" and data["license"] == "mit" and data["language"] == "en"
    assert data["pipeline_tag"] == HEADS[KINDS[kind].__name__][1] and data["pipeline_tag"] in TASKS
    assert data["base_model"] == "ada/base" and "datasets" not in data
    again = ModelCardData(**data)
    assert again.to_dict() == data
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "shop-model" and results == again.eval_results
    for result in results:
        assert result.dataset_type != "garments", "no dataset of the Hub"
        assert result.metric_value == 0.5 and result.metric_args["low"] == 0.45 and result.metric_args["n"] == 40
        assert re.match(r"[\w-]+ \(version 1\): ", result.metric_name) and result.dataset_split == "test"
    assert RepoCard(text).data.to_dict() == yaml.safe_load(text.split("---")[1])
    assert not (tmp_path / "staged" / ".eval_results").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_stands_with_protocol_interval_and_what_to_read_it_against(make_run, tmp_path, kind):
    text = card(make_run(kind), tmp_path)
    for protocol, names in MEASURED[kind].items():
        line = next(line for line in HEADLINES[protocol] if line.metric in names)
        row = next(row for row in text.splitlines() if row.startswith(f"| {line.words} |"))
        assert "**50.0 [45.0, 55.0]**" in row and f"`{protocol}` (version 1): garments" in row
        assert "9 rows, 3 items" in row and re.search(r"\| (chance|random|sum|commonest) ", row)
        assert f"](results/{protocol}.json)" in text and (tmp_path / "staged/results" / f"{protocol}.json").is_file()
    assert "itc_duplicates" not in text and "31 photos of 11 items" in text and "| steps | 8, 2 whole epochs |" in text


def test_a_protocol_that_was_not_run_has_no_row_and_is_named(make_run, tmp_path):
    run = make_run()
    (run / "results" / "items.json").unlink()
    text = card(run, tmp_path)
    missing = next(line for line in text.splitlines() if line.startswith("**Not measured**"))
    assert "items," in missing and "fashiongen-full" in missing and "co-occurrence" not in missing
    assert "found among the first 10" not in text and "model-index" not in text  # co-occurrence is of the teacher
    (run / "results" / "co-occurrence.json").unlink()
    text = card(run, tmp_path)
    assert "None was measured." in text and "co-occurrence" in text.split("**Not measured**")[1]


def test_it_says_whose_masks_were_measured(make_run, tmp_path):
    run = make_run()
    assert "masks of the momentum teacher, the moving average" in card(run, tmp_path)
    result = Result.load(run / "results" / "co-occurrence.json")
    result.model["teacher"] = "none kept: the model itself"
    result.save(run / "results")
    assert "on this model itself" in card(run, tmp_path)
    teacher = make_run(name="teacher", run={"final_weights": "teacher"})
    assert "teacher, whose weights these are" in card(teacher, tmp_path)


def test_energy_and_time_are_told_as_they_were_measured(make_run, tmp_path):
    run = make_run()
    assert "Time, hardware and energy were not measured." in card(run, tmp_path)
    part = {"processes": 2, "threads": 1, "cores": 8, "processor": "EPYC|x", "devices": ["A100", "A100"]}
    energy = {"cpu": {"joules": None, "missing": "no RAPL"}, "gpu": {"joules": 7200.0, "missing": ""}}
    total = {
        "parts": 1,
        "steps": 11,
        "wall_s": 90,
        "cpu_s": 180,
        "steps_per_s": 2.0,
        "peak_rss_bytes": 2**30,
        "energy": energy,
    }
    (run / "usage.json").write_text(json.dumps({"version": 1, "total": total, "parts": [part]}))
    text = card(run, tmp_path)
    assert "| steps | 11, 2 whole epochs |" in text
    assert "| energy, processors and memory | not measured: no RAPL |" in text and "| 2 Wh (NVML) |" in text
    assert "2 x A100, 8 cores of EPYC\\|x" in text and "1.5 minutes, 2 steps a second; 3.0 minutes of" in text


def test_limits_are_those_of_the_corpus(make_run, tmp_path):
    drawn = card(make_run(), tmp_path)
    assert "Drawn garments only" in drawn and "never tested on:** real photos" in drawn.lower()
    assert "50.0 [45.0, 55.0] % of the pairs that share a batch" in drawn
    data = {"corpus": "folder", "data_dir": "/home/ada/shop", "where": ["text_origin=description"]}
    real = card(make_run(name="real", data=data, about={"corpus_source": "files"}), tmp_path)
    assert "Drawn" not in real and "real photos" not in real and "A small corpus" in real
    assert "body types, skin tones" in real and "rows whose `text_origin` is `description`" in real
    assert "language" not in yaml.safe_load(real.split("---")[1])
    heads = card(make_run("classification", name="heads"), tmp_path)
    assert "coat, tee, under\\|wear" in heads and "Texts that name the label" not in heads


def test_what_training_began_with_is_told_and_linked(make_run, tmp_path):
    assert "began with random weights." in card(make_run(), tmp_path)
    head = make_run("retrieval", name="head")
    text = card(head, tmp_path)
    assert "weights of another model, not published" in text and "base_model" not in text.split("---")[1]
    text = card(head, tmp_path, base_model="ada/base")
    assert "](https://huggingface.co/ada/base)" in text
    towers = make_run(name="towers", model={"vision": "a/v", "text": "b/t"}, about={"started_from": ["a/v", "b/t"]})
    text = card(towers, tmp_path)
    assert "towers that were pretrained apart: [a/v]" in text
    assert yaml.safe_load(text.split("---")[1])["base_model"] == ["a/v", "b/t"]


def test_a_dataset_of_the_hub_is_linked_and_has_eval_results(make_run, tmp_path):
    run = make_run("retrieval", data={"corpus": "ada/shop"}, about={"corpus_source": "hub"})
    measure(run, "items", ["image_to_text/recall@10/itc"], corpus={"name": "ada/shop", "source": "hub"})
    text = card(run, tmp_path)
    assert yaml.safe_load(text.split("---")[1])["datasets"] == ["ada/shop"]
    file = tmp_path / "staged" / ".eval_results" / "items.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("ada/shop", "items", 50.0)
    assert "version 1" in entry.notes and "45.0 to 55.0" in entry.notes


def test_what_is_not_the_models_or_was_not_measurable_is_no_entry(make_run, tmp_path):
    """The teacher's masks, and a metric without a value, on a dataset of the Hub."""
    run, hub = make_run(), {"name": "ada/shop", "source": "hub"}
    measure(run, "co-occurrence", MEASURED["pretraining"]["co-occurrence"], corpus=hub)
    measure(run, "items", [], corpus=hub)
    unknown = Result.load(run / "results" / "items.json")
    unknown.metrics["image_to_text/recall@10/itc"] = dict.fromkeys(("value", "low", "high"), float("nan")) | {"n": 0}
    unknown.save(run / "results")
    text = card(run, tmp_path)
    assert not (tmp_path / "staged" / ".eval_results").exists()
    assert "model-index" not in yaml.safe_load(text.split("---")[1]) and "words/precision" not in text.split("---")[1]


def test_the_picture_is_shown_where_its_photos_are_generated(make_run, tmp_path):
    run = make_run()
    (run / "report").mkdir()
    (run / "report" / "masks.png").write_bytes(b"picture")
    assert "left out" in card(run, tmp_path) and not (tmp_path / "staged" / "assets").exists()
    note_photos(run / "report", "files")
    assert "left out" in card(run, tmp_path)
    note_photos(run / "report", "generated")
    assert "assets/masks.png" in card(run, tmp_path) and (tmp_path / "staged/assets/masks.png").is_file()
    (run / "report" / "masks.png").write_bytes(b"another")  # drawn anew of something else
    assert photo_source(run / "report" / "masks.png") == "unknown"


def test_what_is_the_papers_is_told_as_in_the_readme():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert (TEMPLATES / "sources.md").read_text(encoding="utf-8").strip() in readme


def test_the_same_run_gives_the_same_bytes(make_run, tmp_path):
    run = make_run()
    card(run, tmp_path)
    first = {file: file.read_bytes() for file in (tmp_path / "staged").rglob("*") if file.is_file()}
    card(run, tmp_path)
    assert all(file.read_bytes() == content for file, content in first.items()) and len(first) == 3


# --------------------------------------------------------------------------------------------------- nothing leaks


def test_nothing_of_the_machine_and_its_user_leaves_a_run(make_run, tmp_path):
    data = {"corpus": "folder", "data_dir": "/home/ada/private/shop", "where": ["file=/home/ada/private/list.txt"]}
    run = make_run("classification", data=data, about={"corpus_source": "files"})
    measure(
        run,
        "recognition-category",
        ["category/accuracy/fused"],
        corpus={"name": "/home/ada/private/shop", "source": "files", "label_source": "/home/ada/private/labels.txt"},
        command=f"/home/ada/bin/syncmask evaluate /home/ada/runs/x --corpus /home/ada/private/shop --token {SECRET}",
        versions={"torch": "2.13.0", "ada": "/home/ada"},
    )
    card(run, tmp_path)
    texts = {file.name: file.read_text() for file in (tmp_path / "staged").rglob("*") if file.is_file()}
    for name, text in texts.items():
        for told in ("/home", "private", SECRET, str(tmp_path), "--token"):
            assert told not in text, (name, told)
    staged = tmp_path / "staged" / "results" / "recognition-category.json"
    check_seal(staged)
    result = Result.load(staged)
    assert result.command == "syncmask evaluate RUN --corpus shop" and result.corpus["name"] == "shop"
    assert result.corpus["label_source"] == "labels.txt" and result.model["path"] == "final"
    assert "photos and texts in files that are not published" in texts["README.md"]


def test_names_stay_of_places():
    assert [name_of(place) for place in ("/a/shop/", "shop", "C:\\Users\\ada\\shop", "runs/x/final")] == [
        *("shop", "shop", "shop", "final")
    ]
    assert {name_of(place) for place in ("/home/ada", "/root", "~", "~ada", "C:/Users/ada", "s3://k:s@h/x", "")} == {
        "files"
    }
    assert without_places("no /home/ada/x.jpg, C:\\a\\b.png; 1/2 and/or") == "no x.jpg, b.png; 1/2 and/or"


def test_of_a_command_the_known_parts_are_told():
    told = public_command(f"pretrain.py --config quickstart --epochs=9 --run_name {SECRET} --data_dir /home/ada/x")
    assert told == "python -m syncmask.training.pretrain --config quickstart --epochs 9"
    assert public_command(f"syncmask evaluate /x --split {SECRET * 3} --seed 1") == "syncmask evaluate RUN --seed 1"
    assert public_command("syncmask explain /x --pointing --max-rows 9") == (
        "syncmask explain RUN --pointing --max-rows 9"
    )
    assert public_command(f"/bin/{SECRET}.py --seed 1") == "" == public_command("")


def test_data_stay_text_in_markdown():
    assert plain("a|b `c` <img> [x](y)\n# z") == "a\\|b \\`c\\` &lt;img&gt; \\[x\\](y) # z"


@pytest.mark.parametrize("repo_id", ["", "a/b/c", 'x"); import os', "../x"])
def test_only_names_of_the_hub_come_into_the_code(make_run, tmp_path, repo_id):
    with pytest.raises(ValueError):
        write_model_card(make_run(), tmp_path / "staged", repo_id)


# ------------------------------------------------------------------------------------------------------ code that runs

# A block runs in a child of this process, as if pasted into a fresh one; without `import syncmask` the package is not
# to be had, as for a stranger.
RUNNER = """
import json, os, re, sys
import PIL.Image, datasets, torch
from transformers import AutoModel, AutoModelForImageClassification, AutoProcessor, BertModel, ViTModel, pipeline
torch.set_num_threads(1)
for place, code in json.load(open(sys.argv[1])):
    if not os.fork():
        if not re.search("^(import|from) syncmask", code, re.MULTILINE):
            sys.modules["syncmask"] = None
        os.chdir(sys.argv[2])
        try:
            exec(compile(code, place, "exec"), {"__name__": "__main__"})
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"{place} failed:\\n{code}")
"""


def blocks(card, language):
    return re.findall(rf"^```{language}\n(.*?)^```", card.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run_blocks(found, tmp_path):
    """Run (place, code) pairs in fresh processes without the network."""
    (tmp_path / "blocks.json").write_text(json.dumps(found))
    (tmp_path / "empty").mkdir()
    caches = {name: str(tmp_path / name) for name in ("HF_HOME", "HF_MODULES_CACHE", "HF_DATASETS_CACHE")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUNNER, str(tmp_path / "blocks.json"), str(tmp_path / "empty")],
        env={**os.environ, **caches, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [["classification"], [*KINDS][:3]])
def test_every_block_of_python_runs_as_pasted(make_run, tmp_path, kinds):
    found = []
    for kind in kinds:
        stage(make_run(kind, name=kind), tmp_path / f"staged_{kind}", REPO, base_model="ada/base")
        codes = blocks(tmp_path / f"staged_{kind}" / "README.md", "python")
        assert len(codes) >= 2 and any("trust_remote_code" in code for code in codes)
        assert any("import syncmask" in code or "from syncmask" in code for code in codes)
        assert all(f'"{REPO}"' in code for code in codes)
        found += [(f"{kind} {n}", code.replace(REPO, str(tmp_path / f"staged_{kind}"))) for n, code in enumerate(codes)]
    said = run_blocks(found, tmp_path)
    assert kinds != ["classification"] or re.search(
        r"^category (coat|tee|under\|wear) (coat|tee|under\|wear)$", said, re.MULTILINE
    )


def test_every_command_knows_its_options(make_run, tmp_path, garments):
    garments.save_to_disk(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "corpus")
    cards = [write_dataset_card(tmp_path / "corpus", tmp_path / "corpus_card", "ada/corpus", license="other")]
    cards += [write_model_card(make_run(kind, name=kind), tmp_path / f"card_{kind}", REPO) for kind in KINDS]
    lines = [line for one in cards for block in blocks(one, "bash") for line in block.splitlines()]
    assert len(lines) >= 6
    command = typer.main.get_command(app)
    for words in map(str.split, lines):
        if words[0] == "accelerate":
            assert words[1:4] == ["launch", "-m", "syncmask.training.pretrain"]
            load_arguments(words[4:])
        else:
            known = command.get_command(None, words[1])
            options = {option for parameter in known.params for option in parameter.opts}
            assert words[0] == "syncmask" and {word for word in words if word.startswith("--")} <= options


# ------------------------------------------------------------------------------------------------------- dataset cards


@pytest.fixture
def drawn(tmp_path):
    done = CliRunner().invoke(
        app, ["corpus", "make", str(tmp_path / "drawn"), "--num-items", "16", "--image-size", "32"]
    )
    assert done.exit_code == 0, done.output
    return tmp_path / "drawn"


@pytest.mark.slow
def test_dataset_cards_let_the_corpus_be_loaded(drawn, tmp_path):
    convert(drawn, tmp_path / "converted", verify=True)
    found, sizes = [], {}
    for name, license in (("drawn", None), ("converted", "cc-by-4.0")):
        file = write_dataset_card(tmp_path / name, tmp_path / name, f"ada/{name}", license)
        data = metadata_load(file)
        assert DatasetCardData(**data).to_dict() == data
        assert data["license"] == (license or "apache-2.0") and data["size_categories"] == ["n<1K"]
        assert [one["split"] for one in data["configs"][0]["data_files"]] == ["train", "validation", "test"]
        assert ("language" in data) == (name == "drawn")
        (code,) = blocks(file, "python")
        splits = "\nprint(sorted((split, len(rows)) for split, rows in corpus.items()))"
        found.append((name, code.replace(f"ada/{name}", str(tmp_path / name)) + splits))
        text = file.read_text(encoding="utf-8")
        sizes[name] = [re.search(rf"\| {split} \| (\d+) ", text)[1] for split in ("test", "train", "validation")]
    said = run_blocks(found, tmp_path)
    wanted = [f"('{split}', {rows})" for split, rows in zip(("test", "train", "validation"), sizes["drawn"])]
    assert said.count(f"[{', '.join(wanted)}]") == 2 and sizes["drawn"] == sizes["converted"]


def test_a_drawn_corpus_tells_how_to_draw_it_again(drawn, tmp_path):
    text = write_dataset_card(drawn, tmp_path / "card", "ada/drawn").read_text(encoding="utf-8")
    assert "`syncmask corpus make FOLDER --num-items 16 --image-size 32 --seed 0`" in text
    assert (tmp_path / "card" / "assets" / "contact_sheet.png").is_file() and "| `item_id` | string |" in text
    assert "flat drawings" in text and "Who is in the photos" not in text


def test_photos_that_were_not_drawn_need_a_licence(drawn, tmp_path):
    (drawn / "corpus.json").unlink()
    with pytest.raises(ValueError, match="--license"):
        write_dataset_card(drawn, tmp_path / "card", "ada/drawn")
    text = write_dataset_card(drawn, tmp_path / "card", "ada/drawn", "other").read_text(encoding="utf-8")
    assert "Who is in the photos was not recorded" in text and not (tmp_path / "card" / "assets").exists()


def test_findings_of_the_check_are_told_without_places(drawn, tmp_path):
    (drawn / "test" / "000000.png").write_bytes(b"no photo")
    text = write_dataset_card(drawn, tmp_path / "card", "ada/drawn").read_text(encoding="utf-8")
    assert re.search(r"- \w+: .*unreadable.*\(1\)", text) and str(tmp_path) not in text


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_and_writes(make_run, drawn, tmp_path):
    run = make_run()
    printed = CliRunner().invoke(app, ["card", str(run), "--repo_id", REPO])
    assert printed.exit_code == 0 and "# shop-model" in printed.stdout
    out = tmp_path / "out" / "card.md"
    written = CliRunner().invoke(app, ["card", str(run), "--repo_id", REPO, "--out", str(out), "--base_model", "a/b"])
    assert written.exit_code == 0 and "base_model: a/b" in out.read_text() and (out.parent / "results").is_dir()
    assert not (out.parent / "README.md").exists()
    inside = CliRunner().invoke(app, ["card", str(run), "--repo_id", REPO, "--out", str(out.parent)])
    assert inside.exit_code == 0 and str(out.parent / "README.md") in inside.stdout
    assert (out.parent / "README.md").is_file() and not (tmp_path / "results").exists()
    before = (run / "results" / "items.json").read_bytes()
    own = CliRunner().invoke(app, ["card", str(run), "--repo_id", REPO, "--out", str(run / "README.md")])
    assert own.exit_code == 1 and "is a run, whose own results" in own.stderr
    assert (run / "results" / "items.json").read_bytes() == before and not (run / "README.md").exists()
    corpus = CliRunner().invoke(app, ["card", str(drawn), "--repo_id", "ada/drawn"])
    assert corpus.exit_code == 0 and "# drawn" in corpus.stdout
    bad = CliRunner().invoke(app, ["card", str(tmp_path / "nowhere"), "--repo_id", REPO])
    assert bad.exit_code == 1 and "there is no folder" in bad.stderr
