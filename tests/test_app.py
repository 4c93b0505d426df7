"""The page: what it shows of plain data; and, in a real headless browser, that it answers, offline and unharmed."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image

from syncmask import SyncMaskConfig, SyncMaskForPreTraining, SyncMaskModel
from syncmask.retrieval import app_hits
from syncmask.retrieval.catalogue import Catalogue
from syncmask.retrieval.encoder import Encoder
from syncmask.retrieval.space import write_space

SCRIPT = '<script>window.hacked=1</script><img src=x onerror="window.hacked=2"> ${window.hacked=3} {{window.hacked=4}}'
LOCAL = {"127.0.0.1", "localhost", "0.0.0.0", "::1"}


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    ids = {"vocab_size": len(processor.tokenizer), "mask_token_id": processor.tokenizer.mask_token_id}
    return SyncMaskForPreTraining(SyncMaskConfig.tiny(image_size=32, **ids)).eval()


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory, model, processor, garments):
    """20 items; the first one's text, column and id try to run scripts."""
    opened = Catalogue.open(tmp_path_factory.mktemp("shop") / "c", Encoder(model, processor, device="cpu"), create=True)
    items = list(dict.fromkeys(garments["item_id"]))[:20]
    rows = [
        {"image": row["image"], "item_id": row["item_id"], "text": row["text"], "photo_id": f"{row['item_id']}/{place}"}
        | {"category": row["category"], "price": place, "maker": "a & b"}
        for place, row in enumerate(garments)
        if row["item_id"] in items
    ]
    for row in rows:
        if row["item_id"] == items[0]:
            row |= {"text": f"{SCRIPT} red hat", "maker": SCRIPT}
    opened.add(rows)
    return opened


def found(catalogue, words="red hat", **options):
    defaults = {"photo": None, "conditions": (), "k": 20, "rerank": False}
    return app_hits.find(catalogue, words, **(defaults | options))


# ------------------------------------------------------------------------------------------------------- plain data


def test_items_are_found_by_words_by_a_photo_and_by_both(catalogue, garments):
    by_words, by_photo = found(catalogue), found(catalogue, "  ", photo=garments[0]["image"])
    both = found(catalogue, photo=garments[0]["image"])
    assert len(by_words.ranking) == len(by_photo.ranking) == len(both.ranking) == 20
    assert by_photo.ranking[0].item_id == garments[0]["item_id"] and by_photo.words == ""
    orders = {tuple(hit.item_id for hit in answer.ranking) for answer in (by_words, by_photo, both)}
    assert len(orders) == 3
    with pytest.raises(ValueError, match="nothing to search for"):
        found(catalogue, " ")


def test_the_matching_head_orders_only_what_it_can_judge(catalogue, garments):
    judged = found(catalogue, rerank=True).ranking
    scores = [hit.matching for hit in judged]
    assert scores == sorted(scores, reverse=True) and None not in scores
    assert found(catalogue, photo=garments[0]["image"], rerank=True).ranking[0].matching is None


def test_filters_offer_the_values_of_columns_that_have_few(catalogue, garments):
    options = app_hits.filter_options(catalogue)
    categories = {option for option in options if option.startswith("category=")}
    assert categories == {f"category={name}" for name in set(garments.select(range(len(catalogue)))["category"])}
    assert not any(option.startswith(("price=", "text=", "item_id=")) for option in options)
    chosen = found(catalogue, conditions=[min(categories)]).ranking
    assert 0 < len(chosen) < 20 and {f"category={hit.columns['category']}" for hit in chosen} == {min(categories)}
    with pytest.raises(ValueError, match="no column"):
        found(catalogue, conditions=["shop=1 OR 1=1"])


def test_the_gallery_survives_a_lost_photo(catalogue, monkeypatch):
    answer = found(catalogue, k=4)
    pictures = app_hits.gallery(answer)
    assert [picture.size for picture, _ in pictures] == [(360, 360)] * 4
    assert pictures[0][1].startswith("1.  ") and len(pictures[0][1]) < 90

    def lost(self):
        raise ValueError("gone")

    monkeypatch.setattr(type(answer.ranking[0].photos[0]), "open", lost)
    assert app_hits.gallery(answer)[0][0].getcolors() == [(360 * 360, (196, 196, 196))]
    with pytest.raises(ValueError, match="gone"):
        app_hits.why(catalogue.encoder, answer, 0, own_text=False)


def test_reasons_are_of_the_words_or_of_the_items_own_text(catalogue, garments):
    answer = found(catalogue, "a blue star")
    mine = app_hits.why(catalogue.encoder, answer, 1, own_text=False)
    own = app_hits.why(catalogue.encoder, answer, 1, own_text=True)
    assert mine.text == "a blue star" and own.text == answer.ranking[1].text
    assert "3 other photos" in mine.support_note
    by_photo = found(catalogue, "", photo=garments[0]["image"])
    assert app_hits.why(catalogue.encoder, by_photo, 0, own_text=False).text == by_photo.ranking[0].text
    page = app_hits.reasons(answer.ranking[1], mine)
    assert page.count("<img") == 4 + 2 * 3 + len(answer.ranking[1].photos)
    assert app_hits.reasons(answer.ranking[1], mine, "star").count("<img") == 4 + 2 + len(answer.ranking[1].photos)


def test_texts_and_columns_are_escaped(catalogue, garments):
    answer = found(catalogue, SCRIPT)
    place = [hit.item_id for hit in answer.ranking].index(garments[0]["item_id"])
    for own_text in (False, True):
        page = app_hits.reasons(answer.ranking[place], app_hits.why(catalogue.encoder, answer, place, own_text))
        assert "<script" not in page and "<img src=x" not in page
        assert page.count("&lt;script&gt;window.hacked=1&lt;/script&gt;") >= 2  # the text, and the column
    assert "<b>" not in app_hits.problem(ValueError("<b>bold</b>"))


def test_what_cannot_be_explained_is_said(catalogue, model, processor):
    answer = found(catalogue)
    with pytest.raises(ValueError, match="matching head"):
        app_hits.why(Encoder(SyncMaskModel(model.config), processor, device="cpu"), answer, 0, own_text=False)
    answer.ranking.hits[0].text = ""
    with pytest.raises(ValueError, match="nothing to explain"):
        app_hits.why(catalogue.encoder, answer, 0, own_text=True)


def test_an_empty_catalogue_says_so(tmp_path, model, processor):
    empty = Catalogue.open(tmp_path / "c", Encoder(model, processor, device="cpu"), create=True)
    answer = found(empty)
    assert app_hits.gallery(answer) == [] and app_hits.filter_options(empty) == []
    assert "empty" in app_hits.summary(answer) and "click" not in app_hits.summary(answer)


# ------------------------------------------------------------------------------------------------------------ space


def test_a_space_is_complete(catalogue, tmp_path):
    folder = write_space(tmp_path / "space", catalogue, title="Hats and coats")
    assert {path.name for path in folder.iterdir()} == {"app.py", "README.md", "requirements.txt", "catalogue", "model"}
    compile((folder / "app.py").read_text(), "app.py", "exec")
    head = (folder / "README.md").read_text().split("---")[1]
    assert "sdk: gradio" in head and "title: Hats and coats" in head and "app_file: app.py" in head
    again = Catalogue.open(folder / "catalogue", Encoder.from_pretrained(folder / "model", device="cpu"))
    assert [hit.item_id for hit in again.search("red hat")] == [hit.item_id for hit in catalogue.search("red hat")]
    again.search("red hat")[0].photos[0].open()
    with pytest.raises(FileExistsError, match="not empty"):
        write_space(folder, catalogue)


def test_a_space_does_not_tell_where_photos_and_model_lie_here(shop, files, tmp_path):
    shop.add(files[:3], store_photos=True)
    shop.delete(photo_ids=[shop.photo_ids()[0]])
    shop._store.set_state({"model": str(tmp_path / "run")}, only_if=("switching", ""))
    folder = write_space(tmp_path / "space", shop)
    copied = Catalogue.open(folder / "catalogue", shop.encoder)
    assert copied.describe()["model"] == "" and len(copied) == 2
    table = copied.snapshot().table
    for version in table.list_versions():
        table.checkout(version["version"])
        assert len(table.to_arrow()) in (0, 2) and table.to_arrow()["photo_path"].drop_null().to_pylist() == []
    hits = copied.search(text="hat")
    assert [hit.item_id for hit in hits] == [hit.item_id for hit in shop.search(text="hat")]
    assert hits[0].photos[0].open() and hits[0].columns == shop.search(text="hat")[0].columns


def test_a_space_takes_a_wheel_along(catalogue, tmp_path):
    wheel = tmp_path / "syncmask-1-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    folder = write_space(tmp_path / "space", catalogue, package=str(wheel))
    assert (folder / "requirements.txt").read_text() == f"./{wheel.name}[app]\n" and (folder / wheel.name).is_file()


def test_a_space_that_could_not_run_is_refused(catalogue, tmp_path, model, processor):
    for title in ("two\nlines", "a: b", " "):
        with pytest.raises(ValueError, match="one line"):
            write_space(tmp_path / "space", catalogue, title=title)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    outside = Catalogue.open(tmp_path / "c", Encoder(model, processor, device="cpu"), create=True)
    outside.add([{"image": tmp_path / "red.png"}])
    with pytest.raises(ValueError, match="--store-photos"):
        write_space(tmp_path / "space", outside)
    assert not (tmp_path / "space").exists()


# ---------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def lookups():
    """Hosts that this process asks for while the page is served."""
    hosts, real = [], socket.getaddrinfo

    def recorded(host, *args, **kwargs):
        hosts.append(host.decode() if isinstance(host, bytes) else host)
        return real(host, *args, **kwargs)

    socket.getaddrinfo = recorded
    yield hosts
    socket.getaddrinfo = real


@pytest.fixture(scope="module")
def address(catalogue, lookups, tmp_path_factory):
    from syncmask.retrieval.app import serve

    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    page, where = serve(catalogue, block=False)
    yield where
    page.close(verbose=False)
    os.environ.pop("GRADIO_TEMP_DIR") if before is None else os.environ.update(GRADIO_TEMP_DIR=before)


class Visit:
    """A page in the browser, and what it asked for and complained of."""

    def __init__(self, page):
        self.page, self.requests, self.errors = page, [], []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def search(self, words: str) -> None:
        self.page.locator("#words textarea").fill(words)
        self.page.locator("#go").click()

    def choose(self, condition: str) -> None:
        chosen = self.page.locator("#filters .token").filter(has_text=condition)
        for _ in range(20):
            self.page.locator("#filters input").fill(condition)
            for key in ("Enter", "Tab"):  # the list of choices closes when the focus leaves
                self.page.locator("#filters input").press(key)
            self.page.wait_for_timeout(300)
            if chosen.count():
                return
        raise AssertionError(f"the filter {condition!r} was not taken")

    def ask_for(self, count: int) -> None:
        """Type how many results are wanted, again where an answer that came in between reset the field."""
        number, slider = (self.page.locator(f"#k input[type={kind}]") for kind in ("number", "range"))
        for _ in range(20):
            number.fill(str(count))
            number.press("Tab")  # the slider takes the number when the focus leaves
            self.page.wait_for_timeout(500)
            if slider.input_value() == number.input_value() == str(count):
                return
        raise AssertionError(f"the slider shows {slider.input_value()}, not {count}")

    def hosts(self) -> set[str]:
        return {url.split("/")[2].split(":")[0] for url in self.requests if url.startswith(("http", "ws"))}


@pytest.fixture
def visit(browser, address):
    visit = Visit(browser.pages[0])
    visit.page.goto(address)
    visit.page.set_default_timeout(60_000)
    return visit


@pytest.mark.slow
def test_typing_and_clicking_shows_heatmaps(visit, catalogue, lookups):
    visit.search("red hat")
    visit.page.wait_for_selector("#hits .thumbnail-item img")
    captions = visit.page.locator("#hits .caption-label").all_inner_texts()
    assert len(captions) == 12 and captions[0].startswith("1.")
    assert not visit.page.locator("#why").is_visible()
    visit.page.locator("#hits .thumbnail-item").nth(2).click()
    visit.page.wait_for_selector("#why img")
    hit = catalogue.search("red hat", k=12)[2]
    assert visit.page.locator("#why h3").first.inner_text() == hit.item_id
    pictures = visit.page.locator("#why img[alt=gradient]")
    assert pictures.count() == 2  # a map a word
    assert pictures.first.evaluate("picture => picture.complete && picture.naturalWidth") == 150
    visit.page.locator("#side label", has_text="own text").click()
    visit.page.wait_for_function("document.querySelectorAll('#why img[alt=gradient]').length > 2")
    visit.page.locator("#word input").click()
    visit.page.get_by_role("option").nth(1).click()
    visit.page.wait_for_function("document.querySelectorAll('#why img[alt=gradient]').length == 1")
    assert pictures.first.evaluate("picture => picture.naturalWidth") == 264
    assert visit.errors == []
    assert visit.hosts() <= LOCAL, "the browser asked other hosts"
    assert {host for host in lookups if host} <= LOCAL, "the server asked other hosts"


@pytest.mark.slow
def test_a_script_in_a_text_is_shown_and_not_run(visit, garments):
    visit.search(SCRIPT)
    visit.page.wait_for_selector("#hits .thumbnail-item img")
    visit.page.locator("#more button").first.click()
    visit.ask_for(20)
    visit.search(f"{SCRIPT} hat")
    visit.page.wait_for_function("document.querySelectorAll('#hits .thumbnail-item').length == 20")
    captions = visit.page.locator("#hits .caption-label").all_inner_texts()
    place = next(number for number, caption in enumerate(captions) if "<script>" in caption)
    visit.page.locator("#hits .thumbnail-item").nth(place).click()
    visit.page.wait_for_selector("#why img")
    assert visit.page.locator("#why h3").first.inner_text() == garments[0]["item_id"]
    assert SCRIPT in " ".join(visit.page.locator("#why p").first.inner_text().split())
    visit.page.wait_for_timeout(300)
    assert visit.page.evaluate("window.hacked") is None
    assert visit.page.locator("#why script, #why img[src=x]").count() == 0


@pytest.mark.slow
def test_photos_filters_and_mistakes(visit, garments, tmp_path):
    visit.page.locator("#go").click()
    visit.page.wait_for_selector("#status .error")
    assert "nothing to search for" in visit.page.locator("#status").inner_text()
    garments[0]["image"].save(tmp_path / "photo.png")
    visit.page.locator("#photo input[type=file]").set_input_files(tmp_path / "photo.png")
    visit.page.wait_for_selector("#photo img")
    visit.page.locator("#go").click()
    visit.page.wait_for_selector("#hits .thumbnail-item img")
    visit.page.locator("#more button").first.click()
    visit.choose("price<1")
    visit.page.locator("#go").click()
    visit.page.wait_for_function("document.querySelectorAll('#hits .thumbnail-item').length == 1")
    visit.choose("<img src=x onerror=window.hacked=5>=1")
    visit.page.locator("#go").click()
    visit.page.wait_for_selector("#status .error")
    assert "<img src=x" in visit.page.locator("#status").inner_text()
    assert visit.page.evaluate("window.hacked") is None


@pytest.mark.slow
def test_it_fits_a_phone(visit):
    visit.page.set_viewport_size({"width": 390, "height": 844})
    visit.search("red hat")
    visit.page.wait_for_selector("#hits .thumbnail-item img")
    visit.page.locator("#hits .thumbnail-item").first.click()
    visit.page.wait_for_selector("#why img")
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
    left = "all => all.map(one => one.getBoundingClientRect().left)"
    lefts = visit.page.locator("#hits .thumbnail-item").evaluate_all(left)
    assert len(set(lefts)) == 2  # two columns


@pytest.mark.slow
def test_handlers_are_no_api(address):
    import urllib.request

    info = json.load(urllib.request.urlopen(f"{address.rstrip('/')}/gradio_api/info"))
    assert info["named_endpoints"] == {} and info["unnamed_endpoints"] == {}
    assert Path(os.environ["GRADIO_TEMP_DIR"]).is_dir()
