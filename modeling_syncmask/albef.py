"""ALBEF's checkpoints (.pth) as the start of a SyncMask model: same architecture, other names.

ALBEF keeps one BERT whose lower layers are its text encoder and whose upper ones, with cross-attention, fuse; its image
tower is timm's ViT. Here these are a text tower, a fusion encoder and transformers' ViT (names read off ALBEF's public
code; our own mapping).
"""

import math
import pickle
import re
from os import PathLike
from pathlib import Path

import torch

from .configuration_syncmask import SyncMaskConfig
from .conversion import ConversionReport, check_settings, check_shape
from .modeling_syncmask import LOG_TEMPERATURE_RANGE
from .towers import patch_grid, resize_positions

VISION, MLM = "visual_encoder.", "text_encoder.cls.predictions."
HEAD_SIZE = 64  # of both of ALBEF's towers; no shape in a checkpoint tells it
# Read through a sigmoid, so neither end of the temperature's range can be reached, and near them nothing is learned.
TEMPERATURE_SHARES = (0.001, 0.999)

PARTS = ("weight", "bias")
BLOCK = {  # timm's block -> ViT's layer; {} stands for q, k and v, which timm keeps in one matrix
    "norm1": "layernorm_before",
    "attn.qkv": "attention.{}_proj",
    "attn.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
FEED_FORWARD = ("intermediate.dense", "output.dense", "output.LayerNorm")
ATTENTION = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
TEXT_LAYER = [*(f"attention.{name}" for name in ATTENTION), *FEED_FORWARD]  # BERT's own names, here and there
FUSION_LAYER = {  # BERT's layer with cross-attention -> SyncMaskFusionLayer
    **{
        f"{theirs}.{name}": ours
        for theirs, kind in (("attention", "self"), ("crossattention", "cross"))
        for name, ours in zip(
            ATTENTION,
            [*(f"{kind}_attention.{part}" for part in ("query", "key", "value")), f"{kind}_output", f"{kind}_norm"],
        )
    },
    **dict(zip(FEED_FORWARD, ("intermediate", "output", "output_norm"))),
}
# The momentum copies, the queues, buffers that are made anew, and the heads of ALBEF's other tasks.
LEFT_BEHIND = re.compile(r"(\w+_m|cls_head|text_decoder)\..+|(image|text|idx)_queue|queue_ptr|.+\.position_ids")


def load_albef(kind, path: str | PathLike, image_size: int | None = None, **overrides):
    """Build a model from ALBEF's checkpoint; see `SyncMaskPreTrainedModel.from_albef`.

    Args:
        kind: the SyncMask class. path: the .pth file.
        image_size: side of the photos; other than the checkpoint's, positions are interpolated.
        overrides: fields of the configuration, its sub-configurations as {field: value} that are changed.

    Raises:
        FileNotFoundError, ValueError: see `read_checkpoint` and `check_names`; an override that is no such field.
    """
    check_settings(overrides)
    weights = read_checkpoint(path)
    names = names_of(weights)
    check_names(weights, names, path)
    config = config_of(weights, image_size, overrides)
    model = kind(config)
    base = f"{kind.base_model_prefix}." if model.base_model is model else ""
    places = model.state_dict()
    names = {old: new.removeprefix(base) for old, new in names.items()}
    used = {old: new for old, new in names.items() if old in weights and new.format("q") in places}
    report = ConversionReport(dropped=[f"albef: {name}" for name in weights if name not in used])
    values = converted(weights, used, config, report)
    report.new = [name for name in places if name not in values and name not in model.all_tied_weights_keys]
    for name, value in values.items():
        check_shape(name, places[name], f"{path}'s", value)
    model.load_state_dict(values, strict=False)
    model.conversion_report = report
    return model.eval()


def read_checkpoint(path: str | PathLike) -> dict[str, torch.Tensor]:
    """Read the tensors of a .pth without running code that it may hold.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is broken, holds more than tensors and plain values, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path of ALBEF's checkpoint (.pth).")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        raise ValueError(
            f"{path} cannot be read as tensors and plain values alone: it is broken, or holds code that reading it "
            "would run. Take the file as ALBEF's authors released it, or save its weights anew: "
            f"torch.save({{'model': state_dict}}, path). ({str(problem).splitlines()[0]})"
        ) from problem
    except (RuntimeError, EOFError, OSError) as problem:
        reason = (str(problem) or type(problem).__name__).splitlines()[0]
        raise ValueError(f"{path} is incomplete or no checkpoint of torch ({reason}); download it again.") from problem
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds no weights: wanted {{'model': {{name: tensor}}}}, as ALBEF saves it.")
    return weights


def names_of(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """Map every name that a whole checkpoint of this depth has to ours, heads included."""
    bert, blocks, (split, fusing) = _bert(weights), _depth(weights, f"{VISION}blocks."), _split(weights)
    vision, text = "syncmask.vision_model.", "syncmask.text_model."
    names = {f"{VISION}cls_token": f"{vision}embeddings.cls_token"}
    names[f"{VISION}pos_embed"] = f"{vision}embeddings.position_embeddings"
    for kind in ("word", "position", "token_type"):
        names[f"{bert}embeddings.{kind}_embeddings.weight"] = f"{text}embeddings.{kind}_embeddings.weight"
    modules = {
        f"{VISION}patch_embed.proj": f"{vision}embeddings.patch_embeddings.projection",
        f"{VISION}norm": f"{vision}layernorm",
        f"{bert}embeddings.LayerNorm": f"{text}embeddings.LayerNorm",
    }
    for number in range(blocks):
        modules |= {f"{VISION}blocks.{number}.{old}": f"{vision}layers.{number}.{new}" for old, new in BLOCK.items()}
    for number in range(split):
        modules |= {f"{bert}encoder.layer.{number}.{n}": f"{text}encoder.layer.{number}.{n}" for n in TEXT_LAYER}
    for number in range(split, split + max(fusing, 1)):
        fusion = f"syncmask.fusion_encoder.layers.{number - split}"
        modules |= {f"{bert}encoder.layer.{number}.{old}": f"{fusion}.{new}" for old, new in FUSION_LAYER.items()}
    return names | _with_parts(modules) | heads()


def heads() -> dict[str, str]:
    """Map what not every checkpoint has: projections, temperature, matching and MLM head."""
    modules = {
        "vision_proj": "syncmask.vision_projection",
        "text_proj": "syncmask.text_projection",
        "itm_head": "itm_head",
        f"{MLM}transform.dense": "mlm_head.dense",
        f"{MLM}transform.LayerNorm": "mlm_head.norm",
        f"{MLM}decoder": "mlm_head.decoder",
    }
    # The decoder's bias is listed twice, and is one parameter.
    return _with_parts(modules) | {"temp": "syncmask.temperature_logit", f"{MLM}bias": "mlm_head.decoder.bias"}


def check_names(weights: dict[str, torch.Tensor], names: dict[str, str], path: str | PathLike):
    """Refuse a checkpoint that lacks weights of towers or fusion layers, or has weights that nothing is known of.

    Raises:
        ValueError: names them.
    """
    missing = [name for name in names if name not in weights and name not in heads()]
    unknown = [name for name in weights if name not in names and not LEFT_BEHIND.fullmatch(name)]
    for problem, found in (("lacks", missing), ("has, which ALBEF does not,", unknown)):
        if found:
            shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
            raise ValueError(
                f"{path} is not laid out as ALBEF's checkpoints are: it {problem} {len(found)} weight(s): {shown}. "
                "Give a checkpoint of ALBEF's pretraining, retrieval or grounding."
            )


def config_of(weights: dict[str, torch.Tensor], image_size: int | None, overrides: dict) -> SyncMaskConfig:
    """Read the sizes off the weights' shapes; what no shape tells is ALBEF's own (heads of 64, eps, activation)."""
    bert, (split, fusing) = _bert(weights), _split(weights)
    rows, width = weights[f"{bert}embeddings.word_embeddings.weight"].shape
    image_width, channels, patch, _ = weights[f"{VISION}patch_embed.proj.weight"].shape
    text = {
        "hidden_size": width,
        "num_attention_heads": _heads(width),
        "intermediate_size": weights[f"{bert}encoder.layer.0.intermediate.dense.bias"].shape[0],
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "attention_probs_dropout_prob": 0.0,  # differs from ALBEF: any other value would disable the flash path
    }
    fields = {
        "vision_config": {
            "model_type": "vit",
            "image_size": image_size or patch * _side(weights),
            "patch_size": patch,
            "num_channels": channels,
            "hidden_size": image_width,
            "num_hidden_layers": _depth(weights, f"{VISION}blocks."),
            "num_attention_heads": _heads(image_width),
            "intermediate_size": weights[f"{VISION}blocks.0.mlp.fc1.bias"].shape[0],
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
            "qkv_bias": True,
        },
        "text_config": {
            **text,
            "model_type": "bert",
            "num_hidden_layers": split,
            "vocab_size": rows,
            "max_position_embeddings": weights[f"{bert}embeddings.position_embeddings.weight"].shape[0],
            "type_vocab_size": weights[f"{bert}embeddings.token_type_embeddings.weight"].shape[0],
        },
        "fusion_encoder_config": {**text, "num_hidden_layers": fusing},
        "tie_word_embeddings": _is_tied(weights),
    }
    if "vision_proj.weight" in weights:
        fields["projection_dim"] = weights["vision_proj.weight"].shape[0]
    for name in [name for name in overrides if isinstance(fields.get(name), dict)]:
        fields[name] |= overrides.pop(name)
    return SyncMaskConfig(**{**fields, **overrides})


def converted(
    weights: dict[str, torch.Tensor], names: dict[str, str], config: SyncMaskConfig, report: ConversionReport
) -> dict[str, torch.Tensor]:
    """Give the weights our names and forms, as float32; the report learns what was resized."""
    values = {}
    for old, new in names.items():
        value = weights[old].float()
        if "{}" in new:
            values |= {new.format(part): own for part, own in zip("qkv", value.chunk(3))}
        elif old == "temp":
            values[new] = temperature_logit(value)
        elif old == f"{VISION}pos_embed":
            values[new] = resize_positions(value, (_side(weights),) * 2, patch_grid(config.vision_config))
            if values[new].shape != value.shape:
                report.resized.append(new)
        else:
            values[new] = value
    return values


def _with_parts(modules: dict[str, str]) -> dict[str, str]:
    return {f"{old}.{part}": f"{new}.{part}" for old, new in modules.items() for part in PARTS}


def _bert(weights: dict[str, torch.Tensor]) -> str:
    """Return what BERT's names begin with: pretraining has an MLM head beside it, and so one part more."""
    return "text_encoder.bert." if any(name.startswith("text_encoder.bert.") for name in weights) else "text_encoder."


def _split(weights: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Count the layers of BERT without and with cross-attention; ALBEF's are 6 and 6."""
    prefix = f"{_bert(weights)}encoder.layer."
    layers = _depth(weights, prefix)
    fusing = sum(f"{prefix}{n}.crossattention.self.query.weight" in weights for n in range(layers))
    return layers - fusing, fusing


def _depth(weights: dict[str, torch.Tensor], prefix: str) -> int:
    """Number the layers under `prefix`; 1 where there is none, so that the first is what is missing."""
    numbers = [int(name.removeprefix(prefix).partition(".")[0]) for name in weights if name.startswith(prefix)]
    return max(numbers, default=0) + 1


def _heads(width: int) -> int:
    if width % HEAD_SIZE:
        raise ValueError(
            f"the checkpoint is {width} wide, which attention heads of {HEAD_SIZE}, ALBEF's, do not divide; it is not "
            "one of ALBEF's."
        )
    return width // HEAD_SIZE


def _side(weights: dict[str, torch.Tensor]) -> int:
    """Return how many patches a row of the checkpoint's photos has, which are square."""
    patches = weights[f"{VISION}pos_embed"].shape[1] - 1
    side = math.isqrt(patches)
    if side**2 != patches:
        raise ValueError(f"{VISION}pos_embed has {patches} positions of patches; wanted a square, such as 256.")
    return side


def _is_tied(weights: dict[str, torch.Tensor]) -> bool:
    matrix = weights.get(f"{MLM}decoder.weight")
    return matrix is None or torch.equal(matrix, weights[f"{_bert(weights)}embeddings.word_embeddings.weight"])


def temperature_logit(temperature: torch.Tensor) -> torch.Tensor:
    """Invert `SyncMaskModel.temperature`: any shape of one number -> (1,)."""
    low, high = LOG_TEMPERATURE_RANGE
    return ((temperature.log() - low) / (high - low)).clamp(*TEMPERATURE_SHARES).logit().reshape(1)
