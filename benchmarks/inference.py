"""Embedding photos and re-ranking texts: `python -m benchmarks.inference [--quick] [--json]`.

ViT-S/16 at 224 pixels in batches of 8 against the same tower as transformers runs it eagerly in fp32; and 32 texts of
25 tokens matched with a photo by the fusion encoder, against the plain form, which repeats the photo for every text.
CPU seconds, in turns. The notes say how far the answers of bf16 are off.
"""

from __future__ import annotations

import copy
import sys

import torch
from transformers import AutoModel

from .measure import Row, arguments, in_turns, print_rows, timed_row
from .plain_step import PlainStep, linear
from .training_step import draw_inputs, small_model

PHOTOS, TEXTS, LENGTH = 8, 32, 25


@torch.inference_mode()
def embedding_row(rounds: int) -> Row:
    """Photos to tokens of the image tower."""
    model = small_model().eval()
    peer = AutoModel.from_config(model.config.vision_config, attn_implementation="eager", add_pooling_layer=False)
    peer.load_state_dict(model.syncmask.vision_model.state_dict())
    peer.eval()
    pixels = torch.randn(PHOTOS, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ours = copy.deepcopy(model.syncmask).to(torch.bfloat16)
    halves = pixels.to(torch.bfloat16)
    times = in_turns(lambda: ours.encode_image(halves), lambda: peer(pixel_values=pixels), rounds=rounds)
    cosine = torch.cosine_similarity(
        ours.project_image(ours.encode_image(halves)).float(),
        model.syncmask.project_image(peer(pixel_values=pixels).last_hidden_state),
    )
    notes = f"bf16; cosine of features to fp32's at least {float(cosine.min()):.5f}"
    return timed_row("image embedding, ViT-S/16", *times, 1.7, 2.7, notes=notes)


@torch.inference_mode()
def rerank_rows(rounds: int) -> list[Row]:
    """Logits of 32 texts with one photo, exact and in bf16."""
    model = small_model().eval()
    inputs = draw_inputs(model, batch=TEXTS, length=LENGTH)
    mask = inputs.attention_mask
    texts = model.syncmask.encode_text(inputs.input_ids, mask)
    photo = model.syncmask.encode_image(inputs.pixel_values[:1])
    plain = PlainStep(model, dropout=0.0)

    def published() -> torch.Tensor:
        fused = plain.fuse(plain.student, texts, mask, photo.expand(TEXTS, -1, -1).contiguous())
        return linear(plain.student, "itm_head", fused[:, 0])

    half = copy.deepcopy(model).to(torch.bfloat16)
    texts_half, photo_half = texts.to(torch.bfloat16), photo.to(torch.bfloat16)

    def ours() -> torch.Tensor:
        return model.itm_logits(texts, mask, photo)

    def ours_half() -> torch.Tensor:
        return half.itm_logits(texts_half, mask, photo_half)

    expected = published()
    off = [float((found().float() - expected).abs().max()) for found in (ours, ours_half)]
    exact, fast, peer = in_turns(ours, ours_half, published, rounds=rounds)
    name = "re-ranking 32 texts of a photo"
    return [
        timed_row(f"{name}, fp32", exact, peer, 1.9, 3.5, notes=f"logits differ by {off[0]:.0e} at most"),
        timed_row(f"{name}, bf16", fast, peer, 1.9, 3.5, notes=f"logits differ by {off[1]:.0e} at most"),
    ]


def rows(quick: bool) -> list[Row]:
    """All rows of this benchmark."""
    return [embedding_row(5 if quick else 15), *rerank_rows(5 if quick else 15)]


def main(argv: list[str] | None = None) -> int:
    """Run and print; returns the exit code, 1 where a floor was missed."""
    given = arguments(__doc__).parse_args(argv)
    torch.set_num_threads(given.threads)
    return print_rows(rows(given.quick), given.json)


if __name__ == "__main__":
    sys.exit(main())
