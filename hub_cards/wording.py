"""What a model card says in sentences and rows of settings, of a run's record alone."""

from __future__ import annotations

from collections.abc import Sequence

from syncmask.evaluation.result import cell

from .markdown import plain
from .measured import Measured
from .public import name_of
from .record import Record


def size(record: Record) -> str:
    """Say how large the model and its inputs are."""
    side = record.settings["data"].get("image_size") or record.config.get("vision_config", {}).get("image_size")
    texts = f", texts of up to {record.max_text_length} tokens" if record.max_text_length else ""
    millions = record.parameters / 1e6
    return f"{millions:.{1 if millions < 100 else 0}f} M parameters; photos of {side} x {side} pixels{texts}."


def corpus_text(record: Record, base_model: str | None) -> str:
    """Say what the model was trained on, and where its weights began."""
    corpus = record.corpus
    sentences = [f"Corpus: {corpus_kind(record)}.", f"{corpus_sizes(record)}."]
    if corpus.filters:
        # A value may be a file's name; what it says of the place stays here.
        kept = ", ".join(plain(name_of(entry) if "/" in entry else entry) for entry in corpus.filters)
        sentences.append(f"Only rows with {kept} were kept.")
    if corpus.variants:
        sentences.append("Rows are triplets: a photo, the same product in another colour, and a text that asks for it.")
    if record.substitutes:
        sentences.append(f"{record.substitutes:,} times a photo could not be read, and another row stood in for it.")
    return " ".join([*sentences, start(record, base_model)])


def start(record: Record, base_model: str | None) -> str:
    """Say what training began with."""
    if not record.start and not base_model:
        return "Training began with random weights."
    kinds = {"vision": "towers that were pretrained apart", "albef": "a checkpoint of ALBEF"}
    kind = kinds.get(record.start, "another model")
    if names := [base_model] if base_model else record.started_from:
        links = " and ".join(f"[{name}](https://huggingface.co/{name})" for name in names)
        return f"Training began with the weights of {kind}: {links}."
    return f"Training began with the weights of {kind}, not published or not named here."


def corpus_kind(record: Record) -> str:
    """Say what the corpus is; one that is not published is no link."""
    corpus, data = record.corpus, record.settings["data"]
    if corpus.source == "hub":
        return f"[{corpus.name}](https://huggingface.co/datasets/{corpus.name})"
    if corpus.source == "files":
        return f"{plain(corpus.name)}, photos and texts in files that are not published"
    asked = {"num_items": "items", "corpus_seed": "seed"}
    drawn = ", ".join(f"{words} {data[key]}" for key, words in asked.items() if key in data)
    return f"`{corpus.name}`, which syncmask draws itself ({drawn}); its texts are made from templates"


def corpus_sizes(record: Record) -> str:
    """Say how many photos and items the splits have, or what of it is not known."""
    corpus = record.corpus
    if corpus.splits:
        sizes = (f"{name} {size['rows']:,} photos of {size['items']:,} items" for name, size in corpus.splits.items())
        return f"Splits: {', '.join(sizes)}"
    if corpus.train_rows:
        return f"Trained on {corpus.train_rows:,} photos; of how many items was not recorded"
    return "Its size was not recorded"


def text_origin(record: Record) -> str:
    """Say who wrote the texts, where a filter tells: a column `text_origin`, as corpora of this project have it."""
    told = [entry.partition("=")[2] for entry in record.corpus.filters if entry.startswith("text_origin=")]
    return f"rows whose `text_origin` is `{plain(told[0])}`" if told else ""


def recipe(record: Record) -> list[tuple[str, str]]:
    """List the settings that a reader asks for, as (name, value); those that are not set are left out."""
    data, objective = record.settings["data"], record.settings["objective"]
    optim, run = record.settings["optim"], record.settings["run"]
    matrices = {"no": "float32"}.get(run.get("mixed_precision"), run.get("mixed_precision"))
    rows = {
        "architecture": architecture(record.config),
        "steps": told("{}, {} whole epochs", record.step, record.epoch),
        "batch": batch(record),
        "optimiser": of(optim, "AdamW, learning rate {learning_rate}, {warmup_steps} warm-up steps, then a cosine"),
        "weight decay": of(optim, "{weight_decay}"),
        "losses": ", ".join(f"{name} {objective[key]}" for key, name in LOSSES.items() if objective.get(key)),
        "masks": of(
            objective, "`{mask_strategy}`, share hidden: {word_mask_rate} of words, {patch_mask_rate} of patches"
        ),
        "batches are": of(objective, "{grouping}"),
        "teacher": of(objective, "momentum {teacher_momentum}, share in the contrast's targets {soft_target_weight}"),
        "rows without": of(objective, "their photo: {drop_image_share}, their text: {drop_text_share}"),
        "augmentation": {True: "crops, flips, colours", False: "none"}.get(data.get("augment"), ""),
        "adapters": of(record.settings["model"], "LoRA of rank {lora_rank}, alpha {lora_alpha}, merged"),
        "towers": "frozen" if record.settings["model"].get("freeze_towers") else "",
        "numbers": told("{} in training, saved as {}", matrices, record.dtype),
        "weights": of(run, "{final_weights}"),
        "seed": of(run, "{seed}"),
    }
    return [(name, value) for name, value in rows.items() if value]


SMALL = 10_000  # Photos; our choice: the smallest corpus of the field that models are published of has 260,000.
LOSSES = {"itc_weight": "ITC", "itm_weight": "ITM", "mlm_weight": "MLM", "mim_weight": "MIM"}


def architecture(config: dict) -> str:
    """Say what the towers are."""
    parts = []
    for key, name in (("vision_config", "image"), ("text_config", "text"), ("fusion_encoder_config", "fusion")):
        part = config.get(key) or {}
        layers, width = part.get("num_hidden_layers"), part.get("hidden_size")
        kind = "" if key.startswith("fusion") else f"{part.get('model_type', '')} "
        parts += [f"{name} {kind}{layers} x {width}"] if layers and width else []
    return ", ".join(parts) + (" (layers x width)" if parts else "")


def batch(record: Record) -> str:
    """Say how many pairs a step sees."""
    optim, processes = record.settings["optim"], record.processes
    size, steps = optim.get("per_device_batch_size"), optim.get("gradient_accumulation_steps", 1)
    if not size:
        return ""
    shared = f" on each of {processes} processes" if processes and processes > 1 else ""
    as_one = ", contrasted as one" if optim.get("full_contrast") else ""
    return f"{size} pairs{shared}" + (f", {steps} such batches a step{as_one}" if steps > 1 else "")


def usage_rows(record: Record) -> list[tuple[str, str]]:
    """List what training and its evaluation used; [] where the run did not record it. Nothing here is estimated."""
    if not record.usage:
        return []
    total, last = record.usage["total"], record.usage["parts"][-1]
    names = [name for name in last["devices"] if name != "cpu"]
    devices = [f"{names.count(name)} x {plain(name)}" for name in dict.fromkeys(names)]
    speed = f", {total['steps_per_s']:.2g} steps a second" if total["steps_per_s"] else ""
    killed = "of one that was killed, what it had used at its last checkpoint"
    rows = [
        ("hardware", ", ".join([*devices, f"{last['cores']} cores of {plain(last['processor'])}"])),
        ("processes", f"{last['processes']}, with {last['threads']} CPU thread(s) each"),
        ("time", f"{hours(total['wall_s'])}{speed}; {hours(total['cpu_s'])} of processor time"),
        ("memory", f"{total['peak_rss_bytes'] / 2**30:.2f} GiB at its highest" if total["peak_rss_bytes"] else ""),
        *(energy(kind, reading) for kind, reading in total["energy"].items()),
        ("starts", f"{total['parts']}, added up; {killed}" if total["parts"] > 1 else ""),
    ]
    return [(name, value) for name, value in rows if value]


def energy(kind: str, reading: dict) -> tuple[str, str]:
    """Say the energy that a counter measured, or why it was not measured."""
    name, whose = {
        "cpu": ("energy, processors and memory", "RAPL: all that ran on the machine"),
        "gpu": ("energy, GPUs", "NVML"),
    }[kind]
    if reading["joules"] is None:
        return name, f"not measured: {plain(reading['missing'])}"
    return name, f"{reading['joules'] / 3600:.3g} Wh ({whose})"


def hours(seconds: float) -> str:
    """Say a time as people do.

    Example:
        >>> hours(90), hours(12_000)
        ('1.5 minutes', '3.3 hours')
    """
    return f"{seconds / 60:.1f} minutes" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} hours"


def teacher_note(record: Record, measured: Sequence[Measured]) -> str:
    """Say whose masks `co-occurrence` measured; "" where it was not run."""
    found = [one.result for one in measured if one.result.protocol == "co-occurrence"]
    if not found:
        return ""
    if found[0].model.get("teacher", "").startswith("none kept"):
        return "`co-occurrence` was measured on this model itself, since no teacher was kept."
    published = record.settings["run"].get("final_weights") == "teacher"
    whose = (
        "whose weights these are" if published else "the moving average of this model in training; it is not published"
    )
    return f"`co-occurrence` measures the masks of the momentum teacher, {whose}."


def text_tells(measured: Sequence[Measured]) -> str:
    """Say what a classifier gets from texts alone, where that is nearly all: then the texts name the labels."""
    for one in measured:
        for name, metric in one.result.metrics.items():
            if name.endswith("/accuracy/text_only") and metric["value"] > 0.9:
                return cell(metric)
    return ""


def small(record: Record) -> str:
    """Say the number of photos of a corpus that is too small to expect anything of the model; "" of others."""
    rows = record.corpus.splits.get("train", {}).get("rows", record.corpus.train_rows)
    return f"{rows:,}" if rows and rows < SMALL and record.corpus.source != "generated" else ""


def false_negatives(record: Record, measured: Sequence[Measured]) -> str:
    """Say the share of a batch's pairs that were false negatives, where it was measured."""
    rules = "random" if record.settings["objective"].get("grouping") == "random" else "rules_1_2"
    for one in measured:
        if metric := one.result.metrics.get(f"false_negatives/pairs/{rules}"):
            return f"{cell(metric)} %"
    return ""


def told(sentence: str, *values) -> str:
    """Fill a sentence; "" where a value is unknown."""
    return "" if None in values else sentence.format(*values)


def of(section: dict, sentence: str) -> str:
    """Fill a sentence from a section of settings; "" where it lacks one.

    Example:
        >>> of({"seed": 0}, "{seed}"), of({}, "{seed}")
        ('0', '')
    """
    try:
        return sentence.format(**section)
    except KeyError:
        return ""
