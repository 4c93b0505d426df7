import json
import subprocess
import sys

import pytest
import torch

import syncmask
from syncmask.__main__ import COMMANDS, app


def run(*arguments, **kwargs):
    """Run a fresh python."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **kwargs)


# --------------------------------------------------------------------------------------------------------- the names


def test_every_public_name_is_there():
    for name in syncmask.__all__:
        assert getattr(syncmask, name).__name__ == name
        assert name in dir(syncmask)
    assert syncmask.__version__


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="SyncMaskModle.*SyncMaskModel"):
        _ = syncmask.SyncMaskModle
    with pytest.raises(ImportError):
        from syncmask import SyncMaskModle  # noqa: F401


def test_star_import_gives_the_public_names():
    space = {}
    exec("from syncmask import *", space)
    assert set(syncmask.__all__) <= set(space)


def test_registering_twice_does_no_harm(capfd):
    syncmask.register_auto_classes()
    syncmask.register_auto_classes()
    assert "already registered" not in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------- the Auto classes


def test_auto_classes_find_the_models(tiny_config):
    import transformers

    tiny_config.label_sets = {"category": ["tops", "bottoms"]}
    for auto, kind in {
        "AutoModel": "SyncMaskModel",
        "AutoModelForPreTraining": "SyncMaskForPreTraining",
        "AutoModelForZeroShotImageClassification": "SyncMaskForImageTextRetrieval",
        "AutoModelForImageClassification": "SyncMaskForImageTextClassification",
    }.items():
        assert type(getattr(transformers, auto).from_config(tiny_config)) is getattr(syncmask, kind)


def test_pipeline_knows_the_tasks():
    from transformers.pipelines import PIPELINE_REGISTRY, check_task

    for task, kind in {
        "fashion-retrieval": syncmask.SyncMaskRetrievalPipeline,
        "fashion-composed-retrieval": syncmask.SyncMaskComposedRetrievalPipeline,
    }.items():
        assert check_task(task)[1]["impl"] is kind and task in PIPELINE_REGISTRY.get_supported_tasks()


def test_auto_classes_find_the_processor(processor, tiny_model, tmp_path):
    from transformers import AutoImageProcessor, AutoProcessor

    tiny_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is syncmask.SyncMaskProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is syncmask.SyncMaskImageProcessor


FRESH = """
import sys
import torch
torch.set_num_threads(1)
import syncmask
print([name for name in sys.modules if name.split(".")[0] in ("datasets", "typer", "matplotlib")])
print([name for name in sys.modules if name.startswith(("syncmask.training", "syncmask.evaluation"))])
from transformers import AutoModel, AutoModelForPreTraining

folder = sys.argv[1]
inputs = torch.load(folder + "/inputs.pt")
results = {}
for name, loader in (("base", AutoModel), ("heads", AutoModelForPreTraining)):
    model = loader.from_pretrained(folder)
    assert not model.training
    base = getattr(model, "syncmask", model)
    with torch.no_grad():
        results[name] = base(**inputs).to_dict() if hasattr(base, "to_dict") else dict(base(**inputs))
torch.save(results, folder + "/results.pt")
"""


def test_a_fresh_process_gives_bit_equal_embeddings(tiny_model, pairs, tmp_path):
    inputs = {name: pairs[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    tiny_model.save_pretrained(tmp_path)
    torch.save(inputs, tmp_path / "inputs.pt")
    with torch.no_grad():
        wanted = tiny_model.syncmask(**inputs)
    result = run("-c", FRESH, str(tmp_path))
    assert result.returncode == 0, result.stderr
    # The model's users do not pay for training.
    assert result.stdout.split() == ["[]", "[]"]
    # Loading the base model from a pretraining checkpoint says nothing of missing or unexpected weights.
    assert not any(word in result.stderr for word in ("MISSING", "UNEXPECTED", "newly initialized", "LOAD REPORT"))
    for seen in torch.load(tmp_path / "results.pt").values():
        for name in ("image_feats", "text_feats", "image_embeds", "text_embeds", "fused", "logits_per_image"):
            assert torch.equal(seen[name], wanted[name]), name


def test_the_checkpoint_says_what_it_is(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "syncmask" and config["architectures"] == ["SyncMaskForPreTraining"]
    assert "auto_map" not in config  # remote code is named when publishing, not by importing


# -------------------------------------------------------------------------------------------------------- the command


def test_help_lists_the_commands_without_loading_torch():
    code = "import sys, runpy; sys.argv = ['syncmask', '--help']; sys.orig_argv[1:] = ['-m', 'syncmask']\n"
    code += "try:\n    runpy.run_module('syncmask', run_name='__main__')\nfinally:\n    print('torch' in sys.modules)"
    result = run("-c", code)
    for word in ("corpus", "evaluate", "report", "accelerate launch -m syncmask.training.pretrain"):
        assert word in " ".join(result.stdout.split()), result.stderr
    assert result.stdout.split()[-1] == "False"


# What each command's help must speak of.
HELP = {
    "corpus": (["corpus", "make"], "--num-items"),
    "evaluate": (["evaluate"], "--protocol"),
    "report": (["report"], "run folder"),
    "compare": (["compare"], "paired bootstrap"),
    "index": (["index"], "--prune"),
    "search": (["search"], "--rerank"),
    "export": (["export"], "--openvino"),
    "explain": (["explain"], "--pointing"),
    "app": (["app"], "--port"),
    "card": (["card"], "--repo_id"),
    "publish": (["publish"], "--dry_run"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_mounted_from_their_rooms(name, monkeypatch):
    from typer.testing import CliRunner

    for variable, value in {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(variable, value)
    assert name in HELP, "add what the new command's help speaks of"
    command, option = HELP[name]
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0 and option in result.output, result.output


def test_an_unknown_command_is_refused():
    result = run("-m", "syncmask", "nonsense")
    assert result.returncode == 2 and "nonsense" in result.stderr
