"""Other people's checkpoints as the start: the exact report, the split against the source, positions, refusals."""

import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from syncmask import (
    SyncMaskConfig,
    SyncMaskForImageTextClassification,
    SyncMaskForImageTextRetrieval,
    SyncMaskForPreTraining,
    SyncMaskModel,
)
from syncmask.conversion import ConversionReport

LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
PHOTOS = {"image_size": 32, "patch_size": 8}
WORDS = {
    **{"vocab_size": 60, "max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    **{"cls_token_id": 0, "sep_token_id": 2},
}
# The class that a source is saved as -> its configuration.
SOURCES = {
    "ViTForImageClassification": {"model_type": "vit", **LAYERS, **PHOTOS, "num_labels": 3},
    "DeiTModel": {"model_type": "deit", **LAYERS, **PHOTOS},
    "CLIPVisionModel": {"model_type": "clip_vision_model", **LAYERS, **PHOTOS},
    "CLIPVisionModelWithProjection": {"model_type": "clip_vision_model", **LAYERS, **PHOTOS},
    "CLIPModel": {"model_type": "clip", "vision_config": {**LAYERS, **PHOTOS}, "text_config": {**LAYERS, **WORDS}},
    "SiglipVisionModel": {"model_type": "siglip_vision_model", **LAYERS, **PHOTOS},
    "SiglipModel": {"model_type": "siglip", "vision_config": {**LAYERS, **PHOTOS}, "text_config": {**LAYERS, **WORDS}},
    "Siglip2Model": {
        "model_type": "siglip2",
        "vision_config": {**LAYERS, "patch_size": 8, "num_patches": 16},
        "text_config": {**LAYERS, **WORDS},
    },
    "Siglip2VisionModel": {"model_type": "siglip2_vision_model", **LAYERS, "patch_size": 8, "num_patches": 16},
    "Dinov2Model": {"model_type": "dinov2", **LAYERS, "image_size": 56, "patch_size": 14, "mlp_ratio": 2},
    "Dinov2WithRegistersModel": {"model_type": "dinov2_with_registers", **LAYERS, "image_size": 56, "patch_size": 14},
    "BertModel": {"model_type": "bert", **LAYERS, "num_hidden_layers": 5, **WORDS},
    "BertForMaskedLM": {"model_type": "bert", **LAYERS, "num_hidden_layers": 4, **WORDS},
    "BertForPreTraining": {"model_type": "bert", **LAYERS, "num_hidden_layers": 3, **WORDS},
    "RobertaForMaskedLM": {"model_type": "roberta", **LAYERS, "num_hidden_layers": 4, **WORDS},
    "DistilBertForMaskedLM": {"model_type": "distilbert", **LAYERS, "hidden_dim": 48, **WORDS},
    "DistilBertModel": {"model_type": "distilbert", **LAYERS, "hidden_dim": 48, **WORDS},
    "ModernBertForMaskedLM": {"model_type": "modernbert", **LAYERS, **WORDS},
    "ElectraModel": {"model_type": "electra", **LAYERS, "embedding_size": 16, **WORDS},
    "T5EncoderModel": {"model_type": "t5", "d_model": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 60},
}
VISION = [name for name in SOURCES if name.startswith(("ViT", "DeiT", "CLIP", "Siglip", "Dino"))]
TEXT = [name for name in SOURCES if name.startswith(("Bert", "Roberta", "DistilBert", "ModernBert"))]
# Each family of either side once, and each class that a source may be saved as.
PAIRS = [
    ("ViTForImageClassification", "BertForMaskedLM"),
    ("DeiTModel", "DistilBertForMaskedLM"),
    ("CLIPModel", "RobertaForMaskedLM"),
    ("SiglipModel", "BertModel"),
    ("Siglip2VisionModel", "BertForPreTraining"),
    ("Dinov2Model", "ModernBertForMaskedLM"),
    ("Dinov2WithRegistersModel", "BertForMaskedLM"),
    ("CLIPVisionModel", "DistilBertModel"),
    ("CLIPVisionModelWithProjection", "BertModel"),
    ("SiglipVisionModel", "BertForMaskedLM"),
    ("Siglip2Model", "RobertaForMaskedLM"),
]
EACH_FAMILY = PAIRS[:7]


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """The function that gives a source's folder, its weights far from one another, and the model in it."""
    root = tmp_path_factory.mktemp("sources")

    @cache
    def make(name, **changes):
        folder = root / "-".join([name, *(f"{key}{value}" for key, value in changes.items())])
        kind = getattr(transformers, name)
        settings = {**SOURCES[name], **changes}
        torch.manual_seed(0)
        model = kind(AutoConfig.for_model(settings.pop("model_type"), **settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        return str(folder), model

    return make


@pytest.fixture
def convert(source):
    def make(vision="ViTForImageClassification", text="BertForMaskedLM", kind=SyncMaskForPreTraining, **settings):
        torch.manual_seed(1)
        return kind.from_vision_text_pretrained(source(vision)[0], source(text)[0], **{"mask_token_id": 4, **settings})

    return make


@pytest.fixture
def words():
    """Texts of 9, 5 and 7 tokens: ids of special tokens as WORDS has them."""
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 5, 7)):
        ids[row, length:], mask[row, length:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def photos():
    """The function that gives photos for a model."""

    def make(model):
        side = model.config.vision_config.image_size
        return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))

    return make


@pytest.fixture
def batch(photos, words):
    """The function that gives all inputs of the four objectives for a model."""

    def make(model):
        rows, columns = model.syncmask.grid
        patch_mask = torch.zeros(3, rows * columns, dtype=torch.bool)
        patch_mask[:, 2:6] = True
        text_mask = torch.zeros_like(words["input_ids"], dtype=torch.bool)
        text_mask[:, 2] = True
        turned = torch.tensor([1, 2, 0])
        return {
            **words,
            **{"pixel_values": photos(model), "text_mask": text_mask, "patch_mask": patch_mask},
            **{"negative_image_index": turned, "negative_text_index": turned},
        }

    return make


# --------------------------------------------------------------------------------------------------------------- report


def own_tensors(model):
    return {name: value.detach() for name, value in model.named_parameters()}


def as_set(value):
    """Values that a change of form keeps."""
    return value.flatten().sort().values


@pytest.mark.parametrize("vision, text", PAIRS)
def test_the_report_is_exact(vision, text, convert, source):
    """By values alone, whatever the names: what is not new is in a source, what is not dropped is in the result."""
    model = convert(vision, text)
    mine, report = own_tensors(model), model.conversion_report
    theirs = {
        f"{label}: {name}": value
        for label, one in (("vision", vision), ("text", text))
        for name, value in own_tensors(source(one)[1]).items()
    }
    assert len({*report.new, *report.resized}) == len(report.new) + len(report.resized)
    assert set(report.new) | set(report.resized) <= set(mine) and set(report.dropped) <= set(theirs)

    def holds(pool, value):
        return [name for name, other in pool.items() if other.shape == value.shape and torch.equal(other, value)]

    came = {name: value for name, value in mine.items() if name not in {*report.new, *report.resized}}
    for name, value in came.items():
        assert len(holds(theirs, value)) == 1, name
    for name, value in theirs.items():
        found = holds(came, value)
        flat = [n for n in report.resized if torch.equal(as_set(mine[n]), as_set(value))]
        assert len(found + flat) == (0 if name in report.dropped else 1), name
    for name in report.new:
        assert not holds(theirs, mine[name]), name


def test_the_report_of_a_split_bert(convert):
    report = convert("ViTForImageClassification", "BertForMaskedLM", image_size=48).conversion_report
    assert report.resized == ["syncmask.vision_model.embeddings.position_embeddings"]
    assert report.dropped == ["vision: classifier.weight", "vision: classifier.bias"]
    kinds = {name.split(".")[0] if "syncmask" not in name else name.split(".")[1] for name in report.new}
    assert kinds == {
        *("temperature_logit", "fusion_encoder", "vision_projection", "text_projection", "itm_head", "mim_decoder")
    }
    assert {name.split(".")[4] for name in report.new if "fusion_encoder" in name} == {
        *("cross_attention", "cross_output", "cross_norm")
    }


def test_what_a_checkpoint_lacks_is_new_and_what_its_class_lacks_is_dropped(convert, source, tmp_path):
    """The folder of a BertModel whose file has no pooler and one tensor that nobody knows."""
    from safetensors.torch import save_file

    _, bert = source("BertModel")
    weights = {name: value for name, value in bert.state_dict().items() if "pooler" not in name}
    bert.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    save_file({**weights, "odd.weight": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = SyncMaskModel.from_vision_text_pretrained(
        source("CLIPVisionModel")[0], str(tmp_path), mask_token_id=4, split_layer=4
    )
    assert model.conversion_report.dropped == ["text: odd.weight"]


def test_the_report_in_words():
    report = ConversionReport(
        new=["a.layers.0.x.weight", "a.layers.0.x.bias", "a.layers.11.x.weight", "b"], dropped=["text: c.weight"]
    )
    assert str(report).splitlines() == [
        *("new: 4 tensors", "  a.layers.*.x (3)", "  b", "resized: 0 tensors", "dropped: 1 tensors", "  text: c")
    ]


# ---------------------------------------------------------------------------------------------------------------- split


@torch.no_grad()
def slow_states(source_model, words):
    """The source's hidden states, embeddings first."""
    return source_model.base_model(**words, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("text", ["BertModel", "BertForMaskedLM", "RobertaForMaskedLM"])
@pytest.mark.parametrize("split", [None, 1, 3])
def test_without_cross_attention_the_split_model_is_the_source(text, split, convert, source, words):
    model, original = convert("CLIPVisionModel", text, SyncMaskModel, split_layer=split), source(text)[1]
    layers = original.config.num_hidden_layers
    lower = split or layers // 2
    assert model.config.text_config.num_hidden_layers == lower
    assert model.config.fusion_encoder_config.num_hidden_layers == layers - lower
    states, real = slow_states(original, words), words["attention_mask"].bool()
    with torch.no_grad():
        seen = model.text_model(**words, output_hidden_states=True).hidden_states
        for one, wanted in zip(seen, states, strict=False):
            torch.testing.assert_close(one[real], wanted[real], atol=1e-5, rtol=1e-4)
        hidden, mask = seen[-1], model.fusion_encoder._mask(seen[-1], words["attention_mask"], seen[-1])
        for number, layer in enumerate(model.fusion_encoder.layers):
            # The layer as it is, with nothing from the photo and no norm behind that.
            torch.nn.init.zeros_(layer.cross_output.weight)
            torch.nn.init.zeros_(layer.cross_output.bias)
            layer.cross_norm = torch.nn.Identity()
            hidden = layer(hidden, mask, torch.randn(3, 17, 32))
            torch.testing.assert_close(hidden[real], states[lower + 1 + number][real], atol=1e-5, rtol=1e-4)
    assert lower + 1 + number == layers


def test_the_fusion_encoder_is_built_like_the_sources_layers(source, convert):
    odd = {"hidden_act": "relu", "layer_norm_eps": 1e-3, "hidden_dropout_prob": 0.3, "num_attention_heads": 8}
    model = SyncMaskModel.from_vision_text_pretrained(
        source("ViTForImageClassification")[0], source("BertModel", **odd)[0], mask_token_id=4
    )
    fusion = model.config.fusion_encoder_config
    assert {name: getattr(fusion, name) for name in odd} == odd
    assert (fusion.intermediate_size, fusion.attention_probs_dropout_prob) == (48, 0.1)


@pytest.mark.parametrize("text", ["DistilBertForMaskedLM", "ModernBertForMaskedLM"])
def test_other_text_models_keep_all_layers_under_a_new_fusion_encoder(text, convert, source, words):
    model, original = convert(text=text, fusion_layers=3), source(text)[1]
    fusion = model.config.fusion_encoder_config
    assert (fusion.hidden_size, fusion.num_hidden_layers, fusion.num_attention_heads) == (32, 3, 4)
    assert convert(text=text, kind=SyncMaskModel).config.fusion_encoder_config.num_hidden_layers == 6
    with torch.no_grad():
        torch.testing.assert_close(
            model.syncmask.encode_text(**words), original.base_model(**words).last_hidden_state, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    "text", ["BertForMaskedLM", "BertForPreTraining", "RobertaForMaskedLM", "DistilBertForMaskedLM"]
)
def test_a_masked_lm_head_comes_over(text, convert, source, words):
    model, original = convert(text=text), source(text)[1]
    with torch.no_grad():
        states = original.base_model(**words).last_hidden_state
        output = original(**words)
        wanted = output.logits if "logits" in output else output.prediction_logits
        torch.testing.assert_close(model.mlm_head(states), wanted, atol=1e-4, rtol=1e-4)
    assert model.mlm_head.decoder.weight is model.get_input_embeddings().weight


def test_heads_of_another_form_stay_behind(convert):
    """ModernBERT's has no biases; a BertModel has none at all; a retrieval model wants none."""
    report = convert(text="ModernBertForMaskedLM").conversion_report
    assert "mlm_head.dense.weight" in report.new and "text: head.dense.weight" in report.dropped
    assert "mlm_head.dense.weight" in convert(text="BertModel").conversion_report.new
    report = convert(kind=SyncMaskForImageTextRetrieval).conversion_report
    assert "text: cls.predictions.transform.dense.weight" in report.dropped
    assert not [name for name in report.new if "mlm_head" in name]


def test_a_matrix_of_its_own_stays_untied(convert, source, words):
    folder, original = source("RobertaForMaskedLM", tie_word_embeddings=False)
    model = SyncMaskForPreTraining.from_vision_text_pretrained(
        source("ViTForImageClassification")[0], folder, mask_token_id=4
    )
    assert not model.config.tie_word_embeddings
    with torch.no_grad():
        states = original.base_model(**words).last_hidden_state
        torch.testing.assert_close(model.mlm_head(states), original(**words).logits, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------------- photos


@torch.no_grad()
def source_tokens(original, photos):
    """What a source's own vision model makes of photos, behind its last norm."""
    vision = getattr(original, "vision_model", original.base_model)
    output = vision(pixel_values=photos)
    if original.config.model_type.startswith("clip"):
        return vision.post_layernorm(output.last_hidden_state)
    return output.last_hidden_state


@pytest.mark.parametrize("vision", [name for name in VISION if not name.startswith("Siglip2")])
def test_the_image_tower_is_the_source(vision, convert, source, photos):
    model = convert(vision, kind=SyncMaskModel)
    with torch.no_grad():
        tokens = model.encode_image(photos(model))
    torch.testing.assert_close(tokens, source_tokens(source(vision)[1], photos(model)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("vision", ["Siglip2VisionModel", "Siglip2Model"])
@pytest.mark.parametrize("side", [None, 16, 48])
def test_a_flexible_siglip2_on_a_full_grid(vision, side, convert, source, photos):
    """NaFlex takes patches, channels last, and fits its positions to each photo; ours are fitted once."""
    model, original = convert(vision, kind=SyncMaskModel, image_size=side), source(vision)[1]
    tower, pixels = getattr(original, "vision_model", original), photos(model)
    rows = pixels.shape[-1] // 8
    assert rows == (side or 32) // 8 and model.config.vision_config.model_type == "siglip_vision_model"
    patches = torch.stack(
        [pixels[:, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8].movedim(1, -1) for r in range(rows) for c in range(rows)], 1
    )
    with torch.no_grad():
        wanted = tower(
            pixel_values=patches.flatten(2),
            pixel_attention_mask=torch.ones(3, rows * rows, dtype=torch.long),
            spatial_shapes=torch.tensor([[rows, rows]] * 3),
        ).last_hidden_state
        torch.testing.assert_close(model.encode_image(pixels), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("vision", ["ViTForImageClassification", "DeiTModel", "CLIPModel", "SiglipModel", *VISION[-2:]])
@pytest.mark.parametrize("bigger", [True, False])
def test_positions_for_another_size_are_the_familys_own(vision, bigger, convert, source, photos):
    """The source, told to interpolate when it runs, sees the larger or smaller photos alike."""
    patch = 14 if vision.startswith("Dino") else 8
    side = patch * (6 if bigger else 3)
    model, original = convert(vision, kind=SyncMaskModel, image_size=side), source(vision)[1]
    tower = getattr(original, "vision_model", original.base_model)
    asked = {} if vision.startswith("Dino") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        wanted = tower.embeddings(photos(model), **asked)
        torch.testing.assert_close(model.vision_model.embeddings(photos(model)), wanted, atol=1e-5, rtol=1e-4)
    assert len(model.conversion_report.resized) == 1 and model.config.vision_config.image_size == side


def test_positions_of_prefix_tokens_and_of_an_even_table_stay(convert, source):
    table = source("DeiTModel")[1].embeddings.position_embeddings
    fitted = convert("DeiTModel", kind=SyncMaskModel, image_size=64).vision_model.embeddings.position_embeddings
    assert fitted.shape == (1, 2 + 64, 32) and torch.equal(fitted[:, :2], table[:, :2])
    flat, original = (
        model.vision_model.embeddings.position_embedding.weight
        for model in (convert("SiglipModel", image_size=16, kind=SyncMaskModel), source("SiglipModel")[1])
    )
    with torch.no_grad():  # halving a grid of 4 x 4 keeps the mean of a table that is linear in its rows
        assert flat.shape == (4, 32) and abs(float(flat.mean() - original.mean())) < 0.05


@pytest.mark.parametrize(
    "side, patch, vision", [(33, 8, "CLIPModel"), (64, 14, "Dinov2Model"), (30, 8, "Siglip2Model")]
)
def test_a_size_that_patches_do_not_fill_is_refused(side, patch, vision, convert):
    with pytest.raises(ValueError, match=f"patch_size={patch} does not divide image_size={side}"):
        convert(vision, image_size=side)


# ------------------------------------------------------------------------------------------------------ text positions


@pytest.mark.parametrize("text", ["BertModel", "RobertaForMaskedLM", "DistilBertModel"])
@pytest.mark.parametrize("rows", [None, 20, 50])
def test_text_positions_are_cut_or_grown_when_asked(text, rows, convert, source):
    settings = {} if rows is None else {"max_position_embeddings": rows}
    model = convert(text=text, kind=SyncMaskModel, **settings)
    table = model.text_model.embeddings.position_embeddings.weight
    original = source(text)[1].base_model.embeddings.position_embeddings.weight
    shared = min(40, rows or 40)
    assert table.shape == (rows or 40, 32) and torch.equal(table[:shared], original[:shared])
    resized = ["text_model.embeddings.position_embeddings.weight"] if rows else []
    assert model.conversion_report.resized == resized
    if rows == 50:
        assert 0 < table[40:].std() < 0.2  # new, not zero


# --------------------------------------------------------------------------------------------------- the model in use


@pytest.mark.parametrize("vision, text", EACH_FAMILY)
def test_it_trains_saves_and_reloads(vision, text, convert, batch, tmp_path):
    model = convert(vision, text)
    inputs = batch(model)
    model.train()(**inputs).loss.backward()
    assert not [name for name, value in model.named_parameters() if value.grad is None or not value.requires_grad]
    model.eval().save_pretrained(tmp_path)
    again, info = SyncMaskForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(again(**inputs).loss, model(**inputs).loss)
    base = AutoModel.from_pretrained(tmp_path)
    pixels = inputs["pixel_values"]
    wanted = model.syncmask.get_image_features(pixels).pooler_output
    assert torch.equal(base.get_image_features(pixels).pooler_output, wanted)
    names = {type(module).__name__ for module in base.modules()}
    assert names & base._no_split_modules >= {"SyncMaskFusionLayer"} and "LayerNorm" not in base._no_split_modules
    layers = {type(model.syncmask.vision_model.get_submodule(path)).__name__ for path in _layers(model)}
    assert layers <= base._no_split_modules


def _layers(model):
    tower = dict(model.syncmask.vision_model.named_modules())
    return [f"{name}.0" for name in ("layers", "encoder.layers", "encoder.layer") if name in tower]


@pytest.mark.slow
@pytest.mark.parametrize("vision, text", EACH_FAMILY)
def test_gradient_checkpointing_trains_the_same(vision, text, convert, batch, checkpoint_activations):
    model, gradients = convert(vision, text), []
    for checkpointed in (False, True):
        model.train().zero_grad()
        if checkpointed:
            checkpoint_activations(model)
        torch.manual_seed(0)  # of dropout, which is drawn again alike
        model(**batch(model)).loss.backward()
        gradients.append({name: value.grad.clone() for name, value in model.named_parameters()})
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, atol=1e-5, rtol=1e-3)


def test_every_head_is_built_on_checkpoints(convert):
    model = convert(kind=SyncMaskForImageTextClassification, label_sets={"category": ["a", "b"]}, projection_dim=16)
    assert {name for name, value in model.named_parameters() if not value.requires_grad} == {
        *("syncmask.temperature_logit", "syncmask.vision_projection.weight", "syncmask.vision_projection.bias"),
        *("syncmask.text_projection.weight", "syncmask.text_projection.bias"),
    }
    assert model.classifiers[0].out_features == 2 and model.config.projection_dim == 16
    assert not model.training and "classifiers.0.weight" in model.conversion_report.new


def test_unlike_widths_are_bridged(source, batch):
    wide = source("ViTForImageClassification", hidden_size=48, num_attention_heads=6)[0]
    model = SyncMaskForPreTraining.from_vision_text_pretrained(wide, source("BertForMaskedLM")[0], mask_token_id=4)
    config = model.config
    assert (config.fusion_encoder_config.hidden_size, config.fusion_encoder_config.encoder_hidden_size) == (32, 48)
    decoder = config.mim_decoder_config
    assert (decoder.hidden_size, decoder.num_attention_heads, decoder.encoder_hidden_size) == (24, 3, 32)
    assert model(**batch(model)).loss.isfinite()


def test_sub_configurations_can_be_changed(convert):
    model = convert(mim_decoder_config={"num_hidden_layers": 1}, text_config={"hidden_dropout_prob": 0.0})
    assert len(model.mim_decoder.layers) == 1 and model.config.text_config.hidden_dropout_prob == 0


def test_the_configuration_says_nothing_of_the_sources_task(convert):
    vision = convert().config.vision_config.to_dict()
    assert len(AutoConfig.for_model(**vision).id2label) == 2 and not vision.get("architectures")


def test_the_mask_token_is_the_tokenizers(source, tmp_path, processor):
    """Read beside the text model where it is not given."""
    folder, _ = source("BertForMaskedLM", vocab_size=len(processor.tokenizer))
    processor.tokenizer.save_pretrained(folder)
    model = SyncMaskModel.from_vision_text_pretrained(source("CLIPModel")[0], folder)
    assert model.config.mask_token_id == processor.tokenizer.mask_token_id


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"vision": "BertModel"}, "vision=.* is a bert model; wanted an image tower: one of .*'clip_vision_model'"),
        ({"text": "CLIPModel"}, "text=.* is a clip model; wanted a masked language model"),
        ({"text": "T5EncoderModel"}, "text=.* is a t5 model; wanted a masked language model"),
        ({"text": "ElectraModel"}, "embeddings 16 wide for tokens 32 wide"),
        ({"split_layer": 0}, "split_layer=0 leaves .* the text model has 4; wanted 1 to 3"),
        ({"split_layer": 4}, "split_layer=4 leaves .* the text model has 4; wanted 1 to 3"),
        ({"text": "DistilBertModel", "split_layer": 1}, "split_layer=1 .* 'distilbert', whose layers do not fit"),
        ({"fusion_layers": 3}, "fusion_layers=3 .* 'bert', whose upper layers become the fusion encoder"),
        ({"text": "ModernBertForMaskedLM", "max_position_embeddings": 9}, "'modernbert', which has no table"),
        ({"mask_token_id": None}, "'.*BertForMaskedLM' has no tokenizer that can be read; save"),
        ({"mask_token_id": None, "text": "RobertaForMaskedLM"}, "'.*RobertaForMaskedLM' has no tokenizer"),
        ({"patch_size": 4}, "patch_size is no setting of SyncMaskConfig"),
        (
            {"fusion_encoder_config": {"intermediate_size": 40}},
            r"\(40, 32\) but text: .* is \(48, 32\); leave the sizes",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, said, convert):
    with pytest.raises(ValueError, match=said):
        convert(**changes)


def test_a_tokenizer_without_a_mask_token_is_refused(source, processor, tmp_path):
    folder, _ = source("BertModel", vocab_size=len(processor.tokenizer))
    processor.tokenizer.save_pretrained(folder)
    path = os.path.join(folder, "tokenizer_config.json")
    with open(path) as file:
        settings = json.load(file)
    with open(path, "w") as file:
        json.dump({**settings, "tokenizer_class": "PreTrainedTokenizerFast", "mask_token": None}, file)
    with pytest.raises(ValueError, match="has no mask token; choose that of a masked language model"):
        SyncMaskModel.from_vision_text_pretrained(source("CLIPModel")[0], folder)


# ---------------------------------------------------------------------------------------------------------- remote code


STRANGER = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "syncmask":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
torch.set_num_threads(1)
from transformers import AutoModel, AutoModelForPreTraining

folder = sys.argv[1]
inputs = torch.load(folder + "/inputs.pt", weights_only=True)
model = AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    feats = base.get_image_features(inputs["pixel_values"]).pooler_output
    print(json.dumps([float(model(**inputs).loss), feats.tolist()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "vision, text",
    [
        ("SiglipModel", "RobertaForMaskedLM"),
        ("Dinov2WithRegistersModel", "ModernBertForMaskedLM"),
        ("CLIPModel", "DistilBertForMaskedLM"),
    ],
)
def test_a_model_of_mixed_families_loads_without_the_package(vision, text, convert, batch, tmp_path, monkeypatch):
    model = convert(vision, text)
    for kind, auto in ((SyncMaskConfig, "AutoConfig"), (SyncMaskForPreTraining, "AutoModelForPreTraining")):
        monkeypatch.setattr(kind, "_auto_class", auto)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(SyncMaskModel, "_auto_class", "AutoModel")
    model.syncmask.save_pretrained(tmp_path / "base")
    config, base = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("", "base"))
    config["auto_map"] |= base["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    inputs = batch(model)
    torch.save(inputs, tmp_path / "inputs.pt")
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    loss, feats = json.loads(result.stdout.splitlines()[-1])
    with torch.no_grad():
        assert loss == pytest.approx(float(model(**inputs).loss), abs=1e-5)
        wanted = model.syncmask.get_image_features(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(torch.tensor(feats), wanted, atol=1e-5, rtol=0)


def test_the_text_sources_here_are_masked_language_models(source):
    """What the tests split or keep is what AutoModelForMaskedLM knows."""
    for name in TEXT:
        assert type(source(name)[1].config) in AutoModelForMaskedLM._model_mapping
