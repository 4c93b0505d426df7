"""From settings to the parts of a run: corpus, processor, model, teacher, masking."""

import logging
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from scipy.sparse import csr_matrix
from transformers import AutoTokenizer

from syncmask import SyncMaskConfig, SyncMaskForPreTraining, SyncMaskImageProcessor, SyncMaskProcessor
from syncmask.processing.collator import Collator, PhotoDataset, normalise
from syncmask.processing.corpus import CorpusIndex, load_corpus
from syncmask.processing.overlap import overlap_tau, text_rows
from syncmask.processing.tokenizer import train_tokenizer
from syncmask.word_scores import WordScores

from .arguments import DataArguments, ModelArguments, ObjectiveArguments
from .masking import Masking, MaskSettings, other_photos, probe_masks

logger = logging.getLogger(__name__)

FOLDER = "folder"
LONGEST_TEXT = 128
# The probe set never takes more than this share of a small corpus's items.
PROBE_SHARE = 0.1


@dataclass
class TrainData:
    """The rows that are trained on, and what batches are made with.

    Args:
        rows: the train split without the probe items.
        index: item and text ids of these rows.
        photos: the same rows as records, by (epoch, row).
        probe_rows: rows of the train split that are set aside for the gate.
        texts: (texts, words) sparse unit rows for the overlap of texts, by text id.
        tau: the overlap from which two texts may be true of one another's photos.
    """

    rows: datasets.Dataset
    index: CorpusIndex
    photos: PhotoDataset
    probe_rows: datasets.Dataset
    texts: csr_matrix
    tau: float


def read_corpus(arguments: DataArguments) -> datasets.DatasetDict:
    """Load the corpus that the settings name, split by item."""
    generated = arguments.corpus == "garments"
    if arguments.corpus == FOLDER and not arguments.data_dir:
        raise SystemExit(f"corpus: {FOLDER} needs the place of the photos: add --data_dir FOLDER.")
    return load_corpus(
        arguments.data_dir if arguments.corpus == FOLDER else arguments.corpus,
        image_column=arguments.image_column,
        text_column=arguments.text_column,
        item_id_column=arguments.item_id_column,
        where=arguments.filters(),
        seed=arguments.corpus_seed,
        num_items=arguments.num_items if generated else None,
        image_size=arguments.image_size if generated else None,
    )


def build_processor(arguments: DataArguments, texts: list[str], seed: int) -> SyncMaskProcessor:
    """Give the tokenizer that is named, or train one on the train split's texts."""
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


def build_model(arguments: ModelArguments, image_size: int, tokenizer) -> SyncMaskForPreTraining:
    """Build the preset with its overrides, or load the model that training starts from."""
    if arguments.init_from is not None:
        return SyncMaskForPreTraining.from_pretrained(arguments.init_from, dtype=torch.float32)
    preset = {"tiny": SyncMaskConfig.tiny, "small": SyncMaskConfig.small, "base": SyncMaskConfig.base}[arguments.preset]
    fields = {
        "image_size": image_size,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "max_position_embeddings": max(LONGEST_TEXT, tokenizer.model_max_length),
    }
    return SyncMaskForPreTraining(preset(**{**fields, **arguments.model_overrides}))


def build_train_data(
    rows: datasets.Dataset,
    data: DataArguments,
    objective: ObjectiveArguments,
    seed: int,
    resample: int,
) -> TrainData:
    """Set the probe items aside and index what is left; `resample` is the processor's filter."""
    probe = probe_positions(CorpusIndex.from_dataset(rows).item_ids, objective.gate_probe_pairs, seed)
    keep = np.setdiff1d(np.arange(len(rows)), probe)
    train = rows.select(keep)
    index = CorpusIndex.from_dataset(train)
    texts = text_rows(index.texts)
    tau = objective.overlap_tau
    if tau is None:
        tau = overlap_tau(texts, index.item_of_text, seed)
        logger.info("two texts may be true of one another's photos from an overlap of %.3f", tau)
    photos = PhotoDataset(train, index, image_size=data.image_size, seed=seed, augment=data.augment, resample=resample)
    return TrainData(train, index, photos, rows.select(probe), texts, tau)


def probe_positions(item_ids: np.ndarray, pairs: int, seed: int) -> np.ndarray:
    """Choose rows of whole items, seeded: at most `pairs` rows and a tenth of the items, at least two items.

    Raises:
        SystemExit: when the corpus has fewer than four items.
    """
    items, counts = np.unique(item_ids, return_counts=True)
    if len(items) < 4:
        raise SystemExit(
            f"the train split has {len(items)} item(s); at least 4 are needed to train and to test the masks."
        )
    order = np.random.default_rng([seed, 1]).permutation(len(items))[: max(2, int(PROBE_SHARE * len(items)))]
    fits = max(2, int((np.cumsum(counts[order]) <= pairs).sum()))
    return np.flatnonzero(np.isin(item_ids, items[order[:fits]]))


def build_probe(
    rows: datasets.Dataset, processor: SyncMaskProcessor, image_size: int, rate: float, seed: int, device
) -> dict[str, torch.Tensor]:
    """Tokenise the probe pairs, hide words at random once and for all, and give each another item's photo."""
    index = CorpusIndex.from_dataset(rows)
    photos = PhotoDataset(
        rows, index, image_size=image_size, seed=seed, augment=False, resample=processor.image_processor.resample
    )
    batch = Collator(processor)(photos.__getitems__(list(range(len(rows)))))
    batch["pixel_values"] = to_pixels(batch["pixel_values"], processor)
    noise = torch.rand(len(rows), len(rows), generator=torch.Generator().manual_seed(seed))
    batch["other_index"] = other_photos(batch["item_ids"], noise, 1)[0][:, 0]
    batch["text_mask"] = probe_masks(batch, rate, seed)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def to_pixels(pixel_values: torch.Tensor, processor: SyncMaskProcessor) -> torch.Tensor:
    """Standardise bytes as the processor does, on their own device."""
    return normalise(pixel_values, processor.image_processor.image_mean, processor.image_processor.image_std)


def build_masking(
    objective: ObjectiveArguments, config: SyncMaskConfig, processor: SyncMaskProcessor, texts: list[str]
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
