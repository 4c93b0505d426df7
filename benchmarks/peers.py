"""Other libraries at the same work, for the record: `python -m benchmarks.peers [--quick] [--json]`.

faiss and usearch search 100,000 vectors exactly, all rows of every query's product; ONNX Runtime and OpenVINO embed
photos with the tower that `syncmask export` writes. No floors. A library that is not installed is skipped with a line
(`pip install "syncmask[bench-peers]"` brings all).

Left out: approximate search, since the catalogue's own index is LanceDB's (`python -m benchmarks.retrieval`), and
open_clip, which needs torchvision.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

for _library in ("OMP", "OPENBLAS"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")  # read when numpy and torch are loaded

import numpy as np  # noqa: E402
import torch  # noqa: E402

from syncmask.retrieval.export_description import OPSET  # noqa: E402
from syncmask.retrieval.export_graphs import ImageTower  # noqa: E402
from syncmask.retrieval.vectors import ExactScan  # noqa: E402

from .inference import PHOTOS  # noqa: E402
from .measure import Row, arguments, in_turns, print_rows, timed_row  # noqa: E402
from .retrieval import QUERIES, K, clustered, exact, recall  # noqa: E402
from .training_step import small_model  # noqa: E402

ROWS = 100_000
# From how many queries on faiss multiplies by BLAS. As it comes it does not for 256 of them, and is 5 times slower.
FAISS_BLAS_FROM = 20


def faiss_search(rows: np.ndarray, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """The flat index of faiss by inner product: (Q, D) to the numbers of the best K rows."""
    import faiss

    faiss.omp_set_num_threads(threads)
    faiss.cvar.distance_compute_blas_threshold = FAISS_BLAS_FROM
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    return lambda queries: index.search(queries, K)[1]


def usearch_search(rows: np.ndarray, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """The exact search of usearch by inner product."""
    from usearch.index import MetricKind, search

    return lambda queries: search(rows, queries, K, MetricKind.IP, exact=True, threads=threads).keys


def search_rows(names: list[str], rounds: int, threads: int) -> list[Row]:
    """Our scan against each library, 256 queries at once; both must find what float32 finds."""
    makers = {"faiss": faiss_search, "usearch": usearch_search}
    vectors, asked = clustered(ROWS, QUERIES)
    scan, wanted = ExactScan(vectors), exact(vectors, asked)
    found = []
    for name in names:
        search = makers[name](vectors.numpy(), threads)
        recalls = recall(scan.search(asked, K)[1].tolist(), wanted), recall(search(asked.numpy()).tolist(), wanted)
        times = in_turns(partial(scan.search, asked, K), partial(search, asked.numpy()), rounds=rounds)
        notes = f"recall@10 of ours {recalls[0]:.4f}, of {name} {recalls[1]:.4f}"
        row = timed_row(f"exact search, against {name}", *times, a_second=(QUERIES, "queries"), notes=notes)
        found.append(row)
    return found


def onnx_embedding(file: str, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """ONNX Runtime in float32: photos (B, 3, S, S) to unit vectors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(["image_feats"], {"pixel_values": pixels})[0]


def openvino_embedding(file: str, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """OpenVINO in the precision that it chooses: bf16 where the processor has it."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    return lambda pixels: compiled([pixels])["image_feats"]


@torch.inference_mode()
def embedding_rows(names: list[str], rounds: int, threads: int) -> list[Row]:
    """Our tower in bf16 against each library's, a batch of 8 photos."""
    makers = {"onnxruntime": onnx_embedding, "openvino": openvino_embedding}
    base = small_model().eval().syncmask
    ours = copy.deepcopy(base).to(torch.bfloat16)
    pixels = torch.randn(PHOTOS, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    halves, exact_feats = pixels.to(torch.bfloat16), base.project_image(base.encode_image(pixels))
    found = []

    def our_embedding() -> torch.Tensor:
        return ours.project_image(ours.encode_image(halves))

    with tempfile.TemporaryDirectory() as folder:
        file = export_tower(base, pixels, Path(folder) / "image.onnx")
        for name in names:
            embed = makers[name](file, threads)
            cosine = torch.cosine_similarity(torch.from_numpy(embed(pixels.numpy())), exact_feats).min()
            times = in_turns(our_embedding, partial(embed, pixels.numpy()), rounds=rounds)
            notes = f"ours bf16; cosine of {name}'s features to fp32's at least {float(cosine):.5f}"
            found.append(timed_row(f"image embedding, against {name}", *times, notes=notes))
    return found


def export_tower(base, pixels: torch.Tensor, file: Path) -> str:
    """The graph "image" of `syncmask export` for one batch size; returns the file's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        tower = ImageTower(base).eval()
        names = {"input_names": ["pixel_values"], "output_names": ["image_feats", "image_embeds"]}
        program = torch.onnx.export(tower, (pixels,), dynamo=True, opset_version=OPSET, verbose=False, **names)
    program.save(file, external_data=False)
    return str(file)


def installed(wanted: tuple[str, ...], skipped: list[str], needs: tuple[str, ...] = ()) -> list[str]:
    """Those of the libraries that can be imported, with what all of them need; a line in `skipped` for each other."""
    found = []
    for name in wanted:
        missing = [package for package in (name, *needs) if find_spec(package) is None]
        if missing:
            skipped.append(f"{name} skipped: {', '.join(missing)} not installed")
        else:
            found.append(name)
    return found


def main(argv: list[str] | None = None) -> int:
    """Run and print; the exit code is 0, as nothing has a floor."""
    given, skipped = arguments(__doc__).parse_args(argv), []
    torch.set_num_threads(given.threads)
    rounds, rows = 5 if given.quick else 15, []
    if names := installed(("faiss", "usearch"), skipped):
        rows += search_rows(names, rounds, given.threads)
    if names := installed(("onnxruntime", "openvino"), skipped, needs=("onnx", "onnxscript")):
        rows += embedding_rows(names, rounds, given.threads)
    return print_rows(rows, given.json, skipped)


if __name__ == "__main__":
    sys.exit(main())
