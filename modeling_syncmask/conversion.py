"""Other people's checkpoints as the start of a SyncMask model, and the report of what came over and what did not.

A vision model becomes the image tower. A BERT-like text model is split: its lower layers become the text tower, its
upper ones the fusion encoder's, between whose blocks new cross-attention is put (as ALBEF does with BERT-base, 6 + 6).
A text model of another form becomes the text tower whole, under a new fusion encoder.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING

from .configuration_syncmask import SyncMaskConfig, layer_sizes
from .towers import PREFIX_TOKENS, patch_grid, resize_positions

# What target tensors take: name in the result -> (name in the source, value).
Taken = dict[str, tuple[str, torch.Tensor]]

# A layer of BERT (RoBERTa, XLM-R, CamemBERT, MiniLM, ...) -> SyncMaskFusionLayer.
LAYER_NAMES = {
    "attention.self.query": "self_attention.query",
    "attention.self.key": "self_attention.key",
    "attention.self.value": "self_attention.value",
    "attention.output.dense": "self_output",
    "attention.output.LayerNorm": "self_norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_norm",
}
# The masked-LM heads of BERT, RoBERTa and DistilBERT -> SyncMaskMlmHead; a later name of the same target wins.
MLM_HEADS = (
    {
        "cls.predictions.transform.dense": "dense",
        "cls.predictions.transform.LayerNorm": "norm",
        "cls.predictions": "decoder",
        "cls.predictions.decoder": "decoder",
    },
    {"lm_head.dense": "dense", "lm_head.layer_norm": "norm", "lm_head": "decoder", "lm_head.decoder": "decoder"},
    {"vocab_transform": "dense", "vocab_layer_norm": "norm", "vocab_projector": "decoder"},
)
MLM_HEAD_TENSORS = {"dense.weight", "dense.bias", "norm.weight", "norm.bias", "decoder.bias"}
# A SigLIP 2 with flexible grids (NaFlex); the other SigLIP 2 are models of type siglip.
NAFLEX = "siglip2_vision_model"
# Families that resize positions with antialiasing.
ANTIALIASED = ("dinov2_with_registers",)
# Of a source's configuration, what says nothing of its architecture.
NOT_ARCHITECTURE = ("architectures", "_name_or_path", "transformers_version", "dtype", "id2label", "label2id")
SECTIONS = ("vision_config", "text_config", "fusion_encoder_config", "mim_decoder_config")
FRESH_FUSION_LAYERS = 6


@dataclass
class ConversionReport:
    """What a conversion did to the weights; everything that is not named here came over unchanged.

    Args:
        new: parameters and buffers of the result that no source has; they start from random weights.
        dropped: tensors of a source that the result has no place for, as "source: name".
        resized: parameters of the result whose values were fitted to another size or form, such as position embeddings.
    """

    new: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """List each kind, layers of equal names in one line."""
        return "\n".join(
            f"{kind}: {len(names)} tensors" + "".join(f"\n  {line}" for line in _grouped(names))
            for kind, names in (("new", self.new), ("resized", self.resized), ("dropped", self.dropped))
        )


def _grouped(names: list[str]) -> list[str]:
    """Join weight and bias, and layers of equal names: `x.0.y.weight`, `x.1.y.bias` -> `x.*.y (2)`."""
    stems = Counter(re.sub(r"\.\d+\.", ".*.", re.sub(r"\.(weight|bias)$", "", name)) for name in names)
    return [f"{stem} ({count})" if count > 1 else stem for stem, count in stems.items()]


@dataclass
class Source:
    """A checkpoint and the tower in it.

    Args:
        label: "vision" or "text", for the report.
        tensors: all tensors that the checkpoint holds, by name.
        tower: the model that is taken. prefix: of its tensors' names.
    """

    label: str
    tensors: dict[str, torch.Tensor]
    tower: PreTrainedModel
    prefix: str

    def of_tower(self) -> Taken:
        """Return the tower's tensors, by their names in the tower."""
        names = [name for name in self.tensors if name.startswith(self.prefix)]
        return {name.removeprefix(self.prefix): (f"{self.label}: {name}", self.tensors[name]) for name in names}


def from_vision_text(
    kind: type[PreTrainedModel],
    vision: str,
    text: str,
    split_layer: int | None = None,
    image_size: int | None = None,
    fusion_layers: int | None = None,
    max_position_embeddings: int | None = None,
    mask_token_id: int | None = None,
    **overrides,
) -> PreTrainedModel:
    """Build a model of class `kind` on two checkpoints; see [`SyncMaskModel.from_vision_text_pretrained`]."""
    photos, texts = load_source(vision, "vision"), load_source(text, "text")
    lower = text_layers(texts, split_layer, fusion_layers)
    if mask_token_id is None:
        mask_token_id = load_tokenizer(text).mask_token_id
    sections = {
        "vision_config": vision_config(photos, image_size),
        "text_config": text_config(texts, lower, max_position_embeddings),
        "fusion_encoder_config": fusion_config(texts, lower, fusion_layers),
        "mim_decoder_config": decoder_config(photos, texts),
    }
    for name in SECTIONS:
        sections[name] |= overrides.pop(name, {})
    check_settings(overrides)
    head = mlm_head_of(texts)
    tied = {"tie_word_embeddings": "mlm_head.decoder.weight" not in head}
    # Lower layers of a pretrained text model have not been asked to sum a text up in [CLS]: after two of MiniLM's, the
    # [CLS] of 64 product texts have a cosine of .99999 to one another, their means .81 (our choice, measured).
    overrides.setdefault("text_pooling", "mean")
    model = kind(SyncMaskConfig(**sections, mask_token_id=mask_token_id, **(tied | overrides)))
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    towers = vision_weights(photos, model.base_model) | text_weights(texts, lower, model.base_model)
    model.conversion_report = take(model, {base + name: found for name, found in towers.items()} | head, photos, texts)
    return model


def check_settings(overrides: Iterable[str]):
    """Raise ValueError for names that are no settings of a model's configuration, which would take them in silence."""
    unknown = sorted(set(overrides) - set(SyncMaskConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} is no setting of SyncMaskConfig; there are "
            f"{', '.join(SyncMaskConfig.__dataclass_fields__)}."
        )


# -------------------------------------------------------------------------------------------------------------- sources


def load_source(name: str, label: str) -> Source:
    """Load a checkpoint as the class that it was saved as, in fp32, and find the tower in it.

    Args:
        name: local folder or Hub name. label: "vision" or "text".

    Raises:
        ValueError: where it holds no such tower.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        kind = AutoModel
    model, info = kind.from_pretrained(name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
    tensors = dict(model.named_parameters()) | {k: v for k, v in model.named_buffers() if k in model.state_dict()}
    tensors = {key: value.detach() for key, value in tensors.items() if key not in info["missing_keys"]}
    # What is in the file but not in the class is dropped, whatever it is.
    tensors |= {key: torch.empty(0) for key in info["unexpected_keys"]}
    is_tower = _is_image_tower if label == "vision" else _is_text_tower
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and is_tower(module):
            return Source(label, tensors, module, f"{path}." if path else "")
    wanted = {
        "vision": f"an image tower: one of {sorted([*PREFIX_TOKENS, NAFLEX])}, alone or in a whole model",
        "text": "a masked language model that reads whole sentences, such as bert, roberta, distilbert or modernbert",
    }
    raise ValueError(f"{label}={name!r} is a {config.model_type} model; wanted {wanted[label]}.")


def _is_image_tower(model: PreTrainedModel) -> bool:
    config = model.config
    return config.model_type in (*PREFIX_TOKENS, NAFLEX) and type(model) is MODEL_MAPPING[type(config)]


def _is_text_tower(model: PreTrainedModel) -> bool:
    kind = type(model.config)
    known = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(model.config, "is_encoder_decoder", False)
    return known and type(model) is MODEL_MAPPING[kind]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a masked language model: local folder or Hub name.

    Raises:
        ValueError: where there is no tokenizer, or it has no mask token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        # Without any of its files, some families' tokenizers come with their special tokens alone.
        empty = len(tokenizer) <= len(tokenizer.all_special_tokens)
    except (OSError, ValueError, TypeError, AttributeError):
        empty = True
    if empty:
        raise ValueError(f"{name!r} has no tokenizer that can be read; save the tokenizer of the text model with it.")
    if tokenizer.mask_token_id is None:
        raise ValueError(f"the tokenizer of {name!r} has no mask token; choose that of a masked language model.")
    return tokenizer


# ------------------------------------------------------------------------------------------------------- configurations


def is_splittable(tower: PreTrainedModel) -> bool:
    """Tell whether a text model consists of BERT's layers."""
    layers = getattr(getattr(tower, "encoder", None), "layer", None)
    if layers is None:
        return False
    return {name.rpartition(".")[0] for name, _ in layers[0].named_parameters()} == set(LAYER_NAMES)


def text_layers(source: Source, split_layer: int | None, fusion_layers: int | None) -> int:
    """Return how many layers the text tower keeps: of a model that can be split `split_layer` or half, else all.

    Raises:
        ValueError: for a split that the model does not allow, or one that would leave either side without layers.
    """
    config, layers = source.tower.config, source.tower.config.num_hidden_layers
    embedding = source.tower.get_input_embeddings().embedding_dim
    if embedding != config.hidden_size:
        raise ValueError(
            f"text model of type {config.model_type!r} has embeddings {embedding} wide for tokens {config.hidden_size} "
            "wide; wanted both equal, since masked words are predicted through the embeddings. Choose another model."
        )
    if not is_splittable(source.tower):
        if split_layer is not None:
            raise ValueError(
                f"split_layer={split_layer} was given for a text model of type {config.model_type!r}, whose layers "
                "do not fit the fusion encoder; leave it out (fusion_layers says how many new layers it gets)."
            )
        return layers
    if fusion_layers is not None:
        raise ValueError(
            f"fusion_layers={fusion_layers} was given for a text model of type {config.model_type!r}, whose upper "
            "layers become the fusion encoder; give split_layer instead."
        )
    split_layer = layers // 2 if split_layer is None else split_layer
    if not 1 <= split_layer < layers:
        raise ValueError(
            f"split_layer={split_layer} leaves the text tower or the fusion encoder without layers: the text model has "
            f"{layers}; wanted 1 to {layers - 1}."
        )
    return split_layer


def vision_config(source: Source, image_size: int | None) -> dict:
    """Return the image tower's configuration for photos of `image_size`, the source's own when None.

    Raises:
        ValueError: for a size that is no multiple of the patch size.
    """
    config = _architecture(source.tower.config)
    if config["model_type"] == NAFLEX:
        side = int(config.pop("num_patches") ** 0.5) * config["patch_size"]
        config |= {"model_type": "siglip_vision_model", "image_size": side}
    if image_size is not None:
        config["image_size"] = image_size
    patch_grid(AutoConfig.for_model(**config))
    return config


def text_config(source: Source, layers: int, max_position_embeddings: int | None) -> dict:
    """Return the text tower's configuration: `layers` of the source's, its positions unless others are asked for."""
    config = _architecture(source.tower.config)
    if is_splittable(source.tower):
        config |= {"num_hidden_layers": layers}
    if max_position_embeddings is not None:
        if not hasattr(source.tower.embeddings, "position_embeddings"):
            raise ValueError(
                f"max_position_embeddings={max_position_embeddings} was given for a text model of type "
                f"{config['model_type']!r}, which has no table of positions; leave it out."
            )
        config["max_position_embeddings"] = max_position_embeddings
    return config


def fusion_config(source: Source, lower: int, fusion_layers: int | None) -> dict:
    """Return the fusion encoder's configuration: the upper layers of a split text model, else new ones of its width."""
    config = source.tower.config
    upper = config.num_hidden_layers - lower or fusion_layers or FRESH_FUSION_LAYERS
    sizes = layer_sizes({"width": config.hidden_size, "heads": config.num_attention_heads, "layers": upper})
    if not is_splittable(source.tower):
        return sizes
    same = ("intermediate_size", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps")
    return sizes | {name: getattr(config, name) for name in same}


def decoder_config(photos: Source, texts: Source) -> dict:
    """Return the MIM decoder's configuration: two layers, half as wide as the image tower, as in the presets."""
    heads = photos.tower.config.num_attention_heads
    half = max(1, heads // 2)
    width = photos.tower.config.hidden_size // heads * half
    dropout = getattr(texts.tower.config, "hidden_dropout_prob", 0.1)
    return layer_sizes({"width": width, "heads": half, "layers": 2}) | {"hidden_dropout_prob": dropout}


def _architecture(config: PreTrainedConfig) -> dict:
    return {name: value for name, value in config.to_dict().items() if name not in NOT_ARCHITECTURE}


# -------------------------------------------------------------------------------------------------------------- weights


def vision_weights(source: Source, base: PreTrainedModel) -> Taken:
    """Return what the image tower takes, positions fitted to its grid."""
    taken = source.of_tower()
    tower, grid = base.vision_model, base.grid
    if source.tower.config.model_type == NAFLEX:
        name, flat = taken["embeddings.patch_embedding.weight"]
        _, channels, rows, columns = tower.embeddings.patch_embedding.weight.shape
        # NaFlex cuts photos into patches with the channels last and multiplies them by a matrix: a convolution.
        kernel = flat.view(-1, rows, columns, channels).permute(0, 3, 1, 2).contiguous()
        taken["embeddings.patch_embedding.weight"] = (name, kernel)
    positions = next(name for name in taken if name.startswith("embeddings.position_embedding"))
    name, table = taken[positions]
    taken[positions] = (name, fit_positions(source.tower.config, table, grid))
    return {f"vision_model.{name}": found for name, found in taken.items()}


def fit_positions(config: PreTrainedConfig, table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Resize an image tower's positions to a grid of patches as its family does when it runs.

    Args:
        config: of the source's tower. table: its positions, (M, Dv) or (1, M, Dv). grid: rows and columns.
    """
    if config.model_type == NAFLEX:
        side = int(config.num_patches**0.5)
        return resize_positions(table, (side, side), grid, mode="bilinear", antialias=True)
    return resize_positions(table, patch_grid(config), grid, antialias=config.model_type in ANTIALIASED)


def text_weights(source: Source, lower: int, base: PreTrainedModel) -> Taken:
    """Return what the text tower takes and, of a model that is split, the fusion encoder."""
    taken = {}
    for name, (origin, value) in source.of_tower().items():
        target = f"text_model.{name}"
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer and is_splittable(source.tower) and int(layer[1]) >= lower:
            target = f"fusion_encoder.layers.{int(layer[1]) - lower}.{LAYER_NAMES[layer[2]]}.{layer[3]}"
        elif name == "embeddings.position_embeddings.weight":
            value = fit_rows(value, base.text_model.embeddings.position_embeddings)
        taken[target] = (origin, value)
    return taken


def fit_rows(table: torch.Tensor, target: nn.Embedding) -> torch.Tensor:
    """Cut a text tower's positions to a shorter table, or put them at the head of a longer one, whose end stays new."""
    if len(table) == target.num_embeddings:
        return table
    rows = min(len(table), target.num_embeddings)
    return torch.cat([table[:rows], target.weight.detach()[rows:]])


def mlm_head_of(source: Source) -> Taken:
    """Return what the MLM head takes, or nothing where the source has no such head, or one of another form."""
    for names in MLM_HEADS:
        taken = {}
        for module, target in names.items():
            for kind in ("weight", "bias"):
                if (name := f"{module}.{kind}") in source.tensors:
                    taken[f"mlm_head.{target}.{kind}"] = (f"{source.label}: {name}", source.tensors[name])
        if {f"mlm_head.{name}" for name in MLM_HEAD_TENSORS} <= set(taken):
            return taken
    return {}


def check_shape(name: str, place: torch.Tensor, origin: str, value: torch.Tensor):
    """Raise ValueError where a tensor has another shape than its place in the model, as after an override of sizes."""
    if place.shape != value.shape:
        raise ValueError(
            f"{name} is {tuple(place.shape)} but {origin} is {tuple(value.shape)}; leave the sizes of towers and "
            "fusion encoder to the checkpoints."
        )


@torch.no_grad()
def take(model: PreTrainedModel, taken: Taken, *sources: Source) -> ConversionReport:
    """Copy tensors into a model, and report on those of the model and of the sources.

    Raises:
        ValueError: where a tensor has another shape than its place.
    """
    kept = model.state_dict()
    places = dict(model.named_parameters()) | {k: v for k, v in model.named_buffers() if k in kept}
    taken = {name: found for name, found in taken.items() if name in places}
    for name, (origin, value) in taken.items():
        check_shape(name, places[name], origin, value)
        places[name].copy_(value)
    originals = {f"{source.label}: {name}": tensor for source in sources for name, tensor in source.tensors.items()}
    used = {origin for origin, _ in taken.values()}
    return ConversionReport(
        new=[name for name in places if name not in taken],
        dropped=[name for name in originals if name not in used],
        resized=[name for name, (origin, value) in taken.items() if value is not originals[origin]],
    )
