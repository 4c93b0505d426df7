"""What saving the preset `base` costs: `python tests/test_save_cost.py FOLDER` prints bytes and seconds of stall."""

import argparse
import time
from pathlib import Path

import pytest
import torch

from syncmask import SyncMaskConfig, SyncMaskForPreTraining
from syncmask.training.checkpoint import bytes_of, save_checkpoint, split_optimizer
from syncmask.training.optim import make_optimizer


def base_tensors(rows=100_000):
    """Student, teacher, AdamW's moments and the feature bank of `rows` photos, as the trainer saves them."""
    model = SyncMaskForPreTraining(SyncMaskConfig.base())
    optimizer = make_optimizer(model, 1e-4, 0.02)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = model.state_dict()
    width = model.config.projection_dim
    bank = {"image_feats": torch.zeros(rows, width), "text_feats": torch.zeros(rows, width)}
    teacher = {name: tensor.clone() for name, tensor in state.items()}
    return {"model": state, "teacher": teacher, "feature_bank": bank}, optimizer.state_dict()


def measure(folder, saves=2):
    """Return (bytes on the disk, seconds of each save)."""
    tensors, optimizer = base_tensors()
    seconds = []
    for step in range(saves):
        begun = time.monotonic()
        path = save_checkpoint(folder, tensors, {"step": step}, optimizer, keep_last=1)
        seconds.append(time.monotonic() - begun)
    size = sum(file.stat().st_size for file in path.iterdir())
    needed = bytes_of(tensors | {"optimizer": split_optimizer(optimizer)[0]})
    return size, needed, seconds


@pytest.mark.slow
def test_a_save_of_base_takes_the_room_it_asks_for_and_seconds(tmp_path):
    size, needed, seconds = measure(tmp_path, saves=1)
    assert needed <= size <= 1.001 * needed + 100_000
    assert seconds[0] < 120


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    size, needed, seconds = measure(parser.parse_args().folder, saves=3)
    print(f"{size:,} bytes on the disk ({needed:,} asked for); {', '.join(f'{s:.1f}' for s in seconds)} s a save")
