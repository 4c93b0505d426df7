"""Fine-tune a model for image-text retrieval on your own photos, and compare before and after.

    python examples/finetune.py
    python examples/finetune.py --model runs/quickstart --photos path/to/photos

Your folder: train/, validation/ and test/ (or flat), each with metadata.jsonl, one line a photo with file_name, text
and item_id (equal for all photos of one item). `syncmask corpus check path/to/photos` says what is wrong with it.
"""

from example_data import HOME, arguments, run

given = arguments(__doc__, steps="30")
tuned = HOME / "runs" / "finetuned"

photos = ["--corpus", "folder", "--data_dir", str(given.photos)]
options = ["--max_steps", given.steps, "--per_device_batch_size", "32", "--evaluate", "false"]
place = ["--output_dir", str(tuned.parent), "--run_name", tuned.name, "--overwrite"]
start = ["--task", "retrieval", "--init_from", given.model]
run("syncmask.training.finetune", *start, *photos, *options, *place)

results = [HOME / "before.json", HOME / "after.json"]
for model, result in zip((given.model, tuned), results):
    where = ["--corpus", str(given.photos), "--split", "validation", "--out", str(result)]
    run("syncmask", "evaluate", str(model), "--protocol", "items", *where)
run("syncmask", "compare", *map(str, results))
