"""What the models do with a batch before anything else: put texts in order, and refuse what they cannot take."""

import torch
from transformers.modeling_utils import PreTrainedModel

from .towers import max_text_tokens


def text_first(attention_mask: torch.Tensor | None, *tokens: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Move padding on the left behind the text: mask (B, L) and any tensors (B, L) of the same tokens, in one list.

    [CLS] comes first then, and positions count from it, so both ways of padding give equal features. Rows without
    padding on the left stay as they are.

    Example:

    ```python
    >>> text_first(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[9, 9, 2, 3]]))
    [tensor([[1, 1, 0, 0]]), tensor([[2, 3, 9, 9]])]
    ```
    """
    given = [attention_mask, *tokens]
    if attention_mask is None or attention_mask.ndim != 2:
        return given
    length = attention_mask.shape[1]
    first = attention_mask.ne(0).int().argmax(dim=1, keepdim=True)  # 0 where there is no token at all
    order = (torch.arange(length, device=attention_mask.device) + first) % length
    return [None if tensor is None else tensor.gather(1, order) for tensor in given]


def check_padding(attention_mask: torch.Tensor | None):
    """Refuse texts padded on the left, of which a padding token would be taken for [CLS].

    Raises:
        ValueError: says how many.
    """
    if attention_mask is None or attention_mask.ndim != 2 or torch.compiler.is_compiling():
        return
    left = (attention_mask[:, 0] == 0) & attention_mask.any(dim=1)
    if left.any():
        raise ValueError(
            f"{int(left.sum())} of {len(left)} texts are padded on the left, but [CLS] must come first; set "
            "tokenizer.padding_side = 'right', or move the padding: mask, ids = text_first(mask, ids)."
        )


def check_length(input_ids: torch.Tensor, text_model: PreTrainedModel):
    """Refuse texts that are longer than the text tower has positions for.

    Raises:
        ValueError: says how long they are and may be.
    """
    if torch.compiler.is_compiling():
        return
    length, longest = input_ids.shape[1], max_text_tokens(text_model)
    if length > longest:
        raise ValueError(
            f"texts are {length} tokens long, but the text tower has positions for {longest}; cut them: "
            f"processor(text=..., truncation=True, max_length={longest})."
        )


def check_pairs(pixel_values: torch.Tensor, input_ids: torch.Tensor):
    """Refuse photos and texts that are no pairs, row by row.

    Raises:
        ValueError: says how many there are.
    """
    photos, texts = pixel_values.shape[0], input_ids.shape[0]
    if photos != texts:
        raise ValueError(
            f"got {photos} photos and {texts} texts, but row by row they are pairs; give equally many (one photo with "
            "many texts: pixel_values.expand(len(input_ids), -1, -1, -1))."
        )
