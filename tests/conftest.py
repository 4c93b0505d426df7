"""Fixtures that several test files share. Everything is generated here; real photos are extra."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A folder of real photos (SYNCMASK_TEST_DATA, else ../shared/data); the test is skipped without it."""
    folder = Path(os.environ.get("SYNCMASK_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no real photos here: set SYNCMASK_TEST_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def checkpoint_activations():
    """Switch activation checkpointing on, as training does, under its name of this transformers or an earlier one."""
    from syncmask.training.build import checkpoint_activations

    return checkpoint_activations


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Tests neither fill nor read the user's cache of datasets."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def garments(tmp_path_factory):
    """A small generated corpus, 40 items at 32 pixels, rows sorted by item (a Dataset without splits)."""
    from syncmask.processing.garments import make_garments

    return make_garments(40, seed=0, image_size=32, cache_dir=str(tmp_path_factory.mktemp("garments")))


@pytest.fixture(scope="session")
def processor(garments):
    """A processor for 32-pixel photos with a tokenizer trained on the small corpus."""
    from syncmask.processing.processing_syncmask import SyncMaskImageProcessor, SyncMaskProcessor
    from syncmask.processing.tokenizer import train_tokenizer

    return SyncMaskProcessor(SyncMaskImageProcessor(size=32), train_tokenizer(garments["text"]))


@pytest.fixture
def tiny_config():
    """2 + 2 + 2 layers and a decoder of 2, 32 wide, 32-pixel photos in 4 x 4 patches, 60 pieces, no dropout."""
    from syncmask import SyncMaskConfig

    layers = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    return SyncMaskConfig.tiny(
        image_size=32,
        vocab_size=60,
        max_position_embeddings=24,
        mask_token_id=4,
        projection_dim=24,
        vision_config=layers,
        text_config=layers,
        fusion_encoder_config={**layers, "encoder_hidden_size": 32},
        mim_decoder_config={**layers, "hidden_size": 16, "num_attention_heads": 2, "encoder_hidden_size": 32},
    )


@pytest.fixture
def tiny_model(tiny_config):
    """SyncMaskForPreTraining in eval mode; weights far from their start, so that attention is not flat."""
    from syncmask import SyncMaskForPreTraining

    torch.manual_seed(0)
    model = SyncMaskForPreTraining(tiny_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


@pytest.fixture
def pairs():
    """Four pairs for `tiny_model`: texts of 6, 3, 4 and 1 words, some of several pieces, padded to 12 tokens."""
    generator = torch.Generator().manual_seed(1)
    words = [[0, 0, 1, 2, 3, 3, 3, 4, 5], [0, 1, 1, 2], [0, 1, 2, -1, 3, 3], [0, 0]]
    word_ids = torch.full((4, 12), -1)
    input_ids = torch.zeros(4, 12, dtype=torch.long)
    for row, pieces in enumerate(words):
        length = len(pieces)
        word_ids[row, 1 : 1 + length] = torch.tensor(pieces)
        input_ids[row, 1 : 1 + length] = torch.randint(5, 60, (length,), generator=generator)
        input_ids[row, 0], input_ids[row, 1 + length] = 2, 3  # [CLS] and [SEP]
    return {
        "pixel_values": torch.randn(4, 3, 32, 32, generator=generator),
        "input_ids": input_ids,
        "attention_mask": (input_ids != 0).long(),
        "word_ids": word_ids,
        "item_ids": torch.tensor([7, 8, 7, 9]),
        "text_ids": torch.tensor([0, 1, 0, 1]),
    }


@pytest.fixture(scope="session")
def make_encoder(processor):
    """The function that makes an encoder over a tiny model of some class; a seed more is another revision."""
    from syncmask import SyncMaskConfig, SyncMaskForImageTextRetrieval
    from syncmask.retrieval.encoder import Encoder

    def make(seed=0, kind=SyncMaskForImageTextRetrieval, **overrides):
        ids = {"vocab_size": len(processor.tokenizer), "mask_token_id": processor.tokenizer.mask_token_id}
        torch.manual_seed(seed)
        model = kind(SyncMaskConfig.tiny(image_size=32, **ids, **overrides))
        with torch.no_grad():
            for parameter in model.parameters():  # far from their start, so that vectors point in many directions
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return Encoder(model, processor, device="cpu")

    return make


@pytest.fixture(scope="session")
def encoder(make_encoder):
    """An encoder with a matching head."""
    return make_encoder()


@pytest.fixture(scope="session")
def other(make_encoder):
    """An encoder of another revision, with shorter vectors."""
    return make_encoder(1, projection_dim=16)


@pytest.fixture
def files(garments, tmp_path):
    """Rows for a catalogue: twelve photos of a few items as files."""
    rows = []
    for place in range(12):
        row, path = garments[place], tmp_path / "photos" / f"{place:02}.png"
        path.parent.mkdir(exist_ok=True)
        row["image"].save(path)
        columns = {"category": row["category"], "price": place + 0.5}
        rows.append({"image": path, "item_id": row["item_id"], "text": row["text"], **columns})
    return rows


@pytest.fixture
def shop(tmp_path, encoder):
    """An empty catalogue."""
    from syncmask.retrieval.catalogue import Catalogue

    return Catalogue.open(tmp_path / "shop", encoder, create=True)


@pytest.fixture(scope="session")
def contents():
    """`contents(catalogue, names)` gives all rows as {photo id: {name: value}}, each photo once."""

    def read(catalogue, names=("photo_id", "item_id", "text", "category", "price")):
        rows = catalogue.snapshot().table.to_arrow().to_pylist()
        assert len({row["photo_id"] for row in rows}) == len(rows)
        return {row["photo_id"]: {name: row.get(name) for name in names} for row in rows}

    return read


@pytest.fixture(scope="session")
def counts():
    """`counts(report)` gives how many rows were added, updated, unchanged and skipped."""
    return lambda report: (report.added, report.updated, report.unchanged, len(report.skipped))


@pytest.fixture
def forwards(monkeypatch):
    """Photos that went through an image tower, by call."""
    from syncmask.retrieval.encoder import Encoder

    calls, real = [], Encoder._image_embeds
    monkeypatch.setattr(
        Encoder, "_image_embeds", lambda self, photos: (calls.append(len(photos)), real(self, photos))[1]
    )
    return calls


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser; without one the tests are skipped, unless SYNCMASK_REQUIRE_BROWSER says that there must be one."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        message = "no chromium here: install the package chromium"
        pytest.fail(message) if os.environ.get("SYNCMASK_REQUIRE_BROWSER") else pytest.skip(message)
    return path


@pytest.fixture
def browser(chromium, tmp_path):
    """A real headless browser with one empty page; it asks nothing of its own accord."""
    from playwright.sync_api import sync_playwright

    names = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking".split()
    names += ["disable-component-update", "disable-sync"]
    with sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=chromium,
            args=[f"--{name}" for name in names],
            viewport={"width": 1280, "height": 900},
        )
        yield context
        context.close()


# What the readers' tests and the end-to-end test are fed with, as fixtures that give the functions: test modules cannot
# import from one another.


FASHIONGEN_STRINGS = (
    "brand category composition concat_description department description gender name pose season subcategory"
)


def _write_fashiongen(file, rows, chunk=4):
    """All 16 keys with FashionGen's types: fixed-length latin-1 bytes (N, 1), photos (N, H, W, 3), index_2 (N,)."""
    import h5py
    import numpy as np

    values = {name: [f"{name} {row['view']}" for row in rows] for name in FASHIONGEN_STRINGS.split()}
    values["description"] = [f"{row['text']} Décolleté à l'été." for row in rows]
    values["concat_description"] = [row["text"].replace(" ", ".") for row in rows]
    values["name"] = [f"Café {row['category']}" for row in rows]
    values["category"] = [row["category"].upper() for row in rows]
    values["pose"] = [row["view"] for row in rows]
    numbers = np.array([int(row["item_id"].split("-")[1]) for row in rows])
    with h5py.File(file, "w") as out:
        for name, texts in values.items():
            encoded = np.array([text.encode("latin-1") for text in texts])
            out.create_dataset(f"input_{name}", data=encoded.reshape(-1, 1))
        out["input_productID"] = numbers.reshape(-1, 1).astype(np.int64)
        out["input_msrpUSD"] = np.linspace(10, 900, len(rows), dtype=np.float32).reshape(-1, 1)
        out["index"] = np.arange(len(rows)).reshape(-1, 1)
        out["index_2"] = np.arange(len(rows))
        photos = np.stack([np.asarray(row["image"].convert("RGB")) for row in rows])
        chunks = None if chunk is None else (chunk, *photos.shape[1:])
        out.create_dataset("input_image", data=photos, chunks=chunks, compression="gzip" if chunk else None)
    return file


@pytest.fixture(scope="session")
def write_fashiongen():
    """`write_fashiongen(file, rows, chunk=4)` writes rows of the generated corpus as FashionGen's HDF5."""
    return _write_fashiongen


def _write_fashioniq(root, garments):
    """Captions, splits and photos in FashionIQ's layout: pairs of neighbours in a family; one photo leaks."""
    first = {row["item_id"]: row["image"] for row in reversed(list(garments))}
    ids = [f"B{number:09d}" for number in range(len(first))]
    photos = dict(zip(ids, (first[item] for item in sorted(first)), strict=True))
    for name in ("captions", "image_splits", "images"):
        (root / name).mkdir(parents=True)
    for number, one in enumerate(ids):
        photos[one].convert("RGB").save(root / "images" / f"{one}.{'png' if number % 2 else 'jpg'}")
    splits = {}
    for place, kind in enumerate(("dress", "shirt", "toptee")):
        own = ids[place * 13 : place * 13 + 13]
        splits[kind, "train"], splits[kind, "val"], splits[kind, "test"] = own[:6], own[6:11], own[11:]
    splits["toptee", "val"].append(splits["shirt", "train"][0])
    for (kind, split), own in splits.items():
        (root / "image_splits" / f"split.{kind}.{split}.json").write_text(json.dumps(own))
        pairs = [
            {"candidate": own[0], "target": one, "captions": [f"is {one[-1]} tones", "is longer"]} for one in own[1:4]
        ]
        if kind == "shirt" and split == "val":
            pairs[0]["captions"] = ["", "has stripes"]
        if split == "test":
            pairs = [{"candidate": own[0], "captions": ["is red", "is blue"]}]
        (root / "captions" / f"cap.{kind}.{split}.json").write_text(json.dumps(pairs))
    return root


@pytest.fixture(scope="session")
def write_fashioniq():
    """`write_fashioniq(folder, garments)` writes the generated corpus as FashionIQ's folder."""
    return _write_fashioniq


# What training is tested with.


TINY_RUN = [
    *("--corpus", "garments", "--num_items", "40", "--image_size", "32", "--preset", "tiny", "--num_threads", "1"),
    *("--model_overrides", '{"patch_size": 8, "projection_dim": 16}', "--per_device_batch_size", "16"),
    *("--warmup_steps", "2", "--learning_rate", "1e-3", "--teacher_momentum", "0.9", "--deterministic"),
    *("--gate_every", "2", "--gate_max_steps", "4", "--mask_ramp_steps", "2"),
]


@pytest.fixture(scope="session")
def pretrain_tiny():
    """`pretrain_tiny(folder, *settings)` trains a tiny model, the same to the bit each time, and gives folder/run."""
    from syncmask.training import pretrain

    def train(folder, *settings):
        try:
            pretrain.main([*TINY_RUN, "--output_dir", str(folder), "--run_name", "run", *settings])
        finally:
            torch.use_deterministic_algorithms(False)
        return folder / "run"

    return train


# What publishing is tested with.


@pytest.fixture(scope="session")
def make_run(processor):
    """`make_run(folder, kind, **model_settings)` makes a finished run of a tiny model, untrained, with a result."""
    import yaml

    from syncmask import SyncMaskConfig, SyncMaskForImageTextClassification
    from syncmask.evaluation.loading import sha256
    from syncmask.evaluation.result import Result

    def make(folder, kind, dtype=torch.float32, **model_settings):
        labels = {"label_sets": {"category": ["tops", "bottoms"]}} if kind is SyncMaskForImageTextClassification else {}
        ids = {"vocab_size": len(processor.tokenizer), "mask_token_id": processor.tokenizer.mask_token_id}
        torch.manual_seed(0)
        model = kind(SyncMaskConfig.tiny(image_size=32, **ids, **labels))
        with torch.no_grad():
            for parameter in model.parameters():  # far from their start, so that outputs differ
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.to(dtype).save_pretrained(folder / "final")
        processor.save_pretrained(folder / "final")
        settings = {"data": {"corpus": "garments"}, "model": {"init_from": None, **model_settings}}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        (folder / "metrics.jsonl").write_text('{"step": 2, "epoch": 1, "split": "train", "itc": 0.5}\n')
        metrics = {"image_to_text/recall@1/itc": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}}
        about = {"path": str(folder / "final"), "sha256": sha256(folder / "final" / "model.safetensors")}
        corpus = {"name": "garments", "split": "test", "rows": 10, "items": 5}
        command = f"syncmask evaluate {folder} --protocol items"
        Result("items", 1, corpus, about, metrics, command=command).save(folder / "results")
        return folder

    return make


@pytest.fixture
def hub():
    """A Hub on this machine, see hub_server.py; `hub.api` is its user's client."""
    import importlib.util

    from huggingface_hub import HfApi

    spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.serve() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        # Whoever runs the tests offline means the real Hub, not this one.
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setenv("HF_HUB_OFFLINE", "0")
        patch.delenv("TRANSFORMERS_OFFLINE", raising=False)
        patch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between tries
        server.token, server.api = module.TOKEN, HfApi(server.url, token=module.TOKEN)
        yield server
