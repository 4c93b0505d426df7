"""The examples run as they stand: in a new folder, on drawn photos, without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which the first example draws the photos and trains the model that the others find there."""
    return tmp_path_factory.mktemp("examples")


def run(workplace, *words) -> str:
    """What a program of the examples prints; it must not fail."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=workplace, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_embed_folder(workplace):
    printed = run(workplace, EXAMPLES / "embed_folder.py")
    saved = np.load(workplace / "example_files" / "vectors.npz")
    assert len(saved["names"]) == len(saved["vectors"]) > 400
    np.testing.assert_allclose(np.linalg.norm(saved["vectors"], axis=1), 1, atol=1e-4)
    assert "is most like" in printed


@pytest.mark.slow
def test_search(workplace):
    printed = run(workplace, EXAMPLES / "search.py", "--words", "blue hoodie")
    assert "463 photos encoded" in printed or "0 skipped" in printed
    assert "speaks" in printed and "'hoodie'" in printed
    home = workplace / "example_files"
    assert Image.open(home / "hits.png").width > 400
    assert "<script" not in (home / "why.html").read_text() and "data:image" in (home / "why.html").read_text()
    again = run(workplace, EXAMPLES / "search.py", "--words", "blue hoodie")
    assert "0 added" in again and "0 photos encoded" in again  # an unchanged shop costs nothing


@pytest.mark.slow
def test_finetune(workplace):
    run(workplace, EXAMPLES / "finetune.py", "--steps", "4")
    home = workplace / "example_files"
    assert (home / "runs" / "finetuned" / "final" / "model.safetensors").is_file()
    for name in ("before", "after"):
        assert json.loads((home / f"{name}.json").read_text())["protocol"] == "items"


@pytest.mark.slow
def test_the_tour(workplace):
    """The notebook's code, cell by cell in one namespace, with a `display` that counts what it is given."""
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells), "a notebook is kept without its outputs"
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    head = f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\nshown = []\ndisplay = shown.append\n"
    (workplace / "tour.py").write_text(f"{head}{code}\nprint('shown', [picture.size for picture in shown])\n")
    printed = run(workplace, workplace / "tour.py")
    assert printed.count("garment-") >= 15 and "gain" in printed
    sizes = printed.rpartition("shown ")[2]
    assert sizes.count("(") == 2
