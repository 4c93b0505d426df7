"""The settings of a run: dataclasses, a section each; the objective's section depends on what is trained.

The dataclasses are the one list of settings: `--help`, the YAML check and the resolved config.yaml are made from them
(see parsing.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .fields import Checked, setting, share


@dataclass
class DataArguments(Checked):
    """What is read: the corpus, its columns, and how a row becomes pixels and tokens."""

    corpus: str = setting(
        "garments",
        "'garments' (generated, with ground truth), 'garment-variants' (generated triplets), a folder of images with "
        "metadata, parquet or Arrow, FashionGen's or FashionIQ's folder, tar shards, or a dataset on the Hugging Face "
        "Hub",
    )
    data_dir: str | None = setting(None, "with corpus: folder, the folder of the photos")
    image_column: str | None = setting(None, "column of the photos; none = found by name")
    text_column: str | None = setting(None, "column of the texts; none = found by name")
    item_id_column: str | None = setting(None, "column that is equal for photos of one item; none = found by name")
    where: list[str] = setting(
        [], "keep only rows whose column has this value: column=value; may be repeated, all must hold"
    )
    variants: str | None = setting(
        None,
        "PRODUCT_COLUMN,COLOUR_COLUMN: read triplets of photos of one product in two colours, for composed retrieval",
    )
    num_items: int | None = setting(None, "items of a generated corpus; none = its own default", low=8)
    corpus_seed: int = setting(0, "seed of the generated corpus and of item-wise splits", low=0)
    image_size: int = setting(224, "pixels on a side, a multiple of the patch size", low=8)
    tokenizer: str | None = setting(
        None, "folder or Hub name of a tokenizer; none = train a WordPiece on the train split's texts"
    )
    vocab_size: int = setting(8192, "entries of a tokenizer that is trained here, at most", low=64)
    max_text_length: int | None = setting(
        None, "tokens of a text, at most; none = the corpus's 99th percentile, at most 128", low=4
    )
    shuffle_buffer: int | None = setting(
        None,
        "rows of a block that is read in one stretch, batches are made inside it: for tar shards or a slow disk; "
        "none = the whole corpus",
        low=2,
    )
    augment: bool = setting(True, "crop, flip and shift colours of training photos, seeded by row and epoch")
    num_workers: int = setting(0, "processes that decode photos, for each training process", low=0)
    prefetch_factor: int = setting(2, "num_workers: batches that each of them reads ahead", low=1)
    fast_decode: bool = setting(
        False,
        "decode large JPEGs at a half, a quarter or an eighth of their size where that is enough, and shrink photos to "
        "what the smallest crop needs: several times faster, pixels differ a little",
    )
    decoded_cache: str | None = setting(
        None,
        "folder on a fast disk where decoded training photos are kept, so that later epochs and runs need not decode "
        "them again; changes no pixel",
    )

    def __post_init__(self):
        super().__post_init__()
        self.filters()

    def filters(self) -> dict[str, str]:
        """Return `where` as {column: value}; ValueError where an entry has no `=`.

        Example:
            >>> DataArguments(where=["text_origin=description"]).filters()
            {'text_origin': 'description'}
        """
        for entry in self.where:
            if not entry.partition("=")[0] or "=" not in entry:
                raise ValueError(f"where is {entry!r}, but must look like column=value")
        return dict(entry.split("=", 1) for entry in self.where)


@dataclass
class ModelArguments(Checked):
    """What is trained."""

    preset: Literal["tiny", "small", "base"] | None = setting(
        None,
        "size of a model from scratch: tiny trains on a laptop's CPU, base is the paper's size; none = small, where "
        "nothing else says what to train",
    )
    model_overrides: dict[str, Any] = setting(
        {},
        "settings of SyncMaskConfig that replace the preset's; a mapping in YAML, JSON on the command line",
    )
    init_from: str | None = setting(
        None, "run folder, model folder or Hub name whose weights and processor training starts from"
    )
    vision: str | None = setting(
        None,
        "folder or Hub name of a vision model (CLIP, SigLIP, DINOv2, ViT, DeiT) for the image tower; with text",
    )
    text: str | None = setting(
        None,
        "folder or Hub name of a masked language model that becomes text tower and fusion encoder, with its tokenizer; "
        "with vision",
    )
    split_layer: int | None = setting(
        None, "text: layers that the text tower gets, the fusion encoder gets the others; none = half", low=1
    )
    albef: str | None = setting(
        None, "checkpoint (.pth) of ALBEF that the model is made of; with tokenizer, that of bert-base-uncased"
    )
    freeze_towers: bool = setting(False, "train only what is above the image and the text tower")
    lora_rank: int | None = setting(
        None,
        "rank of low-rank adapters (LoRA, by peft) in the layers of towers and fusion encoder: they and the heads "
        "alone are trained, and final/ has them merged; none = train the weights themselves",
        low=1,
    )
    lora_alpha: float = setting(16.0, "lora_rank: adapters count this much over their rank", above=0)

    def __post_init__(self):
        super().__post_init__()
        self._check_start()

    def _check_start(self):
        """Refuse more than one start, or half of one."""
        if (self.vision is None) != (self.text is None):
            missing = "text" if self.text is None else "vision"
            raise ValueError(f"vision and text go together: {missing} is missing")
        if self.split_layer is not None and self.text is None:
            raise ValueError(f"split_layer is {self.split_layer}, but no text says what is split")
        starts = [name for name in ("vision", "albef", "init_from", "preset") if getattr(self, name) is not None]
        # A task's config may name the preset that is trained where nothing is started from.
        if len(starts) > 1 and starts != ["init_from", "preset"]:
            raise ValueError(
                f"{starts[0]} and {starts[1]} are both set, but a model has one start: set {starts[1]} to none"
            )


@dataclass
class ContrastArguments(Checked):
    """Contrast and matching of photos and texts, the momentum teacher, and how batches are put together."""

    itc_weight: float = setting(1.0, "weight of image-text contrast", low=0)
    itm_weight: float = setting(1.0, "weight of image-text matching", low=0)
    soft_target_weight: float = share(0.4, "share of the contrast targets that the teacher gives")
    soft_target_ramp_steps: int = setting(1000, "steps from 0 to soft_target_weight", low=0)
    teacher_momentum: float = share(0.995, "momentum of the teacher; smaller for short runs, such as 0.98")
    grouping: Literal["random", "grouped"] = setting(
        "grouped", "batches at random, or of similar pairs (hard negatives) once matching has begun to learn"
    )
    grouped_share: float = share(
        0.5,
        "grouping: share of an epoch's batches that is grouped; the others stay random, so that a batch also "
        "compares what lies far apart",
    )
    semi_hard_margin: float | None = setting(
        None, "negatives must be this much less similar than the positive (cosine); none = no such rule"
    )
    overlap_tau: float | None = setting(
        None,
        "word overlap from which another item's text is no negative; none = measured on the corpus",
        above=0,
    )


@dataclass
class PretrainingArguments(ContrastArguments):
    """The four losses, the masks, the momentum teacher, and how batches are put together."""

    mlm_weight: float = setting(1.0, "weight of masked words", low=0)
    mim_weight: float = setting(1.0, "weight of masked patches", low=0)
    mlm_soft_targets: bool = setting(
        False, "the teacher's word probabilities have soft_target_weight in MLM's targets too (ALBEF; one more pass)"
    )
    wpa_weight: float = setting(
        0.0,
        "weight of word-patch alignment (ours): in which of a batch's photos is each word found; 0 = no such head, 4 "
        "is what the masks' strategy alignment was measured with",
        low=0,
    )
    mask_strategy: Literal["random", "attention", "evidence", "alignment"] = setting(
        "attention",
        "what decides which words and patches are hidden: chance, the teacher's cross-attention (the paper), "
        "how much the photo raises the teacher's belief in a word (ours, about 15 percent slower), or how much better "
        "a word fits the photo than others (ours, needs wpa_weight)",
    )
    mask_layer: int | None = setting(
        None, "fusion layer that scores are read from, 0 = the first; none = the model's default", low=0
    )
    mask_instance_weight: float | None = setting(
        None,
        "1 = a word's score for this pair alone, 0 = its mean over all photos; none = 1 for attention, "
        "0.5 for evidence and alignment",
        low=0,
        high=1,
    )
    word_mask_rate: float = share(0.3, "share of a text's words that is hidden")
    patch_mask_rate: float = share(0.4, "share of a photo's patches that is hidden")
    mask_temperature: float = setting(0.25, "0 = always the highest scores; larger = more chance in the choice", low=0)
    random_mask_share: float = share(0.25, "share of what is hidden that is drawn without looking at scores")
    evidence_share: float = share(0.25, "evidence: share of each batch that is measured in a step")
    evidence_span: int = setting(3, "evidence: neighbouring words hidden together, at most", low=1)
    evidence_folds: int = setting(3, "evidence: passes over which a text's words are spread", low=2)
    evidence_others: int = setting(1, "evidence: other items' photos that the own photo is compared to", low=1)
    word_mean_decay: float = share(0.99, "decay of the running mean of a word's score, a step")
    gate_threshold: float = setting(
        0.1,
        "masks stay random until hidden words are this much likelier (in nats) to the teacher with their own "
        "photo than with another item's",
    )
    gate_every: int = setting(100, "steps between two tests of the gate", low=1)
    gate_max_steps: int = setting(2000, "step at which the gate opens anyway", low=0)
    gate_probe_pairs: int = setting(256, "train pairs set aside for testing the gate", low=2)
    mask_ramp_steps: int = setting(500, "steps over which scores take over once the gate is open", low=0)

    def __post_init__(self):
        super().__post_init__()
        if self.mask_strategy == "alignment" and not self.wpa_weight:
            raise ValueError("mask_strategy alignment needs the head that wpa_weight trains: set wpa_weight to 4")


@dataclass
class ComposedArguments(Checked):
    """Reference photo and text against target photos: one loss, nothing to set."""


@dataclass
class ClassificationArguments(Checked):
    """Category and subcategory together, from photo and text, from either alone."""

    label_columns: list[str] = setting(
        ["category", "subcategory"], "columns that hold labels, a classifier each; those the corpus lacks are left out"
    )
    drop_image_share: float = share(
        0.15, "share of rows that are trained on without their photo; 1 = a model of texts alone"
    )
    drop_text_share: float = share(
        0.15, "share of rows that are trained on without their text; 1 = a model of photos alone"
    )
    balance: Literal["none", "logit_adjustment", "class_weights"] = setting(
        "none",
        "rare labels: left as they are, logits shifted by the log of a label's share (Menon et al. 2021), or each "
        "label's loss weighted by the inverse of its share",
    )
    balance_strength: float = setting(1.0, "factor of that shift, or power of that weight", low=0)

    def __post_init__(self):
        super().__post_init__()
        if self.drop_image_share + self.drop_text_share > 1:
            raise ValueError(
                f"drop_image_share {self.drop_image_share} and drop_text_share {self.drop_text_share} sum to more than "
                "1: a row needs its photo or its text. For a model of one alone, set the other share to 0"
            )


@dataclass
class OptimArguments(Checked):
    """AdamW, its schedule, and when training ends."""

    per_device_batch_size: int = setting(64, "pairs in a batch of one process", low=1)
    gradient_accumulation_steps: int = setting(1, "batches whose gradients make one step", low=1)
    full_contrast: bool = setting(
        False,
        "gradient_accumulation_steps: image-text contrast compares all pairs of a step's batches with each other, as "
        "one large batch would; one more forward of the towers",
    )
    learning_rate: float = setting(1e-4, "peak learning rate", above=0)
    learning_rate_floor: float = share(0.01, "share of the peak at which the cosine schedule ends")
    layer_decay: float = setting(
        1.0,
        "factor of the learning rate from each layer of a tower to the one below it, the embeddings lowest, such as "
        "0.8; 1 = the same rate everywhere",
        above=0,
        high=1,
    )
    weight_decay: float = setting(0.02, "AdamW's; biases, norms, positions and the temperature get none", low=0)
    warmup_steps: int = setting(500, "steps of linear warm-up", low=0)
    epochs: int = setting(30, "passes over the train split", low=1)
    max_steps: int | None = setting(None, "end after this many steps, if epochs have not ended before", low=1)
    max_minutes: float | None = setting(
        None, "end in good order after this wall time; the schedule still follows the steps", above=0
    )
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", above=0)

    @property
    def rows_of_process(self) -> int:
        """Pairs of a process that are compared with each other: a batch's, or all of a step's."""
        return self.per_device_batch_size * (self.gradient_accumulation_steps if self.full_contrast else 1)

    @property
    def batches_per_step(self) -> int:
        """Batches of `rows_of_process` pairs that make one step."""
        return 1 if self.full_contrast else self.gradient_accumulation_steps


@dataclass
class RunArguments(Checked):
    """Where results go, how often, and how the machine is used."""

    output_dir: str = setting("runs", "folder of run folders")
    run_name: str | None = setting(None, "name of the run's folder; none = the name of the config")
    seed: int = setting(0, "seed of weights, batches, augmentation and masks", low=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "number format of matrix products")
    activation_checkpointing: bool = setting(
        False, "keep only the layers' inputs for the backward pass and compute the rest again: less memory, more time"
    )
    compile: bool = setting(False, "compile the layers of model and teacher (torch.compile): for GPUs")
    estimate: bool = setting(
        False, "train nothing: tell the memory that a step needs and the largest batch that fits, and end"
    )
    profile: int | None = setting(
        None, "steps to record with torch's profiler once training is under way, to profile/ in the run's folder", low=1
    )
    num_threads: int | None = setting(
        None, "CPU threads of a process; none = cores divided by the processes of this machine", low=1
    )
    log_with: list[str] = setting([], "trackers beside metrics.jsonl, such as tensorboard or wandb; may be repeated")
    log_every: int = setting(20, "steps between two lines of metrics.jsonl", low=1)
    log_batches: bool = setting(False, "write the rows of every batch to batches.jsonl")
    checkpoint_every: int | None = setting(
        None, "steps between two checkpoints; the end of each epoch writes one in any case", low=1
    )
    keep_last: int = setting(2, "newest checkpoints that are kept, beside the best", low=1)
    best_metric: str | None = setting(
        None, "validation metric, higher is better, that decides the best one; none = the task's first, a mean of all"
    )
    resume: bool = setting(False, "go on from the newest complete checkpoint of the run's folder")
    overwrite: bool = setting(False, "empty the run's folder if it exists")
    validate_every_epochs: int = setting(1, "epochs between two validations", low=1)
    final_weights: Literal["student", "teacher"] = setting(
        "student", "which weights `final/` holds: the trained ones or their moving average"
    )
    evaluate: bool = setting(True, "run the evaluation protocols at the end")
    deterministic: bool = setting(False, "use deterministic algorithms only, for bit-equal re-runs")
    push_to_hub: bool = setting(False, "publish the run on the Hub, by `syncmask publish` in a process of its own")
    hub_model_id: str | None = setting(None, "push_to_hub: name of the model on the Hub, owner/name")
    hub_private: bool = setting(False, "push_to_hub: make the new repository private")
    hub_strategy: Literal["end", "checkpoint"] = setting(
        "end", "push_to_hub: publish the finished run alone, or also checkpoints as they are saved"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite are both on: one keeps the run's folder, the other empties it")
        if self.push_to_hub and (self.hub_model_id or "").count("/") != 1:
            raise ValueError(f"push_to_hub is on, but hub_model_id is {self.hub_model_id!r}; wanted owner/name")

    @property
    def folder(self) -> Path:
        """The run's folder, `output_dir/run_name`."""
        return Path(self.output_dir) / (self.run_name or "pretrain")


# What can be trained -> the settings of its objective.
OBJECTIVES = {
    "pretraining": PretrainingArguments,
    "retrieval": ContrastArguments,
    "composed": ComposedArguments,
    "classification": ClassificationArguments,
}


@dataclass
class TrainArguments:
    """All settings of a run; field names are unique across the five sections."""

    data: DataArguments = field(default_factory=DataArguments)
    model: ModelArguments = field(default_factory=ModelArguments)
    objective: Checked = field(default_factory=PretrainingArguments)
    optim: OptimArguments = field(default_factory=OptimArguments)
    run: RunArguments = field(default_factory=RunArguments)

    def __post_init__(self):
        if self.optim.full_contrast and not getattr(self.objective, "itc_weight", 0):
            raise ValueError(
                "full_contrast is on, but no photos and texts are contrasted: it is for pretraining and for the task "
                "retrieval, with itc_weight above 0"
            )


def sections_of(task: str) -> dict[str, type[Checked]]:
    """Return the dataclass of each section for what is trained: a key of OBJECTIVES."""
    return {
        "data": DataArguments,
        "model": ModelArguments,
        "objective": OBJECTIVES[task],
        "optim": OptimArguments,
        "run": RunArguments,
    }
