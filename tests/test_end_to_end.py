"""From raw files to tables: FashionGen- and FashionIQ-shaped corpora through all of training and every protocol."""

import json

import pytest
import torch
from typer.testing import CliRunner

from syncmask.__main__ import app
from syncmask.evaluation.compare import compare
from syncmask.evaluation.protocol_names import Protocol
from syncmask.evaluation.result import Result
from syncmask.training import finetune, pretrain

pytestmark = pytest.mark.slow

TINY = [
    *("--preset", "tiny", "--model_overrides", '{"patch_size": 8, "projection_dim": 16}', "--image_size", "32"),
    *("--num_threads", "1", "--no-evaluate", "--warmup_steps", "2", "--learning_rate", "1e-3"),
]
SHORT = ["--per_device_batch_size", "8", "--max_steps", "4", "--num_threads", "1", "--warmup_steps", "1"]


@pytest.fixture(autouse=True, scope="module")
def _restore_torch():
    yield
    torch.use_deterministic_algorithms(False)


def syncmask(*words):
    """Run the command line; return what it printed."""
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def fashiongen(write_fashiongen, garments, tmp_path_factory):
    """Converted and checked, from HDF5 files with one subcategory that only validation has."""
    root = tmp_path_factory.mktemp("fashiongen")
    (root / "raw").mkdir()
    items = sorted(set(garments["item_id"]))
    held_out = set(items[28:])
    splits = {"train": [], "validation": []}
    for row in garments:
        splits["validation" if row["item_id"] in held_out else "train"].append(row)
    splits["validation"][-1] = splits["validation"][-1] | {"view": "unheard-of"}
    for split, rows in splits.items():
        write_fashiongen(root / "raw" / f"fashiongen_256_256_{split}.h5", rows)
    syncmask("corpus", "convert", root / "raw", root / "parquet")
    report = syncmask("corpus", "check", root / "parquet", "--output", root / "check")
    assert "train" in report and (root / "check" / "check.json").is_file()
    return root / "parquet"


@pytest.fixture(scope="module")
def fashioniq(write_fashioniq, garments, tmp_path_factory):
    root = tmp_path_factory.mktemp("fashioniq")
    raw = write_fashioniq(root / "raw", garments)
    syncmask("corpus", "convert", raw, root / "parquet")
    return root / "parquet"


@pytest.fixture(scope="module")
def pretrained(fashiongen, tmp_path_factory):
    """Two seeds of one recipe on the converted FashionGen."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        start = ["--corpus", str(fashiongen), *TINY, "--per_device_batch_size", "16", "--epochs", "3"]
        pretrain.main([*start, "--seed", str(seed), "--output_dir", str(folder), "--run_name", f"seed_{seed}"])
    return folder


def finetuned(task, pretrained, *more, name=None):
    """Train a head from the first seed; its own protocols are run at the end."""
    start = ["--task", task, "--init_from", str(pretrained / "seed_0"), *SHORT]
    finetune.main([*start, "--output_dir", str(pretrained), "--run_name", name or task, *more])
    return pretrained / (name or task)


def results(run):
    return {path.stem: Result.load(path) for path in sorted((run / "results").glob("*.json"))}


def test_every_protocol_from_raw_files(fashiongen, fashioniq, pretrained, garments, tmp_path):
    garments.save_to_disk(tmp_path / "garments")
    variants = ["--corpus", "garment-variants", "--num_items", "24"]
    runs = {
        "retrieval": finetuned("retrieval", pretrained),
        "classification": finetuned("classification", pretrained),
        "composed": finetuned("composed", pretrained, "--corpus", str(fashioniq)),
        "variants": finetuned("composed", pretrained, *variants, name="variants"),
    }
    own = {name: set(results(run)) for name, run in runs.items()}
    assert own["retrieval"] == {"items"} and own["variants"] == {"colour-variants"}
    assert own["composed"] == {"fashioniq-original", "fashioniq-val"}
    assert own["classification"] == {"recognition-category", "recognition-subcategory"}
    for name in ("fashiongen-full", "fashiongen-sampled-item", "fashiongen-sampled-view"):
        syncmask("evaluate", runs["retrieval"], "--protocol", name)
    syncmask("evaluate", pretrained / "seed_0", "--protocol", "co-occurrence", "--corpus", tmp_path / "garments")
    for run in [*runs.values(), pretrained / "seed_0"]:
        for name, result in results(run).items():
            assert result.protocol == name and result.corpus["rows"] and result.model["sha256"]
            assert result.candidates_sha256, name
    done = set().union(*(results(run) for run in [*runs.values(), pretrained / "seed_0"]))
    assert done == {protocol.value for protocol in Protocol}

    recognised = results(runs["classification"])["recognition-subcategory"]
    assert recognised.corpus["unknown_labels"] == {"subcategory unheard-of": 1}
    scores = {name.split("/")[2] for name in recognised.metrics}
    assert {"fused", "image_only", "text_only", "commonest", "chance"} <= scores
    composed = results(runs["composed"])["fashioniq-original"]
    assert {"composed", "composed_both_orders", "image_only", "text_only", "sum", "chance"} <= {
        name.split("/")[2] for name in composed.metrics
    }


def test_two_seeds_are_not_distinguishable(pretrained):
    paths = []
    for seed in (0, 1):
        syncmask("evaluate", pretrained / f"seed_{seed}", "--protocol", "items")
        paths.append(pretrained / f"seed_{seed}" / "results" / "items.json")
    found = compare(*paths)
    assert found.lines and all(line.verdict == "not distinguishable" for line in found.lines)
    assert "not distinguishable" in syncmask("compare", *paths)


def test_results_do_not_change_with_the_batch_size(pretrained, tmp_path):
    run = pretrained / "seed_0"
    whole = json.loads(
        syncmask("evaluate", run, "--protocol", "fashiongen-full", "--out", tmp_path / "a.json", "--json")
    )
    small = json.loads(
        syncmask(
            *("evaluate", run, "--protocol", "fashiongen-full", "--out", tmp_path / "b.json", "--json"),
            *("--batch-size", "5"),
        )
    )
    for name, metric in whole["metrics"].items():
        assert metric["value"] == pytest.approx(small["metrics"][name]["value"], abs=1e-9), name
