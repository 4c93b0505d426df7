"""From settings to the parts of a run: processor, model, teacher, masking, probe."""

from __future__ import annotations

import logging

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.modeling_layers import GradientCheckpointingLayer

from syncmask import SyncMaskConfig, SyncMaskImageProcessor, SyncMaskProcessor
from syncmask.conversion import load_tokenizer
from syncmask.evaluation.loading import model_folder
from syncmask.processing.collator import Collator, PhotoDataset
from syncmask.processing.corpus import CorpusIndex
from syncmask.processing.tokenizer import train_tokenizer
from syncmask.towers import max_text_tokens
from syncmask.word_scores import WordScores

from .arguments import DataArguments, ModelArguments, PretrainingArguments, TrainArguments
from .contrast import Contrast
from .data import PairData, side_of, to_pixels
from .lora import add_adapters
from .masking import Masking, MaskSettings, other_photos, probe_masks
from .planning import EpochPlanner
from .processes import is_main
from .sampler import FeatureBank
from .teacher import MomentumTeacher

logger = logging.getLogger(__name__)

LONGEST_TEXT = 128
RECOMPILE_LIMIT = 64
MOST_WRITTEN_OUT = 400
ALBEF_PHOTOS = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}  # as ALBEF standardises them


def start_of(name: str) -> str:
    """Return where the model is that training starts from; SystemExit where there is none."""
    try:
        return str(model_folder(name))
    except FileNotFoundError as problem:
        raise SystemExit(f"init_from: {problem}.") from problem


def build_processor(arguments: DataArguments, model: ModelArguments, texts: list[str], seed: int) -> SyncMaskProcessor:
    """Give the processor of the model that training starts from, or one for the corpus.

    The tokenizer is the text checkpoint's or the one that is named, or is trained on the train split's texts; photos
    are standardised as the vision checkpoint's are.
    """
    if model.init_from is not None:
        return SyncMaskProcessor.from_pretrained(start_of(model.init_from))
    if model.text is not None and arguments.tokenizer is not None:
        raise SystemExit(
            f"tokenizer is {arguments.tokenizer!r}, but text {model.text!r} brings its own: set tokenizer to none."
        )
    name = model.text or arguments.tokenizer
    if model.albef is not None and name is None:
        raise SystemExit(
            "albef: the checkpoint has no tokenizer with it; name the one that it was trained with, "
            "--tokenizer google-bert/bert-base-uncased or a folder that holds it."
        )
    if name is None:
        tokenizer = train_tokenizer(
            texts, vocab_size=arguments.vocab_size, seed=seed, max_length=arguments.max_text_length
        )
    else:
        tokenizer = pretrained_tokenizer(name, texts, arguments.max_text_length)
    size = {"height": arguments.image_size, "width": arguments.image_size}
    photos = standardisation(model.vision) if model.albef is None else ALBEF_PHOTOS
    return SyncMaskProcessor(SyncMaskImageProcessor(size=size, **photos), tokenizer)


def pretrained_tokenizer(name: str, texts: list[str], max_length: int | None) -> PreTrainedTokenizerBase:
    """Load a tokenizer that reads `max_length` tokens, or as many as nearly all of the texts have."""
    try:
        tokenizer = load_tokenizer(name)
    except ValueError as problem:
        raise SystemExit(str(problem)) from problem
    lengths = [len(ids) for ids in tokenizer(sorted(set(texts))).input_ids]
    usual = min(LONGEST_TEXT, int(np.ceil(np.quantile(lengths, 0.99))))
    tokenizer.model_max_length = max_length or usual
    return tokenizer


def standardisation(vision: str | None) -> dict[str, list[float]]:
    """Return a vision checkpoint's mean and standard deviation; without either, the image processor's own are meant."""
    if vision is None:
        return {}
    try:
        settings, _ = SyncMaskImageProcessor.get_image_processor_dict(vision)
    except OSError:
        logger.warning("%r does not say how its photos are standardised: mean and deviation .5 are taken.", vision)
        return {}
    return {name: settings[name] for name in ("image_mean", "image_std") if name in settings}


def build_model(
    kind: type[PreTrainedModel], arguments: ModelArguments, processor: SyncMaskProcessor, **more
) -> PreTrainedModel:
    """Build the preset with its overrides, or load or convert what training starts from; `more` goes to the config.

    Args:
        kind: the class that is trained. arguments: what of. processor: gives image size and vocabulary.
    """
    if arguments.init_from is not None:
        model = kind.from_pretrained(start_of(arguments.init_from), dtype=torch.float32, **more)
    elif arguments.vision is not None or arguments.albef is not None:
        model = convert_model(kind, arguments, processor, **more)
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
        model = kind(preset[arguments.preset or "small"](**{**fields, **arguments.model_overrides, **more}))
    if arguments.freeze_towers:
        model.syncmask.vision_model.requires_grad_(False)
        model.syncmask.text_model.requires_grad_(False)
    if arguments.lora_rank is not None:
        add_adapters(model, arguments.lora_rank, arguments.lora_alpha, towers=not arguments.freeze_towers)
    return model


def checkpoint_activations(model: PreTrainedModel):
    """Let towers, fusion encoder and MIM decoder keep their layers' inputs alone and compute the rest again.

    Losses and gradients stay the same bit for bit, dropout included: the recomputation draws what the forward drew.
    """
    # transformers renamed it in 5.23, and warns under the old name.
    switch_on = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch_on()


def compile_layers(model: PreTrainedModel, **options):
    """Compile every layer of towers, fusion encoder and MIM decoder in place; `options` go to `torch.compile`.

    Layer by layer (our choice): equal layers share a graph, so it takes seconds; names of weights stay; and what
    depends on the data's values, such as how many words are hidden, stands between the layers, where a graph of the
    whole forward would break.
    """
    # All layers go through one wrapper of transformers, and dynamo counts recompilations by function: the kinds of
    # layers, with and without gradient, in few and in many tokens, are more than its default of 8.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # transformers' name for a repeated layer
            module.compile(**options)


def write_out_attention(model: PreTrainedModel, device: str, precision: str):
    """Let attention be two products and a softmax where PyTorch's fused one is slow: in bf16 on the CPU.

    Its bf16 backward there is slower than fp32's: 197 tokens of 4 photos take 22 ms forward and backward, written out
    13 ms, 25 words on 197 patches 19 and 8 ms. With MOST_WRITTEN_OUT patches and more nothing is gained that would be
    worth the score matrices that are kept, so these stay with the fused one (our choice).

    Args:
        model: any SyncMask class. device: its kind, such as "cpu". precision: of autocast, such as "bf16" or "no".
    """
    rows, columns = model.base_model.grid
    if device == "cpu" and precision == "bf16" and rows * columns < MOST_WRITTEN_OUT:
        # By name, since transformers warns of a decoder that the config describes and the class has not.
        built = {id(module.config) for module in model.modules() if isinstance(module, PreTrainedModel)}
        parts = [name for name in model.config.sub_configs if id(getattr(model.config, name)) in built]
        model.set_attn_implementation(dict.fromkeys(["", *parts], "eager"))


def convert_model(
    kind: type[PreTrainedModel], arguments: ModelArguments, processor: SyncMaskProcessor, **more
) -> PreTrainedModel:
    """Build a model on other people's checkpoints, say what came over, and see that it fits the processor."""
    tokenizer = processor.tokenizer
    fields = {"image_size": side_of(processor), "mask_token_id": tokenizer.mask_token_id}
    fields |= {**arguments.model_overrides, **more}
    vision, text, albef = arguments.vision, arguments.text, arguments.albef
    source = f"text {text!r}" if albef is None else f"albef {albef!r}"
    try:
        if albef is None:
            model = kind.from_vision_text_pretrained(vision, text, arguments.split_layer, **fields)
        else:
            model = kind.from_albef(albef, **fields)
    except (OSError, ValueError, StrictDataclassError) as problem:
        raise SystemExit(f"{'vision and text' if albef is None else 'albef'}: {problem}") from problem
    room, vocabulary = max_text_tokens(model.syncmask.text_model), model.config.text_config.vocab_size
    if tokenizer.model_max_length > room:
        raise SystemExit(
            f"max_text_length is {tokenizer.model_max_length}, but {source} has positions for {room} "
            "tokens: set it to that at most."
        )
    # Of ALBEF's the tokenizer is named by hand, so a smaller one is another one, and not a table with room to spare.
    if len(tokenizer) > vocabulary or albef is not None and len(tokenizer) != vocabulary:
        raise SystemExit(
            f"the tokenizer of {source} knows {len(tokenizer)} tokens, but its model {vocabulary}: they "
            "do not belong together."
        )
    if is_main():
        logger.info("built on %s\n%s", source if albef else f"vision {vision!r}, {source}", model.conversion_report)
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
        optim.rows_of_process * accelerator.num_processes,
        settings.semi_hard_margin,
        settings.grouped_share,
        arguments.data.shuffle_buffer,
    )
    teacher = MomentumTeacher(model, settings.teacher_momentum, layer)
    write_out_attention(teacher.model, accelerator.device.type, accelerator.mixed_precision)
    if arguments.run.compile:
        compile_layers(teacher.model)
    return Contrast(settings, data, teacher, bank, planner)


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
    word_scores, kinds = words_of(processor, texts, objective.word_mean_decay)
    return Masking(mask_settings(objective), word_scores, config, kinds)


def mask_settings(objective: PretrainingArguments) -> MaskSettings:
    """Return what masking needs of an objective's settings."""
    return MaskSettings(
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
