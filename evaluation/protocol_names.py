"""The names of all protocols. Alone in a file, so that the command line can list them without loading a model."""

from enum import StrEnum


class Protocol(StrEnum):
    """Every named protocol; docs/protocols.md says what each one measures."""

    ITEMS = "items"
    CO_OCCURRENCE = "co-occurrence"
    FASHIONGEN_FULL = "fashiongen-full"
    FASHIONGEN_SAMPLED_ITEM = "fashiongen-sampled-item"
    FASHIONGEN_SAMPLED_VIEW = "fashiongen-sampled-view"
    FASHIONIQ_ORIGINAL = "fashioniq-original"
    FASHIONIQ_VAL = "fashioniq-val"
    COLOUR_VARIANTS = "colour-variants"
    RECOGNITION_CATEGORY = "recognition-category"
    RECOGNITION_SUBCATEGORY = "recognition-subcategory"
