"""Fixtures that several test files share. Everything is generated here; real photos are extra."""

import os
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
