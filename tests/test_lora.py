"""Low-rank adapters: where they are, what trains, that merged they are the same model, that runs with them resume."""

import copy
import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import syncmask
from syncmask import SyncMaskConfig, SyncMaskForPreTraining
from syncmask.evaluation.loading import load_checkpoint, merge_adapters
from syncmask.training import finetune, resume
from syncmask.training.lora import add_adapters, linear_maps, merged_weights
from syncmask.training.optim import make_optimizer
from syncmask.training.teacher import MomentumTeacher

LAYERS = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
# A family's vision or text config, and the linear maps in each of its layers.
VISION = {"vit": 6, "deit": 6, "clip_vision_model": 6, "siglip_vision_model": 6, "dinov2": 6}
TEXT = {"bert": 6, "roberta": 6, "distilbert": 6, "modernbert": 4}


def config_of(vision="vit", text="bert"):
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48} if text == "distilbert" else {}
    return SyncMaskConfig(
        vision_config={"model_type": vision, "image_size": 32, "patch_size": 8, **LAYERS},
        text_config={"model_type": text, "vocab_size": 60, "pad_token_id": 0, **LAYERS, **sizes},
        fusion_encoder_config=LAYERS,
        mim_decoder_config={**LAYERS, "hidden_size": 16, "num_attention_heads": 2},
        mask_token_id=4,
        projection_dim=24,
    )


@pytest.fixture
def adapted(tiny_model):
    """A model whose adapters are no longer what they start as."""
    add_adapters(tiny_model, rank=4, alpha=8.0)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in tiny_model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2)
    return tiny_model


@pytest.fixture
def inputs(pairs):
    return {name: pairs[name] for name in ("pixel_values", "input_ids", "attention_mask")}


def step_of(pairs, inputs):
    return inputs | {
        "text_mask": pairs["word_ids"] == 0,
        "patch_mask": torch.rand(4, 16, generator=torch.Generator().manual_seed(3)).argsort(dim=1) < 6,
        "negative_image_index": torch.tensor([1, 0, 3, 2]),
        "negative_text_index": torch.tensor([3, 2, 1, 0]),
    }


def is_head(name):
    return not name.startswith(("syncmask.vision_model.", "syncmask.text_model.", "syncmask.fusion_encoder."))


# ------------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    "vision, text", [*((name, "bert") for name in VISION), *(("vit", name) for name in TEXT if name != "bert")]
)
def test_every_linear_map_of_the_layers_has_an_adapter(vision, text):
    """10 in each fusion layer; none in embeddings, projections, heads and the MIM decoder."""
    model = SyncMaskForPreTraining(config_of(vision, text))
    names = linear_maps(model)
    assert len(names) == 2 * (VISION[vision] + TEXT[text] + 10)
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in names)
    assert not [name for name in names if is_head(name) or "embed" in name]
    add_adapters(model, rank=2, alpha=2.0)
    adapted = {name.partition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert adapted == set(names)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name or is_head(name)}


def test_an_adapter_starts_as_nothing_and_is_its_equation(tiny_model, inputs):
    with torch.no_grad():
        wanted = tiny_model.syncmask(**inputs).fused
        name = "syncmask.fusion_encoder.layers.1.cross_attention.query"
        weight, bias = (copy.deepcopy(value) for value in tiny_model.get_submodule(name).parameters())
        add_adapters(tiny_model, rank=4, alpha=8.0)
        assert torch.equal(tiny_model.syncmask(**inputs).fused, wanted)
        layer, x = tiny_model.get_submodule(name), torch.randn(3, 32)
        layer.lora_B.default.weight.normal_()
        down, up = layer.lora_A.default.weight, layer.lora_B.default.weight
        assert down.shape == (4, 32) and up.shape == (32, 4)
        torch.testing.assert_close(layer(x), x @ weight.T + bias + 8.0 / 4 * x @ down.T @ up.T, atol=1e-5, rtol=1e-5)


def test_adapters_and_heads_alone_are_trained(adapted, pairs, inputs):
    before = copy.deepcopy(adapted.state_dict())
    optimizer = make_optimizer(adapted.train(), 1e-2, 0.1)
    adapted(**step_of(pairs, inputs)).loss.backward()
    optimizer.step()
    tied = "mlm_head.decoder.weight"  # the text tower's embeddings
    for name, value in adapted.state_dict().items():
        moves = ".lora_" in name or is_head(name) and name != tied
        assert torch.equal(value, before[name]) != moves, name


def test_frozen_towers_have_no_adapters(tiny_model):
    add_adapters(tiny_model, rank=2, alpha=2.0, towers=False)
    trained = {name for name, parameter in tiny_model.named_parameters() if parameter.requires_grad}
    assert any(".lora_" in name for name in trained)
    assert not [name for name in trained if "vision_model" in name or "text_model" in name]


def test_what_a_head_has_no_use_for_stays_frozen(tiny_config):
    tiny_config.label_sets = {"category": ["tops", "skirts"]}
    model = syncmask.SyncMaskForImageTextClassification(tiny_config)
    add_adapters(model, rank=2, alpha=2.0)
    base = model.syncmask
    assert not base.vision_projection.weight.requires_grad and not base.temperature_logit.requires_grad
    assert model.no_image.requires_grad and model.classifiers[0].weight.requires_grad


def test_without_peft_the_way_to_get_it_is_told(tiny_model, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'peft>=0.21'"):
        add_adapters(tiny_model, rank=2, alpha=2.0)


# ----------------------------------------------------------------------------------------------------- merging, teacher


def test_merged_it_is_a_plain_model_with_the_same_answers(adapted, inputs, tmp_path):
    names = dict(SyncMaskForPreTraining(adapted.config).state_dict())
    adapted.save_pretrained(tmp_path, state_dict=merged_weights(adapted))
    plain, info = SyncMaskForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert merged_weights(adapted).keys() == names.keys() and not hasattr(plain, "peft_config")
    with torch.no_grad():
        wanted, seen = adapted.syncmask(**inputs), plain.syncmask(**inputs)
    for name in ("image_feats", "text_feats", "fused", "image_embeds"):
        torch.testing.assert_close(seen[name], wanted[name], atol=2e-5, rtol=1e-4)
    assert any(".lora_" in name for name, _ in adapted.named_parameters())  # the trained model is untouched


def test_a_model_without_adapters_is_saved_as_it_is(tiny_model):
    state, merged = tiny_model.state_dict(), merged_weights(tiny_model)
    assert state.keys() == merged.keys() and all(torch.equal(merged[name], value) for name, value in state.items())


def test_merging_is_its_equation():
    weights = {
        "a.base_layer.weight": torch.ones(2, 3),
        "a.base_layer.bias": torch.zeros(2),
        "a.lora_A.default.weight": torch.tensor([[1.0, 2.0, 3.0]]),
        "a.lora_B.default.weight": torch.tensor([[1.0], [10.0]]),
        "b.weight": torch.ones(1),
    }
    merged = merge_adapters(weights, 0.5)
    assert merged.keys() == {"a.weight", "a.bias", "b.weight"}
    assert merged["a.weight"].tolist() == [[1.5, 2.0, 2.5], [6.0, 11.0, 16.0]]


def test_the_teacher_follows_the_adapters(adapted):
    teacher = MomentumTeacher(adapted, momentum=0.9, layer=None)
    before = {name: value.clone() for name, value in teacher.model.named_parameters()}
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    teacher.update(adapted)
    for name, value in teacher.model.named_parameters():
        moved = dict(adapted.named_parameters())[name].requires_grad
        torch.testing.assert_close(value, before[name] + 0.1 * moved, atol=1e-6, rtol=1e-5)
        assert not value.requires_grad


# ----------------------------------------------------------------------------------------------------------------- runs

SMALL = [
    *("--lora_rank", "2", "--layer_decay", "0.8", "--epochs", "2"),
    *("--log_every", "1", "--checkpoint_every", "2", "--no-evaluate"),
]


@pytest.fixture(scope="module")
def train(pretrain_tiny):
    return lambda folder, *more: pretrain_tiny(folder, *SMALL, *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, train):
    return train(tmp_path_factory.mktemp("lora"))


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "time" not in name} for line in lines if "itc" in line]


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(finished, tmp_path, monkeypatch, train):
    real, saved = resume.save_checkpoint, []

    def die_after_two(*arguments, **settings):
        real(*arguments, **settings)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_checkpoint", die_after_two)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    run = train(tmp_path, "--resume")
    one, other = (load_file(folder / "final" / "model.safetensors") for folder in (finished, run))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert metrics(run) == metrics(finished) and len(metrics(run)) > 3


def test_the_final_model_loads_plainly_and_checkpoints_can_be_scored(finished, inputs):
    """Student and teacher of a checkpoint hold adapters; who scores them sees plain models."""
    final, info = SyncMaskForPreTraining.from_pretrained(finished / "final", output_loading_info=True)
    assert not any(info.values()) and not [name for name in final.state_dict() if "lora" in name]
    newest = sorted((finished / "checkpoints").iterdir())[-1]
    kept = load_file(newest / "model.safetensors")
    assert any(".lora_A." in name for name in kept)
    of_checkpoint, of_run = load_checkpoint(newest), load_checkpoint(finished)
    for name, value in final.state_dict().items():
        torch.testing.assert_close(of_checkpoint.model.state_dict()[name], value, atol=1e-6, rtol=1e-5)
    # The teacher lags behind, so it is another model, and the same from both places.
    query = "syncmask.fusion_encoder.layers.0.self_attention.query.weight"
    teachers = [found.teacher.state_dict()[query] for found in (of_checkpoint, of_run)]
    assert torch.equal(*teachers) and not torch.equal(teachers[0], final.state_dict()[query])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["retrieval", "composed", "classification"])
def test_every_task_trains_adapters(task, finished, tmp_path):
    corpus = ["--corpus", "garment-variants", "--num_items", "40"] if task == "composed" else []
    settings = ["--lora_rank", "2", "--lora_alpha", "4", "--layer_decay", "0.8", "--max_steps", "3"]
    more = ["--per_device_batch_size", "16", "--num_threads", "1", "--output_dir", str(tmp_path), "--run_name", "run"]
    finetune.main(["--task", task, "--init_from", str(finished), *corpus, *settings, *more])
    before = load_file(finished / "final" / "model.safetensors")
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    name = "syncmask.fusion_encoder.layers.0.self_attention.query"
    assert not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
    assert torch.equal(before[f"{name}.bias"], after[f"{name}.bias"])
    assert list((tmp_path / "run" / "results").glob("*.json"))
