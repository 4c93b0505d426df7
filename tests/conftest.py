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
