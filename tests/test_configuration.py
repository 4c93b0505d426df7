import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, BertConfig, ViTConfig

import syncmask
from syncmask import SyncMaskConfig, SyncMaskFusionEncoderConfig, SyncMaskMimDecoderConfig, SyncMaskModel

SUB_CONFIGS = ("vision_config", "text_config", "fusion_encoder_config", "mim_decoder_config")


def fields(config):
    """Everything but where it came from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def test_round_trip_through_a_folder(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    for loaded in (SyncMaskConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is SyncMaskConfig
        assert fields(loaded) == fields(tiny_config)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "syncmask"


def test_round_trip_through_dict_and_json(tiny_config):
    assert SyncMaskConfig.from_dict(tiny_config.to_dict()).to_dict() == tiny_config.to_dict()
    assert SyncMaskConfig(**json.loads(tiny_config.to_json_string(use_diff=False))).to_dict() == tiny_config.to_dict()


def test_sub_configs_are_read_from_the_whole(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    for kind, name in (
        (SyncMaskFusionEncoderConfig, "fusion_encoder_config"),
        (SyncMaskMimDecoderConfig, "mim_decoder_config"),
    ):
        assert kind.from_pretrained(tmp_path).to_dict() == getattr(tiny_config, name).to_dict()


def test_a_sub_config_alone_is_saved_and_loaded(tiny_config, tmp_path):
    tiny_config.fusion_encoder_config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is SyncMaskFusionEncoderConfig
    assert fields(loaded) == fields(tiny_config.fusion_encoder_config)


def test_without_arguments_it_is_a_whole_configuration():
    config = SyncMaskConfig()
    assert (config.vision_config.model_type, config.text_config.model_type) == ("vit", "bert")
    assert config.fusion_encoder_config.encoder_hidden_size == config.vision_config.hidden_size
    assert config.mim_decoder_config.encoder_hidden_size == config.text_config.hidden_size
    assert SyncMaskConfig().to_dict() == config.to_dict()


def test_sub_configs_may_be_objects_or_dicts(tiny_config):
    objects = SyncMaskConfig(mask_token_id=4, **{name: getattr(tiny_config, name) for name in SUB_CONFIGS})
    dicts = SyncMaskConfig(mask_token_id=4, **{name: getattr(tiny_config, name).to_dict() for name in SUB_CONFIGS})
    assert objects.to_dict() == dicts.to_dict()


def test_two_configurations_share_no_sub_config():
    one, other = SyncMaskConfig(), SyncMaskConfig()
    one.text_config.vocab_size = 77
    assert other.text_config.vocab_size != 77


def test_the_encoders_follow_the_towers_widths():
    config = SyncMaskConfig(
        vision_config={"model_type": "vit", "hidden_size": 48, "num_attention_heads": 4},
        text_config={"model_type": "bert", "hidden_size": 64, "num_attention_heads": 4},
        fusion_encoder_config={"hidden_size": 64, "num_attention_heads": 4},
    )
    assert config.fusion_encoder_config.encoder_hidden_size == 48
    assert config.mim_decoder_config.encoder_hidden_size == 64


# ----------------------------------------------------------------------------------------------------------- refusals


def test_positional_arguments_are_refused():
    with pytest.raises((TypeError, ValueError)):
        SyncMaskConfig({"model_type": "vit"})


@pytest.mark.parametrize(
    "field, value",
    [("projection_dim", "256"), ("tie_word_embeddings", "yes"), ("initial_temperature", None), ("text_config", 3)],
)
def test_wrong_types_are_refused(field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        SyncMaskConfig(**{field: value})


def test_wrong_types_are_refused_on_assignment(tiny_config):
    with pytest.raises(StrictDataclassFieldValidationError, match="num_hidden_layers"):
        tiny_config.fusion_encoder_config.num_hidden_layers = "two"


@pytest.mark.parametrize(
    "name, field",
    [
        ("fusion_encoder_config", "hidden_size"),
        ("fusion_encoder_config", "encoder_hidden_size"),
        ("mim_decoder_config", "encoder_hidden_size"),
    ],
)
def test_widths_that_do_not_fit_are_refused(tiny_config, name, field):
    parts = {each: getattr(tiny_config, each).to_dict() for each in SUB_CONFIGS}
    parts[name][field] = 64
    with pytest.raises(StrictDataclassClassValidationError, match=rf"{name}.{field}=64.*set it to 32"):
        SyncMaskConfig(mask_token_id=4, **parts)


@pytest.mark.parametrize("kind", [SyncMaskFusionEncoderConfig, SyncMaskMimDecoderConfig])
def test_heads_that_do_not_divide_the_width_are_refused(kind):
    with pytest.raises(StrictDataclassClassValidationError, match="hidden_size=50 is not a multiple"):
        kind(hidden_size=50, num_attention_heads=4)


@pytest.mark.parametrize("value", [0.001, 0.5, 0.0, 7.0])
def test_temperatures_out_of_range_are_refused(value):
    with pytest.raises(StrictDataclassClassValidationError, match=f"initial_temperature={value}"):
        SyncMaskConfig(initial_temperature=value)


def test_a_mask_token_outside_the_vocabulary_is_refused():
    with pytest.raises(StrictDataclassClassValidationError, match="mask_token_id=103.*vocab_size.*60"):
        SyncMaskConfig.tiny(vocab_size=60)


def test_another_pooling_of_texts_is_refused():
    with pytest.raises(StrictDataclassClassValidationError, match="text_pooling='max'.*cls.*mean"):
        SyncMaskConfig(text_pooling="max")


@pytest.mark.parametrize("preset", [SyncMaskConfig.tiny, SyncMaskConfig.small, SyncMaskConfig.base])
def test_a_misspelt_override_of_a_preset_is_refused(preset):
    with pytest.raises((TypeError, ValueError), match="vocab_sise"):
        preset(vocab_sise=500)


# ------------------------------------------------------------------------------------------------------------ presets


@pytest.mark.parametrize(
    "preset, widths, layers, side",
    [
        ("tiny", (96, 96, 96, 96), (2, 1, 2, 1), 8),
        ("small", (384, 384, 384, 192), (12, 6, 6, 2), 14),
        ("base", (768, 768, 768, 384), (12, 6, 6, 2), 16),
    ],
)
def test_presets_are_what_they_say_and_can_be_built(preset, widths, layers, side):
    config = getattr(SyncMaskConfig, preset)()
    parts = [getattr(config, name) for name in SUB_CONFIGS]
    assert tuple(part.hidden_size for part in parts) == widths
    assert tuple(part.num_hidden_layers for part in parts) == layers
    with torch.device("meta"):
        assert SyncMaskModel(config).grid == (side, side)


def test_overrides_reach_the_part_they_name():
    towers = {"vision_config": {"num_hidden_layers": 3}, "text_config": {"num_hidden_layers": 4}}
    overrides = {"projection_dim": 32, **towers}
    config = SyncMaskConfig.tiny(vocab_size=500, image_size=32, patch_size=16, max_position_embeddings=40, **overrides)
    assert (config.text_config.vocab_size, config.text_config.max_position_embeddings) == (500, 40)
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (32, 16)
    assert (config.vision_config.num_hidden_layers, config.vision_config.hidden_size) == (3, 96)
    assert (config.text_config.num_hidden_layers, config.projection_dim) == (4, 32)
    # The caller's dict is left alone.
    assert overrides["vision_config"] == {"num_hidden_layers": 3}


@pytest.mark.parametrize("count, layer", [(1, 0), (2, 0), (3, 1), (6, 2), (12, 5)])
def test_masks_are_read_from_an_early_layer_never_the_last(count, layer):
    config = SyncMaskConfig.tiny(fusion_encoder_config={"num_hidden_layers": count})
    assert config.mask_layer == layer and (count == 1 or layer < count - 1)


def test_other_towers_keep_their_kind(tmp_path):
    config = SyncMaskConfig(vision_config=ViTConfig(), text_config=BertConfig(vocab_size=321))
    config.save_pretrained(tmp_path)
    loaded = SyncMaskConfig.from_pretrained(tmp_path)
    assert isinstance(loaded.vision_config, ViTConfig) and loaded.text_config.vocab_size == 321
    assert loaded.get_text_config().vocab_size == 321


def test_registered_by_their_model_types():
    for kind in (SyncMaskConfig, SyncMaskFusionEncoderConfig, SyncMaskMimDecoderConfig):
        assert type(AutoConfig.for_model(kind.model_type)) is kind
    assert syncmask.SyncMaskConfig is SyncMaskConfig
