"""The definition of a word, photos of every kind, the processor and its round trips."""

import ast
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from syncmask.processing import processing_syncmask
from syncmask.processing.processing_syncmask import (
    SyncMaskImageProcessor,
    SyncMaskProcessor,
    align_words,
    split_words,
    to_rgb,
)
from syncmask.processing.tokenizer import train_tokenizer

TRICKY = [
    "A V-neck, (cotton); \u201cCaf\u00e9\u201d blouse -- 100% silk!",
    "  it's   a t-shirt/top \u2122 with 2.5cm \u00abbord\u00bb...",
    "...",
    "e\u0301le\u0301gant, robe\u0301. \u2014 $30",
    "\u7ea2\u8272 \u886c\u886b, dress",
    "'don't'\tstop\n(now)",
]


@pytest.fixture(scope="module")
def local_processor():
    """Built here from fixed texts, so that a change of the generated corpus cannot hide a fault."""
    return SyncMaskProcessor(SyncMaskImageProcessor(size=24), train_tokenizer(TRICKY[:2] + ["a red shirt"] * 3))


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


# ---------------------------------------------------------------------------------------------- words
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \n\t ", []),
        ("-- ... \u2014 !", []),
        ("v-neck (cotton), 'n' 100%", ["v-neck", "cotton", "n", "100"]),
        ("it's  a t-shirt/top.", ["it's", "a", "t-shirt/top"]),
        ("\u201cCaf\u00e9\u201d\u2122", ["Caf\u00e9"]),
        ("robe\u0301.", ["robe\u0301"]),
        ("Rot,blau", ["Rot,blau"]),
    ],
)
def test_split_words(text, words):
    assert [text[start:end] for start, end in split_words(text)] == words


def slow_alignment(offsets, spans):
    ids = []
    for start, end in offsets:
        ids.append(-1)
        for number, (begin, stop) in enumerate(spans):
            if start < end and start < stop and begin < end:
                ids[-1] = number
                break
    return ids


def test_align_words_against_loops():
    rng = np.random.default_rng(0)
    for _ in range(200):
        edges = np.sort(rng.choice(60, size=2 * rng.integers(0, 8), replace=False))
        spans = [tuple(map(int, pair)) for pair in edges.reshape(-1, 2)]
        starts = np.sort(rng.integers(0, 60, size=12))
        offsets = np.stack([starts, starts + rng.integers(0, 4, size=12)], axis=1)
        assert align_words(offsets, spans).tolist() == slow_alignment(offsets, spans)


def test_word_ids_of_tricky_texts(local_processor):
    batch = local_processor(text=TRICKY, return_word_ids=True, return_offsets_mapping=True)
    assert batch["word_ids"].shape == batch["input_ids"].shape
    assert batch["word_ids"].dtype == torch.int64
    for row, text in enumerate(TRICKY):
        spans, ids = split_words(text), batch["word_ids"][row].tolist()
        assert ids == slow_alignment(batch["offset_mapping"][row].tolist(), spans)
    whole = local_processor(text=TRICKY, return_word_ids=True, truncation=False)
    for text, ids in zip(TRICKY, whole["word_ids"].tolist()):
        assert set(ids) - {-1} == set(range(len(split_words(text)))), text


def test_word_ids_known_values(local_processor):
    batch = local_processor(text=["A V-neck, (a)", "a"], return_word_ids=True)
    tokens = local_processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert tokens == ["[CLS]", "a", "v", "-", "neck", ",", "(", "a", ")", "[SEP]"]
    assert batch["word_ids"][0].tolist() == [-1, 0, 1, 1, 1, -1, -1, 2, -1, -1]
    assert batch["word_ids"][1].tolist() == [-1, 0] + [-1] * 8


def test_truncated_words_are_absent(local_processor):
    batch = local_processor(text="a red shirt a red shirt", return_word_ids=True, max_length=5)
    assert batch["word_ids"].tolist() == [[-1, 0, 1, 2, -1]]
    limit = local_processor.tokenizer.model_max_length
    assert local_processor(text="red " * 300).input_ids.shape == (1, limit)


def test_the_length_that_a_tokenizers_file_was_last_cut_to_is_not_taken(local_processor, tmp_path):
    local_processor.tokenizer("red", truncation=True, max_length=7)
    local_processor.tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.model_max_length = 20
    again = SyncMaskProcessor(SyncMaskImageProcessor(size=24), tokenizer)
    assert again(text="red " * 30, return_word_ids=True)["word_ids"].shape == (1, 20)


def test_word_ids_follow_the_container(local_processor):
    one = local_processor(text="red shirt", return_word_ids=True, return_tensors=None)
    assert one["word_ids"] == [-1, 0, 1, -1] and len(one["input_ids"]) == 4
    two = local_processor(text=["red", "a red"], return_word_ids=True, return_tensors="np", padding="max_length")
    assert isinstance(two["word_ids"], np.ndarray) and two["word_ids"].shape == two["input_ids"].shape


# --------------------------------------------------------------------------------------------- images
def pixels(image, **kwargs):
    return SyncMaskImageProcessor(size=24, **kwargs)(image, return_tensors="pt").pixel_values


def test_known_pixels():
    grey = Image.new("RGB", (5, 9), (255, 0, 51))
    assert torch.allclose(pixels(grey)[0, :, 3, 3], torch.tensor([1.0, -1.0, -0.6]), atol=1e-6)
    other = pixels(grey, image_mean=[0.0, 0.0, 0.2], image_std=[1.0, 1.0, 2.0])
    assert torch.allclose(other[0, :, 3, 3], torch.tensor([1.0, 0.0, 0.0]), atol=1e-6)
    assert other.dtype == torch.float32 and other.shape == (1, 3, 24, 24)


def test_every_container_gives_the_same_pixels(photo, tmp_path):
    wanted = pixels(photo)
    array = np.array(photo)
    photo.save(tmp_path / "photo.png")
    buffer = BytesIO()
    photo.save(buffer, "PNG")
    same = [
        array,
        torch.from_numpy(array),
        torch.from_numpy(array).permute(2, 0, 1),
        array.astype(np.float32) / 255,
        array.astype(np.int64),
        array.astype(np.uint16) * 257,
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        buffer.getvalue(),
        [[photo]],
        array[None],
    ]
    for image in same:
        assert torch.equal(pixels(image), wanted), type(image)
    assert torch.equal(pixels([photo, array, str(tmp_path / "photo.png")]), wanted.repeat(3, 1, 1, 1))


def saved(image, kind, **options):
    """The photo as a file would give it back."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(BytesIO(buffer.getvalue()))


def odd_photos():
    """name -> (photo, the colour that its middle should have)."""
    red = Image.new("RGB", (8, 8), (200, 10, 20))
    clear = Image.new("RGBA", (8, 8), (200, 10, 20, 0))
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    palette = red.quantize(4)
    paletted_clear = Image.new("P", (8, 8), 1)
    paletted_clear.putpalette([0, 0, 0, 9, 9, 9] + [0] * 750)
    sixteen = Image.fromarray(np.full((8, 8), 0x80FF, dtype=np.uint16))
    wide = Image.fromarray(np.full((8, 8), 40000, dtype=np.int32))
    frames = [red, Image.new("RGB", (8, 8), (0, 0, 255))]
    return {
        "RGB": (red, (200, 10, 20)),
        "L": (Image.new("L", (8, 8), 77), (77, 77, 77)),
        "1": (Image.new("1", (8, 8), 1), (255, 255, 255)),
        "LA": (Image.new("LA", (8, 8), (0, 0)), (255, 255, 255)),
        "RGBA clear": (clear, (255, 255, 255)),
        "RGBA half": (half, (127, 127, 127)),
        "P": (palette, (200, 10, 20)),
        "P clear": (saved(paletted_clear, "PNG", transparency=1), (255, 255, 255)),
        "RGB tRNS": (saved(red, "PNG", transparency=(200, 10, 20)), (255, 255, 255)),
        "CMYK": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (255, 0, 0)),
        "CMYK JPEG": (saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
        "YCbCr": (red.convert("YCbCr"), (200, 10, 20)),
        "I;16": (saved(sixteen, "PNG"), (128, 128, 128)),
        "I": (wide, (156, 156, 156)),
        "F": (Image.new("F", (8, 8), 0.5), (128, 128, 128)),
        "GIF": (saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), (200, 10, 20)),
        "APNG": (saved(frames[0], "PNG", save_all=True, append_images=frames[1:]), (200, 10, 20)),
    }


@pytest.mark.parametrize("name", odd_photos())
def test_modes(name):
    image, colour = odd_photos()[name]
    found = to_rgb(image)
    assert found.mode == "RGB" and found.size == (8, 8)
    assert np.abs(np.array(found.getpixel((4, 4))) - colour).max() <= 3, (found.getpixel((4, 4)), colour)


def test_first_frame_whatever_the_position():
    image, colour = odd_photos()["GIF"]
    image.seek(1)
    assert np.abs(np.array(to_rgb(image).getpixel((4, 4))) - colour).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_camera_orientation(photo, orientation, tmp_path):
    T = Image.Transpose
    undo = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90}
    undo |= {7: T.TRANSVERSE, 8: T.ROTATE_270}
    stored = photo if orientation == 1 else photo.transpose(undo[orientation])
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert torch.equal(pixels(tmp_path / "photo.png"), pixels(photo))


def test_broken_camera_tags_do_not_matter(photo):
    buffer = BytesIO()
    photo.save(buffer, "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff")
    assert to_rgb(Image.open(buffer)).size == photo.size


def test_an_rgb_photo_is_not_touched(photo):
    before = photo.tobytes()
    pixels(photo)
    assert photo.tobytes() == before and photo.size == (40, 30)


def test_an_upright_rgb_photo_is_read_and_not_copied(photo, tmp_path):
    assert to_rgb(photo) is photo
    photo.save(tmp_path / "photo.png")
    with Image.open(tmp_path / "photo.png") as image:
        found = to_rgb(image)
    assert found.tobytes() == photo.tobytes(), "the file is closed by now"


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        ([], ValueError, "empty list of images"),
        (["missing.jpg"], FileNotFoundError, "missing.jpg"),
        (b"no image", ValueError, "8 bytes"),
        ([None], TypeError, "image 0 is a NoneType"),
        (np.full((4, 4, 3), -1.0), ValueError, "normalisation"),
        (np.zeros((5, 5, 7)), ValueError, r"shape \(5, 5, 7\)"),
        (np.full((4, 4, 3), np.nan), ValueError, "pixel values"),
    ],
)
def test_image_errors(images, error, match):
    with pytest.raises(error, match=match):
        pixels(images)


def test_cut_off_and_foreign_files_are_named(photo, tmp_path):
    photo.save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    (tmp_path / "text.jpg").write_text("no photo")
    for name in ("cut.jpg", "text.jpg"):
        with pytest.raises(ValueError, match=name):
            pixels([tmp_path / "whole.jpg", tmp_path / name])


# ------------------------------------------------------------------------------------------ processor
def test_batch(local_processor, photo):
    batch = local_processor(images=[photo, photo], text=["a red shirt", "red"])
    assert sorted(batch) == ["attention_mask", "input_ids", "pixel_values"]
    assert batch["pixel_values"].shape == (2, 3, 24, 24)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert sorted(local_processor(images=photo)) == ["pixel_values"]
    assert sorted(local_processor(text="red")) == ["attention_mask", "input_ids"]
    assert sorted(local_processor.model_input_names) == ["attention_mask", "input_ids", "pixel_values"]


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({}, "at least one input"),
        ({"text": []}, "empty list of texts"),
        ({"text": [None]}, r"strings|`str`"),
        ({"images": []}, "empty list of images"),
        ({"return_word_ids": True}, "needs text"),
    ],
)
def test_processor_errors(local_processor, inputs, match):
    with pytest.raises(ValueError, match=match):
        local_processor(**inputs)


LOAD = """
import sys, torch
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
folder, trust = sys.argv[1], sys.argv[2] == "remote"
if not trust:
    import syncmask  # registers the classes
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
alone = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust)
assert ("syncmask" in sys.modules) != trust
batch = processor(images=[folder + "/a.png", folder + "/b.png"], text=["A V-neck, (a)", "red"], return_word_ids=True)
assert torch.equal(alone([folder + "/a.png"], return_tensors="pt").pixel_values, batch["pixel_values"][:1])
assert AutoTokenizer.from_pretrained(folder)("A V-neck").input_ids == processor.tokenizer("A V-neck").input_ids
torch.save(dict(batch), folder + "/batch.pt")
"""


@pytest.mark.parametrize("how", ["registered", "remote"])
def test_round_trip_in_a_fresh_process(how, photo, tmp_path, monkeypatch):
    image_processor = SyncMaskImageProcessor(size=24, image_mean=[0.1, 0.2, 0.3], resample=2)
    processor = SyncMaskProcessor(image_processor, train_tokenizer(TRICKY[:2] + ["a red shirt"], max_length=7))
    if how == "remote":
        monkeypatch.setattr(SyncMaskProcessor, "_auto_class", "AutoProcessor")
        monkeypatch.setattr(SyncMaskImageProcessor, "_auto_class", "AutoImageProcessor")
    processor.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    code = {"processing_syncmask.py"} if how == "remote" else set()
    assert files == {"processor_config.json", "tokenizer.json", "tokenizer_config.json"} | code

    photo.save(tmp_path / "a.png")
    photo.convert("P").save(tmp_path / "b.png", transparency=3)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(tmp_path), how]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    found = torch.load(tmp_path / "batch.pt")
    texts, files = ["A V-neck, (a)", "red"], [tmp_path / "a.png", tmp_path / "b.png"]
    wanted = processor(images=files, text=texts, return_word_ids=True)
    assert found.keys() == wanted.keys()
    for name in found:
        assert torch.equal(found[name], wanted[name]), name
    assert found["input_ids"].shape == (2, 7)


def test_the_file_that_travels_imports_nothing_of_the_project():
    tree = ast.parse(Path(processing_syncmask.__file__).read_text(encoding="utf-8"))
    modules = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {
        name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    allowed = {"__future__", "PIL", "numpy", "torch", "transformers"} | sys.stdlib_module_names
    assert modules <= allowed


def test_real_photos(real_data):
    files = sorted((real_data / "luma" / "test").glob("*.jpg"))[:8]
    assert pixels(files).shape == (len(files), 3, 24, 24)
