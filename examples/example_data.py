"""What the examples run on when nothing of yours is named: drawn photos, and a model trained on them in half a minute.

Such a model is a toy: `accelerate launch -m syncmask.training.pretrain --config quickstart` trains a better one in ten
minutes, and the examples take it from runs/quickstart when it is there.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from syncmask.processing.corpus import load_corpus
from syncmask.processing.readers_folder import write_folder

HOME = Path("example_files")
COLUMNS = ["image", "text", "item_id", "category", "view"]


def arguments(description: str, **more: str) -> argparse.Namespace:
    """The command line of an example: --photos and --model, made here where they are not given, and `more` of its own.

    Args:
        description: of the example.
        more: name = default value.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="a folder of photos; none = some garments are drawn")
    parser.add_argument("--model", help="a run, or a model's folder; none = runs/quickstart, or one is trained")
    for name, value in more.items():
        parser.add_argument(f"--{name}", default=value, help=f"{value} where not given")
    given = parser.parse_args()
    HOME.mkdir(exist_ok=True)
    given.photos = Path(given.photos or example_photos())
    given.model = given.model or example_model()
    return given


def example_photos(num_items: int = 150) -> Path:
    """A folder of drawn photos with their metadata: train/, validation/ and test/, metadata.jsonl in each."""
    folder = HOME / "photos"
    if not folder.exists():
        print(f"drawing {num_items} garments to {folder} ...")
        corpus = load_corpus("garments", num_items=num_items, image_size=64)
        write_folder(corpus.select_columns(COLUMNS), folder)
    return folder


def example_model() -> str:
    """The quickstart's model, or one that is trained on the drawn photos for a few steps."""
    if Path("runs/quickstart/final").exists():
        return "runs/quickstart"
    final = HOME / "runs" / "model" / "final"
    if not final.exists():
        photos = ["--corpus", "folder", "--data_dir", str(example_photos())]
        short = ["--max_steps", "40", "--per_device_batch_size", "32", "--evaluate", "false"]
        place = ["--output_dir", str(HOME / "runs"), "--run_name", "model", "--overwrite"]
        run("syncmask.training.pretrain", "--config", "quickstart", *photos, *short, *place)
    return str(final.parent)


def run(*words: str) -> None:
    """Run a command of this package, shown as you would type it."""
    print("\n$ python -m", *words, flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True)
