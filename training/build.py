"""From settings to the parts of a run: processor, model, teacher, masking, probe."""

from __future__ import annotations

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer, PreTrainedModel

from syncmask import SyncMaskConfig, SyncMaskImageProcessor, SyncMaskProcessor
from syncmask.evaluation.loading import model_folder
from syncmask.processing.collator import Collator, PhotoDataset
from syncmask.processing.corpus import CorpusIndex
from syncmask.processing.tokenizer import train_tokenizer
from syncmask.word_scores import WordScores

from .arguments import DataArguments, ModelArguments, PretrainingArguments, TrainArguments
from .contrast import Contrast
from .data import PairData, side_of, to_pixels
from .masking import Masking, MaskSettings, other_photos, probe_masks
from .planning import EpochPlanner
from .sampler import FeatureBank
from .teacher import MomentumTeacher

LONGEST_TEXT = 128


def start_of(name: str) -> str:
    """Return where the model is that training starts from; SystemExit where there is none."""
    try:
        return str(model_folder(name))
    except FileNotFoundError as problem:
        raise SystemExit(f"init_from: {problem}.") from problem


def build_processor(arguments: DataArguments, model: ModelArguments, texts: list[str], seed: int) -> SyncMaskProcessor:
    """Give the processor of the model that training starts from, or one for the corpus.

    The tokenizer is the one that is named, or is trained on the train split's texts.
    """
    if model.init_from is not None:
        return SyncMaskProcessor.from_pretrained(start_of(model.init_from))
    if arguments.tokenizer is None:
        tokenizer = train_tokenizer(
            texts, vocab_size=arguments.vocab_size, seed=seed, max_length=arguments.max_text_length
        )
    else:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        if tokenizer.mask_token_id is None:
            raise SystemExit(
                f"tokenizer {arguments.tokenizer!r} has no mask token; choose one of a masked language model."
            )
        lengths = [len(ids) for ids in tokenizer(sorted(set(texts))).input_ids]
        usual = min(LONGEST_TEXT, int(np.ceil(np.quantile(lengths, 0.99))))
        tokenizer.model_max_length = arguments.max_text_length or usual
    size = {"height": arguments.image_size, "width": arguments.image_size}
    return SyncMaskProcessor(SyncMaskImageProcessor(size=size), tokenizer)


def build_model(
    kind: type[PreTrainedModel], arguments: ModelArguments, processor: SyncMaskProcessor, **more
) -> PreTrainedModel:
    """Build the preset with its overrides, or load what training starts from; `more` goes to the config.

    Args:
        kind: the class that is trained. arguments: what of. processor: gives image size and vocabulary.
    """
    if arguments.init_from is not None:
        model = kind.from_pretrained(start_of(arguments.init_from), dtype=torch.float32, **more)
    else:
        preset = {"tiny": SyncMaskConfig.tiny, "small": SyncMaskConfig.small, "base": SyncMaskConfig.base}
        tokenizer = processor.tokenizer
        fields = {
            "image_size": side_of(processor),
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "mask_token_id": tokenizer.mask_token_id,
            "max_position_embeddings": max(LONGEST_TEXT, tokenizer.model_max_length),
        }
        model = kind(preset[arguments.preset](**{**fields, **arguments.model_overrides, **more}))
    if arguments.freeze_towers:
        model.syncmask.vision_model.requires_grad_(False)
        model.syncmask.text_model.requires_grad_(False)
    return model


def build_contrast(
    arguments: TrainArguments, accelerator: Accelerator, data: PairData, model, layer: int | None
) -> Contrast:
    """Make the teacher of a model that is on its device, the feature bank and the planner."""
    settings, optim, seed = arguments.objective, arguments.optim, arguments.run.seed
    bank = FeatureBank(len(data.rows), model.config.projection_dim)
    planner = EpochPlanner(
        data,
        bank,
        seed,
        optim.per_device_batch_size * accelerator.num_processes,
        settings.semi_hard_margin,
        settings.grouped_share,
        arguments.data.shuffle_buffer,
    )
    return Contrast(settings, data, MomentumTeacher(model, settings.teacher_momentum, layer), bank, planner)


def build_probe(
    rows: datasets.Dataset, processor: SyncMaskProcessor, rate: float, seed: int, device
) -> dict[str, torch.Tensor]:
    """Tokenise the probe pairs, hide words at random once and for all, and give each another item's photo."""
    index = CorpusIndex.from_dataset(rows)
    options = {"image_size": side_of(processor), "resample": processor.image_processor.resample}
    photos = PhotoDataset(rows, index, seed=seed, augment=False, **options)
    batch = Collator(processor)(photos.__getitems__(list(range(len(rows)))))
    batch["pixel_values"] = to_pixels(batch["pixel_values"], processor)
    noise = torch.rand(len(rows), len(rows), generator=torch.Generator().manual_seed(seed))
    batch["other_index"] = other_photos(batch["item_ids"], noise, 1)[0][:, 0]
    batch["text_mask"] = probe_masks(batch, rate, seed)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def build_masking(
    objective: PretrainingArguments, config: SyncMaskConfig, processor: SyncMaskProcessor, texts: list[str]
) -> Masking:
    """Collect the settings of masking and the train split's words."""
    settings = MaskSettings(
        strategy=objective.mask_strategy,
        instance_weight=objective.mask_instance_weight,
        word_rate=objective.word_mask_rate,
        patch_rate=objective.patch_mask_rate,
        temperature=objective.mask_temperature,
        random_share=objective.random_mask_share,
        evidence_share=objective.evidence_share,
        evidence_span=objective.evidence_span,
        evidence_folds=objective.evidence_folds,
        evidence_others=objective.evidence_others,
        gate_threshold=objective.gate_threshold,
        gate_every=objective.gate_every,
        gate_max_steps=objective.gate_max_steps,
        ramp_steps=objective.mask_ramp_steps,
    )
    word_scores, kinds = words_of(processor, texts, objective.word_mean_decay)
    return Masking(settings, word_scores, config, kinds)


def words_of(processor: SyncMaskProcessor, texts: list[str], decay: float) -> tuple[WordScores, torch.Tensor]:
    """Start running means for the words of some texts, and tell the common from the rare.

    Returns:
        The means, and (V,) kinds: thirds of the texts' running words by how often the word occurs, 0 = commonest.
    """
    tokenised = []
    for start in range(0, len(texts), 1024):
        inputs = processor(text=texts[start : start + 1024], return_word_ids=True)
        tokenised += list(zip(inputs["input_ids"], inputs["word_ids"]))
    scores = WordScores.from_texts(tokenised, decay)
    counts = torch.zeros(len(scores.vocabulary))
    for input_ids, word_ids in tokenised:
        rows = scores.rows(input_ids[None], word_ids[None])[0]
        counts += torch.bincount(rows[rows >= 0], minlength=len(counts))
    order = counts.argsort(descending=True, stable=True)
    share = counts[order].cumsum(0) / counts.sum().clamp(min=1)
    kinds = torch.empty_like(order)
    kinds[order] = (share * 3).long().clamp(max=2)
    return scores, kinds
