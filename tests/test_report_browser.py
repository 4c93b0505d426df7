"""The report in a real headless browser: pictures are there, nothing is asked for, nothing runs, it fits a phone."""

import json

import pytest
import torch

from syncmask.evaluation.showcase import spread_rows
from syncmask.training import finetune, pretrain

pytestmark = pytest.mark.slow

SCRIPT = '<script>window.hacked=1</script><img src="http://evil.example/x.png" onerror="window.hacked=2">'
LONG = "unbroken" * 30
TINY = [
    *("--preset", "tiny", "--model_overrides", '{"patch_size": 8, "projection_dim": 16}', "--image_size", "32"),
    *(
        "--per_device_batch_size",
        "16",
        "--epochs",
        "3",
        "--warmup_steps",
        "2",
        "--num_threads",
        "1",
        "--log_every",
        "1",
    ),
    *("--gate_every", "2", "--gate_max_steps", "4", "--mask_ramp_steps", "2", "--learning_rate", "1e-3"),
]
SHORT = [
    "--per_device_batch_size",
    "8",
    "--epochs",
    "1",
    "--num_threads",
    "1",
    "--warmup_steps",
    "1",
    "--log_every",
    "1",
]


@pytest.fixture(scope="module")
def corpus(garments, tmp_path_factory):
    """The small corpus; texts and categories of some items try to run a script or are too wide for a phone."""
    evil = {garments[int(row)]["item_id"] for row in spread_rows(garments, 20)}

    def harm(row):
        if row["item_id"] not in evil:
            return row
        words = row["text"].split()
        text = f"{SCRIPT} {LONG} {' '.join(words)}"
        return row | {"text": text, "category": f"{row['category']} {SCRIPT}"}

    folder = tmp_path_factory.mktemp("corpus") / "saved"
    columns = ["words", "visible", "regions", "attributes", "revealed", "claimed"]
    garments.remove_columns(columns).map(harm).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def runs(corpus, garments, tmp_path_factory):
    """Reports of pretraining on texts that mean harm, on the corpus with ground truth, and of two heads."""
    folder = tmp_path_factory.mktemp("runs")
    more = ["--output_dir", str(folder)]
    pretrain.main(["--corpus", str(corpus), *TINY, *more, "--run_name", "harm"])
    pretrain.main(["--corpus", "garments", "--num_items", "60", *TINY, *more, "--run_name", "truth"])
    start = ["--init_from", str(folder / "truth"), *SHORT, *more]
    finetune.main(
        ["--task", "composed", *start, "--corpus", "garment-variants", "--num_items", "40", "--run_name", "composed"]
    )
    finetune.main(["--task", "classification", *start, "--corpus", str(corpus), "--run_name", "classification"])
    torch.use_deterministic_algorithms(False)
    return folder


class Reading:
    """A report in the browser, and what the page asked for and complained of."""

    def __init__(self, browser, path):
        self.page, self.requests, self.errors = browser.pages[0], [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.goto(path.as_uri())
        self.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        self.page.wait_for_load_state("networkidle")


@pytest.fixture(params=["harm", "truth", "composed", "classification"])
def reading(request, browser, runs):
    return request.param, Reading(browser, runs / request.param / "report" / "index.html")


def test_every_picture_is_there_and_has_words(reading, runs):
    name, report = reading
    pictures = report.page.locator("img").evaluate_all(
        "all => all.map(one => [one.complete, one.naturalWidth, one.alt])"
    )
    assert len(pictures) > 15
    assert all(complete and width > 0 and alt.strip() for complete, width, alt in pictures)
    assert (runs / name / "report" / "index.html").stat().st_size < 8_000_000


def test_nothing_is_asked_for_and_nothing_runs(reading):
    name, report = reading
    asked = [url for url in report.requests if not url.startswith(("file://", "data:"))]
    assert asked == [] and sum(url.startswith("file://") for url in report.requests) == 1
    assert report.errors == [] and report.page.evaluate("window.hacked") is None
    assert report.page.locator("script, iframe, object, img[onerror]").count() == 0
    if name == "harm":
        assert SCRIPT in report.page.locator("body").inner_text()


def test_it_fits_a_phone(reading):
    _, report = reading
    for width in (390, 1280):
        report.page.set_viewport_size({"width": width, "height": 844})
        assert report.page.evaluate("document.documentElement.scrollWidth") <= width
        # What scrolls by itself (tables) may hold wider things; nothing else may reach over the edge.
        wide = report.page.locator("body *").evaluate_all(
            "(all, width) => all.filter(one => one.getBoundingClientRect().right > width + 1"
            " && !one.closest('.scroll')).map(one => one.outerHTML.slice(0, 80))",
            width,
        )
        assert wide == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser, runs, scheme):
    report = Reading(browser, runs / "truth" / "report" / "index.html")
    report.page.emulate_media(color_scheme=scheme)
    ground = channels(report.page.locator("body").evaluate("one => getComputedStyle(one).backgroundColor"))
    assert (sum(ground) < 150) == (scheme == "dark")
    for kind in ("p", "h2", "td", "figcaption", ".note", "a", "summary", "mark.right", "mark.wrong", "mark.unseen"):
        ink, own = report.page.locator(kind).first.evaluate(
            "one => [getComputedStyle(one).color, getComputedStyle(one).backgroundColor]"
        )
        behind = ground if own == "rgba(0, 0, 0, 0)" else channels(own)
        assert contrast(channels(ink), behind) >= 4.5, (kind, ink, behind)


def test_it_is_read_with_the_keyboard_and_printed(browser, runs, tmp_path):
    report = Reading(browser, runs / "truth" / "report" / "index.html")
    report.page.keyboard.press("Tab")
    assert report.page.evaluate("document.activeElement.getAttribute('href')") == "#part-1"
    links = report.page.locator("nav a").evaluate_all("all => all.map(one => one.getAttribute('href'))")
    assert len(links) >= 10 and all(report.page.locator(link).count() == 1 for link in links)
    levels = report.page.locator("h1, h2, h3").evaluate_all("all => all.map(one => +one.tagName[1])")
    assert levels[0] == 1 and all(after - before <= 1 for before, after in zip(levels, levels[1:]))
    assert report.page.evaluate("document.documentElement.lang") == "en"
    printed = report.page.pdf(format="A4")
    assert 5 < printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") < 60


def channels(colour):
    return [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")][:3]


def contrast(one, other):
    """The ratio of WCAG 2; 4.5 is what small text needs."""

    def light(colour):
        parts = [part / 255 for part in colour]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_harm_is_in_the_corpus(corpus, runs):
    """Else the tests above would show nothing."""
    settings = (runs / "harm" / "config.yaml").read_text()
    assert str(corpus) in settings
    states = [json.loads(line) for line in (runs / "harm" / "masks_over_time.jsonl").read_text().splitlines()]
    assert len(states) == 4
