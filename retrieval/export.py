"""A model as ONNX files with a description and a client that need neither torch nor this package.

The folder that `export_model` writes:

    image.onnx  text.onnx  match.onnx  query.onnx   towers and heads, the latter two where the model has them
    *.int8.onnx                                     the same with 8-bit weights (by option)
    openvino/*.xml, *.bin                           the same as OpenVINO IR (by option)
    tokenizer.json                                  cuts and pads by itself
    export.json                                     names, shapes, dtypes, preprocessing: all a client must know
    client.py                                       a client of onnxruntime, tokenizers, pillow and numpy
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from syncmask.evaluation.result import aligned
from syncmask.evaluation.running import choose_split
from syncmask.processing.corpus import load_corpus

from .encoder import Encoder
from .export_description import DESCRIPTION, OPSET, TOKENIZER, cutting_tokenizer, describe
from .export_graphs import Graph, base_of, graphs_of

CLIENT = Path(__file__).with_name("client.py")


def export_model(
    encoder: Encoder,
    out: str | os.PathLike,
    *,
    int8: bool = False,
    openvino: bool = False,
    overwrite: bool = False,
    check_on=None,
) -> dict:
    """Write a model's towers and heads as ONNX; all of the folder appears at once, or nothing.

    Args:
        encoder: the model, on the CPU in float32, with its processor.
        out: the folder to make.
        int8: also with 8-bit weights (dynamic quantisation).
        openvino: also as OpenVINO IR, in float32.
        overwrite: replace an earlier export.
        check_on: rows of a corpus on which the export is compared with torch before it appears (see `check_export`).

    Returns:
        The description, as in export.json.

    Raises:
        ImportError: a package that is missing; the message names the extra that brings it.
        FileExistsError: `out` is there already, and is no export or `overwrite` is not set.
        ValueError: a model that is not float32 on the CPU, a processor that cannot be described, a check that failed.
    """
    _require("export", "onnx", "onnxscript", "onnxruntime")
    if openvino:
        _require("openvino", "openvino")
    _refuse_other_precision(base_of(encoder.model))
    description = describe(encoder)
    with _appearing_at_once(Path(out), overwrite) as folder:
        graphs = {name: _write_graph(name, graph, folder) for name, graph in graphs_of(encoder.model).items()}
        for name, graph in graphs.items():
            if int8:
                graph["files"]["int8"] = _quantise(folder, name)
            if openvino:
                graph["files"]["openvino"] = _to_openvino(folder, name)
        cutting_tokenizer(encoder).save(str(folder / TOKENIZER))
        shutil.copyfile(CLIENT, folder / CLIENT.name)
        description["graphs"] = graphs
        _write_json(folder, description)
        if check_on is not None:
            from .export_check import check_export

            description["check"] = check_export(encoder, folder, check_on)
            _write_json(folder, description)
    return description


def check_rows(source: str, split: str | None = None):
    """Rows of a corpus to check an export on: of its test split by default, else of validation.

    Raises:
        ValueError: the corpus has no such split.
    """
    splits = load_corpus(source)
    return splits[choose_split(splits, split)]


def sizes_table(out: Path, description: dict) -> str:
    """The files of an export with their sizes, a line a graph."""
    precisions = list(description["graphs"]["image"]["files"])
    cells = [["megabytes", *precisions]]
    for name, graph in description["graphs"].items():
        files = [out / graph["files"][precision] for precision in precisions]
        sizes = [file.stat().st_size + _weights_beside(file) for file in files]
        cells.append([name, *(f"{size / 1e6:.2f}" for size in sizes)])
    return "\n".join(aligned(cells))


def _weights_beside(file: Path) -> int:
    """OpenVINO's weights are a file of their own."""
    weights = file.with_suffix(".bin")
    return weights.stat().st_size if weights.is_file() else 0


# ------------------------------------------------------------------------------------------- graphs
def _write_graph(name: str, graph: Graph, folder: Path) -> dict:
    """Write NAME.onnx; return its entry in the description, read back from the file.

    Differs from what the exporter writes: without the notes where in the source an operator comes from, which hold
    paths of this machine (and are a seventh of the file of a tiny model).
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    file = folder / f"{name}.onnx"
    dims = {axis: torch.export.Dim(axis) for axes in graph.axes.values() for axis in axes}
    shapes = {argument: {place: dims[axis] for place, axis in enumerate(axes)} for argument, axes in graph.axes.items()}
    with _quiet_exporter():
        program = torch.onnx.export(
            graph.module.eval(),
            kwargs=graph.inputs,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            verbose=False,
        )
        ClearMetadataAndDocStringPass()(program.model)
        program.save(file, external_data=False)
    return {"about": graph.about, "files": {"fp32": file.name}, **_signature(file)}


def _signature(file: Path) -> dict:
    """Names, dtypes and shapes of a file's inputs and outputs; a word in a shape is an axis of any size."""
    import onnx

    graph = onnx.load(file).graph

    def describe(value) -> dict:
        tensor = value.type.tensor_type
        return {
            "name": value.name,
            "dtype": onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
            "shape": [dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
        }

    return {
        "inputs": [describe(value) for value in graph.input],
        "outputs": [describe(value) for value in graph.output],
    }


def _quantise(folder: Path, name: str) -> str:
    """Write NAME.int8.onnx: 8-bit weights a column and embeddings; activations are quantised as they come.

    The projections stay in float32: they are small, and end in the vectors.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    file = f"{name}.int8.onnx"
    with tempfile.TemporaryDirectory() as scratch:
        inferred = Path(scratch, "inferred.onnx")
        quant_pre_process(folder / f"{name}.onnx", inferred, skip_optimization=True, skip_symbolic_shape=True)
        quantize_dynamic(
            inferred,
            folder / file,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
    return file


def _to_openvino(folder: Path, name: str) -> str:
    import openvino

    file = f"openvino/{name}.xml"
    openvino.save_model(openvino.convert_model(folder / f"{name}.onnx"), folder / file, compress_to_fp16=False)
    return file


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter warns of libraries that are not installed and of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ---------------------------------------------------------------------------------------- the folder
@contextmanager
def _appearing_at_once(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write to, which becomes `out` at the end; after a failure there is none, after a kill a hidden one.

    Raises:
        FileExistsError: see `export_model`.
    """
    _refuse_to_lose(out, overwrite)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _put_in_place(partial, out, overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_to_lose(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / DESCRIPTION).is_file():
        raise FileExistsError(f"{out} exists and is no export (it has no {DESCRIPTION}); choose another name.")
    if not overwrite:
        raise FileExistsError(f"{out} holds an export already; add --overwrite to replace it, or choose another name.")


def _put_in_place(partial: Path, out: Path, overwrite: bool) -> None:
    """Two renames where an older export goes: between them there is none, never half of one."""
    _refuse_to_lose(out, overwrite)  # it may have come while this one was made
    aside = partial.with_suffix(".replaced")
    if out.exists():
        os.rename(out, aside)
    os.rename(partial, out)
    shutil.rmtree(aside, ignore_errors=True)


def _write_json(folder: Path, description: dict) -> None:
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _refuse_other_precision(base) -> None:
    if base.dtype != torch.float32 or base.device.type != "cpu":
        raise ValueError(
            f"the model is {base.dtype} on {base.device.type}; wanted torch.float32 on the CPU: "
            'Encoder.from_pretrained(name, device="cpu").'
        )


def _require(extra: str, *packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f'this needs {", ".join(missing)}: pip install "syncmask[{extra}]"')
