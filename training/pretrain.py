"""Pretrain SyncMask: `accelerate launch -m syncmask.training.pretrain --config quickstart`."""

from __future__ import annotations

import logging
from functools import partial

from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import DatasetDict

from syncmask import SyncMaskConfig, SyncMaskForPreTraining

from .arguments import TrainArguments
from .build import build_contrast, build_masking, build_model, build_probe, build_processor, start_of
from .data import pair_data, split_probe
from .launch import launch
from .parsing import load_arguments
from .processes import is_main
from .substitutes import readable
from .task_pretraining import Pretraining

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None):
    """Parse, build, train, evaluate; problems that are known of are explained."""
    launch(partial(load_arguments, argv), build_pretraining, "syncmask.training.pretrain", argv)


def build_pretraining(
    arguments: TrainArguments, accelerator: Accelerator, corpus: DatasetDict
) -> tuple[Pretraining, SyncMaskForPreTraining]:
    """Put model, teacher, masks and rows together."""
    data, objective, seed = arguments.data, arguments.objective, arguments.run.seed
    processor = build_processor(data, arguments.model, corpus["train"]["text"], seed)
    set_seed(seed)  # weights depend on the seed alone, not on what was drawn before
    heads = {"word_patch_alignment": objective.wpa_weight > 0}
    if arguments.model.init_from is not None and not objective.wpa_weight:
        note_left_out(arguments.model.init_from)
    model = build_model(SyncMaskForPreTraining, arguments.model, processor, **heads).to(accelerator.device)
    rows, probe_rows = split_probe(corpus["train"], objective.gate_probe_pairs, seed)
    pairs = pair_data(rows, data, objective, processor, seed)
    layer = model.config.mask_layer if objective.mask_layer is None else objective.mask_layer
    contrast = build_contrast(arguments, accelerator, pairs, model, layer)
    probe = build_probe(readable(probe_rows), processor, objective.word_mask_rate, seed, accelerator.device)
    task = Pretraining(
        objective,
        accelerator,
        processor,
        contrast,
        masking=build_masking(objective, model.config, processor, pairs.index.texts),
        probe=probe,
        validation=corpus.get("validation"),
        final_weights=arguments.run.final_weights,
        seed=seed,
    )
    return task, model


def note_left_out(init_from: str):
    """Say so where the model that training starts from has a word-patch head, which would stay as it is and age."""
    if SyncMaskConfig.from_pretrained(start_of(init_from)).word_patch_alignment and is_main():
        logger.warning(
            "the word-patch head of %s is left out, since wpa_weight is 0; --wpa_weight 4 keeps and trains it",
            init_from,
        )


if __name__ == "__main__":
    main()
