"""ALBEF's checkpoints: the test writes one name by name, and computes its layers by itself, from their definition."""

import json
import math

import pytest
import torch
from torch.nn.functional import conv2d, gelu, layer_norm, linear

from syncmask import (
    SyncMaskConfig,
    SyncMaskForComposedImageRetrieval,
    SyncMaskForImageTextClassification,
    SyncMaskForImageTextRetrieval,
    SyncMaskForPreTraining,
    SyncMaskModel,
    SyncMaskProcessor,
)
from syncmask.albef import check_names, config_of, converted, names_of
from syncmask.conversion import ConversionReport
from syncmask.training import pretrain
from syncmask.training.arguments import DataArguments, ModelArguments
from syncmask.training.build import build_model, build_processor

PARTS = ("weight", "bias")
# What one of ALBEF's checkpoints holds, at the sizes that were released: 12 blocks, 12 layers of which 6 fuse.
BASE = {"vision": 768, "text": 768, "inner": 3072, "blocks": 12, "layers": 12, "split": 6, "vocab": 30522, "side": 16}
BASE |= {"positions": 512, "shared": 256, "queue": 65536, "patch": 16}
SMALL = {"vision": 128, "text": 64, "inner": 96, "blocks": 3, "layers": 4, "split": 2, "vocab": 120, "side": 4}
SMALL |= {"positions": 24, "shared": 32, "queue": 16, "patch": 8}
DECODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def layout(size, kind="pretraining"):
    """{name: (shape, dtype)} of all that ALBEF saves in pretraining or in retrieval."""
    width, inner = size["text"], size["inner"]
    image = {"cls_token": (1, 1, size["vision"]), "pos_embed": (1, size["side"] ** 2 + 1, size["vision"])}
    image |= module("patch_embed.proj", (size["vision"], 3, size["patch"], size["patch"]))
    for block in range(size["blocks"]):
        for norm in ("norm1", "norm2"):
            image |= module(f"blocks.{block}.{norm}", (size["vision"],))
        image |= module(f"blocks.{block}.attn.qkv", (3 * size["vision"], size["vision"]))
        image |= module(f"blocks.{block}.attn.proj", (size["vision"], size["vision"]))
        image |= module(f"blocks.{block}.mlp.fc1", (inner, size["vision"]))
        image |= module(f"blocks.{block}.mlp.fc2", (size["vision"], inner))
    image |= module("norm", (size["vision"],))
    bert = {
        "embeddings.position_ids": (1, size["positions"]),
        "embeddings.word_embeddings.weight": (size["vocab"], width),
        "embeddings.position_embeddings.weight": (size["positions"], width),
        "embeddings.token_type_embeddings.weight": (2, width),
        **module("embeddings.LayerNorm", (width,)),
    }
    for layer in range(size["layers"]):
        kinds = {"attention": width} | ({"crossattention": size["vision"]} if layer >= size["split"] else {})
        for name, keys in kinds.items():
            bert |= module(f"encoder.layer.{layer}.{name}.self.query", (width, width))
            bert |= module(f"encoder.layer.{layer}.{name}.self.key", (width, keys))
            bert |= module(f"encoder.layer.{layer}.{name}.self.value", (width, keys))
            bert |= module(f"encoder.layer.{layer}.{name}.output.dense", (width, width))
            bert |= module(f"encoder.layer.{layer}.{name}.output.LayerNorm", (width,))
        bert |= module(f"encoder.layer.{layer}.intermediate.dense", (inner, width))
        bert |= module(f"encoder.layer.{layer}.output.dense", (width, inner))
        bert |= module(f"encoder.layer.{layer}.output.LayerNorm", (width,))
    if kind == "pretraining":
        bert = {f"bert.{name}": shape for name, shape in bert.items()}
        bert |= {"cls.predictions.bias": (size["vocab"],), **module("cls.predictions.transform.dense", (width, width))}
        bert |= module("cls.predictions.transform.LayerNorm", (width,))
        bert |= module("cls.predictions.decoder", (size["vocab"], width))
    shapes = {"temp": (), **module("itm_head", (2, width))}
    for copy in ("", "_m"):
        shapes |= {f"visual_encoder{copy}.{name}": shape for name, shape in image.items()}
        shapes |= {f"text_encoder{copy}.{name}": shape for name, shape in bert.items()}
        shapes |= module(f"vision_proj{copy}", (size["shared"], size["vision"]))
        shapes |= module(f"text_proj{copy}", (size["shared"], width))
    shapes |= {"image_queue": (size["shared"], size["queue"]), "text_queue": (size["shared"], size["queue"])}
    shapes |= {"queue_ptr": (1,)} | ({"idx_queue": (1, size["queue"])} if kind == "retrieval" else {})
    whole = ("queue_ptr", "idx_queue", "position_ids")
    return {name: (shape, torch.int64 if name.endswith(whole) else torch.float32) for name, shape in shapes.items()}


def module(name, shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def checkpoint(kind="pretraining"):
    """Random weights in that layout; norms near 1, the vocabulary matrix tied and the temperature ALBEF's."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, (shape, dtype) in layout(SMALL, kind).items():
        value = torch.randn(shape, generator=generator) * 0.15
        is_norm = name.endswith("weight") and ("norm" in name.lower())
        weights[name] = (value + 1 if is_norm else value).to(dtype)
    weights["temp"] = torch.tensor(0.0532)
    if kind == "pretraining":
        for copy in ("", "_m"):
            head = f"text_encoder{copy}.cls.predictions."
            weights[f"{head}decoder.weight"] = weights[f"text_encoder{copy}.bert.embeddings.word_embeddings.weight"]
            weights[f"{head}decoder.bias"] = weights[f"{head}bias"]
    return weights


def write(weights, path, **more):
    torch.save({"model": weights, "epoch": 29, "config": {"image_res": 256, "schedular": {"lr": 1e-4}}, **more}, path)
    return path


@pytest.fixture
def albef(tmp_path):
    return write(checkpoint(), tmp_path / "ALBEF.pth")


def load(kind, path, **config):
    torch.manual_seed(0)
    return kind.from_albef(path, mim_decoder_config=DECODER, **{"mask_token_id": 103, **config})


# ------------------------------------------------------------------------------- ALBEF's layers, as they are defined


def attend(queries, keys, weights, names, heads):
    """Multi-head attention token by token: softmax(q k / sqrt(64)) v, heads side by side."""
    q, k, v = (
        linear(states, weights[f"{name}.weight"], weights[f"{name}.bias"])
        for states, name in zip((queries, keys, keys), names)
    )
    size, parts = q.shape[-1] // heads, []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        parts.append((q[..., own] @ k[..., own].transpose(-1, -2) / math.sqrt(size)).softmax(-1) @ v[..., own])
    return torch.cat(parts, dim=-1)


def norm(states, weights, name, eps):
    return layer_norm(states, states.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def dense(states, weights, name):
    return linear(states, weights[f"{name}.weight"], weights[f"{name}.bias"])


def vision_states(weights, pixels):
    """Pre-norm blocks; the state after the embeddings, after each block, and after the last norm."""
    w = {name.removeprefix("visual_encoder."): value for name, value in weights.items()}
    patches = conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=SMALL["patch"])
    x = torch.cat([w["cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], 1) + w["pos_embed"]
    states = [x]
    for n in range(SMALL["blocks"]):
        block = {name.removeprefix(f"blocks.{n}."): value for name, value in w.items()}
        for part, name in enumerate("qkv"):
            for end in PARTS:
                block[f"{name}.{end}"] = block[f"attn.qkv.{end}"].view(3, SMALL["vision"], -1).squeeze(-1)[part]
        normed = norm(x, block, "norm1", 1e-6)
        x = x + dense(attend(normed, normed, block, ("q", "k", "v"), SMALL["vision"] // 64), block, "attn.proj")
        x = x + dense(gelu(dense(norm(x, block, "norm2", 1e-6), block, "mlp.fc1")), block, "mlp.fc2")
        states.append(x)
    return [*states, norm(x, w, "norm", 1e-6)]


def bert_states(weights, ids, image=None):
    """Post-norm layers of ONE unpadded text: after the embeddings, after each layer; the upper ones look at `image`."""
    w = {name.replace("text_encoder.", "").replace("bert.", ""): value for name, value in weights.items()}
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
    states = [norm(x + w["embeddings.position_embeddings.weight"][: ids.shape[1]], w, "embeddings.LayerNorm", 1e-12)]
    for n in range(SMALL["layers"]):
        x, prefix = states[-1], f"encoder.layer.{n}."
        layer = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
        for kind, keys in (("attention", x), ("crossattention", image)):
            if f"{kind}.output.dense.weight" in layer:
                names = [f"{kind}.self.{part}" for part in ("query", "key", "value")]
                seen = attend(x, x if kind == "attention" else keys, layer, names, SMALL["text"] // 64)
                x = norm(x + dense(seen, layer, f"{kind}.output.dense"), layer, f"{kind}.output.LayerNorm", 1e-12)
        inner = gelu(dense(x, layer, "intermediate.dense"))
        states.append(norm(x + dense(inner, layer, "output.dense"), layer, "output.LayerNorm", 1e-12))
    return states


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, SMALL["vocab"], (3, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([9, 5, 2])[:, None]).long()
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids * mask, "attention_mask": mask}


def close(seen, wanted):
    torch.testing.assert_close(seen, wanted, atol=2e-5, rtol=2e-4)


# ----------------------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("kind", ["pretraining", "retrieval"])
def test_towers_and_fusion_reproduce_albef_layer_by_layer(kind, batch, tmp_path):
    weights = checkpoint(kind)
    model = load(SyncMaskModel, write(weights, tmp_path / "a.pth"))
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
        wanted = vision_states(weights, batch["pixel_values"])
        for seen, state in zip(output.vision_hidden_states[:-1], wanted[:-2], strict=True):
            close(seen, state)
        close(output.image_embeds, wanted[-1])
        shared = linear(wanted[-1][:, 0], weights["vision_proj.weight"], weights["vision_proj.bias"])
        close(output.image_feats, shared / shared.norm(dim=-1, keepdim=True))
        for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            ids, image = batch["input_ids"][row : row + 1, :length], wanted[-1][row : row + 1]
            states = bert_states(weights, ids, image)
            mine = [*output.text_hidden_states, *output.fusion_hidden_states[1:]]
            for seen, state in zip(mine, states, strict=True):
                close(seen[row, :length], state[0])
            close(output.fusion_hidden_states[0][row, :length], states[SMALL["split"]][0])
            close(output.fused[row, :length], states[-1][0])
            own = linear(states[SMALL["split"]][0, 0], weights["text_proj.weight"], weights["text_proj.bias"])
            close(output.text_feats[row], own / own.norm())
    assert model.temperature.item() == pytest.approx(0.0532, rel=1e-5)


def test_matching_and_mlm_head_are_albef_s(albef, batch):
    weights, model = checkpoint(), load(SyncMaskForPreTraining, albef)
    ids, pixels = batch["input_ids"][:1], batch["pixel_values"][:1]
    with torch.no_grad():
        fused = bert_states(weights, ids, vision_states(weights, pixels)[-1])[-1]
        image_embeds, text_embeds = model.syncmask.encode_image(pixels), model.syncmask.encode_text(ids)
        close(model.itm_logits(text_embeds, None, image_embeds), dense(fused[:, 0], weights, "itm_head"))
        head = "text_encoder.cls.predictions."
        hidden = norm(
            gelu(dense(fused, weights, f"{head}transform.dense")), weights, f"{head}transform.LayerNorm", 1e-12
        )
        wanted = hidden @ weights["text_encoder.bert.embeddings.word_embeddings.weight"].T + weights[f"{head}bias"]
        close(model.mlm_logits(text_embeds, None, image_embeds, torch.arange(9)[None]), wanted)
    assert model.mlm_head.decoder.weight is model.get_input_embeddings().weight


def test_no_name_is_left_over(albef):
    """Every tensor of the file is used, or named in the report; every parameter is loaded, or named as new."""
    model = load(SyncMaskForPreTraining, albef)
    report, names = model.conversion_report, checkpoint().keys()
    dropped = {line.removeprefix("albef: ") for line in report.dropped}
    copies = {name for name in names if name.split(".")[0].endswith("_m")}
    assert dropped == copies | {"image_queue", "text_queue", "queue_ptr", "text_encoder.bert.embeddings.position_ids"}
    assert all(name.startswith("mim_decoder.") for name in report.new) and len(report.new) > 5
    assert report.resized == []


def test_every_tensor_that_is_not_dropped_counts(albef):
    """Shift each tensor by an amount of its own: every parameter of the result that is not new has one of them."""
    weights = checkpoint("pretraining")
    model = load(SyncMaskForPreTraining, albef)
    before, report = model.state_dict(), model.conversion_report
    used = [name for name in weights if f"albef: {name}" not in report.dropped and name != "temp"]
    for name in used:
        weights[name] = torch.full_like(weights[name], 1.0 + used.index(name))
    weights["text_encoder.cls.predictions.decoder.bias"] = weights["text_encoder.cls.predictions.bias"]
    weights["text_encoder.cls.predictions.decoder.weight"] = weights[
        "text_encoder.bert.embeddings.word_embeddings.weight"
    ]
    after = load(SyncMaskForPreTraining, write(weights, albef)).state_dict()
    found = {value.flatten()[0].item() for name, value in after.items() if name not in report.new}
    twice = {f"text_encoder.cls.predictions.decoder.{part}" for part in PARTS}
    assert {1.0 + used.index(name) for name in used if name not in twice} <= found
    assert all(
        not torch.equal(after[name], value)
        for name, value in before.items()
        if name not in {*report.new, "syncmask.temperature_logit"}
    )


def test_the_names_of_the_released_checkpoint():
    """All 12 blocks and 12 layers, at their real sizes, without their memory."""
    weights = {name: torch.zeros((), dtype=dtype).expand(shape) for name, (shape, dtype) in layout(BASE).items()}
    weights["temp"] = torch.tensor(0.07)
    names = names_of(weights)
    check_names(weights, names, "ALBEF.pth")
    assert len(weights) == 844 and len(names) == 421
    assert names["text_encoder.bert.encoder.layer.11.crossattention.output.LayerNorm.bias"] == (
        "syncmask.fusion_encoder.layers.5.cross_norm.bias"
    )
    config, report = config_of(weights, None, {}), ConversionReport()
    base = SyncMaskConfig.base()
    for part in ("vision_config", "text_config", "fusion_encoder_config"):
        for size in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"):
            assert getattr(getattr(config, part), size) == getattr(getattr(base, part), size), (part, size)
    assert (config.vision_config.image_size, config.vision_config.patch_size, config.projection_dim) == (256, 16, 256)
    assert (config.vision_config.layer_norm_eps, config.text_config.layer_norm_eps) == (1e-6, 1e-12)
    assert config.fusion_encoder_config.layer_norm_eps == 1e-12 and config.text_config.type_vocab_size == 2
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in SyncMaskForPreTraining(config).state_dict().items()}
    seen = {name: value.shape for name, value in converted(weights, names, config, report).items()}
    assert seen == {name: shape for name, shape in wanted.items() if not name.startswith("mim_decoder.")}


@pytest.mark.parametrize(
    "kind, new, dropped",
    [
        (SyncMaskModel, (), ("itm_head", "text_encoder")),
        (SyncMaskForImageTextRetrieval, (), ("text_encoder",)),
        (SyncMaskForComposedImageRetrieval, ("query_head",), ("itm_head", "text_encoder")),
        (SyncMaskForImageTextClassification, ("no_image", "no_text", "classifiers"), ("itm_head", "text_encoder")),
    ],
)
def test_every_class_says_what_is_new_and_what_it_has_no_place_for(kind, new, dropped, albef):
    config = {"label_sets": {"category": ["tops", "skirts"]}} if kind is SyncMaskForImageTextClassification else {}
    model = load(kind, albef, **config)
    assert {name.partition(".")[0] for name in model.conversion_report.new} == set(new)
    copies = ("_m", "_queue", "queue_ptr")
    left = [line.removeprefix("albef: ") for line in model.conversion_report.dropped]
    left = [name for name in left if not name.partition(".")[0].endswith(copies) and "position_ids" not in name]
    assert {name.partition(".")[0] for name in left} == set(dropped) and not model.training
    assert all(name.startswith(("itm_head.", "text_encoder.cls.predictions.")) for name in left)
    if kind is SyncMaskForImageTextClassification:
        assert not model.syncmask.temperature_logit.requires_grad


def test_parts_of_the_configuration_can_be_changed(albef):
    model = load(SyncMaskModel, albef, text_config={"hidden_dropout_prob": 0.0}, initial_temperature=0.1)
    config = model.config
    assert (config.text_config.hidden_dropout_prob, config.initial_temperature) == (0.0, 0.1)
    assert (config.text_config.vocab_size, config.text_config.num_hidden_layers) == (SMALL["vocab"], SMALL["split"])


def test_an_override_that_is_no_setting_or_does_not_fit_is_refused(albef):
    with pytest.raises(ValueError, match="projection is no setting of SyncMaskConfig; there are .*projection_dim"):
        load(SyncMaskModel, albef, projection=16)
    with pytest.raises(ValueError, match=r"vision_projection.weight is \(16, 128\) but .*ALBEF.pth's is \(32, 128\)"):
        load(SyncMaskModel, albef, projection_dim=16)


def test_a_converted_model_saves_and_loads(albef, batch, tmp_path):
    model = load(SyncMaskForImageTextRetrieval, albef)
    model.save_pretrained(tmp_path / "saved")
    again = SyncMaskForImageTextRetrieval.from_pretrained(tmp_path / "saved")
    assert torch.equal(model(**batch).itm_logits, again(**batch).itm_logits)


def test_without_heads_towers_and_fusion_still_come_over(tmp_path):
    """As in ALBEF's visual entailment, which has a classifier of its own."""
    heads = ("temp", "itm_head", "vision_proj", "text_proj", "text_encoder.cls")
    weights = {name: value for name, value in checkpoint().items() if not name.startswith(heads)}
    weights |= {f"cls_head.{n}.weight": torch.randn(4, 4) for n in (0, 2)}
    model = load(SyncMaskForImageTextRetrieval, write(weights, tmp_path / "a.pth"))
    assert {name.removeprefix("syncmask.").partition(".")[0] for name in model.conversion_report.new} == {
        "vision_projection",
        "text_projection",
        "temperature_logit",
        "itm_head",
    }
    assert model.syncmask.temperature.item() == pytest.approx(0.07)
    assert "albef: cls_head.2.weight" in model.conversion_report.dropped


def test_a_retrieval_checkpoint_has_no_mlm_head(tmp_path):
    """The vocabulary matrix is not new all the same: it is the token embeddings."""
    model = load(SyncMaskForPreTraining, write(checkpoint("retrieval"), tmp_path / "a.pth"))
    new = {name for name in model.conversion_report.new if not name.startswith("mim_decoder.")}
    assert new == {
        f"mlm_head.{name}" for name in ("dense.weight", "dense.bias", "norm.weight", "norm.bias", "decoder.bias")
    }
    assert "albef: idx_queue" in model.conversion_report.dropped


def test_an_untied_vocabulary_matrix_stays_its_own(tmp_path):
    weights = checkpoint()
    matrix = weights["text_encoder.cls.predictions.decoder.weight"] + 1
    weights["text_encoder.cls.predictions.decoder.weight"] = matrix
    model = load(SyncMaskForPreTraining, write(weights, tmp_path / "a.pth"))
    assert not model.config.tie_word_embeddings and torch.equal(model.mlm_head.decoder.weight, matrix)


def test_positions_are_interpolated_to_another_size(albef):
    small, large = load(SyncMaskModel, albef), load(SyncMaskModel, albef, image_size=48)
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(5))
    assert large.grid == (6, 6)
    assert large.conversion_report.resized == ["vision_model.embeddings.position_embeddings"]
    # transformers interpolates in the forward what is fitted once here.
    wanted = small.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
    close(large.get_image_features(pixels).pooler_output, wanted)
    with pytest.raises(ValueError, match="patch_size=8 does not divide image_size=50"):
        load(SyncMaskModel, albef, image_size=50)


@pytest.mark.parametrize("temperature", [0.001, 0.5, 2.0])
def test_a_temperature_at_the_end_of_its_range_can_still_be_learned(temperature, tmp_path):
    weights = checkpoint() | {"temp": torch.tensor(temperature)}
    model = load(SyncMaskModel, write(weights, tmp_path / "a.pth"))
    assert model.temperature.item() == pytest.approx(min(temperature, 0.5), rel=0.01)
    model.temperature.backward()
    assert model.temperature_logit.grad.abs() > 1e-7


# ------------------------------------------------------------------------------------------------------------- refusals


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path):
    write(checkpoint(), tmp_path / "a.pth", extra=Bomb(str(tmp_path / "went off")))
    with pytest.raises(ValueError, match="a.pth cannot be read as tensors and plain values alone"):
        load(SyncMaskModel, tmp_path / "a.pth")
    assert not (tmp_path / "went off").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(albef, share):
    content = albef.read_bytes()
    albef.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"ALBEF.pth (is incomplete|cannot be read)"):
        load(SyncMaskModel, albef)


def test_a_file_of_another_layout_names_what_is_missing(albef, tmp_path):
    weights = checkpoint()
    del weights["visual_encoder.blocks.1.mlp.fc2.bias"], weights["text_encoder.bert.encoder.layer.3.output.dense.bias"]
    with pytest.raises(ValueError, match=r"lacks 2 .*visual_encoder.blocks.1.mlp.fc2.bias.*layer.3.output.dense.bias"):
        load(SyncMaskModel, write(weights, albef))
    with pytest.raises(ValueError, match=r"lacks \d+ weight.*visual_encoder.cls_token"):
        load(SyncMaskModel, write({"conv1.weight": torch.ones(2, 2)}, albef))
    with pytest.raises(ValueError, match=r"ALBEF does not, 1 weight.*visual_encoder.adapter.weight"):
        load(SyncMaskModel, write(checkpoint() | {"visual_encoder.adapter.weight": torch.ones(2)}, albef))
    torch.save([1, 2], albef)
    with pytest.raises(ValueError, match="holds no weights"):
        load(SyncMaskModel, albef)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load(SyncMaskModel, tmp_path / "absent.pth")


# ----------------------------------------------------------------------------------------------------- training from it


@pytest.fixture
def start(processor, tmp_path):
    """A checkpoint with as many words as a tokenizer, and the folder of that tokenizer."""
    words, weights, generator = len(processor.tokenizer), checkpoint(), torch.Generator().manual_seed(1)
    matrix = torch.randn(words, SMALL["text"], generator=generator)
    weights["text_encoder.bert.embeddings.word_embeddings.weight"] = matrix
    weights["text_encoder.bert.embeddings.position_embeddings.weight"] = torch.randn(128, 64, generator=generator)
    weights["text_encoder.cls.predictions.decoder.weight"] = matrix
    weights["text_encoder.cls.predictions.bias"] = torch.zeros(words)
    weights["text_encoder.cls.predictions.decoder.bias"] = torch.zeros(words)
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    return write(weights, tmp_path / "ALBEF.pth"), tmp_path / "tokenizer"


def test_a_run_starts_from_albef(start, tmp_path):
    path, tokenizer = start
    pretrain.main(
        [
            *("--corpus", "garments", "--num_items", "40", "--image_size", "32", "--tokenizer", str(tokenizer)),
            *("--albef", str(path), "--model_overrides", json.dumps({"mim_decoder_config": DECODER})),
            *("--per_device_batch_size", "16", "--max_steps", "2", "--learning_rate", "1e-9", "--num_threads", "1"),
            *("--output_dir", str(tmp_path), "--run_name", "run", "--no-evaluate"),
        ]
    )
    final = SyncMaskForPreTraining.from_pretrained(tmp_path / "run" / "final")
    wanted = torch.load(path, weights_only=True)["model"]["visual_encoder.blocks.1.mlp.fc1.weight"]
    close(final.syncmask.vision_model.layers[1].mlp.fc1.weight, wanted)
    photos = SyncMaskProcessor.from_pretrained(tmp_path / "run" / "final").image_processor
    assert [round(mean, 3) for mean in photos.image_mean] == [0.481, 0.458, 0.408]


def test_the_tokenizer_must_be_named_and_albef_s(start):
    path, tokenizer = start
    model = ModelArguments(albef=str(path))
    with pytest.raises(
        SystemExit, match="albef: the checkpoint has no tokenizer.*--tokenizer google-bert/bert-base-unc"
    ):
        build_processor(DataArguments(image_size=32), model, ["a red hat"], seed=0)
    processor = build_processor(DataArguments(image_size=32, tokenizer=str(tokenizer)), model, ["a red hat"], seed=0)
    build_model(SyncMaskForImageTextRetrieval, model, processor)
    processor.tokenizer.add_tokens(["zzz"])
    with pytest.raises(SystemExit, match="do not belong together"):
        build_model(SyncMaskForImageTextRetrieval, model, processor)
    # A tokenizer that is smaller than the table of embeddings is another one, too.
    weights = torch.load(path, weights_only=True)["model"]
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"):
        weights[f"text_encoder.{name}"] = torch.zeros(2000, SMALL["text"])
    for name in ("bias", "decoder.bias"):
        weights[f"text_encoder.cls.predictions.{name}"] = torch.zeros(2000)
    write(weights, path)
    with pytest.raises(SystemExit, match="but its model 2000: they do not belong together"):
        build_model(SyncMaskForImageTextRetrieval, model, processor)


def test_a_model_has_one_start():
    for other in ({"init_from": "run"}, {"preset": "tiny"}, {"vision": "a", "text": "b"}):
        with pytest.raises(ValueError, match="albef.*both set, but a model has one start: set .* to none"):
            ModelArguments(albef="ALBEF.pth", **other)
    assert ModelArguments(init_from="run", preset="tiny").preset == "tiny"  # as a task's config has it


def test_a_broken_start_is_told_in_one_line(tmp_path, processor):
    (tmp_path / "a.pth").write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit, match="albef: .*a.pth"):
        build_model(SyncMaskModel, ModelArguments(albef=str(tmp_path / "a.pth")), processor)
