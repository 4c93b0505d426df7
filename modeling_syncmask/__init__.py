"""SyncMask: synchronized attentional masking for fashion vision-language pretraining.

`import syncmask` registers the classes with transformers' Auto loaders; names are imported when they are used.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

_HOMES = {
    "SyncMaskConfig": "syncmask.configuration_syncmask",
    "SyncMaskFusionEncoderConfig": "syncmask.configuration_syncmask",
    "SyncMaskMimDecoderConfig": "syncmask.configuration_syncmask",
    "SyncMaskModel": "syncmask.modeling_syncmask",
    "SyncMaskForPreTraining": "syncmask.modeling_pretraining",
    "SyncMaskForImageTextRetrieval": "syncmask.modeling_retrieval",
    "SyncMaskForComposedImageRetrieval": "syncmask.modeling_composed",
    "SyncMaskForImageTextClassification": "syncmask.modeling_classification",
    "SyncMaskRetrievalPipeline": "syncmask.pipeline_syncmask",
    "SyncMaskComposedRetrievalPipeline": "syncmask.pipeline_syncmask",
    "SyncMaskImageProcessor": "syncmask.processing.processing_syncmask",
    "SyncMaskProcessor": "syncmask.processing.processing_syncmask",
}

__all__ = [*_HOMES, "register_auto_classes"]
__version__ = "0.1.0.dev0"


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'syncmask' has no attribute {name!r}; public names are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def register_auto_classes() -> None:
    """Let transformers' Auto classes find these classes, and its `pipeline` the tasks of retrieval.

    There is no Auto class for composed retrieval: its model is loaded by its own class, and AutoModel gives the base
    model.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForPreTraining,
        AutoModelForZeroShotImageClassification,
        AutoProcessor,
    )
    from transformers.pipelines import PIPELINE_REGISTRY

    from syncmask.configuration_syncmask import (
        SyncMaskConfig,
        SyncMaskFusionEncoderConfig,
        SyncMaskMimDecoderConfig,
    )
    from syncmask.modeling_classification import SyncMaskForImageTextClassification
    from syncmask.modeling_pretraining import SyncMaskForPreTraining
    from syncmask.modeling_retrieval import SyncMaskForImageTextRetrieval
    from syncmask.modeling_syncmask import SyncMaskModel
    from syncmask.pipeline_syncmask import SyncMaskComposedRetrievalPipeline, SyncMaskRetrievalPipeline
    from syncmask.processing.processing_syncmask import SyncMaskImageProcessor, SyncMaskProcessor

    for config in (SyncMaskConfig, SyncMaskFusionEncoderConfig, SyncMaskMimDecoderConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(SyncMaskConfig, SyncMaskModel, exist_ok=True)
    AutoModelForPreTraining.register(SyncMaskConfig, SyncMaskForPreTraining, exist_ok=True)
    AutoModelForZeroShotImageClassification.register(SyncMaskConfig, SyncMaskForImageTextRetrieval, exist_ok=True)
    AutoModelForImageClassification.register(SyncMaskConfig, SyncMaskForImageTextClassification, exist_ok=True)
    AutoImageProcessor.register(SyncMaskConfig, image_processor_classes={"pil": SyncMaskImageProcessor}, exist_ok=True)
    AutoProcessor.register(SyncMaskConfig, SyncMaskProcessor, exist_ok=True)
    for kind in (SyncMaskRetrievalPipeline, SyncMaskComposedRetrievalPipeline):
        if kind.registered_task not in PIPELINE_REGISTRY.supported_tasks:
            PIPELINE_REGISTRY.register_pipeline(
                kind.registered_task, pipeline_class=kind, pt_model=kind.auto_model, type="multimodal"
            )


def _is_own_program() -> bool:
    """Tell whether this process is the `syncmask` command or `python -m syncmask...`.

    These register once they know that they need models: help stays quick, and training can set how threads wait before
    torch is loaded.
    """
    arguments = sys.orig_argv
    module = arguments[arguments.index("-m") + 1] if "-m" in arguments[:-1] else ""
    return Path(sys.argv[0]).stem == "syncmask" or module.split(".")[0] == "syncmask"


if not _is_own_program() and importlib.util.find_spec("torch") is not None:
    register_auto_classes()
