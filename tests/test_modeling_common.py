"""What transformers promises of every model: saving, loading, initialisation, dtypes, attention, outputs."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import BaseModelOutputWithPooling

import syncmask
from syncmask import SyncMaskForPreTraining, SyncMaskModel

INPUTS = ("pixel_values", "input_ids", "attention_mask")
HEADS = ("itm_head.", "mlm_head.", "mim_decoder.")
LABEL_SETS = {"subcategory": ["jeans", "skirt", "shirt"], "category": ["bottoms", "tops"]}
FROZEN = {  # what a head has no use for
    f"syncmask.{name}"
    for name in (
        "vision_projection.weight",
        "vision_projection.bias",
        "text_projection.weight",
        "text_projection.bias",
        "temperature_logit",
    )
}


@pytest.fixture
def inputs(pairs):
    return {name: pairs[name] for name in INPUTS}


@pytest.fixture
def step(pairs, inputs):
    """Enough to switch all four terms on."""
    order = torch.rand(4, 16, generator=torch.Generator().manual_seed(3)).argsort(dim=1)
    return {
        **inputs,
        "item_ids": pairs["item_ids"],
        "text_ids": pairs["text_ids"],
        "text_mask": pairs["word_ids"] == 0,
        "patch_mask": order < 6,
        "negative_image_index": torch.tensor([1, 0, 3, 2]),
        "negative_text_index": torch.tensor([3, 2, 1, 0]),
    }


@pytest.fixture(
    params=[
        "Model",
        "ForPreTraining",
        "ForImageTextRetrieval",
        "ForComposedImageRetrieval",
        "ForImageTextClassification",
    ]
)
def case(request, tiny_model, step, inputs, pairs):
    """(model, inputs) of every class, its loss switched on if it has one."""
    negatives = ("item_ids", "text_ids", "negative_image_index", "negative_text_index")
    extra = {
        "Model": {},
        "ForPreTraining": step,
        "ForImageTextRetrieval": {name: step[name] for name in negatives},
        "ForComposedImageRetrieval": {
            "target_pixel_values": pairs["pixel_values"].flip(0),
            "target_ids": pairs["item_ids"],
            "reference_ids": torch.tensor([8, 5, 6, 3]),
        },
        "ForImageTextClassification": {"labels": torch.tensor([[0, 1], [2, 0], [1, -100], [-100, 1]])},
    }[request.param]
    if request.param == "Model":
        return tiny_model.syncmask, inputs
    config = copy.deepcopy(tiny_model.config)
    if request.param == "ForImageTextClassification":
        config.label_sets, config.classifier_dropout = LABEL_SETS, 0.0
    model = getattr(syncmask, f"SyncMask{request.param}")(config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model, {**inputs, **extra}


def flat(outputs, prefix=""):
    """Name the tensors of nested outputs: {"loss": ..., "losses.0": ..., "logits_by_set.category": ...}."""
    found = {}
    for name, value in outputs.items() if isinstance(outputs, dict) else enumerate(outputs):
        found |= {f"{prefix}{name}": value} if isinstance(value, torch.Tensor) else flat(value, f"{prefix}{name}.")
    return found


@torch.no_grad()
def outputs_of(model, inputs):
    return flat(model.eval()(**inputs))


def frozen(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def assert_equal_outputs(one, other, atol=0.0, rtol=0.0):
    assert one.keys() == other.keys() and one
    for name, value in one.items():
        torch.testing.assert_close(
            other[name], value, atol=atol, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_like(seen, wanted):
    """Half precision turns features and logits of classes by little."""
    watched = [name for name in wanted if name.endswith("_feats") or name.startswith("logits_by_set")]
    assert watched
    for name in watched:
        assert torch.nn.functional.cosine_similarity(seen[name].float(), wanted[name]).min() > 0.99, name


def keep_weights(folder, keep):
    """Take out of a checkpoint the weights whose names `keep` does not want."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    kept = {name: value for name, value in weights.items() if keep(name)}
    assert 0 < len(kept) < len(weights)
    save_file(kept, path, metadata={"format": "pt"})


# -------------------------------------------------------------------------------------------------- saving and loading


def test_saved_and_loaded_is_the_same_model(case, tmp_path):
    model, inputs = case
    wanted = outputs_of(model, inputs)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not loaded.training
    assert_equal_outputs(outputs_of(loaded, inputs), wanted)


def test_shards_are_put_together_again(case, tmp_path):
    model, inputs = case
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_equal_outputs(outputs_of(type(model).from_pretrained(tmp_path), inputs), outputs_of(model, inputs))


def test_the_base_model_loads_from_a_pretraining_checkpoint(tiny_model, inputs, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    loaded, info = SyncMaskModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info  # the heads are left behind without a word
    assert_equal_outputs(outputs_of(loaded, inputs), outputs_of(tiny_model.syncmask, inputs))


def test_the_pretraining_model_loads_from_a_base_checkpoint(tiny_model, inputs, tmp_path):
    tiny_model.syncmask.save_pretrained(tmp_path)
    loaded, info = SyncMaskForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    heads = {name for name in tiny_model.state_dict() if name.startswith(HEADS)} - {"mlm_head.decoder.weight"}
    assert set(info["missing_keys"]) == heads and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_equal_outputs(outputs_of(loaded.syncmask, inputs), outputs_of(tiny_model.syncmask, inputs))
    assert all(torch.isfinite(parameter).all() for parameter in loaded.parameters())
    assert loaded.mlm_head.decoder.weight is loaded.get_input_embeddings().weight


def test_a_copy_is_independent(case):
    model, inputs = case
    wanted, other = outputs_of(model, inputs), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_equal_outputs(outputs_of(model, inputs), wanted)


# ---------------------------------------------------------------------------------------------------------------- dtype


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_the_saved_dtype_is_the_default(tiny_model, saved, tmp_path):
    tiny_model.to(saved).save_pretrained(tmp_path)
    for kind in (SyncMaskModel, SyncMaskForPreTraining):
        assert {parameter.dtype for parameter in kind.from_pretrained(tmp_path).parameters()} == {saved}
        as_asked = kind.from_pretrained(tmp_path, dtype=torch.float32)
        assert {parameter.dtype for parameter in as_asked.parameters()} == {torch.float32}


def test_a_bf16_model_runs_and_trains(case, tmp_path):
    model, inputs = case
    wanted = outputs_of(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    seen = outputs_of(loaded, inputs)
    assert_like(seen, wanted)
    if "loss" in seen:
        assert seen["loss"].dtype == torch.float32
        loaded.train()(**inputs).loss.backward()
        assert all(torch.isfinite(one.grad).all() for one in loaded.parameters() if one.requires_grad)


def test_it_runs_under_autocast(case):
    model, inputs = case
    wanted = outputs_of(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        seen = outputs_of(model, inputs)
    assert_like(seen, wanted)


# ------------------------------------------------------------------------------------------------------- initialisation


def test_every_parameter_is_initialised_on_its_own_terms(tiny_config):
    """Norms are 1 and 0, biases 0, everything else small and not constant."""
    torch.manual_seed(0)
    for name, parameter in SyncMaskForPreTraining(tiny_config).named_parameters():
        if "norm" in name.lower() and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif name.endswith("temperature_logit"):
            continue
        else:
            assert 0.01 < parameter.std() < 0.1 and parameter.abs().max() < 0.4, name


def test_weights_that_a_checkpoint_lacks_are_initialised_like_fresh_ones(tiny_model, tiny_config, tmp_path):
    """Loading happens on the meta device: what is missing must be made, not left as memory happens to be."""
    tiny_model.save_pretrained(tmp_path)
    kept = "syncmask.text_projection.weight"
    keep_weights(tmp_path, lambda name: name == kept)
    torch.manual_seed(0)
    loaded = SyncMaskForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(loaded.syncmask.text_projection.weight, tiny_model.syncmask.text_projection.weight)
    fresh = SyncMaskForPreTraining(tiny_config).state_dict()
    for name, value in loaded.state_dict().items():
        if name == kept:
            continue
        assert torch.isfinite(value).all(), name
        if fresh[name].std() == 0 or fresh[name].numel() == 1:
            assert torch.equal(value, fresh[name]), name
        else:
            assert 0.5 < value.std() / fresh[name].std() < 2, name
    assert loaded.syncmask.temperature.item() == pytest.approx(0.07)


@pytest.mark.parametrize(
    "missing",
    [
        "mim_decoder.mask_token",
        "mim_decoder.position_embeddings",
        "syncmask.temperature_logit",
        "syncmask.vision_projection.bias",
        "syncmask.vision_model.embeddings.cls_token",
        "mlm_head.decoder.bias",
    ],
)
def test_a_missing_weight_spoils_no_loaded_one(tiny_model, missing, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    keep_weights(tmp_path, lambda name: name != missing)
    loaded, info = SyncMaskForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {missing}
    for name, value in loaded.state_dict().items():
        if name != missing:
            assert torch.equal(value, tiny_model.state_dict()[name]), name
    assert torch.isfinite(loaded.state_dict()[missing]).all()


def test_buffers_are_deterministic_and_survive_loading(case, tmp_path):
    model, _ = case
    model.save_pretrained(tmp_path)
    for other in (type(model)(model.config), type(model).from_pretrained(tmp_path)):
        theirs = dict(other.named_buffers())
        assert theirs.keys() == dict(model.named_buffers()).keys()
        assert all(torch.equal(buffer, theirs[name]) for name, buffer in model.named_buffers())


def test_the_seed_decides_the_start(tiny_config):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(SyncMaskForPreTraining(tiny_config).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_all_is_trainable_but_what_a_head_has_no_use_for(case, tmp_path):
    """Built, loaded, and loaded with a report alike: loading makes every parameter trainable at first."""
    model, _ = case
    wanted = FROZEN if isinstance(model, syncmask.SyncMaskForImageTextClassification) else set()
    model.save_pretrained(tmp_path)
    assert frozen(model) == wanted == frozen(type(model).from_pretrained(tmp_path))
    assert frozen(type(model).from_pretrained(tmp_path, output_loading_info=True)[0]) == wanted


def test_every_trainable_parameter_has_a_gradient(case):
    """Those without one would make DDP wait."""
    model, inputs = case
    output = model.train()(**inputs)
    if "loss" in output:
        output.loss.backward()
        assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == frozen(model)


# --------------------------------------------------------------------------------------------------------- tied weights


def tied(model):
    return model.mlm_head.decoder.weight is model.get_input_embeddings().weight


def test_the_vocabulary_matrix_is_tied_and_stays_so(tiny_model, tmp_path):
    assert tied(tiny_model) and tied(copy.deepcopy(tiny_model))
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert sum("word_embeddings" in name or name == "mlm_head.decoder.weight" for name in weights) == 1
    loaded = SyncMaskForPreTraining.from_pretrained(tmp_path)
    assert tied(loaded)
    loaded.resize_token_embeddings(70)
    assert tied(loaded)


def test_untied_weights_are_two(tiny_config, tmp_path):
    tiny_config.tie_word_embeddings = False
    model = SyncMaskForPreTraining(tiny_config)
    assert not tied(model)
    model.save_pretrained(tmp_path)
    loaded, info = SyncMaskForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not tied(loaded) and not info["missing_keys"]
    assert torch.equal(loaded.mlm_head.decoder.weight, model.mlm_head.decoder.weight)


def test_models_do_not_share_their_tying(tiny_config):
    """Tying is named by each model's own text tower, not by a class attribute that the last model wrote."""
    assert not hasattr(SyncMaskForPreTraining, "_tied_weights_keys") or not SyncMaskForPreTraining._tied_weights_keys
    model = SyncMaskForPreTraining(tiny_config)
    assert list(model._tied_weights_keys.values()) == ["syncmask.text_model.embeddings.word_embeddings.weight"]


@pytest.mark.parametrize("size", [75, 50])
def test_resizing_the_vocabulary(tiny_model, step, size, tmp_path):
    step["input_ids"] = step["input_ids"].clamp(max=49)
    before = outputs_of(tiny_model, step)["mlm_logits"]
    tiny_model.resize_token_embeddings(size)
    assert tiny_model.config.text_config.vocab_size == size and tied(tiny_model)
    assert tiny_model.mlm_head.decoder.bias.shape == (size,)
    after = outputs_of(tiny_model, step)["mlm_logits"]
    assert after.shape[-1] == size
    torch.testing.assert_close(after[:, :50], before[:, :50], atol=1e-5, rtol=1e-4)
    tiny_model.save_pretrained(tmp_path)
    loaded = SyncMaskForPreTraining.from_pretrained(tmp_path)
    assert_equal_outputs(outputs_of(loaded, step), outputs_of(tiny_model, step))


def test_the_base_model_resizes_too(tiny_model, inputs):
    base = tiny_model.syncmask
    wanted = outputs_of(base, inputs)
    base.resize_token_embeddings(64)
    assert base.get_input_embeddings().weight.shape[0] == 64
    assert_equal_outputs(outputs_of(base, inputs), wanted)


# ----------------------------------------------------------------------------------------------------------- attention


def test_eager_and_sdpa_agree(case):
    model, inputs = case
    model.set_attn_implementation("sdpa")
    wanted = outputs_of(model, inputs)
    model.set_attn_implementation("eager")
    assert_equal_outputs(wanted, outputs_of(model, inputs), atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_flex_attention_agrees(tiny_model, inputs):
    """One part at a time: it is compiled, and needs a C++ compiler on a CPU."""
    base = tiny_model.syncmask
    wanted = outputs_of(base, inputs)
    base.set_attn_implementation("flex_attention")
    try:
        seen = outputs_of(base, inputs)
    except Exception as error:
        pytest.skip(f"flex attention does not run here: {type(error).__name__}: {str(error)[:200]}")
    assert_equal_outputs(wanted, seen, atol=2e-4, rtol=1e-3)


def attention_of(model):
    return {
        name: module.config._attn_implementation
        for name, module in model.named_modules()
        if getattr(module, "config", None) is not None
    }


def test_the_attention_setting_reaches_every_part(tiny_model, tiny_config, tmp_path):
    assert set(attention_of(tiny_model).values()) == {"sdpa"}
    tiny_model.set_attn_implementation("eager")
    parts = attention_of(tiny_model)
    assert {"syncmask.vision_model", "syncmask.text_model", "syncmask.fusion_encoder", "mim_decoder"} <= parts.keys()
    assert set(parts.values()) == {"eager"}
    tiny_model.save_pretrained(tmp_path)
    loaded = SyncMaskForPreTraining.from_pretrained(tmp_path, attn_implementation="eager")
    assert set(attention_of(loaded).values()) == {"eager"}
    # The choice is not saved: a later reader gets the default.
    assert set(attention_of(SyncMaskForPreTraining.from_pretrained(tmp_path)).values()) == {"sdpa"}


# ------------------------------------------------------------------------------------------------------------- outputs


def test_hidden_states_and_attentions_on_request(tiny_model, inputs):
    base = tiny_model.syncmask
    base.set_attn_implementation("eager")
    output = base(**inputs, output_hidden_states=True, output_attentions=True)
    shapes = {
        "vision_hidden_states": (3, (4, 17, 32)),
        "text_hidden_states": (3, (4, 12, 32)),
        "fusion_hidden_states": (3, (4, 12, 32)),
        "vision_attentions": (2, (4, 4, 17, 17)),
        "text_attentions": (2, (4, 4, 12, 12)),
        "fusion_attentions": (2, (4, 4, 12, 12)),
        "cross_attentions": (2, (4, 4, 12, 17)),
    }
    for name, (count, shape) in shapes.items():
        assert [tuple(value.shape) for value in output[name]] == [shape] * count, name
    assert torch.equal(output.fusion_hidden_states[-1], output.fused)
    assert torch.equal(output.text_hidden_states[-1], output.text_embeds)
    for name in ("vision_attentions", "text_attentions", "fusion_attentions", "cross_attentions"):
        for weights in output[name]:
            torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    # Padding is not looked at.
    padding = (inputs["attention_mask"] == 0)[:, None, None].expand(-1, 4, 12, -1)
    assert (output.fusion_attentions[0][padding] == 0).all() and (output.text_attentions[0][padding] == 0).all()
    plain = base(**inputs)
    assert all(plain[name] is None if name in plain else True for name in shapes)


def test_hidden_states_keep_their_gradients(tiny_model, inputs):
    tiny_model.syncmask.set_attn_implementation("eager")
    output = tiny_model.syncmask(**inputs, output_hidden_states=True, output_attentions=True)
    watched = [output.fusion_hidden_states[0], output.vision_hidden_states[0], output.cross_attentions[0]]
    for value in watched:
        value.retain_grad()
    output.fused.square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in watched)


def test_tuples_hold_the_same_values(case):
    model, inputs = case
    assert type(model(**inputs)).__name__ == f"{type(model).__name__.removesuffix('Model')}Output"
    wanted = model(**inputs).to_tuple()
    seen = model(**inputs, return_dict=False)
    assert isinstance(seen, tuple) and len(seen) == len(wanted)
    assert_equal_outputs(flat(seen), flat(wanted))
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)


def test_tuples_are_in_the_order_of_the_fields_loss_first(case):
    model, inputs = case
    output = model(**inputs)
    order = [field for field in type(output).__dataclass_fields__ if getattr(output, field) is not None]
    assert list(output.keys()) == order
    if "loss" in order:
        assert torch.equal(model(**inputs, return_dict=False)[0], output.loss)


def test_the_models_still_work_inside_when_tuples_are_the_default(tiny_model, step, inputs):
    wanted = tiny_model(**step).loss
    tiny_model.config.return_dict = False
    assert any(torch.equal(value, wanted) for value in tiny_model(**step))
    assert isinstance(tiny_model.syncmask.get_image_features(inputs["pixel_values"]), tuple)


def test_texts_pooled_by_their_mean_do_not_see_padding_and_every_caller_agrees(tiny_config, pairs, step):
    tiny_config.text_pooling = "mean"
    torch.manual_seed(0)
    model = SyncMaskForPreTraining(tiny_config).eval()
    base, mask = model.syncmask, pairs["attention_mask"]
    with torch.no_grad():
        tokens = base.encode_text(pairs["input_ids"], mask)
        feats = base.get_text_features(pairs["input_ids"], mask).pooler_output
        trained = model(**step).text_feats
        for row in range(4):
            length = int(mask[row].sum())
            mean = tokens[row, :length].mean(dim=0)
            torch.testing.assert_close(base.pool_text(tokens, mask)[row], mean)
            wanted = torch.nn.functional.normalize(base.text_projection(mean), dim=-1)
            torch.testing.assert_close(feats[row], wanted)
            torch.testing.assert_close(trained[row], wanted)
            alone = base.get_text_features(pairs["input_ids"][row : row + 1, :length]).pooler_output[0]
            torch.testing.assert_close(alone, wanted, atol=1e-5, rtol=1e-4)
    tiny_config.text_pooling = "cls"
    assert not torch.allclose(base.pool_text(tokens, mask), tokens.mean(dim=1))


def test_features_are_unit_length_and_pooled(tiny_model, inputs):
    base = tiny_model.syncmask
    whole = base(**inputs)
    image = base.get_image_features(inputs["pixel_values"])
    text = base.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    for features, tokens, width in ((image, 17, whole.image_feats), (text, 12, whole.text_feats)):
        assert isinstance(features, BaseModelOutputWithPooling)
        assert features.last_hidden_state.shape == (4, tokens, 32) and features.pooler_output.shape == (4, 24)
        torch.testing.assert_close(features.pooler_output.norm(dim=-1), torch.ones(4))
        assert torch.equal(features.pooler_output, width)
        assert features.hidden_states is None
    asked = base.get_image_features(inputs["pixel_values"], output_hidden_states=True)
    assert len(asked.hidden_states) == 3 and torch.equal(asked[1], image.pooler_output)
    as_tuple = base.get_text_features(inputs["input_ids"], inputs["attention_mask"], return_dict=False)
    assert torch.equal(as_tuple[1], text.pooler_output)


def test_logits_are_cosines_over_the_temperature(tiny_model, inputs):
    output = tiny_model.syncmask(**inputs)
    for i in range(4):
        for j in range(4):
            cosine = torch.nn.functional.cosine_similarity(output.image_feats[i], output.text_feats[j], dim=0)
            wanted = (cosine / tiny_model.syncmask.temperature).squeeze()
            torch.testing.assert_close(output.logits_per_image[i, j], wanted, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(output.logits_per_text[j, i], wanted, atol=1e-4, rtol=1e-4)


def test_either_modality_alone(tiny_model, inputs):
    base = tiny_model.syncmask
    whole, photos = base(**inputs), base(pixel_values=inputs["pixel_values"])
    texts = base(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert torch.equal(photos.image_feats, whole.image_feats) and photos.text_feats is None and photos.fused is None
    assert torch.equal(texts.text_feats, whole.text_feats) and texts.image_feats is None and texts.fused is None
    with pytest.raises(ValueError, match="neither pixel_values nor input_ids"):
        base()


def test_different_numbers_of_photos_and_texts_are_compared_but_not_fused(tiny_model, inputs):
    output = tiny_model.syncmask(**{**inputs, "pixel_values": inputs["pixel_values"][:3]})
    assert output.logits_per_image.shape == (3, 4) and output.fused is None


# ----------------------------------------------------------------------------------------------------------- equalities


def test_a_batch_equals_its_rows_alone(tiny_model, inputs):
    base, lengths = tiny_model.syncmask, inputs["attention_mask"].sum(dim=1)
    whole = outputs_of(base, inputs)
    for row in range(4):
        length = int(lengths[row])
        alone = outputs_of(
            base,
            {
                "pixel_values": inputs["pixel_values"][row : row + 1],
                "input_ids": inputs["input_ids"][row : row + 1, :length],
                "attention_mask": inputs["attention_mask"][row : row + 1, :length],
            },
        )
        for name in ("image_feats", "text_feats", "image_embeds"):
            torch.testing.assert_close(alone[name][0], whole[name][row], atol=1e-5, rtol=1e-4)
        for name in ("text_embeds", "fused"):
            torch.testing.assert_close(alone[name][0], whole[name][row, :length], atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_trains_the_same(case, checkpoint_activations):
    model, inputs = case
    model.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(model)
            assert model.is_gradient_checkpointing
        model.zero_grad()
        output = model(**inputs)
        loss = output.loss if "loss" in output else output.fused.square().mean() + output.logits_per_image.mean()
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_training_lowers_the_loss(tiny_config, step):
    torch.manual_seed(0)
    model = SyncMaskForPreTraining(tiny_config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss = model(**step).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_photos_of_another_size_with_interpolated_positions(tiny_model, inputs):
    base = tiny_model.syncmask
    larger = torch.nn.functional.interpolate(inputs["pixel_values"], size=(48, 48))
    with pytest.raises(ValueError, match="48"):
        base.get_image_features(larger)
    features = base.get_image_features(larger, interpolate_pos_encoding=True)
    assert features.last_hidden_state.shape == (4, 37, 32)
    same = base.get_image_features(inputs["pixel_values"], interpolate_pos_encoding=True)
    torch.testing.assert_close(same.pooler_output, base.get_image_features(inputs["pixel_values"]).pooler_output)
    whole = base(**{**inputs, "pixel_values": larger}, interpolate_pos_encoding=True)
    assert torch.equal(whole.image_feats, features.pooler_output) and whole.fused.shape == (4, 12, 32)


def test_class_attributes_that_the_library_reads(tiny_model):
    for model in (tiny_model, tiny_model.syncmask):
        assert model.main_input_name == "pixel_values" and model.base_model_prefix == "syncmask"
        assert model.base_model is tiny_model.syncmask
        assert model.supports_gradient_checkpointing and model._supports_sdpa
        assert model.get_input_embeddings().weight.shape == (60, 32)
        # Layers that must stay whole when a model is spread over devices, those of the towers included.
        assert {"SyncMaskFusionLayer", "ViTLayer", "BertLayer"} <= set(model._no_split_modules)
