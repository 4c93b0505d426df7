"""Photos by (epoch, row), batches, and the equality of the two ways to pixels."""

import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from syncmask.processing.augment import Augmentation
from syncmask.processing.collator import Collator, PhotoDataset, UnreadablePhoto, normalise
from syncmask.processing.corpus import CorpusIndex
from syncmask.processing.garments_variants import make_garment_variants
from syncmask.processing.processing_syncmask import open_image, split_words


@pytest.fixture(scope="module")
def odd_rows(tmp_path_factory):
    """Photos of several sizes, shapes and modes, by path."""
    folder = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(0)
    paths = []
    for number, (size, mode) in enumerate([((32, 32), "RGB"), ((50, 20), "RGBA"), ((9, 70), "L"), ((64, 64), "P")]):
        noise = Image.fromarray(rng.integers(0, 256, (*size[::-1], 4), dtype=np.uint8))
        noise.convert(mode).save(folder / f"{number}.png")
        paths.append(str(folder / f"{number}.png"))
    texts = ["a red shirt", "A v-neck, blue", "long " * 9 + "coat", "Red"]
    rows = datasets.Dataset.from_dict({"image": paths, "text": texts, "item_id": ["a", "a", "b", "c"]})
    return rows.cast_column("image", datasets.Image())


def photos(rows, **options):
    options = {"image_size": 32, "seed": 0, "augment": False} | options
    return PhotoDataset(rows, CorpusIndex.from_dataset(rows), **options)


def test_record(odd_rows):
    record = photos(odd_rows)[(3, 2)]
    assert record["pixel_values"].shape == (3, 32, 32) and record["pixel_values"].dtype == np.uint8
    assert record["text"].startswith("long long")
    assert (record["row_id"], record["item_id"], record["text_id"]) == (2, 1, 2)
    assert {type(record[name]) for name in ("row_id", "item_id", "text_id")} == {int}


def test_without_augmentation_the_pixels_are_the_processors(odd_rows, garments, processor):
    options = processor.image_processor
    for rows in (odd_rows, garments.select(range(6))):
        records = photos(rows).__getitems__([(epoch, row) for epoch, row in enumerate(range(len(rows)))])
        batch = Collator(processor)(records)
        wanted = processor(images=[rows[row]["image"] for row in range(len(rows))])["pixel_values"]
        found = normalise(batch["pixel_values"], options.image_mean, options.image_std)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    other = type(options)(size=32, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    wanted = other([rows[row]["image"] for row in range(len(rows))], return_tensors="pt").pixel_values
    torch.testing.assert_close(
        normalise(batch["pixel_values"], other.image_mean, other.image_std), wanted, rtol=0, atol=1e-6
    )


def test_augmentation_is_of_seed_epoch_and_row_alone(odd_rows):
    one, same, other = (
        photos(odd_rows, augment=True),
        photos(odd_rows, augment=True),
        photos(odd_rows, augment=True, seed=1),
    )
    keys = [(epoch, row) for epoch in range(3) for row in range(4)]
    first = [record["pixel_values"] for record in one.__getitems__(keys)]
    for key, pixels in reversed(list(zip(keys, first))):
        assert np.array_equal(same[key]["pixel_values"], pixels)
        assert not np.array_equal(other[key]["pixel_values"], pixels)
        assert pixels.shape == (3, 32, 32) and pixels.dtype == np.uint8 and pixels.flags["C_CONTIGUOUS"]
    assert len({pixels.tobytes() for pixels in first}) == len(first)
    plain = photos(odd_rows)
    assert np.array_equal(plain[(0, 1)]["pixel_values"], plain[(5, 1)]["pixel_values"])
    assert np.array_equal(plain[1]["pixel_values"], plain[(5, 1)]["pixel_values"])


def test_augmentation_stays_mild():
    """A dot in the middle stays in the photo; nothing else than crop, flip and brightness happens."""
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 3, (64, 1, 3)))
    left = 0
    for draw in range(200):
        pixels = Augmentation()(ramp, 32, np.random.default_rng(draw)).astype(float)
        assert np.abs(pixels[0] - pixels[2]).max() == 0
        span = abs(pixels[0, 16, -1] - pixels[0, 16, 0]) / (63 * 3)
        assert 0.6 < span < 1.12
        left += pixels[0, 16, -1] < pixels[0, 16, 0]
    assert 70 < left < 130
    still = Augmentation(scale=(1, 1), stretch=1, flip=False, brightness=0)
    assert np.array_equal(still(ramp, 64, np.random.default_rng(0))[0], np.asarray(ramp)[..., 0])


@pytest.mark.parametrize("options", [{"scale": (0, 1)}, {"scale": (0.9, 0.8)}, {"stretch": 0.5}, {"brightness": 1}])
def test_augmentation_errors(options):
    with pytest.raises(ValueError, match="wanted"):
        Augmentation(**options)


def test_batch(odd_rows, processor):
    dataset, collate = photos(odd_rows), Collator(processor)
    batch = collate(dataset.__getitems__([(0, 2), (0, 1)]))
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["pixel_values"].dtype == torch.uint8
    assert batch["row_ids"].tolist() == [2, 1]
    assert batch["item_ids"].tolist() == [1, 0] and batch["text_ids"].tolist() == [2, 1]
    for name in ("input_ids", "attention_mask", "word_ids", "row_ids", "item_ids", "text_ids"):
        assert batch[name].dtype == torch.int64, name
    for row, text in enumerate([odd_rows[2]["text"], odd_rows[1]["text"]]):
        alone = processor(text=text, return_word_ids=True)
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, :length], alone["input_ids"][0])
        assert (batch["word_ids"][row, length:] == -1).all() and (batch["attention_mask"][row, length:] == 0).all()
        assert batch["word_ids"][row].max() + 1 <= len(split_words(text))
    short = collate(dataset.__getitems__([(0, 1), (0, 0)]))
    assert short["input_ids"].shape[1] < batch["input_ids"].shape[1]
    assert (short["attention_mask"].sum(1).max() == short["input_ids"].shape[1]).item()


def test_word_ids_point_at_the_words_of_the_truth(garments, processor):
    """Column `words` of the generated corpus and word_ids count alike."""
    index = CorpusIndex.from_dataset(garments)
    dataset = PhotoDataset(garments, index, image_size=32, seed=0, augment=True)
    batch = Collator(processor)(dataset.__getitems__([(0, row) for row in range(20)]))
    for row in range(20):
        words = garments[row]["words"]
        ids = batch["word_ids"][row]
        for word in ids[ids >= 0].unique().tolist():
            pieces = processor.tokenizer.decode(batch["input_ids"][row][ids == word]).replace(" ", "")
            assert words[word].replace(" ", "").startswith(pieces) or pieces == "[UNK]"


def test_broken_photos_are_named_and_stop_nothing_else(odd_rows, tmp_path):
    good = odd_rows.cast_column("image", datasets.Image(decode=False))[0]["image"]["path"]
    (tmp_path / "cut.png").write_bytes(open(good, "rb").read()[:300])
    (tmp_path / "text.png").write_text("no photo")
    paths = [good, str(tmp_path / "cut.png"), str(tmp_path / "text.png"), str(tmp_path / "missing.png"), None]
    rows = datasets.Dataset.from_dict({"image": paths, "text": ["red"] * 5, "item_id": list("abcde")})
    dataset = photos(rows.cast_column("image", datasets.Image()))
    assert dataset[(0, 0)]["row_id"] == 0
    for row, reason in [(1, "cut.png"), (2, "text.png"), (3, "missing.png"), (4, "no photo")]:
        with pytest.raises(UnreadablePhoto, match=reason) as caught:
            dataset.__getitems__([(2, 0), (2, row)])
        assert caught.value.row == row and reason in caught.value.reason
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.row, again.reason) == (row, caught.value.reason)


def test_through_worker_processes(odd_rows, processor):
    dataset = pickle.loads(pickle.dumps(photos(odd_rows, augment=True)))
    sampler = [[(1, 0), (1, 2)], [(1, 3), (1, 1)]]
    here = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=Collator(processor)))
    there = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=Collator(processor), num_workers=1))
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_unreadable_photos_keep_their_row_through_workers(odd_rows, processor):
    broken = datasets.Dataset.from_dict({"image": [None] * 3, "text": ["red"] * 3, "item_id": list("abc")})
    dataset = photos(broken.cast_column("image", datasets.Image()))
    loader = DataLoader(dataset, batch_sampler=[[(0, 2)]], collate_fn=Collator(processor), num_workers=1)
    batches = iter(loader)
    try:
        next(batches)
    except UnreadablePhoto as error:  # not pytest.raises: it would keep the worker alive for seconds
        row = error.row
    assert row == 2


def test_dataset_and_index_must_agree(odd_rows):
    index = CorpusIndex.from_dataset(odd_rows.select([0, 1]))
    with pytest.raises(ValueError, match="4 rows, its index 2"):
        PhotoDataset(odd_rows, index, image_size=32, seed=0, augment=False)


# ------------------------------------------------------------------------------------------------------------ triplets


@pytest.fixture(scope="module")
def triplets(tmp_path_factory):
    return make_garment_variants(6, image_size=32, cache_dir=str(tmp_path_factory.mktemp("variants")))


def test_triplets_hold_both_photos(triplets, processor):
    dataset = photos(triplets, reference_column="candidate")
    batch = Collator(processor)(dataset.__getitems__([(0, 3), (2, 1)]))
    assert batch["reference_pixel_values"].dtype == torch.uint8
    for name, column in (("pixel_values", "image"), ("reference_pixel_values", "candidate")):
        for place, row in enumerate((3, 1)):
            wanted = np.moveaxis(np.asarray(triplets[row][column]), -1, 0)
            assert np.array_equal(batch[name][place].numpy(), wanted), (name, row)
    assert "reference_pixel_values" not in Collator(processor)(photos(triplets).__getitems__([(0, 3)]))
    with pytest.raises(ValueError, match="no column 'candidate' of reference photos; it has .*garment-variants"):
        photos(triplets.remove_columns("candidate"), reference_column="candidate")


def test_the_reference_is_augmented_on_its_own(triplets):
    plain, with_reference = photos(triplets, augment=True), photos(triplets, augment=True, reference_column="candidate")
    image = triplets.select_columns(["image"]).rename_column("image", "candidate")
    same = datasets.concatenate_datasets([triplets.remove_columns("candidate"), image], axis=1)
    twice = photos(same, augment=True, reference_column="candidate")
    for key in ((0, 2), (1, 2), (0, 5)):
        record = with_reference[key]
        assert np.array_equal(record["pixel_values"], plain[key]["pixel_values"]), "the photo's own draw is unchanged"
        again = photos(triplets, augment=True, reference_column="candidate")[key]
        assert np.array_equal(record["reference_pixel_values"], again["reference_pixel_values"])
        assert not np.array_equal(twice[key]["pixel_values"], twice[key]["reference_pixel_values"])
    first, later = (twice[(epoch, 2)]["reference_pixel_values"] for epoch in (0, 1))
    assert not np.array_equal(first, later)


def test_a_broken_reference_is_named(triplets, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"broken")
    cells = [str(tmp_path / "cut.png"), None]
    rows = triplets.select([0, 1]).remove_columns("candidate")
    rows = rows.add_column("candidate", cells).cast_column("candidate", datasets.Image())
    for row, reason in ((0, "its reference photo: .*cut.png"), (1, "its reference photo: the row holds no photo")):
        with pytest.raises(UnreadablePhoto, match=reason) as caught:
            photos(rows, reference_column="candidate")[(0, row)]
        assert caught.value.row == row and pickle.loads(pickle.dumps(caught.value)).row == row


def test_fast_decoding_keeps_what_is_needed_and_is_close(tmp_path, garments):
    smooth = garments[0]["image"].resize((600, 450), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    smooth.save(tmp_path / "a.jpg", quality=95)
    smooth.save(tmp_path / "b.jpg", quality=95, exif=exif)
    smooth.save(tmp_path / "c.png")
    paths = [str(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.png")]
    rows = datasets.Dataset.from_dict({"image": paths, "text": ["t"] * 3, "item_id": ["a", "b", "c"]})
    rows = rows.cast_column("image", datasets.Image())
    whole = photos(rows).__getitems__([0, 1, 2])
    quick = photos(rows, fast_decode=True).__getitems__([0, 1, 2])
    for one, other in zip(whole, quick):
        assert np.abs(one["pixel_values"].astype(int) - other["pixel_values"]).mean() < 3
    assert (whole[2]["pixel_values"] == quick[2]["pixel_values"]).all()
    assert (whole[0]["pixel_values"] != quick[0]["pixel_values"]).any()
    assert [open_image(path, 32).size for path in paths] == [(75, 57), (75, 57), (600, 450)]
    assert open_image(paths[0], 120).size == (300, 225) and open_image(paths[0], 460).size == (600, 450)


def test_fast_decoding_leaves_enough_for_the_smallest_crop(odd_rows):
    assert photos(odd_rows, fast_decode=True).at_least == 32
    settings = Augmentation(scale=(0.25, 1.0), stretch=1.21)
    assert photos(odd_rows, fast_decode=True, augment=settings).at_least == 71  # 32 / (.5 / 1.1)
    assert photos(odd_rows, augment=True).at_least is None


def test_fast_decoding_shrinks_before_the_crop_and_differs_little(tmp_path, garments):
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    photo = garments[0]["image"].resize((300, 200), Image.Resampling.BICUBIC)
    photo.save(paths[0])
    photo.resize((30, 60)).save(paths[1])
    rows = datasets.Dataset.from_dict({"image": paths, "text": ["t"] * 2, "item_id": ["a", "b"]})
    rows = rows.cast_column("image", datasets.Image())
    read, crop = [], Augmentation()

    def spy(photo, *args):
        read.append(photo.size)
        return crop(photo, *args)

    quick = photos(rows, augment=crop, fast_decode=True)
    assert quick.at_least == 38  # of a side, the smallest crop keeps (.8 / 1.1) ** .5
    whole = photos(rows, augment=True).__getitems__([0, 1])
    close = [np.abs(one["pixel_values"].astype(int) - quick[row]["pixel_values"]) for row, one in enumerate(whole)]
    quick.augment = spy
    quick.__getitems__([0, 1])
    assert read == [(38, 38), (30, 38)] and 0 < close[0].mean() < 3
