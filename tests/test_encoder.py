"""The encoder against the model called by hand, row by row; what its revision depends on."""

import copy
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from syncmask import (
    SyncMaskForComposedImageRetrieval,
    SyncMaskForImageTextRetrieval,
    SyncMaskForPreTraining,
    SyncMaskModel,
    SyncMaskProcessor,
)
from syncmask.evaluation.loading import model_folder
from syncmask.processing.processing_syncmask import SyncMaskImageProcessor
from syncmask.retrieval.encoder import Encoder


@pytest.fixture(scope="module")
def photos(garments):
    return [garments[row]["image"] for row in range(5)]


TEXTS = ["a red shirt", "blue", "long green dress with a belt and pockets", "red hat", "a red shirt"]


@torch.no_grad()
def by_hand(encoder, photo=None, text=None):
    """One row through the model's own calls."""
    if photo is not None:
        return encoder.model.get_image_features(**encoder.processor(images=photo)).pooler_output[0]
    return encoder.model.get_text_features(**encoder.processor(text=text)).pooler_output[0]


def test_vectors_are_the_models_whatever_the_batch(encoder, photos):
    for batch_size in (1, 2, 32):
        images, texts = encoder.encode_image(photos, batch_size), encoder.encode_text(TEXTS, batch_size)
        for row, (photo, text) in enumerate(zip(photos, TEXTS)):
            torch.testing.assert_close(images[row], by_hand(encoder, photo=photo), atol=1e-5, rtol=0)
            torch.testing.assert_close(texts[row], by_hand(encoder, text=text), atol=1e-5, rtol=0)
    assert images.shape == (5, encoder.dim) and images.dtype == torch.float32 and not images.is_inference()
    torch.testing.assert_close(images.norm(dim=1), torch.ones(5))


def test_without_normalising_the_direction_stays(encoder, photos):
    raw, unit = encoder.encode_image(photos, normalize=False), encoder.encode_image(photos)
    assert (raw.norm(dim=1) - 1).abs().min() > 0.01
    torch.testing.assert_close(torch.nn.functional.normalize(raw, dim=1), unit)
    assert not torch.allclose(encoder.encode_text(TEXTS, normalize=False).norm(dim=1), torch.ones(5))


def test_photos_come_as_pixels_paths_and_bytes(encoder, photos, tmp_path):
    photos[0].save(tmp_path / "a.png")
    buffer = BytesIO()
    photos[0].save(buffer, "PNG")
    found = encoder.encode_image([photos[0], tmp_path / "a.png", str(tmp_path / "a.png"), buffer.getvalue()])
    assert all(torch.allclose(row, found[0], atol=1e-6) for row in found)


def test_arrays_and_nothing(encoder, photos):
    found = encoder.encode_image(photos[:2], as_numpy=True)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    np.testing.assert_array_equal(found, encoder.encode_image(photos[:2]).numpy())
    assert encoder.encode_image([]).shape == encoder.encode_text([]).shape == (0, encoder.dim)
    assert encoder.match([], []).shape == (0,)


def test_composed_queries_come_from_the_query_head(make_encoder, processor, photos):
    encoder = make_encoder(kind=SyncMaskForComposedImageRetrieval)
    found = encoder.encode_composed(photos, TEXTS, batch_size=2)
    for row, (photo, text) in enumerate(zip(photos, TEXTS)):
        with torch.no_grad():
            wanted = encoder.model.get_query_features(**processor(images=photo, text=text)).pooler_output[0]
        torch.testing.assert_close(found[row], wanted, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no matching head"):
        encoder.match(photos[:1], TEXTS[:1])


def test_without_a_query_head_both_towers_are_summed(encoder, photos):
    both = encoder.encode_image(photos) + encoder.encode_text(TEXTS)
    wanted = torch.nn.functional.normalize(both, dim=1)
    torch.testing.assert_close(encoder.encode_composed(photos, TEXTS, batch_size=2), wanted, atol=1e-5, rtol=0)


def test_matching_is_that_of_each_pair_alone(encoder, photos):
    rows, texts = [0, 1, 0, 2, 1, 0], [*TEXTS[:4], TEXTS[0], TEXTS[0]]
    for batch_size in (1, 2, 32):  # 4, 8 and 128 pairs at a time
        found = encoder.match([photos[row] for row in rows], texts, batch_size)
        for place, (row, text) in enumerate(zip(rows, texts)):
            with torch.no_grad():
                inputs = encoder.processor(images=photos[row], text=text)
                logits = encoder.model(**inputs).itm_logits[0]
            assert found[place] == pytest.approx(float(logits[1] - logits[0]), abs=1e-4)
    assert len(set(np.round(found, 4))) == 5  # the first pair is the last one, too


def test_a_photo_in_many_rows_is_encoded_once(encoder, photos, monkeypatch):
    seen = []
    real = SyncMaskModel.encode_image
    monkeypatch.setattr(
        SyncMaskModel,
        "encode_image",
        lambda self, pixels, **kw: (seen.append(len(pixels)), real(self, pixels, **kw))[1],
    )
    encoder.match([photos[0]] * 20 + [photos[1]], ["red", "blue", "hat"] * 7)
    assert sum(seen) == 2


def test_what_is_wrong_is_told(encoder, photos):
    with pytest.raises(ValueError, match="2 photos and 1 texts"):
        encoder.match(photos[:2], ["a"])
    with pytest.raises(ValueError, match="texts is a single str; wanted a list"):
        encoder.encode_text("a red shirt")
    with pytest.raises(ValueError, match="photos is a single"):
        encoder.encode_image(photos[0])
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        encoder.encode_image(["nowhere.png"])
    with pytest.raises(ValueError, match="12 bytes"):
        encoder.encode_image([b"not a photo!"])


def test_cut_texts_are_named(encoder):
    longest = "red " * (encoder.max_tokens - 2)  # and the two special tokens
    assert encoder.cut_texts(["red", "red " * 5000, "", longest, longest + "red"]) == [1, 4]
    torch.testing.assert_close(
        encoder.encode_text(["red " * 5000]),
        encoder.encode_text(["red " * (encoder.max_tokens - 2)]),
        atol=1e-5,
        rtol=0,
    )


# ------------------------------------------------------------------------------------------------------ revision


def test_the_revision_is_that_of_towers_and_preprocessing(make_encoder, processor, tmp_path):
    model = make_encoder(kind=SyncMaskForPreTraining).model
    first = Encoder(model, processor, device="cpu")
    before = first.revision
    # A call leaves its padding and cutting in the tokenizer.
    processor.tokenizer(TEXTS, padding="max_length", max_length=9, truncation=True)
    assert len(before) == 64 and Encoder(model, processor, device="cpu").revision == before
    model.save_pretrained(tmp_path / "run" / "final")
    processor.save_pretrained(tmp_path / "run" / "final")
    loaded = Encoder.from_pretrained(tmp_path / "run", device="cpu")
    assert type(loaded.model) is SyncMaskForPreTraining and loaded.revision == before
    retrieval = SyncMaskForImageTextRetrieval.from_pretrained(tmp_path / "run" / "final")
    assert Encoder(retrieval, processor, device="cpu").revision == before  # another class over the same towers
    retrieval.itm_head.weight.data += 1
    assert Encoder(retrieval, processor, device="cpu").revision == before
    assert Encoder.from_pretrained(tmp_path / "run", device="cpu", dtype=torch.bfloat16).revision != before


@pytest.mark.parametrize("name", ["vision_model", "vision_projection", "text_model", "text_projection"])
def test_any_weight_of_a_tower_makes_a_new_revision(make_encoder, processor, name):
    model = make_encoder().model
    before = Encoder(model, processor, device="cpu").revision
    last = list(getattr(model.syncmask, name).parameters())[-1]
    last.data.view(-1)[0] += 1e-3
    assert Encoder(model, processor, device="cpu").revision != before


def test_preprocessing_makes_a_new_revision(encoder, processor, garments):
    from syncmask.processing.tokenizer import train_tokenizer

    others = [
        SyncMaskProcessor(SyncMaskImageProcessor(size=32, resample=Image.Resampling.NEAREST), processor.tokenizer),
        SyncMaskProcessor(SyncMaskImageProcessor(size=32, image_mean=[0.4] * 3), processor.tokenizer),
        SyncMaskProcessor(processor.image_processor, train_tokenizer(garments["text"][:40])),
        SyncMaskProcessor(processor.image_processor, copy.deepcopy(processor.tokenizer)),
    ]
    others[-1].tokenizer.model_max_length -= 1
    found = {Encoder(encoder.model, other, device="cpu").revision for other in others}
    assert len(found) == 4 and encoder.revision not in found


def test_models_are_found_in_runs_and_refused_elsewhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither a model"):
        model_folder(tmp_path)
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text('{"model_type": "syncmask", "architectures": ["BertModel"]}')
    assert model_folder(tmp_path) == model_folder(tmp_path / "final") == tmp_path / "final"
    assert model_folder("somebody/model") == "somebody/model"
    with pytest.raises(ValueError, match="class 'BertModel'; wanted one of SyncMaskModel"):
        Encoder.from_pretrained(tmp_path)


def test_bfloat16_weights_give_nearly_the_same(processor, photos, encoder):
    half = Encoder(copy.deepcopy(encoder.model).bfloat16(), processor, device="cpu")
    found = half.encode_image(photos)
    assert found.dtype == torch.float32 and (found * encoder.encode_image(photos)).sum(dim=1).min() > 0.99
