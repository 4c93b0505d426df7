"""Switches that change what a step costs and not what it computes: checkpointed activations, compiling, bf16."""

import json
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, modeling_utils

from syncmask import SyncMaskConfig, SyncMaskForImageTextRetrieval, SyncMaskForPreTraining
from syncmask.training import build, launch, pretrain
from syncmask.training.build import checkpoint_activations
from syncmask.training.lora import add_adapters

SMALL = [
    *("--corpus", "garments", "--num_items", "40", "--image_size", "32", "--preset", "tiny"),
    *("--per_device_batch_size", "16", "--max_steps", "2", "--warmup_steps", "1", "--learning_rate", "1e-3"),
    *("--gate_every", "1", "--gate_max_steps", "0", "--mask_ramp_steps", "1", "--soft_target_ramp_steps", "0"),
    *("--num_threads", "1", "--log_every", "1", "--deterministic", "--no-evaluate", "--overwrite"),
    *("--validate_every_epochs", "99"),
]
PLAIN = {"patch_size": 8, "projection_dim": 16}
DROPOUT = {
    "text_config": {"hidden_dropout_prob": 0.1},
    "fusion_encoder_config": {"hidden_dropout_prob": 0.1},
}


@pytest.fixture(autouse=True)
def _restore_torch():
    yield
    torch.use_deterministic_algorithms(False)


def train(folder, *more, overrides=PLAIN):
    words = ["--model_overrides", json.dumps(overrides), "--output_dir", str(folder), "--run_name", "run"]
    pretrain.main([*SMALL, *words, *more])
    return folder / "run"


def steps_of(run):
    """The losses and gradient norms of each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time_s"} for line in lines if "mim" in line]


def weights_of(run):
    return load_file(run / "final" / "model.safetensors")


def assert_same_run(one, other):
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert steps_of(one) == steps_of(other) and len(steps_of(one)) == 2


def step_inputs(pairs):
    """All that switches an objective on; the kept patches go through the hook of `kept_patches`."""
    named = {name: pairs[name] for name in ("pixel_values", "input_ids", "attention_mask", "item_ids", "text_ids")}
    return named | {
        "text_mask": (pairs["word_ids"] == 0) | (pairs["word_ids"] == 3),
        "patch_mask": torch.rand(4, 16, generator=torch.Generator().manual_seed(3)).argsort(dim=1) < 6,
        "negative_image_index": torch.tensor([1, 0, 3, -1]),
        "negative_text_index": torch.tensor([3, 2, 1, 0]),
    }


def gradients(model, inputs):
    """Losses and gradients of one batch."""
    model.train().zero_grad()
    torch.manual_seed(0)
    output = model(**inputs)
    output.loss.backward()
    terms = {name: output[f"{name}_loss"].detach() for name in ("itc", "itm", "mlm", "mim")}
    return terms, {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@contextmanager
def counted_calls(model):
    """How often each linear map is run, by name."""
    calls = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: calls.update([name]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# ------------------------------------------------------------------------------------------- checkpointed activations


@pytest.mark.parametrize("dropout", [{}, DROPOUT])
@pytest.mark.parametrize("trained", ["all", "frozen", "lora"])
def test_checkpointing_recomputes_the_layers_and_changes_no_bit(pairs, trained, dropout):
    torch.manual_seed(0)
    model = SyncMaskForPreTraining(
        SyncMaskConfig.tiny(image_size=32, vocab_size=60, patch_size=8, mask_token_id=4, **dropout)
    )
    if trained == "frozen":
        model.syncmask.vision_model.requires_grad_(False)
        model.syncmask.text_model.requires_grad_(False)
    if trained == "lora":
        add_adapters(model, rank=2, alpha=2.0)
    inputs = step_inputs(pairs)
    with counted_calls(model) as calls:
        losses, grads = gradients(model, inputs)
    checkpoint_activations(model)
    with counted_calls(model) as calls_again:
        losses_again, grads_again = gradients(model, inputs)
    assert_equal(losses, losses_again)
    assert_equal(grads, grads_again)
    parts = ("vision_model", "text_model", "fusion_encoder.layers", "mim_decoder.layers")
    for part in parts:
        counts = [sum(n for name, n in found.items() if f"{part}." in name) for found in (calls, calls_again)]
        idle = trained == "frozen" and part.endswith("_model")  # no gradient goes there, so nothing is computed again
        assert counts[0] > 0 and (counts[1] > 1.4 * counts[0]) != idle, (part, counts)


@pytest.mark.slow
def test_a_run_with_checkpointing_equals_one_without(tmp_path):
    overrides = PLAIN | DROPOUT
    plain = train(tmp_path / "plain", overrides=overrides)
    assert_same_run(plain, train(tmp_path / "less", "--activation_checkpointing", overrides=overrides))


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--freeze_towers",), ("--lora_rank", "2"), ("--gradient_accumulation_steps", "2")])
def test_frozen_and_adapted_runs_with_checkpointing_equal_those_without(tmp_path, more):
    plain = train(tmp_path / "plain", *more)
    assert_same_run(plain, train(tmp_path / "less", *more, "--activation_checkpointing"))


# ------------------------------------------------------------------------------------------------------------ compiling


@pytest.fixture
def aot_eager(monkeypatch):
    """Trace as inductor would, without its kernels; a break of the graph is an error."""
    torch._dynamo.reset()
    real = build.compile_layers

    def traced(model):
        real(model, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(build, "compile_layers", traced)
    monkeypatch.setattr(launch, "compile_layers", traced)
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_compile_without_a_break_and_compute_the_same(pairs, checkpointing):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = SyncMaskForPreTraining(SyncMaskConfig.tiny(image_size=32, vocab_size=60, patch_size=8, mask_token_id=4))
    inputs, names = step_inputs(pairs), list(model.state_dict())
    losses, grads = gradients(model, inputs)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    if checkpointing:
        checkpoint_activations(model)
    build.compile_layers(model, backend=backend, fullgraph=True)
    losses_again, grads_again = gradients(model, inputs)
    # ViT's, BERT's and the fusion layers in their uses, not one for each of the layers.
    assert 3 <= len(graphs) <= 16 and list(model.state_dict()) == names
    for one, other in ((losses, losses_again), (grads, grads_again)):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_a_plain_one_and_resumes(tmp_path, aot_eager):
    plain = train(tmp_path / "plain")
    compiled = train(tmp_path / "compiled", "--compile", "--max_steps", "1")
    compiled = train(tmp_path / "compiled", "--compile", "--resume", "--no-overwrite")
    assert weights_of(compiled).keys() == weights_of(plain).keys()
    for one, other in zip(steps_of(plain), steps_of(compiled), strict=True):
        for name in ("itc", "itm", "mlm", "mim", "gradient_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-4), name


# ----------------------------------------------------------------------------------------------------- number formats


@pytest.fixture
def another_precision():
    """Let a run of this process have another number format than those before it, and those behind it theirs."""
    yield AcceleratorState._reset_state
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "device, precision, side, attention",
    [
        ("cpu", "bf16", 32, "eager"),
        ("cpu", "bf16", 160, "sdpa"),
        ("cpu", "no", 32, "sdpa"),
        ("cuda", "bf16", 32, "sdpa"),
    ],
)
@pytest.mark.parametrize("kind", [SyncMaskForPreTraining, SyncMaskForImageTextRetrieval])
def test_attention_is_written_out_in_bf16_on_the_cpu_alone(kind, device, precision, side, attention, monkeypatch):
    warned = []
    monkeypatch.setattr(modeling_utils.logger, "warning", warned.append)
    model = kind(SyncMaskConfig.tiny(**(PLAIN | {"image_size": side})))
    build.write_out_attention(model, device, precision)
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    assert {part.config._attn_implementation for part in parts} == {attention}
    assert not warned


@pytest.mark.slow
def test_bf16_trains_on_the_cpu(tmp_path, another_precision, monkeypatch):
    plain = steps_of(train(tmp_path / "plain"))
    another_precision(reset_partial_state=True)
    # Student and teacher both write attention out there.
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", None)
    half = steps_of(train(tmp_path / "bf16", "--mixed_precision", "bf16"))
    for name in ("itc", "itm", "mlm", "mim"):
        assert half[0][name] == pytest.approx(plain[0][name], rel=0.05), name
    assert half[0]["mlm"] != plain[0]["mlm"]
    weights = weights_of(tmp_path / "bf16" / "run")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())
