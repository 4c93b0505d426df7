"""Candidate lists: never the right one twice, the documented mix, the same for any order of rows, frozen by a hash."""

import numpy as np
import pytest

from syncmask.evaluation.archive import arrays_sha256, read_arrays
from syncmask.evaluation.candidates import (
    WAYS,
    Candidates,
    Pool,
    check_candidates,
    draw_by_item,
    draw_by_view,
    same_subcategory_share,
)
from syncmask.evaluation.fashiongen import pool_of

DRAWING = [draw_by_item, draw_by_view]


def random_pool(seed):
    """Products of skewed subcategories (most have fewer than the negatives wanted), 1 to 4 photos each."""
    rng = np.random.default_rng(seed)
    items = np.array([f"p{number:03d}" for number in range(rng.integers(3, 60))])
    of_photo = np.repeat(np.arange(len(items)), rng.integers(1, 5, size=len(items)))
    photos = np.array([f"{items[item]}/{number:04d}" for number, item in enumerate(of_photo)])
    kinds = np.array(["tops", "tops", "tops", "gloves", "hats"])[rng.integers(0, 5, size=len(items))]
    return Pool(items, photos, of_photo, kinds)


@pytest.mark.parametrize("draw", DRAWING)
@pytest.mark.parametrize("seed", range(12))
def test_lists_hold_the_right_one_once_and_the_documented_mix(draw, seed):
    pool = random_pool(seed)
    wanted = int(np.random.default_rng(seed).integers(1, 30))
    lists = draw(pool, queries=20, negatives=wanted, draws=3, seed=seed)
    check_candidates(lists, pool)
    for way in WAYS:
        queries, listed = lists.arrays[f"{way}/queries"], lists.arrays[f"{way}/candidates"]
        assert queries.shape == listed.shape[:2] and queries.shape[0] == 3
        assert all(len(set(drawn)) == len(drawn) for drawn in queries.tolist()) or draw is draw_by_item
        for query, row in zip(queries.reshape(-1), listed.reshape(-1, listed.shape[2])):
            asked = pool.item_of_photo[query] if way == "image_to_text" else query
            items = row if way == "image_to_text" else pool.item_of_photo[row]
            assert items[0] == asked and (items[1:] != asked).all()
            assert len(set(row.tolist())) == len(row), "no candidate twice"
            if draw is draw_by_item:
                assert len(set(items.tolist())) == len(items), "one photo a product"
            entries = (
                np.arange(len(pool.items)) if way == "image_to_text" or draw is draw_by_item else pool.item_of_photo
            )
            near = int(((entries != asked) & (pool.subcategories[entries] == pool.subcategories[asked])).sum())
            same = pool.subcategories[items[1:]] == pool.subcategories[asked]
            assert same.sum() == min(near, len(row) - 1), "the own subcategory first, others only to fill up"
            assert (np.diff(same.astype(int)) <= 0).all()


def test_one_list_by_item_serves_both_directions():
    pool = random_pool(3)
    arrays = draw_by_item(pool, queries=5, negatives=4, draws=2).arrays
    assert (pool.item_of_photo[arrays["text_to_image/candidates"]] == arrays["image_to_text/candidates"]).all()
    assert (arrays["text_to_image/candidates"][:, :, 0] == arrays["image_to_text/queries"]).all()


@pytest.mark.parametrize("draw", DRAWING)
def test_draws_differ_from_each_other_and_come_again_with_the_seed(draw):
    pool = random_pool(1)
    one, again, other = (draw(pool, queries=9, negatives=5, seed=seed) for seed in (0, 0, 1))
    assert one.sha256 == again.sha256 != other.sha256
    listed = one.arrays["image_to_text/candidates"]
    assert len({drawn.tobytes() for drawn in listed}) == len(listed) == 5


def test_the_defaults_are_the_protocols_own():
    items = np.array([f"{number:05d}" for number in range(1200)])
    pool = Pool(items, np.char.add(items, "/0"), np.arange(1200), np.repeat(["a", "b", "c", "d"], 300))
    lists = draw_by_item(pool)
    assert lists.arrays["image_to_text/candidates"].shape == (5, 1000, 101)
    assert same_subcategory_share(lists, pool) == 1


def test_every_product_and_photo_can_be_drawn():
    pool = random_pool(2)
    lists = draw_by_view(pool, queries=1000, negatives=3, draws=4)
    assert set(lists.arrays["image_to_text/queries"][0]) == set(range(len(pool.photos)))
    assert set(lists.arrays["text_to_image/candidates"].reshape(-1)) == set(range(len(pool.photos)))


def test_the_order_of_rows_changes_nothing(garments):
    rows = garments.add_column("subcategory", [f"kind {len(item) + int(item[-1]) % 3}" for item in garments["item_id"]])
    shuffled = rows.select(np.random.default_rng(0).permutation(len(rows)))
    for draw in DRAWING:
        one, other = (draw(pool_of(part), queries=10, negatives=8) for part in (rows, shuffled))
        assert one.sha256 == other.sha256


def test_lists_survive_a_file_and_are_known_by_their_contents(tmp_path):
    lists = draw_by_item(random_pool(4), queries=6, negatives=4)
    path = tmp_path / "lists.candidates.npz"
    assert lists.save(path) == lists.sha256 == Candidates.load(path).sha256
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(ValueError, match="another evaluation"):
        read_arrays(path, "0" * 64)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="cut short"):
        Candidates.load(path)
    with pytest.raises(FileNotFoundError, match="evaluate again"):
        Candidates.load(tmp_path / "none.npz")


def test_the_hash_sees_names_shapes_and_values_alone():
    base = arrays_sha256({"a": np.array([[1, 2], [3, 4]])})
    assert base == arrays_sha256({"a": np.array([[1, 2], [3, 4]], dtype=np.int16)})
    assert base != arrays_sha256({"b": np.array([[1, 2], [3, 4]])})
    assert base != arrays_sha256({"a": np.array([1, 2, 3, 4])}) != arrays_sha256({"a": np.array([1, 2, 3, 5])})
    assert arrays_sha256({"a": np.array(["x", "yy"])}) != arrays_sha256({"a": np.array(["xy", "y"])})


def test_lists_that_do_not_fit_are_refused():
    pool = random_pool(5)
    lists = draw_by_item(pool, queries=6, negatives=4)
    with pytest.raises(ValueError, match="another corpus"):
        check_candidates(lists, random_pool(6))
    for broken, message in (
        ({"image_to_text/candidates": lists.arrays["image_to_text/candidates"][:, :, ::-1]}, "first and only once"),
        ({"text_to_image/candidates": lists.arrays["text_to_image/candidates"] + 10_000}, "outside"),
        ({"text_to_image/queries": np.array([0.5])}, "no positions"),
    ):
        with pytest.raises(ValueError, match=message):
            check_candidates(Candidates(lists.arrays | broken), pool)
    twice = lists.arrays["image_to_text/candidates"].copy()
    twice[..., 2] = twice[..., 0]
    with pytest.raises(ValueError, match="only once"):
        check_candidates(Candidates(lists.arrays | {"image_to_text/candidates": twice}), pool)


def test_pools_are_checked(garments):
    with pytest.raises(ValueError, match="ascending"):
        Pool(np.array(["b", "a"]), np.array(["x", "y"]), np.array([0, 1]), np.array(["k", "k"]))
    with pytest.raises(ValueError, match="have a photo"):
        Pool(np.array(["a", "b"]), np.array(["x", "y"]), np.array([0, 0]), np.array(["k", "k"]))
    with pytest.raises(ValueError, match="at least two products"):
        draw_by_item(Pool(np.array(["a"]), np.array(["x"]), np.array([0]), np.array(["k"])))
    with pytest.raises(ValueError, match="no column of that name"):
        pool_of(garments.select_columns(["image", "text", "item_id"]))
