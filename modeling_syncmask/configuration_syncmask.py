"""SyncMaskConfig: the architecture of a SyncMask model and nothing else; a run's settings are not in it."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec


@strict
class SyncMaskFusionEncoderConfig(PreTrainedConfig):
    r"""The cross-attention encoder: BERT's post-norm layer with a cross-attention block, never causal.

    Args:
        hidden_size (`int`): width D of the query tokens.
        encoder_hidden_size (`int`, *optional*): width of the tokens that are attended to; inside a
            [`SyncMaskConfig`] it follows the tower, alone None means `hidden_size`.
        num_hidden_layers, num_attention_heads, intermediate_size, hidden_act: as in BERT.
        hidden_dropout_prob (`float`): dropout after the embedding, attention and feed-forward blocks.
        attention_probs_dropout_prob (`float`): 0 by default, since any other value disables flash attention.
    """

    model_type = "syncmask_fusion_encoder"
    base_config_key = "fusion_encoder_config"

    hidden_size: int = 768
    encoder_hidden_size: int | None = None
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12

    def validate_heads(self):
        """Refuse a width that the heads do not divide (run by `@strict`)."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}; "
                "change one of the two."
            )


@strict
class SyncMaskMimDecoderConfig(SyncMaskFusionEncoderConfig):
    r"""The masked-image decoder: the same layers, image tokens as queries attending to the text tower's tokens."""

    model_type = "syncmask_mim_decoder"
    base_config_key = "mim_decoder_config"

    hidden_size: int = 384
    num_hidden_layers: int = 2
    num_attention_heads: int = 6
    intermediate_size: int = 1536


@strict
class SyncMaskConfig(PreTrainedConfig):
    r"""Configuration of [`SyncMaskModel`] and its heads.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*): the image tower, any transformers config whose
            model takes `pixel_values` and has `embeddings` (ViT by default).
        text_config (`dict` or `PreTrainedConfig`, *optional*): the text tower (BERT by default).
        fusion_encoder_config (`dict` or [`SyncMaskFusionEncoderConfig`], *optional*): text queries attend to image
            tokens; its widths follow the towers where they are not given.
        mim_decoder_config (`dict` or [`SyncMaskMimDecoderConfig`], *optional*): reconstructs masked patches.
        projection_dim (`int`): size of the shared space that ITC compares in (ALBEF's 256).
        text_pooling (`str`): what a text's vector is projected from, its `"cls"` token or the `"mean"` of its tokens.
        mask_token_id (`int`): the tokenizer's `[MASK]`.
        initial_temperature (`float`): ITC temperature at the start, between .001 and .5.
        word_patch_alignment (`bool`): [`SyncMaskForPreTraining`] has a head that finds a text's words in photos.
        tie_word_embeddings (`bool`): the MLM head's output matrix is the text tower's embedding matrix.
        label_sets (`dict[str, list[str]]`, *optional*): what [`SyncMaskForImageTextClassification`] tells apart, e.g.
            `{"category": ["dresses", "tops"], "colour": ["red", "blue"]}`; `id2label`, `label2id` are the first set's.
        label_set_names (`list[str]`, *optional*): the order of `label_sets`, theirs by default; kept here since JSON
            files are written with sorted keys.
        classifier_dropout (`float`): dropout before the classifiers.

    Example:

    ```python
    >>> from syncmask import SyncMaskConfig, SyncMaskModel
    >>> config = SyncMaskConfig.tiny(vocab_size=500)
    >>> model = SyncMaskModel(config)
    ```
    """

    model_type = "syncmask"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
        "fusion_encoder_config": SubConfigSpec(config_class=SyncMaskFusionEncoderConfig),
        "mim_decoder_config": SubConfigSpec(config_class=SyncMaskMimDecoderConfig),
    }

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    fusion_encoder_config: dict[str, Any] | PreTrainedConfig | None = None
    mim_decoder_config: dict[str, Any] | PreTrainedConfig | None = None
    projection_dim: int = 256
    text_pooling: str = "cls"
    mask_token_id: int = 103
    initial_temperature: float = 0.07
    word_patch_alignment: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    label_sets: dict[str, list[str]] | None = None
    label_set_names: list[str] | None = None
    classifier_dropout: float | int = 0.1

    def __post_init__(self, **kwargs):
        # In the installed package, which has registered its pipelines: transformers would ask to trust a repository's
        # copy of them. As remote code this file has another name, and the copy is needed.
        if __name__.startswith("syncmask."):
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        for encoder, tower in (
            (self.fusion_encoder_config, self.vision_config),
            (self.mim_decoder_config, self.text_config),
        ):
            if encoder.encoder_hidden_size is None:
                encoder.encoder_hidden_size = tower.hidden_size
        self.order_label_sets()

    def order_label_sets(self):
        """Put `label_sets` in their order and let `id2label` and `label2id` be the first one's.

        Called again by the classification model: `from_pretrained(..., label_sets=...)` assigns them to a finished
        configuration.

        Raises:
            ValueError: for a set without labels or with a label twice.
        """
        self.validate_label_sets()
        if not self.label_sets:
            return
        if set(self.label_set_names or ()) != set(self.label_sets):
            self.label_set_names = list(self.label_sets)
        self.label_sets = {name: self.label_sets[name] for name in self.label_set_names}
        self.id2label = dict(enumerate(self.label_sets[self.label_set_names[0]]))
        self.label2id = {label: index for index, label in self.id2label.items()}

    def validate_label_sets(self):
        """Refuse sets that are empty or name a label twice (run by `@strict`)."""
        for name, labels in (self.label_sets or {}).items():
            if not labels:
                raise ValueError(f"label_sets[{name!r}] has no labels; list them or leave the set out.")
            twice = sorted({label for label in labels if labels.count(label) > 1})
            if twice:
                raise ValueError(
                    f"label_sets[{name!r}] names {', '.join(map(repr, twice))} twice; list each label once."
                )

    def validate_widths(self):
        """Refuse a fusion encoder that cannot take the towers' tokens (run by `@strict`)."""
        fusion, decoder = self.fusion_encoder_config, self.mim_decoder_config
        wanted = {
            "fusion_encoder_config.hidden_size": (fusion.hidden_size, self.text_config.hidden_size),
            "fusion_encoder_config.encoder_hidden_size": (
                fusion.encoder_hidden_size,
                self.vision_config.hidden_size,
            ),
            "mim_decoder_config.encoder_hidden_size": (
                decoder.encoder_hidden_size,
                self.text_config.hidden_size,
            ),
        }
        for name, (seen, needed) in wanted.items():
            if seen != needed:
                raise ValueError(f"{name}={seen} does not fit the towers: set it to {needed}.")

    def validate_temperature(self):
        """Refuse an initial temperature outside (.001, .5), the range of the learned one (run by `@strict`)."""
        if not 0.001 < self.initial_temperature < 0.5:
            raise ValueError(f"initial_temperature={self.initial_temperature} is not between .001 and .5 (usual: .07).")

    def validate_text_pooling(self):
        """Refuse another way to sum texts up (run by `@strict`)."""
        if self.text_pooling not in ("cls", "mean"):
            raise ValueError(f'text_pooling={self.text_pooling!r} is not known; set it to "cls" or "mean".')

    def validate_mask_token(self):
        """Refuse a mask token that the text tower has no embedding for (run by `@strict`)."""
        if not 0 <= self.mask_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"mask_token_id={self.mask_token_id} is not in text_config.vocab_size={self.text_config.vocab_size}; "
                "set it to the tokenizer's mask_token_id."
            )

    @property
    def mask_layer(self) -> int:
        """Index of the fusion layer that masks are read from by default: the third of six, the first of two.

        Our choice, early or middle but never the last: only the [CLS] row of the last layer feeds ITM, so its rows of
        words are noise.
        """
        return max(0, (self.fusion_encoder_config.num_hidden_layers - 1) // 2)

    @classmethod
    def tiny(cls, **overrides) -> "SyncMaskConfig":
        """2 + 1 + 2 layers, 96 wide, 8-pixel patches of 64-pixel photos: trains on two CPU cores in minutes."""
        return _preset(
            cls,
            vision={"layers": 2, "width": 96, "heads": 4, "image_size": 64, "patch_size": 8},
            text={"layers": 1, "width": 96, "heads": 4, "dropout": 0.0},
            fusion_layers=2,
            decoder={"layers": 1, "width": 96, "heads": 4},
            overrides={"projection_dim": 96, **overrides},
        )

    @classmethod
    def small(cls, **overrides) -> "SyncMaskConfig":
        """ViT-S/16 at 224 pixels, 384-wide text tower and fusion encoder of 6 layers each."""
        return _preset(
            cls,
            vision={"layers": 12, "width": 384, "heads": 6, "image_size": 224, "patch_size": 16},
            text={"layers": 6, "width": 384, "heads": 12, "dropout": 0.1},
            fusion_layers=6,
            decoder={"layers": 2, "width": 192, "heads": 6},
            overrides=overrides,
        )

    @classmethod
    def base(cls, **overrides) -> "SyncMaskConfig":
        """ViT-B/16 at 256 pixels and BERT-base split 6 + 6: the size of the paper's family."""
        return _preset(
            cls,
            vision={"layers": 12, "width": 768, "heads": 12, "image_size": 256, "patch_size": 16},
            text={"layers": 6, "width": 768, "heads": 12, "dropout": 0.1},
            fusion_layers=6,
            decoder={"layers": 2, "width": 384, "heads": 6},
            overrides=overrides,
        )


def _preset(cls, vision: dict, text: dict, fusion_layers: int, decoder: dict, overrides: dict) -> SyncMaskConfig:
    """Spell out a preset; `overrides` may hold config fields and, for short, image_size, patch_size, vocab_size ..."""
    vision, text = dict(vision), dict(text)
    for key in ("image_size", "patch_size"):
        vision[key] = overrides.pop(key, vision[key])
    text_fields = {
        k: overrides.pop(k) for k in ("vocab_size", "max_position_embeddings", "pad_token_id") if k in overrides
    }
    fields = {
        "vision_config": {
            **layer_sizes(vision),
            "model_type": "vit",
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        "text_config": {
            **layer_sizes(text),
            "model_type": "bert",
            **_dropout(text),
            "type_vocab_size": 1,
            **text_fields,
        },
        "fusion_encoder_config": {
            **layer_sizes({**text, "layers": fusion_layers}),
            "hidden_dropout_prob": text["dropout"],
        },
        "mim_decoder_config": {
            **layer_sizes(decoder),
            "hidden_dropout_prob": text["dropout"],
        },
    }
    for key in [key for key in overrides if key in fields]:
        fields[key] = {**fields[key], **overrides.pop(key)}
    unknown = sorted(set(overrides) - set(cls.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} is no setting of a preset; there are {', '.join(cls.__dataclass_fields__)}."
        )
    return cls(**fields, **overrides)


def layer_sizes(tower: dict) -> dict:
    """Spell out layers of a width: {"layers", "width", "heads"} -> the fields that BERT's and ViT's configs share."""
    return {
        "hidden_size": tower["width"],
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": tower["heads"],
        "intermediate_size": 4 * tower["width"],
        # BERT's .02 is made for 768 wide layers; narrow ones would start with activations that carry next to nothing.
        "initializer_range": round(0.02 * (768 / tower["width"]) ** 0.5, 3),
    }


def _dropout(tower: dict) -> dict:
    # Attention dropout would disable the flash path; the hidden states' dropout stays BERT's.
    return {"hidden_dropout_prob": tower["dropout"], "attention_probs_dropout_prob": 0.0}


__all__ = ["SyncMaskConfig", "SyncMaskFusionEncoderConfig", "SyncMaskMimDecoderConfig"]
