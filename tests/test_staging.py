"""The staged folder: what is in it and what never is, the code and its names, checkpoints laid out as runs."""

import hashlib
import json
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from syncmask import (
    SyncMaskForComposedImageRetrieval,
    SyncMaskForImageTextClassification,
    SyncMaskForImageTextRetrieval,
    SyncMaskForPreTraining,
)
from syncmask.evaluation.result import check_seal
from syncmask.hub_cards.check import check, compare
from syncmask.hub_cards.scan import scan
from syncmask.hub_cards.staging import (
    MANIFEST,
    SERVES,
    files_in,
    head_of,
    published_base,
    run_of_checkpoint,
    stage,
)
from syncmask.word_scores import WordScores

HEADS = {
    SyncMaskForPreTraining: ["zero-shot-image-classification", "fashion-retrieval"],
    SyncMaskForImageTextRetrieval: ["zero-shot-image-classification", "fashion-retrieval"],
    SyncMaskForComposedImageRetrieval: ["fashion-composed-retrieval"],
    SyncMaskForImageTextClassification: ["image-classification"],
}
PLANTED = "hf_" + "Zz9" * 8


@pytest.fixture(scope="module")
def pretrained(make_run, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", SyncMaskForPreTraining)


@pytest.fixture
def run(pretrained, tmp_path):
    """A copy that may be spoiled."""
    return shutil.copytree(pretrained, tmp_path / "tiny")


def named_in(staged):
    """List (module, class) of every piece of code that the configs of a staged folder name."""
    config = json.loads((staged / "config.json").read_text())
    processor = json.loads((staged / "processor_config.json").read_text())
    names = [*config["auto_map"].values(), *processor["auto_map"].values()]
    names += [entry["impl"] for entry in config.get("custom_pipelines", {}).values()]
    return [tuple(name.split(".")) for name in names]


@pytest.mark.parametrize(
    "kind", [SyncMaskForPreTraining, *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(HEADS)[1:])]
)
def test_a_stranger_gets_what_the_run_gives(kind, make_run, tmp_path):
    run = make_run(tmp_path / "run", kind)
    serves = stage(run, tmp_path / "staged", "me/x")
    assert serves is SERVES[kind] and serves.pipelines == HEADS[kind]
    assert head_of(run / "final") is kind
    for module, name in named_in(tmp_path / "staged"):
        assert f"class {name}(" in (tmp_path / "staged" / f"{module}.py").read_text()
    config = json.loads((tmp_path / "staged" / "config.json").read_text())
    assert config["architectures"] == [kind.__name__]
    assert check(tmp_path / "staged", run / "final", serves) == 0


def test_only_what_is_listed_is_staged(run, tmp_path):
    for name in ("notes.txt", "final/optimizer.bin", "final/training_args.json", "final/.env"):
        (run / name).write_text(PLANTED)
    stage(run, tmp_path / "staged", "me/x")
    names = files_in(tmp_path / "staged")
    others = [name for name in names if not name.endswith(".py")]
    assert others == [
        MANIFEST,
        "README.md",
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "results/items.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (tmp_path / "staged" / MANIFEST).read_text().split() == names


def test_what_config_yaml_says_stays_there(run, tmp_path):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["run"] = {"log_with": [PLANTED]}
    settings["about"] = {"command": f"python x --hub_token {PLANTED}"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    stage(run, tmp_path / "staged", "me/x")
    for path in (tmp_path / "staged").rglob("*"):
        assert path.is_dir() or PLANTED.encode() not in path.read_bytes(), path


def test_staging_twice_gives_the_same_bytes(run, tmp_path):
    def digests():
        stage(run, tmp_path / "staged", "me/x")
        paths = [path for path in (tmp_path / "staged").rglob("*") if path.is_file()]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    first = digests()
    (tmp_path / "staged" / "left over.py").write_text("")
    assert digests() == first


def test_saving_with_code_ends_with_staging(run, tmp_path):
    stage(run, tmp_path / "staged", "me/x")
    model = SyncMaskForPreTraining.from_pretrained(run / "final")
    model.save_pretrained(tmp_path / "plain")
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not list((tmp_path / "plain").glob("*.py"))


@pytest.mark.slow
def test_large_weights_are_sharded(run, tmp_path):
    serves = stage(run, tmp_path / "staged", "me/x", max_shard_size="1MB")
    shards = sorted((tmp_path / "staged").glob("model-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "staged" / "model.safetensors.index.json").is_file()
    assert not (tmp_path / "staged" / "model.safetensors").exists()
    assert check(tmp_path / "staged", run / "final", serves) < 1e-6


@pytest.mark.slow
def test_the_number_format_is_kept(make_run, tmp_path):
    run = make_run(tmp_path / "run", SyncMaskForImageTextRetrieval, dtype=torch.bfloat16)
    serves = stage(run, tmp_path / "staged", "me/x")
    assert {tensor.dtype for tensor in load_file(tmp_path / "staged" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert check(tmp_path / "staged", run / "final", serves) == 0


def test_word_scores_travel_with_known_notes_alone(run, tmp_path):
    scores = WordScores([(1,), (2, 3)])
    scores.sums, scores.counts = torch.tensor([1.0, 2.0]).double(), torch.tensor([2.0, 2.0]).double()
    scores.save(run / "final" / "word_scores.safetensors", {"strategy": "evidence", "host": "/home/someone/x"})
    stage(run, tmp_path / "staged", "me/x")
    assert WordScores.settings_in(tmp_path / "staged" / "word_scores.safetensors") == {"strategy": "evidence"}
    again = WordScores.load(tmp_path / "staged" / "word_scores.safetensors")
    assert again.vocabulary == scores.vocabulary and torch.equal(again.sums, scores.sums)


def test_results_come_without_the_machines_paths_and_sealed(run, tmp_path):
    stage(run, tmp_path / "staged", "me/x")
    staged = tmp_path / "staged" / "results" / "items.json"
    check_seal(staged)
    assert json.loads(staged.read_text())["metrics"] == json.loads((run / "results/items.json").read_text())["metrics"]
    assert scan(tmp_path / "staged", run) == []


# ------------------------------------------------------------------------------------------------------ the base model


def test_the_base_model_is_named_where_it_is_known(make_run, run, tmp_path):
    make = make_run(tmp_path / "head", SyncMaskForImageTextRetrieval, init_from=str(run / "final"))
    assert published_base(run) is None and published_base(make) is None
    (run / "publish").mkdir()
    (run / "publish" / "me--base.json").write_text('{"repo_id": "me/base"}')
    assert published_base(make) == "me/base"
    for options in ({"license": "mit"}, {"base_model": "other/base"}):
        stage(make, tmp_path / "staged", "me/x", **options)
        card = ModelCard.load(tmp_path / "staged" / "README.md")
        assert card.data.base_model == options.get("base_model", "me/base")
        assert card.data.license == options.get("license", "apache-2.0")


@pytest.mark.parametrize("start", ["some/model", "../runs/x", "/no/such", "x"])
def test_a_place_that_is_not_here_is_no_base_model(tmp_path, start):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"init_from": start}}))
    assert published_base(tmp_path) is None


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_run_that_has_not_ended_is_refused(run, tmp_path):
    shutil.rmtree(run / "final")
    with pytest.raises(FileNotFoundError, match="has no final/config.json.*--resume.*--checkpoint newest"):
        stage(run, tmp_path / "staged", "me/x")


def test_another_class_is_refused(run, tmp_path):
    config = json.loads((run / "final" / "config.json").read_text())
    (run / "final" / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match="names BertModel; wanted one of SyncMaskForPreTraining"):
        stage(run, tmp_path / "staged", "me/x")


def test_broken_weights_are_refused(run, tmp_path):
    weights = run / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be loaded as SyncMaskForPreTraining"):
        stage(run, tmp_path / "staged", "me/x")


def test_lacking_weights_are_refused(run, tmp_path):
    weights = run / "final" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["syncmask.vision_projection.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights.*syncmask.vision_projection.weight.*random numbers"):
        stage(run, tmp_path / "staged", "me/x")


@pytest.mark.slow
def test_a_staged_model_that_says_something_else_is_refused(run, tmp_path):
    serves = stage(run, tmp_path / "staged", "me/x")
    weights = tmp_path / "staged" / "model.safetensors"
    tensors = load_file(weights)
    tensors["syncmask.text_projection.weight"] *= 1.01
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="differs by .*from the run's"):
        check(tmp_path / "staged", run / "final", serves)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("modeling_syncmask.py", "import math", "import math\nimport syncmask.training", "syncmask"),
        ("config.json", '"modeling_syncmask.SyncMaskModel"', '"modeling_absent.SyncMaskModel"', "modeling_absent"),
    ],
)
def test_code_that_a_stranger_cannot_run_is_refused(run, tmp_path, file, old, new, said):
    serves = stage(run, tmp_path / "staged", "me/x")
    path = tmp_path / "staged" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match="does not load in a process without syncmask") as caught:
        check(tmp_path / "staged", run / "final", serves)
    assert said in str(caught.value)


def test_compare_takes_nothing_on_trust():
    wanted = {"a": torch.tensor([1.0, 2.0])}
    assert compare({"a": torch.tensor([1.0, 2.0 + 4e-6])}, wanted) == pytest.approx(2e-6, rel=0.1)
    for seen in ({"a": torch.tensor([1.0, 2.1])}, {"a": torch.tensor([1.0, float("nan")])}, {"a": torch.zeros(3)}):
        with pytest.raises(ValueError, match="a of the staged model differs"):
            compare(seen, wanted)
    large = {"a": torch.tensor([100.0, 200.0])}
    assert compare({"a": torch.tensor([100.0, 200.0 + 1e-3])}, large) == pytest.approx(5e-6, rel=0.2)
    with pytest.raises(ValueError, match="'b'.*one side alone"):
        compare({**wanted, "b": wanted["a"]}, wanted)


# --------------------------------------------------------------------------------------------------------- checkpoints


def write_checkpoint(run, step, whole=True, **weights):
    """As training writes it: files and their hashes."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    for name, tensors in weights.items():
        save_file(tensors, folder / f"{name}.safetensors")
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    (folder / "COMPLETE").write_text(json.dumps(digests if whole else {**digests, "model.safetensors": "0"}))
    return folder


@pytest.fixture
def running(run):
    """A run that has not ended: config and processor in publish/skeleton, two whole checkpoints and a broken one."""
    tensors = load_file(run / "final" / "model.safetensors")
    (run / "final").rename(run / "publish_skeleton")
    (run / "publish").mkdir()
    (run / "publish_skeleton").rename(run / "publish" / "skeleton")
    (run / "publish" / "skeleton" / "model.safetensors").unlink()
    for step in (2, 10):
        model = {name: tensor + step for name, tensor in tensors.items()}
        write_checkpoint(run, step, model=model, teacher={name: -tensor for name, tensor in model.items()})
    write_checkpoint(run, 20, whole=False, model=tensors)
    (run / "checkpoints" / "step_00000030.unfinished").mkdir()
    return run, tensors


def test_a_checkpoint_is_laid_out_as_a_run(running, tmp_path):
    run, tensors = running
    for name, step in (("newest", 10), ("step_00000002", 2)):
        with run_of_checkpoint(run, name) as (whole, seen):
            assert seen == step and whole.name == run.name and not (whole / "results").exists()
            loaded = load_file(whole / "final" / "model.safetensors")
            for key, tensor in tensors.items():
                assert torch.equal(loaded[key], tensor + step)
            assert head_of(whole / "final") is SyncMaskForPreTraining
        assert not whole.exists()
    assert not list(run.glob(".publish-*"))


def test_a_checkpoint_of_the_average_where_the_run_ends_with_it(running):
    run, tensors = running
    settings = yaml.safe_load((run / "config.yaml").read_text()) | {"run": {"final_weights": "teacher"}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    with run_of_checkpoint(run, "newest") as (whole, _):
        loaded = load_file(whole / "final" / "model.safetensors")
    assert all(torch.equal(loaded[key], -(tensor + 10)) for key, tensor in tensors.items())


def test_no_checkpoint_to_publish(running):
    run, _ = running
    with pytest.raises(FileNotFoundError, match="no complete checkpoint 'step_00000020' .step_00000020: broken"):
        with run_of_checkpoint(run, "step_00000020"):
            pass
    shutil.rmtree(run / "publish")
    with pytest.raises(FileNotFoundError, match="--hub_strategy checkpoint"):
        with run_of_checkpoint(run, "newest"):
            pass
