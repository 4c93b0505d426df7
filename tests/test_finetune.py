"""The three heads, trained by the pretraining loop: what they start from, what they write, that they resume."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import syncmask
from syncmask.training import launch, pretrain, resume
from syncmask.training.finetune import main, read_arguments, task_of
from syncmask.training.task_classification import (
    UNKNOWN,
    balance_inputs,
    drawn_drops,
    find_labels,
    label_shares,
    label_table,
)
from syncmask.training.task_composed import photo_ids

MODEL = ["--preset", "tiny", "--model_overrides", '{"patch_size": 8, "projection_dim": 16}']
COMMON = [
    *("--per_device_batch_size", "16", "--warmup_steps", "2", "--learning_rate", "1e-3", "--num_threads", "1"),
    *("--log_every", "1", "--log_batches", "--deterministic", "--checkpoint_every", "2"),
    *("--validate_every_epochs", "1"),
]
HEADS = {
    "retrieval": syncmask.SyncMaskForImageTextRetrieval,
    "composed": syncmask.SyncMaskForComposedImageRetrieval,
    "classification": syncmask.SyncMaskForImageTextClassification,
}


@pytest.fixture(autouse=True)
def _restore_torch():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run of a few steps, with everything that a finetuning takes from it."""
    folder = tmp_path_factory.mktemp("pretrained")
    corpus = ["--corpus", "garments", "--num_items", "40", "--image_size", "32"]
    more = ["--max_steps", "3", "--no-evaluate", "--output_dir", str(folder), "--run_name", "run"]
    pretrain.main([*corpus, *MODEL, *COMMON, *more])
    torch.use_deterministic_algorithms(False)
    return folder / "run"


def words(task, pretrained, folder, *more):
    corpus = ["--corpus", "garment-variants", "--num_items", "40"] if task == "composed" else []
    start = ["--task", task, "--init_from", str(pretrained), "--epochs", "2", *corpus, *COMMON]
    return [*start, "--output_dir", str(folder), "--run_name", "run", *more]


def train(task, pretrained, folder, *more):
    main(words(task, pretrained, folder, *more))
    return folder / "run"


def lines(run, name="metrics.jsonl"):
    found = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time_s"} for line in found]


@pytest.fixture(scope="module", params=list(HEADS))
def finished(request, pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    run = train(request.param, pretrained, folder, "--no-evaluate")
    torch.use_deterministic_algorithms(False)
    return request.param, run


def test_a_run_writes_what_the_schema_says(finished, pretrained):
    task, run = finished
    model = HEADS[task].from_pretrained(run / "final")
    saved = load_file(sorted((run / "checkpoints").glob("step_*"))[-1] / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    start = load_file(pretrained / "final" / "model.safetensors")
    moved = [name for name in start if name in saved and not torch.equal(start[name], saved[name])]
    assert any("fusion_encoder" in name for name in moved) and any("vision_model" in name for name in moved)
    steps = [line for line in lines(run) if line["split"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    validations = [line for line in lines(run) if line["split"] == "validation"]
    assert len(validations) == 2 and 0 <= next(iter(list(validations[0].values())[3:])) <= 1
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_from"] == str(pretrained)
    processor = syncmask.SyncMaskProcessor.from_pretrained(run / "final")
    assert (
        processor.tokenizer.get_vocab()
        == syncmask.SyncMaskProcessor.from_pretrained(pretrained / "final").tokenizer.get_vocab()
    )


def test_every_row_is_trained_on_once_an_epoch(finished):
    for epoch in range(2):
        rows = np.concatenate([line["rows"] for line in lines(finished[1], "batches.jsonl") if line["epoch"] == epoch])
        assert len(np.unique(rows)) == len(rows)


class Killed(Exception):
    pass


def test_resume_equals_an_uninterrupted_run_bit_for_bit(finished, pretrained, tmp_path, monkeypatch):
    task, whole = finished
    real = resume.save_checkpoint

    def die_after_the_first(*args, **kwargs):
        real(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_checkpoint", die_after_the_first)
        with pytest.raises(Killed):
            train(task, pretrained, tmp_path, "--no-evaluate")
    run = train(task, pretrained, tmp_path, "--no-evaluate", "--resume")
    one, other = (load_file(folder / "final" / "model.safetensors") for folder in (whole, run))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert lines(whole) == lines(run) and lines(whole, "batches.jsonl") == lines(run, "batches.jsonl")


def test_only_the_head_is_new(pretrained):
    """What a head does not find in a pretraining checkpoint is its own."""
    labels = {"label_sets": {"category": ["a", "b"]}}
    new = {"retrieval": (), "composed": ("query_head.",), "classification": ("classifiers.", "no_image", "no_text")}
    for task, kind in HEADS.items():
        more = labels if task == "classification" else {}
        _, info = kind.from_pretrained(pretrained / "final", output_loading_info=True, **more)
        assert all(name.startswith(new[task]) for name in info["missing_keys"]), task
        assert bool(info["missing_keys"]) == bool(new[task]) and not info["mismatched_keys"]


def test_frozen_towers_stay(pretrained, tmp_path):
    run = train("composed", pretrained, tmp_path, "--no-evaluate", "--freeze_towers", "--max_steps", "2")
    start, end = (load_file(folder / "final" / "model.safetensors") for folder in (pretrained, run))
    for name in start.keys() & end.keys():
        if "vision_model" in name or "text_model" in name:
            assert torch.equal(start[name], end[name]), name
    assert any(not torch.equal(start[name], end[name]) for name in start.keys() & end.keys())


# ---------------------------------------------------------------------------------------------------------- settings


def test_the_corpus_is_that_of_the_run_it_starts_from(pretrained):
    arguments = read_arguments("retrieval", ["--init_from", str(pretrained)])
    assert (arguments.data.corpus, arguments.data.num_items, arguments.data.image_size) == ("garments", 40, 32)
    other = read_arguments("composed", ["--init_from", str(pretrained), "--corpus", "garment-variants"])
    assert (other.data.corpus, other.data.num_items, other.data.image_size) == ("garment-variants", None, 32)
    assert other.run.run_name == "composed"


def test_without_a_task_the_tasks_are_listed(capsys):
    with pytest.raises(SystemExit) as ended:
        task_of(["--init_from", "x"])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "--task {retrieval,composed,classification}" in said.out and "say what to train" in said.err
    assert task_of(["--epochs", "1", "--task", "composed"]) == ("composed", ["--epochs", "1"])


def test_a_setting_of_another_task_is_refused(pretrained, capsys):
    with pytest.raises(SystemExit):
        read_arguments("composed", ["--init_from", str(pretrained), "--mlm_weight", "1"])
    assert "--mlm_weight" in capsys.readouterr().err


def test_a_start_that_is_no_model_is_named(pretrained, tmp_path):
    with pytest.raises(SystemExit, match="there is no folder"):
        read_arguments("retrieval", ["--init_from", str(tmp_path / "absent")])
    with pytest.raises(SystemExit, match="holds neither a model"):
        read_arguments("retrieval", ["--init_from", str(pretrained / "checkpoints")])


def test_triplets_and_labels_must_be_there(pretrained, tmp_path):
    with pytest.raises(SystemExit, match="garment-variants"):
        main(words("composed", pretrained, tmp_path, "--corpus", "garments"))
    with pytest.raises(SystemExit, match="label_columns"):
        train("classification", pretrained, tmp_path, "--label_columns", "colour")


def test_shares_of_dropped_sides_leave_every_row_one():
    with pytest.raises(SystemExit):
        read_arguments("classification", ["--drop_image_share", "0.7", "--drop_text_share", "0.6"])


# ------------------------------------------------------------------------------------------------------------ pieces


def test_photos_are_numbered_by_name_across_both_columns():
    targets, references = photo_ids(["b", "a", "d"], ["a", "c", "b"])
    names = {name: int(number) for name, number in zip(["b", "a", "d"], targets)}
    assert [int(number) for number in references] == [names["a"], int(references[1]), names["b"]]
    assert len({*targets.tolist(), *references.tolist()}) == 4


def test_label_tables_shares_and_weights():
    from datasets import Dataset

    rows = Dataset.from_dict({"category": ["b", "a", "b", None], "subcategory": ["x", "y", "", "x"], "one": ["z"] * 4})
    sets = find_labels(rows, ["category", "subcategory", "one", "absent"])
    assert sets == {"category": ["a", "b"], "subcategory": ["x", "y"]}
    table = label_table(rows, sets)
    assert table.tolist() == [[1, 0], [0, 1], [1, UNKNOWN], [UNKNOWN, 0]]
    shares = [label_shares(column, 2) for column in table.T]
    torch.testing.assert_close(shares[0], torch.tensor([1 / 3, 2 / 3]))
    weights = balance_inputs(shares, "class_weights", 1.0)["class_weights"][0]
    assert weights[0] / weights[1] == pytest.approx(2) and float((weights * shares[0]).sum()) == pytest.approx(1)
    priors = balance_inputs(shares, "logit_adjustment", 0.5)["log_priors"][0]
    torch.testing.assert_close(priors, 0.5 * shares[0].log())
    assert balance_inputs(shares, "none", 1.0) == {}


def test_rows_lose_one_side_in_the_shares_asked_for():
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    drop_image, drop_text = drawn_drops(noise, 0.2, 0.1)
    assert not (drop_image & drop_text).any()
    assert drop_image.float().mean() == pytest.approx(0.2, abs=0.02)
    assert drop_text.float().mean() == pytest.approx(0.1, abs=0.02)
    assert drawn_drops(noise, 1.0, 0.0)[0].all() and not drawn_drops(noise, 0.0, 1.0)[0].any()


def test_the_loop_is_pretrainings_own():
    """Nothing of the loop is written twice: both programs end in the same run."""
    from syncmask.training import finetune

    assert finetune.launch is pretrain.launch is launch.launch


def test_triplets_with_an_unreadable_photo_on_either_side_are_left_out(tmp_path):
    import datasets
    from PIL import Image

    from syncmask.training.substitutes import readable

    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (8, 8)).save(good)
    bad.write_bytes(good.read_bytes()[:40])
    table = {"image": [good, bad, good], "candidate": [good, good, bad], "item_id": ["a", "b", "c"]}
    rows = datasets.Dataset.from_dict({name: [str(value) for value in values] for name, values in table.items()})
    for name in ("image", "candidate"):
        rows = rows.cast_column(name, datasets.Image())
    assert readable(rows)["item_id"][:] == ["a"]


def test_a_corpus_that_cannot_be_read_ends_with_the_reason_alone(tmp_path):
    start = ["--output_dir", str(tmp_path), "--num_threads", "1", *MODEL]
    with pytest.raises(SystemExit, match="data_dir"):
        pretrain.main(["--corpus", "folder", *start])
    with pytest.raises(SystemExit, match="cannot tell what"):
        pretrain.main(["--corpus", str(tmp_path), "--run_name", "other", *start])
