"""Pictures are right in what they show, whole and of the promised size."""

import numpy as np
import pytest
from PIL import Image

from syncmask.evaluation import figures as f
from syncmask.evaluation.plots import Panel, bars, curves, heat_table, histogram
from syncmask.evaluation.typeset import _place, font, paragraph

TEXT = 'A red (cotton) shirt, "v-neck".'


def photo(width=64, height=64):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pair(names=("synchronised", "random"), visible=None, text=TEXT):
    masks = [f.Masks(name, np.array([0, 1, 0, 1, 0], bool), np.eye(4, dtype=bool)) for name in names]
    return f.MaskedPhoto(photo(), text, masks, visible)


def test_word_styles_cover_the_text_in_order():
    hidden, visible = np.array([0, 1, 1, 0, 0]), np.array([0, 1, 0, 1, 1])
    pieces = f.word_styles(TEXT, hidden, visible)
    assert "".join(piece for piece, _ in pieces) == TEXT
    assert dict(pieces)["red"] == "right" and dict(pieces)["cotton"] == "wrong" and dict(pieces)["A"] == "unseen"
    assert dict(f.word_styles(TEXT, hidden))["cotton"] == "hidden"


def test_words_that_were_cut_off_are_plain():
    assert f.word_styles("one two three", np.array([True])) == [("one", "hidden"), (" two three", "plain")]
    assert f.word_styles("", np.array([True])) == []


def test_hidden_patches_are_dimmed_and_the_others_are_not():
    white = Image.new("RGB", (64, 64), "white")
    patches = np.zeros((2, 4), dtype=bool)
    patches[0, 1] = True
    picture = np.asarray(f.masked_photo(white, patches, size=200))
    assert picture[50, 75].max() < 100  # middle of row 0, column 1
    assert (picture[150, 75] == 255).all() and (picture[50, 25] == 255).all()
    assert tuple(picture[50, 50]) == (255, 211, 77)  # the outline, where hidden meets seen


def test_patches_must_come_as_a_grid():
    with pytest.raises(ValueError, match="grid"):
        f.masked_photo(photo(), np.zeros(16, dtype=bool))


def test_enlarge_keeps_the_shape_of_the_photo():
    tall = f.enlarge(Image.new("RGB", (10, 40), "black"), 100)
    columns = np.flatnonzero((np.asarray(tall) < 128).all(axis=(0, 2)))
    assert tall.size == (100, 100) and abs(len(columns) - 25) <= 1


def test_mask_view_grows_with_pairs_and_columns():
    one, two = f.mask_view([pair()]), f.mask_view([pair(), pair()])
    assert two.height > one.height + 264 and two.width == one.width
    assert f.mask_view([pair(names=("a", "b", "c"))]).width > one.width
    with pytest.raises(ValueError, match="same ways"):
        f.mask_view([pair(), pair(names=("other", "random"))])
    with pytest.raises(ValueError):
        f.mask_view([])


def test_marked_words_have_their_colours():
    blue, orange = (23, 99, 166), (194, 84, 10)

    def colours(picture):
        return {tuple(pixel) for pixel in np.asarray(picture).reshape(-1, 3)}

    truth = colours(f.mask_view([pair(visible=np.array([1, 1, 1, 0, 1], bool))]))
    assert blue in truth and orange in truth
    unknown = colours(f.mask_view([pair()]))
    assert (61, 61, 61) in unknown and orange not in unknown


def test_paragraph_shows_all_of_a_long_text():
    short, long = (paragraph([("word " * count, "plain")], 200) for count in (10, 1000))
    assert long.height > 80 * short.height
    ink = (np.asarray(long) < 128).any(axis=(1, 2))
    assert ink[-30:].any()
    unbroken = np.asarray(paragraph([("w" * 300, "plain")], 200, font(16)))
    assert unbroken.shape[0] > 10 * 20


def test_punctuation_stays_with_its_word():
    face = font(16)
    pieces = [
        ("a long ", "plain"),
        ("shirt", "hidden"),
        (", and ", "plain"),
        ("(", "plain"),
        ("cotton", "hidden"),
        ("),", "plain"),
    ]
    for width in range(100, 260, 3):
        lines = {}
        for _, line, word, _ in _place(pieces, width, face)[0]:
            lines.setdefault(line, []).append(word)
        for words in lines.values():
            assert words[0] not in (",", "),"), width
            assert words[-1] != "(", width
    whole = "".join(word for _, _, word, _ in _place(pieces, 100, face)[0])
    assert whole == "alongshirt,and(cotton),"


def test_a_long_chain_without_a_space_is_still_shown():
    placed, lines = _place([("w" * 40, "plain"), ("w" * 40, "hidden")], 100, font(16))
    assert lines > 5 and sum(len(word) for _, _, word, _ in placed) == 80


def test_mask_sheet_is_compact_and_as_wide_as_asked():
    text = TEXT + " Long sleeves, a zip and two pockets."
    sheet, view = f.mask_sheet([pair(text=text)] * 5), f.mask_view([pair(text=text)] * 3)
    assert abs(sheet.width - 1000) < 10 and sheet.height < 0.6 * view.height
    assert f.mask_sheet([pair()] * 2, count=1).height < sheet.height
    assert f.mask_sheet([pair()], width=700).width < 710
    with pytest.raises(ValueError, match="same ways"):
        f.mask_sheet([])


def test_right_hits_are_framed_and_wrong_ones_are_not():
    def green(right):
        sheet = f.retrieval_sheet([f.Search([f.Hit(0.5, right, photo=Image.new("RGB", (8, 8)))], text="q", rank=3)])
        return (np.asarray(sheet) == (26, 127, 55)).all(axis=2).sum()

    assert green(True) > 3000 and green(False) == 0
    with pytest.raises(ValueError, match="at least one"):
        f.retrieval_sheet([])


def test_retrieval_sheet_takes_photo_queries_and_text_hits():
    search = f.Search([f.Hit(0.1, False, text="a long text of a product " * 5)], photo=photo())
    assert f.retrieval_sheet([search], caption="recall").width > 400


def test_curves_draw_each_panel():
    panel = Panel("recall", {"a": ([1, 2], [0.1, 0.5])}, level=0.1, marks=((1, "gate"),), span=(1, 2, "ramp"))
    one, two, three = (curves([panel] * count) for count in (1, 2, 3))
    assert two.width == 2 * one.width == three.width and three.height == 2 * one.height and np.asarray(one).std() > 0
    with pytest.raises(ValueError):
        curves([])


def test_plots_of_one_value_are_drawn():
    for picture in (histogram("x", np.array([3, 3]), "a", "b"), bars("x", {"a": 0.0}, "minutes")):
        assert np.asarray(picture).std() > 0
    assert heat_table("x", np.array([[2, 0], [0, 0]]), ["a", "b"], ["a", "b"], ("p", "t")).width > 400
