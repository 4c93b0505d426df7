"""What users of transformers do with every class: half precision, splitting, compiling, exporting, any padding."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

import syncmask
from syncmask import SyncMaskForImageTextRetrieval, SyncMaskModel
from syncmask.inputs import text_first
from syncmask.towers import max_text_tokens

INPUTS = ("pixel_values", "input_ids", "attention_mask")
LABEL_SETS = {"subcategory": ["jeans", "skirt", "shirt"], "category": ["bottoms", "tops"]}
KINDS = ("Model", "ForPreTraining", "ForImageTextRetrieval", "ForComposedImageRetrieval", "ForImageTextClassification")


@pytest.fixture
def inputs(pairs):
    return {name: pairs[name] for name in INPUTS}


@pytest.fixture(params=KINDS)
def model(request, tiny_model):
    """Of every class, in eval mode, with weights far from their start."""
    config = copy.deepcopy(tiny_model.config)
    if request.param == "ForImageTextClassification":
        config.label_sets = LABEL_SETS
    torch.manual_seed(1)
    found = getattr(syncmask, f"SyncMask{request.param}")(config).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return found


def flat(outputs):
    """Name the tensors: {"loss": ..., "logits_by_set.category": ...}."""
    found = {}
    for name, value in outputs.items():
        found |= (
            {name: value} if isinstance(value, torch.Tensor) else flat({f"{name}.{k}": v for k, v in value.items()})
        )
    return found


@torch.no_grad()
def answers(model, **inputs):
    return flat(model(**inputs))


def row_outputs(found):
    """What belongs to one pair; ITC of a whole batch and logits of all with all do not."""
    return {name: value for name, value in found.items() if not name.endswith("loss") and "_per_" not in name}


def assert_close(seen, wanted, atol=1e-5, rtol=1e-4):
    assert seen.keys() == wanted.keys() and wanted
    for name, value in wanted.items():
        torch.testing.assert_close(
            seen[name], value, atol=atol, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}"
        )


# ------------------------------------------------------------------------------------------------ precision, splitting


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loads_and_answers_alike(model, inputs, dtype, tmp_path):
    wanted = answers(model, **inputs)
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    seen = answers(half, **inputs | {"pixel_values": inputs["pixel_values"].to(dtype)})
    for name, value in wanted.items():
        assert seen[name].dtype == (torch.float32 if name.endswith("loss") else dtype), name
        assert seen[name].isfinite().all(), name
        assert torch.nn.functional.cosine_similarity(seen[name].float().flatten(), value.flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_a_model_that_does_not_fit_is_split_and_answers_the_same(model, inputs, share, tmp_path):
    """The rest lies on the disk and is read module by module: nothing may use a weight outside its module's forward."""
    wanted = answers(model, **inputs)
    model.save_pretrained(tmp_path / "model")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    split = type(model).from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": int(share * size)},
        offload_folder=tmp_path / "offload",
    )
    assert set(split.hf_device_map.values()) == {"cpu", "disk"}
    whole = {name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules}
    assert whole and not [name for name in split.hf_device_map if name.rpartition(".")[0] in whole]
    assert_close(answers(split, **inputs), wanted, atol=0, rtol=0)
    base, given = getattr(split, "syncmask", split), (inputs["input_ids"], inputs["attention_mask"])
    own = getattr(model, "syncmask", model)
    with torch.no_grad():
        assert torch.equal(base.get_text_features(*given).pooler_output, own.get_text_features(*given).pooler_output)


# --------------------------------------------------------------------------------------------- compiling and exporting


@pytest.mark.slow
def test_it_compiles_in_one_graph(model, inputs):
    """No break in the graph, for any number of rows and tokens."""
    torch._dynamo.reset()
    with torch.no_grad():
        explained = torch._dynamo.explain(model)(**inputs)
        assert explained.graph_break_count == 0 and explained.graph_count == 1, explained.break_reasons
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
        for rows, length in ((4, 12), (3, 9), (2, 7)):
            part = {name: value[:rows, :length] if value.ndim == 2 else value[:rows] for name, value in inputs.items()}
            assert_close(flat(compiled(**part)), answers(model, **part))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("call", ["get_image_features", "get_text_features", "get_query_features"])
def test_features_compile_in_one_graph(model, inputs, call):
    function = getattr(model, call, None)
    if function is None:
        assert call == "get_query_features" or not isinstance(model, SyncMaskModel | SyncMaskForImageTextRetrieval)
        return
    wanted = {"get_image_features": INPUTS[:1], "get_text_features": INPUTS[1:], "get_query_features": INPUTS}[call]
    given = {name: inputs[name] for name in wanted}
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert torch.equal(compiled(**given).pooler_output, function(**given).pooler_output)
    torch._dynamo.reset()


@pytest.mark.slow
def test_it_is_exported_for_any_number_of_rows_and_tokens(model, inputs):
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=24)
    axes = {"pixel_values": {0: batch}, "input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}}
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, dynamic_shapes=axes).module()
        for rows, tokens in ((2, 24), (7, 5)):
            more = {
                "pixel_values": torch.randn(rows, 3, 32, 32),
                "input_ids": torch.randint(5, 60, (rows, tokens)),
                "attention_mask": (torch.arange(tokens) < torch.randint(2, tokens, (rows, 1))).long(),
            }
            assert_close(flat(exported(**more)), answers(model, **more))


# -------------------------------------------------------------------------------------------------------------- padding


def padded(tensor, extra, side, value=0):
    """Put `extra` columns behind each row's last real token, or move all padding before its first."""
    filler = torch.full((len(tensor), extra), value, dtype=tensor.dtype)
    return torch.cat([tensor, filler] if side == "right" else [filler, tensor], dim=1)


def on_the_left(inputs, names=INPUTS[1:]):
    """Move every row's padding to its head."""
    lengths = inputs["attention_mask"].sum(dim=1)
    rows = {name: [row.roll(row.shape[0] - int(n)) for row, n in zip(inputs[name], lengths)] for name in names}
    return inputs | {name: torch.stack(found) for name, found in rows.items()}


def test_padding_on_the_left_gives_equal_answers(model, inputs):
    left = on_the_left(inputs)
    assert (left["attention_mask"][1:, 0] == 0).all() and not torch.equal(left["input_ids"], inputs["input_ids"])
    assert_close(answers(model, **left), answers(model, **inputs), atol=0, rtol=0)
    # Further padding moves everything again; tokens are returned with the padding behind.
    more = {name: padded(left[name], 5, "left") for name in INPUTS[1:]} | {"pixel_values": left["pixel_values"]}
    seen, wanted = answers(model, **more), answers(model, **inputs)
    seen = {name: value[:, :12] if name in ("text_embeds", "fused") else value for name, value in seen.items()}
    real = inputs["attention_mask"].bool()
    for name, value in wanted.items():
        pick = real if name in ("text_embeds", "fused") else ...
        torch.testing.assert_close(seen[name][pick], value[pick], atol=1e-5, rtol=1e-4)


def test_text_features_take_either_padding(tiny_model, inputs):
    left = on_the_left(inputs)
    base = tiny_model.syncmask
    wanted = base.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    seen = base.get_text_features(left["input_ids"], left["attention_mask"])
    assert torch.equal(seen.pooler_output, wanted.pooler_output)
    assert torch.equal(seen.last_hidden_state, wanted.last_hidden_state)


def test_composed_queries_take_either_padding(tiny_config, inputs):
    torch.manual_seed(0)
    model = syncmask.SyncMaskForComposedImageRetrieval(tiny_config).eval()
    query, left = model.get_query_features(**inputs), model.get_query_features(**on_the_left(inputs))
    assert torch.equal(query.pooler_output, left.pooler_output)


def test_a_pretraining_step_takes_masks_with_either_padding(tiny_model, pairs, inputs):
    step = inputs | {
        "text_mask": (pairs["word_ids"] >= 0) & (pairs["word_ids"] % 2 == 0),
        "masked_input_ids": torch.where(pairs["word_ids"] == 0, 9, pairs["input_ids"]),
        "patch_mask": torch.rand(4, 16, generator=torch.Generator().manual_seed(3)).argsort(dim=1) < 6,
        "negative_image_index": torch.tensor([1, 0, 3, 2]),
        "negative_text_index": torch.tensor([3, 2, 1, 0]),
    }
    left = on_the_left(step, (*INPUTS[1:], "text_mask", "masked_input_ids"))
    assert_close(answers(tiny_model, **left), answers(tiny_model, **step), atol=0, rtol=0)


def test_what_comes_first_is_moved_and_nothing_else():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]])
    tokens = torch.arange(20).view(5, 4)
    moved_mask, moved, none = text_first(mask, tokens, None)
    assert moved_mask.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]]
    assert moved.tolist()[0] == [2, 3, 0, 1] and moved.tolist()[4] == [17, 18, 19, 16] and none is None
    assert torch.equal(moved[1:4], tokens[1:4])
    assert text_first(None, tokens)[1] is tokens


def test_the_parts_refuse_padding_on_the_left(tiny_model, inputs):
    """`encode_text` gives tokens that go with the caller's mask, so it moves nothing."""
    left = on_the_left(inputs)
    with pytest.raises(ValueError, match="4 of 4 texts are padded on the left.*text_first"):
        tiny_model.syncmask.encode_text(left["input_ids"], left["attention_mask"])


# -------------------------------------------------------------------------------------------- batches, lengths, numbers


def test_a_batch_equals_its_rows_alone(model, inputs):
    whole = row_outputs(answers(model, **inputs))
    for row, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
        alone = {name: inputs[name][row : row + 1] for name in INPUTS}
        alone |= {name: alone[name][:, :length] for name in INPUTS[1:]}
        for name, value in row_outputs(answers(model, **alone)).items():
            wanted = whole[name][row, : value.shape[1]] if name in ("text_embeds", "fused") else whole[name][row]
            torch.testing.assert_close(value[0], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("empty", [[0], [0, 1, 2, 3]])
def test_empty_texts_have_answers_of_their_own(model, inputs, empty):
    """[CLS][SEP] alone, in one row or in all of them, padded or not."""
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    ids[empty], mask[empty] = 0, 0
    ids[empty, 0], ids[empty, 1], mask[empty, :2] = 2, 3, 1
    seen = answers(model, pixel_values=inputs["pixel_values"], input_ids=ids, attention_mask=mask)
    assert all(value.isfinite().all() for value in seen.values())
    short = answers(model, pixel_values=inputs["pixel_values"][:1], input_ids=ids[:1, :2], attention_mask=mask[:1, :2])
    for name, value in row_outputs(short).items():
        wanted = seen[name][0, :2] if name in ("text_embeds", "fused") else seen[name][0]
        torch.testing.assert_close(value[0], wanted, atol=1e-5, rtol=1e-4)


def test_the_longest_text_is_read_and_one_token_more_is_refused(model, inputs):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 60, (4, 25), generator=generator)
    seen = answers(model, pixel_values=inputs["pixel_values"], input_ids=ids[:, :24])
    assert all(value.isfinite().all() for value in seen.values())
    with pytest.raises(ValueError, match="25 tokens long, but the text tower has positions for 24.*max_length=24"):
        model(pixel_values=inputs["pixel_values"], input_ids=ids)


def test_roberta_has_fewer_positions_than_rows(tiny_config):
    """Its positions begin behind the padding's, so a table of 24 rows reads 22 tokens."""
    sizes = tiny_config.text_config.to_dict() | {"model_type": "roberta", "pad_token_id": 1}
    tiny_config.text_config = AutoConfig.for_model(**sizes)
    model = SyncMaskModel(tiny_config).eval()
    ids = torch.randint(5, 60, (2, 23))
    assert max_text_tokens(model.text_model) == 22
    assert model.get_text_features(ids[:, :22]).pooler_output.isfinite().all()
    with pytest.raises(ValueError, match="23 tokens long, but the text tower has positions for 22"):
        model.get_text_features(ids)


def test_one_photo_with_many_texts(model, inputs):
    """Compared where all are compared with all; refused, with the way out, where rows are pairs."""
    one = inputs | {"pixel_values": inputs["pixel_values"][:1]}
    if isinstance(model, SyncMaskModel | SyncMaskForImageTextRetrieval):
        seen, whole = answers(model, **one), answers(model, **inputs)
        assert seen["logits_per_image"].shape == (1, 4) and "itm_logits" not in seen and "fused" not in seen
        torch.testing.assert_close(seen["logits_per_image"][0], whole["logits_per_image"][0], atol=1e-5, rtol=1e-4)
        return
    with pytest.raises(ValueError, match="got 1 photos and 4 texts"):
        model(**one)
    repeated = one | {"pixel_values": one["pixel_values"].expand(4, -1, -1, -1)}
    first = {name: inputs[name][:1] for name in INPUTS}
    seen, alone = answers(model, **repeated), row_outputs(answers(model, **first))
    for name, value in alone.items():
        torch.testing.assert_close(seen[name][:1], value, atol=1e-5, rtol=1e-4)


def test_towers_on_devices_apart_can_be_compared(tiny_model):
    """Tensors without values stand for those of two GPUs; mixed devices are refused as they are by real ones."""
    base = tiny_model.syncmask
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        texts, photos = torch.empty(3, 24, device="cuda:0"), torch.empty(2, 24, device="cuda:1")
        with pytest.raises(RuntimeError, match="device"):
            texts @ photos.T
        logits = base.compare(texts, photos)
        assert logits.device == texts.device and logits.shape == (3, 2)
