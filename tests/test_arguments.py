import dataclasses
import typing

import pytest
import yaml

from syncmask.training.arguments import (
    OBJECTIVES,
    DataArguments,
    PretrainingArguments,
    RunArguments,
    TrainArguments,
    sections_of,
)
from syncmask.training.parsing import config_names, load_arguments, save_config

SECTIONS = sections_of("pretraining")


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(capsys, argv):
    with pytest.raises(SystemExit) as ended:
        load_arguments(argv)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_field_names_are_unique_and_every_field_has_help():
    names = [item.name for kind in SECTIONS.values() for item in dataclasses.fields(kind)]
    assert len(names) == len(set(names))
    for kind in SECTIONS.values():
        assert all(len(item.metadata["help"]) > 15 for item in dataclasses.fields(kind))
    assert list(SECTIONS) == [item.name for item in dataclasses.fields(TrainArguments)]


def test_no_arguments_give_the_defaults():
    arguments = load_arguments([])
    assert arguments.objective == PretrainingArguments()
    assert arguments.data == DataArguments()
    assert arguments.run.folder.as_posix() == "runs/pretrain"


def test_the_command_line_wins_over_yaml_which_wins_over_defaults(tmp_path):
    config = write(tmp_path, "optim:\n  learning_rate: 0.5\n  warmup_steps: 7\n")
    arguments = load_arguments(["--config", config, "--learning_rate", "0.25"])
    assert (arguments.optim.learning_rate, arguments.optim.warmup_steps) == (0.25, 7)
    assert arguments.optim.weight_decay == 0.02
    assert arguments.run.run_name == "mine"
    assert load_arguments(["--config", config, "--run_name", "other"]).run.run_name == "other"


def test_switches_take_every_spelling(tmp_path):
    off = write(tmp_path, "data:\n  augment: false\n")
    assert load_arguments(["--config", off]).data.augment is False
    for words in (["--augment"], ["--augment", "true"], ["--augment=yes"]):
        assert load_arguments(["--config", off, *words]).data.augment is True
    for words in (["--no-augment"], ["--no_augment"], ["--augment", "false"], ["--augment", "0"]):
        assert load_arguments(words).data.augment is False


def test_hyphens_in_names_are_underscores_but_values_keep_theirs():
    arguments = load_arguments(["--num-items=1_000", "--run-name", "my-run", "--where=a-b=c-d"])
    assert arguments.data.num_items == 1000
    assert arguments.run.run_name == "my-run"
    assert arguments.data.filters() == {"a-b": "c-d"}


def test_yaml_values_are_converted_to_the_fields_types(tmp_path):
    text = "optim:\n  learning_rate: 1e-5\n  max_steps: 1e4\n  max_minutes: 3\nrun:\n  mixed_precision: no\n"
    arguments = load_arguments(["--config", write(tmp_path, text)])
    assert arguments.optim.learning_rate == 1e-5
    assert arguments.optim.max_steps == 10000 and isinstance(arguments.optim.max_steps, int)
    assert isinstance(arguments.optim.max_minutes, float)
    assert arguments.run.mixed_precision == "no"


def test_none_lists_and_mappings():
    words = ["--where", "a=1", "--where", "b=2", "--log_with", "wandb", "tensorboard", "--overlap_tau", "none"]
    arguments = load_arguments([*words, "--model_overrides", '{"mask_layer": 2}'])
    assert arguments.data.filters() == {"a": "1", "b": "2"}
    assert arguments.run.log_with == ["wandb", "tensorboard"]
    assert arguments.objective.overlap_tau is None
    assert arguments.model.model_overrides == {"mask_layer": 2}
    assert load_arguments(["--config", "small_real", "--where", "none"]).data.where == []


def test_defaults_are_not_shared():
    first, second = DataArguments(), DataArguments()
    first.where.append("a=b")
    assert second.where == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--learning_rat", "1"], "did you mean --learning_rate?"),
        (["--learning-rates=1"], "did you mean --learning_rate?"),
        (["--config", "quickstrat"], "did you mean quickstart?"),
        (["stray"], "belongs to no option"),
        (["--learning_rate", "fast"], "learning_rate is 'fast', but must be float"),
        (["--num_items", "10.5"], "num_items is '10.5', but must be int or none"),
        (["--epochs", "none"], "epochs is 'none', but must be int"),
        (["--augment", "maybe"], "augment is 'maybe', but must be bool"),
        (["--mask_strategy", "magic"], "must be random|attention|evidence|alignment"),
        (["--model_overrides", "[1]"], "must be a mapping (JSON)"),
        (["--word_mask_rate", "1.5"], "word_mask_rate is 1.5, but must be at least 0 and at most 1"),
        (["--learning_rate", "0"], "must be above 0"),
        (["--learning_rate", "nan"], "must be above 0"),
        (["--where", "description"], "must look like column=value"),
        (["--resume", "--overwrite"], "both on"),
        (["--mask_strategy", "alignment"], "set wpa_weight to 4"),
    ],
)
def test_wrong_words_on_the_command_line_are_refused(capsys, argv, said):
    assert said in refusal(capsys, argv)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim:\n  learning_rat: 1\n", "unknown setting optim.learning_rat, did you mean learning_rate?"),
        ("data:\n  learning_rate: 1\n", "learning_rate belongs under `optim:`, not under `data:`"),
        ("learning_rate: 1\n", "learning_rate belongs under `optim:`"),
        ("optimiser:\n  epochs: 1\n", "unknown section optimiser, did you mean optim?"),
        ("optim: 3\n", "optim must hold settings"),
        ("- 1\n", "must be a mapping"),
        ("optim:\n  epochs: true\n", "optim.epochs is True, but must be int"),
        ("optim:\n  learning_rate: yes\n", "optim.learning_rate is True, but must be float"),
        ("run:\n  run_name: 3\n", "run.run_name is 3, but must be str or none"),
        ("data:\n  where: a=b\n", "data.where is 'a=b', but must be a list of texts"),
        ("optim: [\n", "mine.yaml"),
    ],
)
def test_wrong_yaml_is_refused_with_the_files_name(capsys, tmp_path, text, said):
    message = refusal(capsys, ["--config", write(tmp_path, text)])
    assert said in message and "mine.yaml" in message


def test_an_empty_section_and_an_empty_file_are_allowed(tmp_path):
    assert load_arguments(["--config", write(tmp_path, "data:\n")]).data == DataArguments()
    assert load_arguments(["--config", write(tmp_path, "")]).data == DataArguments()


def test_save_and_load_round_trip(tmp_path):
    words = ["--config", "quickstart", "--where", "a=b", "--max_minutes", "2.5", "--learning_rate", "1e-5"]
    arguments = load_arguments([*words, "--model_overrides", '{"text_config": {"hidden_size": 8}}'])
    path = tmp_path / "config.yaml"
    save_config(path, arguments, {"command": "syncmask pretrain", "versions": {"torch": "2"}})
    assert load_arguments(["--config", str(path)]) == arguments
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# syncmask pretrain\n")
    assert yaml.safe_load(text)["about"]["versions"] == {"torch": "2"}
    saved = {key for section in SECTIONS for key in yaml.safe_load(text)[section]}
    assert saved == {item.name for kind in SECTIONS.values() for item in dataclasses.fields(kind)}


def test_packaged_configs_load_and_their_first_line_is_the_command():
    import importlib.resources

    assert {"quickstart", "small_real", "base"} <= set(config_names())
    for task in OBJECTIVES:
        for name in config_names(task):
            assert load_arguments(["--config", name], task).run.run_name == name
            path = importlib.resources.files("syncmask.training").joinpath("configs", f"{name}.yaml")
            first = path.read_text(encoding="utf-8").splitlines()[0]
            option = f"--config {name}" if task == "pretraining" else f"--task {name}"
            assert first.startswith("# ") and option in first
    assert [config_names(task) for task in ("retrieval", "composed", "classification")] == [
        ["retrieval"], ["composed"], ["classification"]
    ]  # fmt: skip


def test_every_task_has_unique_field_names_with_help():
    for task in OBJECTIVES:
        fields = [item for kind in sections_of(task).values() for item in dataclasses.fields(kind)]
        assert len({item.name for item in fields}) == len(fields)
        assert all(len(item.metadata["help"]) > 15 for item in fields)


def test_help_shows_every_field_its_choices_and_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        load_arguments(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for kind in SECTIONS.values():
        for item in dataclasses.fields(kind):
            assert f"--{item.name}" in text
    assert "random|attention|evidence|alignment" in text and "(default: 0.995)" in text


def test_bounds_hold_for_dataclasses_made_in_code():
    with pytest.raises(ValueError, match="keep_last is 0"):
        RunArguments(keep_last=0)


def test_types_in_use_are_known_to_the_converter():
    for kind in SECTIONS.values():
        for name, hint in typing.get_type_hints(kind).items():
            base = [inner for inner in typing.get_args(hint) if inner is not type(None)]
            plain = base[0] if type(None) in typing.get_args(hint) else hint
            known = (bool, int, float, str, list, dict, typing.Literal)
            assert (typing.get_origin(plain) or plain) in known, name
