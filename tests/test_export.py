"""Exported graphs against torch, the description against the files, the client against the processor."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from typer.testing import CliRunner

from syncmask import (
    SyncMaskConfig,
    SyncMaskForComposedImageRetrieval,
    SyncMaskForImageTextRetrieval,
    SyncMaskForPreTraining,
    SyncMaskImageProcessor,
    SyncMaskProcessor,
)
from syncmask.evaluation.embedding import photos
from syncmask.evaluation.protocols import items
from syncmask.processing.corpus import CorpusIndex
from syncmask.retrieval import cli, export_description
from syncmask.retrieval import client as client_module
from syncmask.retrieval import export as export_module
from syncmask.retrieval.client import Client, Vectors, index_folder, search, to_rgb
from syncmask.retrieval.encoder import Encoder
from syncmask.retrieval.export import export_model
from syncmask.retrieval.export_check import check_export, check_table

TOWER = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
FUSION = {**TOWER, "num_hidden_layers": 2, "encoder_hidden_size": 32}


def build(kind, processor, **towers):
    """A model whose vocabulary and photo size are the processor's, with weights far from their start."""
    config = SyncMaskConfig.tiny(
        image_size=32,
        vocab_size=len(processor.tokenizer),
        max_position_embeddings=64,
        mask_token_id=processor.tokenizer.mask_token_id,
        projection_dim=24,
        vision_config={**TOWER, **towers.get("vision", {})},
        text_config={**TOWER, **towers.get("text", {})},
        fusion_encoder_config=FUSION,
        mim_decoder_config={**FUSION, "hidden_size": 16, "num_attention_heads": 2},
    )
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return Encoder(model, processor, device="cpu")


@pytest.fixture(scope="module")
def encoder(processor):
    return build(SyncMaskForPreTraining, processor)


@pytest.fixture(scope="module")
def folder(encoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "out"
    export_model(encoder, path, int8=True)
    return path


@pytest.fixture(scope="module")
def client(folder):
    return Client(folder, threads=1)


def texts_of(encoder, rows, length):
    """Token ids and masks (rows, length), each row shorter than the one before."""
    generator = torch.Generator().manual_seed(rows * 100 + length)
    vocabulary = encoder.model.config.text_config.vocab_size
    ids = torch.randint(5, vocabulary, (rows, length), generator=generator)
    mask = (torch.arange(length) < (length - torch.arange(rows)).clamp(min=2)[:, None]).long()
    return ids * mask, mask


def run(client, graph, **inputs):
    return client.run(graph, None, **{name: tensor.numpy() for name, tensor in inputs.items()})


# --------------------------------------------------------------------------------------------- graphs
@pytest.mark.parametrize("rows", [1, 3, 7])
@torch.no_grad()
def test_image_tower_agrees_with_torch_at_any_batch_size(encoder, client, rows):
    pixels = torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(rows))
    feats, embeds = run(client, "image", pixel_values=pixels)
    base = encoder.model.syncmask
    wanted = base.encode_image(pixels)
    np.testing.assert_allclose(embeds, wanted, atol=1e-4)
    np.testing.assert_allclose(feats, base.project_image(wanted), atol=1e-5)


@pytest.mark.parametrize("rows, length", [(1, 2), (1, 64), (3, 5), (7, 2), (7, 33), (5, 64)])
@torch.no_grad()
def test_text_tower_and_matching_head_agree_with_torch_at_any_size(encoder, client, rows, length):
    ids, mask = texts_of(encoder, rows, length)
    feats, embeds = run(client, "text", input_ids=ids, attention_mask=mask)
    base = encoder.model.syncmask
    wanted = base.encode_text(ids, mask)
    np.testing.assert_allclose(feats, base.project_text(wanted), atol=1e-5)
    real = mask.bool().numpy()
    np.testing.assert_allclose(embeds[real], wanted[real], atol=1e-4)

    image_embeds = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(length))
    image_index = torch.arange(rows) % 2
    inputs = {"text_embeds": wanted, "attention_mask": mask, "image_embeds": image_embeds, "image_index": image_index}
    (logits,) = run(client, "match", **inputs)
    expected = encoder.model.itm_logits(*inputs.values())
    np.testing.assert_allclose(logits, expected[:, 1] - expected[:, 0], atol=1e-4)


def test_padded_batches_equal_single_rows(encoder, client):
    ids, mask = texts_of(encoder, 4, 20)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    feats, embeds = run(client, "text", input_ids=ids, attention_mask=mask)
    _, image_embeds = run(client, "image", pixel_values=pixels)
    (logits,) = client.run(
        "match",
        text_embeds=embeds,
        attention_mask=mask.numpy(),
        image_embeds=image_embeds,
        image_index=np.array([3, 2, 1, 0]),
    )
    for row in range(4):
        length = int(mask[row].sum())
        alone, tokens = run(client, "text", input_ids=ids[row, None, :length], attention_mask=mask[row, None, :length])
        np.testing.assert_allclose(alone[0], feats[row], atol=1e-5)
        (logit,) = client.run(
            "match",
            text_embeds=tokens,
            attention_mask=mask[row, None, :length].numpy(),
            image_embeds=image_embeds[3 - row, None],
            image_index=np.array([0]),
        )
        np.testing.assert_allclose(logit[0], logits[row], atol=1e-4)


@pytest.mark.slow
def test_the_query_head_is_exported_and_a_model_without_matching_head_says_so(
    encoder, processor, garments, folder, tmp_path, monkeypatch
):
    composed = build(SyncMaskForComposedImageRetrieval, processor)
    composed.model.syncmask = composed._base = encoder.model.syncmask
    reuse_graphs(monkeypatch, folder, "image", "text")
    export_model(composed, tmp_path / "out")
    client = Client(tmp_path / "out", threads=1)
    pictures, texts = photos(garments, np.arange(5)), garments["text"][5:10]
    got = client.encode_composed(pictures, texts, batch_size=2)
    np.testing.assert_allclose(got, composed.encode_composed(pictures, texts, as_numpy=True), atol=1e-5)
    found = check_export(composed, tmp_path / "out", garments, max_rows=20)
    assert set(found["max_abs_difference"]["fp32"]) == {"image", "text", "query"}
    assert not any(name.endswith("/itm") for name in found["recall"]["torch"])
    with pytest.raises(ValueError, match="SyncMaskForComposedImageRetrieval has no matching head"):
        client.match(pictures, texts)


def reuse_graphs(monkeypatch, folder, *names):
    """Take these graphs from an earlier export: tracing one takes seconds."""
    write = export_module._write_graph

    def copy(name, graph, out):
        if name not in names:
            return write(name, graph, out)
        shutil.copyfile(folder / f"{name}.onnx", out / f"{name}.onnx")
        return {"files": {"fp32": f"{name}.onnx"}, **export_module._signature(out / f"{name}.onnx")}

    monkeypatch.setattr(export_module, "_write_graph", copy)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, towers",
    [
        (SyncMaskForImageTextRetrieval, {}),
        (SyncMaskForImageTextRetrieval, {"vision": {"model_type": "deit"}}),
        (
            SyncMaskForPreTraining,
            {"text": {"model_type": "roberta", "pad_token_id": 0, "max_position_embeddings": 130}},
        ),
    ],
)
def test_other_classes_and_towers(processor, garments, tmp_path, kind, towers):
    encoder = build(kind, processor, **towers)
    export_model(encoder, tmp_path / "out", int8=True, openvino=True, check_on=garments)
    differences = json.loads((tmp_path / "out" / "export.json").read_text())["check"]["max_abs_difference"]
    assert set(differences) == {"fp32", "int8", "openvino"}
    assert max(differences["fp32"].values()) < 1e-4 and max(differences["openvino"].values()) < 1e-4


# ---------------------------------------------------------------------------------------- description
def test_the_description_says_what_the_files_hold(encoder, folder, client):
    about = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    assert sorted(about["graphs"]) == ["image", "match", "text"]
    for name, graph in about["graphs"].items():
        client.run(name, **{put["name"]: example(put) for put in graph["inputs"]})
        session = client._sessions[name]
        for kind in ("inputs", "outputs"):
            described = {put["name"]: (put["shape"], put["dtype"]) for put in graph[kind]}
            real = {put.name: (put.shape, dtype(put.type)) for put in getattr(session, f"get_{kind}")()}
            assert described == real
    assert about["graphs"]["text"]["inputs"][0]["shape"] == ["batch", "length"]
    assert about["graphs"]["match"]["inputs"][2]["shape"] == ["images", 17, 32]
    assert about["model"] == {"class": "SyncMaskForPreTraining", "revision": encoder.revision}
    assert about["temperature"]["value"] == pytest.approx(encoder.model.syncmask.temperature.item())
    assert about["text"]["special_tokens"]["cls_token"] == {"token": "[CLS]", "id": 2}
    onnx = pytest.importorskip("onnx")
    assert onnx.load(folder / "image.onnx").opset_import[0].version == about["opset"]


def dtype(name):
    return {"tensor(float)": "float32", "tensor(int64)": "int64"}[name]


def example(put):
    """Ones: a valid token, mask and pixel, and the second of two photos."""
    return np.ones([axis if isinstance(axis, int) else 2 for axis in put["shape"]], dtype=put["dtype"])


def test_files_hold_no_path_of_this_machine(folder):
    here = [str(Path(export_module.__file__).parents[1]), str(Path(torch.__file__).parents[1]), str(folder)]
    for file in folder.iterdir():
        content = file.read_bytes()
        assert not [path for path in here if path.encode() in content], file.name


def test_the_int8_files_are_smaller_and_close(folder, client, garments):
    for graph in ("image", "text", "match"):
        assert (folder / f"{graph}.int8.onnx").stat().st_size < 0.9 * (folder / f"{graph}.onnx").stat().st_size
    quantised = Client(folder, "int8", threads=1)
    pictures = photos(garments, np.arange(8))
    cosines = (quantised.encode_image(pictures) * client.encode_image(pictures)).sum(axis=1)
    assert 0.98 < cosines.min() < 1 - 1e-6
    with pytest.raises(ValueError, match="'fp8' was not exported, only fp32, int8"):
        Client(folder, "fp8")


def test_a_model_of_another_precision_is_refused(encoder, processor, tmp_path):
    half = Encoder(copy.deepcopy(encoder.model).to(torch.bfloat16), processor, device="cpu")
    with pytest.raises(ValueError, match="torch.bfloat16 on cpu; wanted torch.float32 on the CPU"):
        export_model(half, tmp_path / "out")


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"size": {"height": 64, "width": 64}}, "size is 64 x 64, the model's photos are 32 x 32"),
        ({"do_center_crop": True}, "do_center_crop=True"),
        ({"do_resize": False}, "do_resize=False"),
    ],
)
def test_photos_that_a_client_could_not_prepare_are_refused(encoder, processor, tmp_path, changed, message):
    other = SyncMaskProcessor(SyncMaskImageProcessor(**{"size": 32, **changed}), processor.tokenizer)
    with pytest.raises(ValueError, match=message):
        export_model(Encoder(encoder.model, other, device="cpu"), tmp_path / "out")
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- preprocessing
def odd_photos():
    """Photos of many kinds, of several sizes."""
    noise = np.random.default_rng(0).integers(0, 256, (41, 57, 4), dtype=np.uint8)
    rgb, rgba = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    rotated = rgb.copy()
    rotated.getexif().update(exif)
    palette = rgb.quantize(16)
    palette.info["transparency"] = 3
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    return {
        "RGB": rgb,
        "RGBA": rgba,
        "L": rgb.convert("L"),
        "LA": rgba.convert("LA"),
        "P with transparency": palette,
        "1": rgb.convert("1"),
        "CMYK": rgb.convert("CMYK"),
        "I;16": deep,
        "F": Image.fromarray(noise[..., 0].astype(np.float32) / 255),
        "EXIF-rotated": rotated,
        "tiny": rgb.resize((1, 1)),
        "tall": rgb.resize((3, 200)),
        "large": rgb.resize((700, 500)),
    }


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"resample": 2, "image_mean": [0.48, 0.45, 0.4], "image_std": [0.22, 0.23, 0.28]},
        {"do_normalize": False},
        {"do_rescale": False, "size": {"height": 20, "width": 36}},
    ],
)
def test_the_clients_pixels_are_the_processors(encoder, processor, client, monkeypatch, changed):
    how = SyncMaskImageProcessor(**{"size": 32, **changed})
    size = (how.size.height, how.size.width)
    monkeypatch.setattr(export_description, "photo_size", lambda config: size)
    other = Encoder(encoder.model, SyncMaskProcessor(how, processor.tokenizer), device="cpu")
    monkeypatch.setattr(client, "about", export_description.describe(other))
    for name, picture in odd_photos().items():
        wanted = how(picture, return_tensors="np")["pixel_values"]
        got = client.pixels([picture])
        assert got.dtype == np.float32 and np.array_equal(got, wanted), name


def test_the_client_opens_files_as_the_processor_does(client, processor, tmp_path):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    for name in ("RGB", "EXIF-rotated"):
        picture = odd_photos()[name]
        picture.save(tmp_path / f"{name}.jpg", exif=picture.getexif())
    paths = sorted(tmp_path.iterdir())
    wanted = processor(images=[*paths, paths[0].read_bytes()])["pixel_values"]
    np.testing.assert_array_equal(client.pixels([*paths, paths[0].read_bytes()]), wanted)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "EXIF-rotated.jpg"))
    assert to_rgb(Image.open(tmp_path / "EXIF-rotated.jpg")).size == upright.size == (41, 57)
    (tmp_path / "broken.jpg").write_bytes(paths[0].read_bytes()[:100])
    for broken in (tmp_path / "broken.jpg", tmp_path / "missing.jpg"):
        with pytest.raises(ValueError, match=broken.name):
            client.encode_image([broken])


def test_the_clients_tokens_are_the_processors(client, processor, garments):
    texts = [*garments["text"][:6], "a", "Été, RED!! 中文 ☂", "red " * 5000]
    wanted = processor(text=texts)
    got = client.tokens(texts)
    assert got["input_ids"].shape == (9, processor.tokenizer.model_max_length)
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(got[name], wanted[name])


def test_a_tokenizer_without_a_limit_is_cut_at_the_models(encoder, processor, tmp_path):
    limit = processor.tokenizer.model_max_length
    processor.tokenizer.model_max_length = int(1e30)
    try:
        assert export_description.describe(encoder)["text"]["max_length"] == 64
        assert len(export_description.cutting_tokenizer(encoder).encode("red " * 100).ids) == 64
    finally:
        processor.tokenizer.model_max_length = limit


# ------------------------------------------------------------------------------------------- client
def test_the_client_says_what_the_encoder_says(encoder, client, garments):
    pictures = [*photos(garments, np.arange(10)), *odd_photos().values()]
    texts = garments["text"][: len(pictures)]
    np.testing.assert_allclose(
        client.encode_image(pictures, batch_size=4), encoder.encode_image(pictures, as_numpy=True), atol=1e-5
    )
    np.testing.assert_allclose(
        client.encode_text(texts, batch_size=4), encoder.encode_text(texts, as_numpy=True), atol=1e-5
    )
    np.testing.assert_allclose(client.match(pictures, texts, batch_size=4), encoder.match(pictures, texts), atol=1e-4)
    # Without a query head both sum the vectors of photo and text.
    np.testing.assert_allclose(
        client.encode_composed(pictures, texts), encoder.encode_composed(pictures, texts, as_numpy=True), atol=1e-5
    )
    assert client.encode_image([]).shape == (0, 24) and client.match([], []).shape == (0,)
    for compare in (client.match, client.encode_composed):
        with pytest.raises(ValueError, match="got 1 photos and 2 texts"):
            compare(pictures[:1], texts[:2])


@pytest.fixture
def shop(tmp_path, garments):
    """A folder of eight photos in two sub-folders, and one that is none."""
    for row, picture in enumerate(photos(garments, np.arange(8))):
        path = tmp_path / "shop" / ("a" if row < 4 else "b") / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    (tmp_path / "shop" / "broken.jpg").write_bytes(b"no photo")
    (tmp_path / "shop" / "notes.txt").write_text("no photo either")
    return tmp_path / "shop"


def test_search_ranks_by_cosine_and_rerank_by_the_matching_head(encoder, client, shop, garments, tmp_path):
    vectors, unread = index_folder(client, shop, batch_size=3)
    assert len(vectors.names) == 8 and vectors.names[0] == "a/0.png"
    assert len(unread) == 1 and "broken.jpg" in unread[0]
    paths = [shop / name for name in vectors.names]
    text = garments["text"][20]
    cosines = encoder.encode_image(paths, as_numpy=True) @ encoder.encode_text([text], as_numpy=True)[0]
    hits = search(client, vectors, text=text, k=100)
    assert [hit["photo"] for hit in hits] == [vectors.names[row] for row in np.argsort(-cosines)]
    np.testing.assert_allclose([hit["score"] for hit in hits], np.sort(cosines)[::-1], atol=1e-5)

    logits = encoder.match(paths, [text] * 8)
    best = np.argsort(-cosines)[:5]
    reranked = search(client, vectors, text=text, k=3, rerank=5)
    assert [hit["photo"] for hit in reranked] == [vectors.names[row] for row in best[np.argsort(-logits[best])][:3]]
    assert search(client, vectors, image=paths[6], k=1)[0]["photo"] == vectors.names[6]
    both = search(client, vectors, image=paths[6], text=text, k=1)[0]["score"]
    query = encoder.encode_composed([paths[6]], [text], as_numpy=True)[0]
    assert both == pytest.approx((encoder.encode_image(paths, as_numpy=True) @ query).max(), abs=1e-5)


def test_saved_vectors_come_back_and_strangers_are_refused(client, shop, tmp_path):
    vectors, _ = index_folder(client, shop)
    vectors.save(tmp_path / "vectors.npz")
    loaded = Vectors.load(tmp_path / "vectors.npz")
    assert (loaded.names, loaded.folder, loaded.revision) == (vectors.names, str(shop), client.revision)
    np.testing.assert_array_equal(loaded.vectors, vectors.vectors)
    loaded.revision = "another"
    with pytest.raises(ValueError, match="of revision another, .* index again"):
        search(client, loaded, text="red")
    with pytest.raises(ValueError, match="nothing to search for"):
        search(client, vectors)
    with pytest.raises(ValueError, match="re-ranking compares a text"):
        search(client, vectors, image=shop / "a" / "0.png", rerank=3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no photo that can be read"):
        index_folder(client, tmp_path / "empty")
    content = (tmp_path / "vectors.npz").read_bytes()
    for name, data in {"cut.npz": content[:200], "text.npz": b"text", "empty.npz": b""}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} holds no vectors"):
            Vectors.load(tmp_path / name)
    np.save(tmp_path / "pickled.npz", np.array([object()]), allow_pickle=True)
    with pytest.raises((ValueError, FileNotFoundError)):
        Vectors.load(tmp_path / "pickled.npz.npy")


def test_the_clients_command_line(folder, shop, tmp_path, capsys):
    def call(*arguments):
        client_module.main(["--model", str(folder), "--threads", "1", *map(str, arguments)])
        return capsys.readouterr()

    said = call("index", shop, tmp_path / "vectors.npz")
    assert "8 photos" in said.out and "left out" in said.err and "broken.jpg" in said.err
    hits = json.loads(call("search", tmp_path / "vectors.npz", "--text", "red", "--k", "3", "--json").out)
    assert len(hits) == 3
    lines = call("search", shop, "--text", "red", "--k", "3", "--rerank", "4").out.splitlines()
    assert len(lines) == 3 and re.fullmatch(r"[+-]0\.\d{3} +[+-]\d+\.\d{2}  [ab]/\d\.png", lines[0])
    assert "probability" in call("match", shop / "a" / "0.png", "red").out
    with pytest.raises(SystemExit, match="Error: .*no-such.npz"):
        call("search", tmp_path / "no-such.npz", "--text", "red")


# -------------------------------------------------------------------------------------------- check
def test_the_check_is_the_protocol_items(encoder, folder, garments):
    first, second = garments.unique("item_id")[1:3]  # two items of one text: texts and items are numbered apart
    shared = garments[garments["item_id"].index(first)]["text"]
    texts = [shared if item == second else text for item, text in zip(garments["item_id"], garments["text"])]
    garments = garments.remove_columns("text").add_column("text", texts)
    found = check_export(encoder, folder, garments, rerank_k=4)
    result = items(encoder.model, encoder.processor, garments, rerank_k=4)
    assert "text_to_image/recall@5/itm" in found["recall"]["torch"]
    for name, value in found["recall"]["torch"].items():
        assert value == pytest.approx(result.value(name), abs=1e-9), name
    assert found["recall"]["fp32"] == found["recall"]["torch"]
    assert max(found["max_abs_difference"]["fp32"].values()) < 1e-4
    assert 1e-4 < found["max_abs_difference"]["int8"]["image"] < 0.1
    table = check_table(found)
    assert "match (logit)" in table and re.search(r"text to image/recall@1/itc .*[+-]\d+\.\d", table)
    assert found["photos"] == len(garments) and found["texts"] == len(CorpusIndex.from_dataset(garments).texts)


def test_an_export_that_differs_from_torch_never_appears(encoder, processor, garments, folder, tmp_path, monkeypatch):
    other = build(SyncMaskForPreTraining, processor)
    with torch.no_grad():
        other.model.syncmask.vision_projection.bias[0] += 0.01
    reuse_graphs(monkeypatch, folder, "image", "text", "match")
    with pytest.raises(
        ValueError, match="image vectors of the fp32 export differ from torch's by .*Nothing was written"
    ):
        export_model(other, tmp_path / "out", check_on=garments.select(range(6)))
    assert not any(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- folder
def test_an_existing_folder_is_never_lost(encoder, folder, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="holds an export already; add --overwrite"):
        export_model(encoder, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="is no export"):
        export_model(encoder, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").is_file()


def test_overwriting_replaces_all_and_a_failure_changes_nothing(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_write_graph", lambda name, graph, folder: {"files": {"fp32": f"{name}.onnx"}})
    out = tmp_path / "deep" / "out"
    export_model(encoder, out)
    (out / "old.onnx").write_text("of the export before")
    before = sorted(path.name for path in out.iterdir())
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="disk"):
        patch.setattr(export_module, "cutting_tokenizer", failing)
        export_model(encoder, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == before
    export_model(encoder, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["client.py", "export.json", "tokenizer.json"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    (tmp_path / "empty").mkdir()
    export_model(encoder, tmp_path / "empty")
    assert (tmp_path / "empty" / "export.json").is_file()


def failing(*args):
    raise RuntimeError("the disk is full")


def test_a_missing_package_is_named_with_the_extra_that_brings_it(encoder, tmp_path, monkeypatch):
    find = export_module.importlib.util.find_spec
    for lost, extra, options in (("onnxscript", "export", {}), ("openvino", "openvino", {"openvino": True})):
        finders = {lost: lambda name: None}
        with monkeypatch.context() as patch, pytest.raises(ImportError, match=rf'{lost}: .*"syncmask\[{extra}\]"'):
            patch.setattr("importlib.util.find_spec", lambda name, known=finders: known.get(name, find)(name))
            export_model(encoder, tmp_path / "out", **options)


def test_the_command_says_in_one_line_what_is_wrong(encoder, folder, monkeypatch):
    monkeypatch.setattr(Encoder, "from_pretrained", lambda name, device: encoder)
    said = CliRunner().invoke(cli.app, ["export", "a-run", str(folder)])
    assert said.exit_code == 1
    assert (
        said.stderr
        == f"Error: {folder} holds an export already; add --overwrite to replace it, or choose another name.\n"
    )


@pytest.mark.slow
def test_the_command_exports_checks_and_prints(encoder, garments, tmp_path):
    encoder.model.save_pretrained(tmp_path / "model")
    encoder.processor.save_pretrained(tmp_path / "model")
    garments.save_to_disk(tmp_path / "corpus")
    command = [sys.executable, "-m", "syncmask", "export", tmp_path / "model", tmp_path / "out", "--int8"]
    done = subprocess.run([*command, "--check", tmp_path / "corpus"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^image +0\.\d\d +0\.\d\d$", done.stdout, re.MULTILINE)
    assert re.search(r"^text to image/recall@10/itc .* [+-]\d+\.\d$", done.stdout, re.MULTILINE)
    again = subprocess.run(
        [*command, "--split", "nowhere", "--check", tmp_path / "corpus"], capture_output=True, text=True
    )
    assert again.returncode == 1 and "has no split 'nowhere'" in again.stderr


KILLED = """
import os, signal, sys, torch
from syncmask.retrieval import export
from syncmask.retrieval.encoder import Encoder
def die(*args): os.kill(os.getpid(), signal.SIGKILL)
setattr(export, sys.argv[3], die)
export.export_model(Encoder.from_pretrained(sys.argv[1], device="cpu"), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["_signature", "cutting_tokenizer", "_put_in_place"])
def test_a_kill_leaves_no_half_folder(encoder, tmp_path, moment):
    encoder.model.save_pretrained(tmp_path / "model")
    encoder.processor.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "model"), str(tmp_path / "out"), moment]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["model"]


# ---------------------------------------------------------------------------------- without torch
def requirements(*names):
    """The distributions and those that they need."""
    found = {}
    for name in names:
        if name not in found:
            found[name] = distribution(name)
            lines = [line for line in found[name].requires or [] if "extra ==" not in line]
            needed = [re.match(r"[\w.-]+", line)[0] for line in lines if "python_version" not in line]
            found |= requirements(*(need for need in needed if installed(need)))
    return found


def installed(name):
    try:
        return distribution(name)
    except ImportError:
        return None


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """The python of a new environment with the client's four packages and what they need: no torch."""
    home = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    site = next(home.glob("lib/python*/site-packages"))
    for found in requirements("onnxruntime", "tokenizers", "pillow", "numpy").values():
        for name in {file.parts[0] for file in found.files if file.parts[0] not in ("..", "__pycache__")}:
            source = found.locate_file(name)
            if source.exists() and not (site / name).exists():
                (site / name).symlink_to(source)
    return home / "bin" / "python"


def test_the_client_runs_without_torch_and_ranks_alike(encoder, folder, shop, garments, bare_python, tmp_path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def call(*arguments):
        return subprocess.run([bare_python, *arguments], capture_output=True, text=True, cwd=tmp_path, env=clean)

    for absent in ("torch", "transformers", "syncmask"):
        assert f"No module named '{absent}'" in call("-c", f"import {absent}").stderr
    script, text = folder / "client.py", garments["text"][20]
    indexed = call(script, "index", shop, "vectors.npz")
    assert indexed.returncode == 0, indexed.stderr
    found = call(script, "search", "vectors.npz", "--text", text, "--k", "8", "--rerank", "5", "--json")
    hits = json.loads(found.stdout)

    paths = sorted(shop.glob("*/*.png"))
    cosines = encoder.encode_image(paths, as_numpy=True) @ encoder.encode_text([text], as_numpy=True)[0]
    logits = encoder.match(paths, [text] * 8)
    order = np.argsort(-cosines)
    order = [*order[:5][np.argsort(-logits[order[:5]])], *order[5:]]
    assert [hit["photo"] for hit in hits] == [paths[row].relative_to(shop).as_posix() for row in order]
    np.testing.assert_allclose([hit["score"] for hit in hits], cosines[order], atol=1e-5)
    np.testing.assert_allclose([hit["match"] for hit in hits[:5]], logits[order[:5]], atol=1e-4)
