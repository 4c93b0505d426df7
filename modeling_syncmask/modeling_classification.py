"""SyncMaskForImageTextClassification: category, subcategory and other label sets from a photo, a text or both."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_syncmask import SyncMaskConfig
from .inputs import check_pairs, text_first
from .losses import classification_loss
from .modeling_syncmask import SyncMaskModel, SyncMaskPreTrainedModel
from .outputs import SyncMaskForImageTextClassificationOutput


class SyncMaskForImageTextClassification(SyncMaskPreTrainedModel):
    r"""Recognition: one linear classifier for each of `config.label_sets` on the fused [CLS].

    A learned token stands in for a photo or a text that is missing, so one model answers for a photo with its text, for
    a photo alone and for a text alone; hide a side of some rows in training (`drop_image`, `drop_text`) to teach that.
    `config.id2label` is the first label set, so that the stock pipeline "image-classification" takes the model.
    Projections and temperature, which no classifier needs, are frozen: DDP waits for no gradient of theirs.

    Example:

    ```python
    >>> from syncmask import SyncMaskForImageTextClassification
    >>> model = SyncMaskForImageTextClassification.from_pretrained(
    ...     "runs/quickstart/final", label_sets={"category": ["dresses", "tops"], "colour": ["red", "blue"]}
    ... )
    >>> model(pixel_values=photos).logits_by_set["colour"]  # (B, 2)
    ```
    """

    def __init__(self, config: SyncMaskConfig):
        super().__init__(config)
        if not config.label_sets:
            raise ValueError(
                "this configuration names no labels to tell apart; give "
                f"{type(self).__name__}.from_pretrained(..., label_sets={{'category': ['dresses', 'tops']}})."
            )
        config.order_label_sets()
        width = config.text_config.hidden_size
        self.syncmask = SyncMaskModel(config)
        self.no_image = nn.Parameter(torch.zeros(config.vision_config.hidden_size))
        self.no_text = nn.Parameter(torch.zeros(width))
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifiers = nn.ModuleList([nn.Linear(width, len(labels)) for labels in config.label_sets.values()])
        self.post_init()
        self._freeze_unused()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SyncMaskForImageTextClassification):
            init.normal_(module.no_image, std=self.config.initializer_range)
            init.normal_(module.no_text, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load; see [`PreTrainedModel.from_pretrained`]. Loading makes every parameter trainable, which is undone."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze_unused()
        return loaded

    def _freeze_unused(self):
        self.syncmask.vision_projection.requires_grad_(False)
        self.syncmask.text_projection.requires_grad_(False)
        self.syncmask.temperature_logit.requires_grad_(False)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        drop_image: torch.Tensor | None = None,
        drop_text: torch.Tensor | None = None,
        log_priors: tuple[torch.Tensor, ...] | None = None,
        class_weights: tuple[torch.Tensor, ...] | None = None,
    ) -> SyncMaskForImageTextClassificationOutput:
        """Classify photos with their texts, or either alone.

        Args:
            pixel_values: (B, 3, S, S). input_ids, attention_mask: (B, L), padded on either side. Photos or texts may be
                left out.
            labels: (B, S) int64, a column for each label set; -100 = unknown.
            drop_image, drop_text: (B,) bool, True = as if this row had no photo, no text.
            log_priors, class_weights: for each label set (C,), see `losses.classification_loss`.

        Raises:
            ValueError: without photos and texts, where there are not as many of both, or when labels, priors or weights
                do not fit the label sets.
        """
        self._check_sides(pixel_values, input_ids, drop_image, drop_text)
        self._check_labels(labels, log_priors, class_weights)
        attention_mask, input_ids = text_first(None if input_ids is None else attention_mask, input_ids)
        image_embeds, text_embeds = self._sides(pixel_values, input_ids, attention_mask, drop_image, drop_text)
        cls = self.dropout(self.syncmask.fuse_cls(text_embeds, attention_mask, image_embeds))
        logits = [classifier(cls) for classifier in self.classifiers]
        output = SyncMaskForImageTextClassificationOutput(
            logits=logits[0], logits_by_set=ModelOutput(zip(self.config.label_sets, logits))
        )
        if labels is not None:
            none = [None] * len(logits)
            output.losses = tuple(
                classification_loss(*arguments)
                for arguments in zip(logits, labels.unbind(dim=1), log_priors or none, class_weights or none)
            )
            output.loss = sum(output.losses)
        return SyncMaskForImageTextClassificationOutput(**output)

    def _sides(self, pixel_values, input_ids, attention_mask, drop_image, drop_text):
        """Return the tokens of photos and texts, a learned token in place of what is missing.

        All tokens of a dropped side are that one token: attention over equal keys gives what it gives over one of them.
        """
        if pixel_values is None:
            image_embeds = self.no_image.expand(input_ids.shape[0], 1, -1)
        else:
            image_embeds = _drop(self.syncmask.encode_image(pixel_values), drop_image, self.no_image)
        if input_ids is None:
            text_embeds = self.no_text.expand(pixel_values.shape[0], 1, -1)
        else:
            text_embeds = _drop(self.syncmask.encode_text(input_ids, attention_mask), drop_text, self.no_text)
        return image_embeds, text_embeds

    def _check_sides(self, pixel_values, input_ids, drop_image, drop_text):
        if pixel_values is None and input_ids is None:
            raise ValueError(f"{type(self).__name__} got neither pixel_values nor input_ids; give one or both.")
        if input_ids is None and drop_text is not None or pixel_values is None and drop_image is not None:
            raise ValueError("drop_image and drop_text are for a side that is given; leave out that of a missing side.")
        if pixel_values is not None and input_ids is not None:
            check_pairs(pixel_values, input_ids)

    def _check_labels(self, labels, log_priors, class_weights):
        sizes = {name: len(names) for name, names in self.config.label_sets.items()}
        if labels is not None and (labels.ndim != 2 or labels.shape[1] != len(sizes)):
            raise ValueError(
                f"labels are {tuple(labels.shape)}; wanted (rows, {len(sizes)}), a column for each of the label sets "
                f"{', '.join(sizes)} (-100 where a label is unknown)."
            )
        for argument, given in (("log_priors", log_priors), ("class_weights", class_weights)):
            seen = sizes.values() if given is None else [len(one) for one in given]
            if list(seen) != list(sizes.values()):
                raise ValueError(f"{argument} have {seen} classes; wanted one for each label of {sizes}.")


def _drop(embeds: torch.Tensor, drop: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """Put `stand_in` (D,) in place of all tokens (B, M, D) of the rows `drop` (B,).

    Done when nothing is dropped too, so that the token has a gradient, if one of zeros, and DDP does not wait for it.
    """
    if drop is None:
        drop = torch.zeros(embeds.shape[0], dtype=torch.bool, device=embeds.device)
    return torch.where(drop[:, None, None], stand_in.to(embeds), embeds)


__all__ = ["SyncMaskForImageTextClassification"]
