"""Search photos with an exported SyncMask model, without torch: one file, copied beside the ONNX files it runs.

    pip install onnxruntime tokenizers pillow numpy

    python client.py index photos/ vectors.npz                              # a folder of photos, once
    python client.py search vectors.npz --text "a red hat" --rerank 20      # by words
    python client.py search vectors.npz --image hat.jpg --text "in blue"    # by a photo, or by both
    python client.py match hat.jpg "a red hat"                              # how well do the two go together

In Python: `Client("exported").encode_image([...])`, `.encode_text([...])`, `.encode_composed(photos, texts)`,
`.match(photos, texts)`, and `search(client, vectors, ...)`. Everything that this file knows of the model it reads from
export.json, which says all that a client in another language needs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

DESCRIPTION = "export.json"
PHOTOS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
Photo = Image.Image | str | os.PathLike | bytes


# --------------------------------------------------------------------------------------------- the model
class Client:
    """An exported model: photos and texts to unit-length vectors (a dot product is a cosine), pairs to matching logits.

    Args:
        folder: what `syncmask export` wrote; by default where this file lies.
        precision: "fp32", or "int8" where it was exported too.
        threads: of a forward pass; 0 = all cores.

    Raises:
        FileNotFoundError: a folder that is no export.
        ValueError: a precision that was not exported.
    """

    def __init__(self, folder: str | os.PathLike | None = None, precision: str = "fp32", threads: int = 0):
        self.folder = Path(__file__).parent if folder is None else Path(folder)
        if not (self.folder / DESCRIPTION).is_file():
            raise FileNotFoundError(
                f"{self.folder} holds no {DESCRIPTION}; give a folder that `syncmask export` wrote."
            )
        self.about = json.loads((self.folder / DESCRIPTION).read_text(encoding="utf-8"))
        known = [name for name in self.about["graphs"]["image"]["files"] if name != "openvino"]
        if precision not in known:
            raise ValueError(f"precision {precision!r} was not exported, only {', '.join(known)}: export with --int8.")
        self.precision, self.threads = precision, threads
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    @property
    def revision(self) -> str:
        """Name of what a vector depends on; vectors of equal revisions can be compared."""
        return self.about["model"]["revision"]

    def encode_image(self, photos: Sequence[Photo], batch_size: int = 32) -> np.ndarray:
        """Photos (PIL images, paths, bytes of image files) to vectors (n, P) float32.

        Raises:
            ValueError: a photo that cannot be read; the message names it.
        """
        inputs = ({"pixel_values": self.pixels(part)} for part in _parts(photos, batch_size))
        return self._stacked([self.run("image", ["image_feats"], **part)[0] for part in inputs])

    def encode_text(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Texts to vectors (n, P) float32; what is longer than `max_length` tokens is cut."""
        inputs = map(self.tokens, _parts(texts, batch_size))
        return self._stacked([self.run("text", ["text_feats"], **part)[0] for part in inputs])

    def encode_composed(self, photos: Sequence[Photo], texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Photos with what should differ from them, row by row, to query vectors (n, P) for photos' vectors.

        A model without a query head gives the normalised sum of both vectors.
        """
        _refuse_unequal(photos, texts)
        if "query" not in self.about["graphs"]:
            summed = self.encode_image(photos, batch_size) + self.encode_text(texts, batch_size)
            return summed / np.linalg.norm(summed, axis=-1, keepdims=True)
        parts = zip(_parts(photos, batch_size), _parts(texts, batch_size))
        return self._stacked([self.run("query", **self._pairs(*part))[0] for part in parts])

    def match(self, photos: Sequence[Photo], texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """How well each photo matches the text in its row: (n,), the logit of match less that of no match.

        Raises:
            ValueError: a model without a matching head, or unequal numbers of photos and texts.
        """
        if "match" not in self.about["graphs"]:
            raise ValueError(f"{self.about['model']['class']} has no matching head; search without re-ranking.")
        _refuse_unequal(photos, texts)
        logits = [np.empty(0, dtype=np.float32)]
        for part in zip(_parts(photos, batch_size), _parts(texts, batch_size)):
            logits += self.run("match", image_index=np.arange(len(part[0])), **self._pairs(*part))
        return np.concatenate(logits)

    # ---------------------------------------------------------------------------------- inputs and graphs
    def pixels(self, photos: Sequence[Photo]) -> np.ndarray:
        """Photos as (n, 3, H, W) float32, as the section "image" of export.json says."""
        how = self.about["image"]
        size = (how["size"]["width"], how["size"]["height"])
        resample = Image.Resampling[how["resample"].upper()]
        array = np.stack([np.asarray(to_rgb(open_image(photo)).resize(size, resample)) for photo in photos])
        scaled = (array.astype(np.float64) * how["rescale_factor"]).astype(np.float32)
        mean, std = np.array(how["mean"], dtype=np.float32), np.array(how["std"], dtype=np.float32)
        return np.ascontiguousarray(((scaled - mean) / std).transpose(0, 3, 1, 2))

    def tokens(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Texts as input_ids and attention_mask, (n, L) int64 each, padded to the longest."""
        rows = self._tokenizer.encode_batch(list(texts))
        return {
            "input_ids": np.array([row.ids for row in rows], dtype=np.int64),
            "attention_mask": np.array([row.attention_mask for row in rows], dtype=np.int64),
        }

    def run(self, graph: str, outputs: list[str] | None = None, **inputs: np.ndarray) -> list[np.ndarray]:
        """Run "image", "text", "match" or "query"; the outputs in the order asked for, all when None."""
        if graph not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            file = self.folder / self.about["graphs"][graph]["files"][self.precision]
            self._sessions[graph] = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return self._sessions[graph].run(outputs, inputs)

    def _pairs(self, photos: Sequence[Photo], texts: Sequence[str]) -> dict[str, np.ndarray]:
        """What the matching head and the query head take: the tokens of photos and texts, row by row."""
        tokens = self.tokens(texts)
        (text_embeds,) = self.run("text", ["text_embeds"], **tokens)
        (image_embeds,) = self.run("image", ["image_embeds"], pixel_values=self.pixels(photos))
        return {"text_embeds": text_embeds, "attention_mask": tokens["attention_mask"], "image_embeds": image_embeds}

    def _stacked(self, parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts) if parts else np.empty((0, self.about["vectors"]["dim"]), dtype=np.float32)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.folder / self.about["text"]["tokenizer"]))  # cuts and pads by itself


def _refuse_unequal(photos: Sequence[Photo], texts: Sequence[str]) -> None:
    if len(photos) != len(texts):
        raise ValueError(f"got {len(photos)} photos and {len(texts)} texts; wanted as many of each, row by row.")


def _parts(rows: Sequence, size: int) -> list[Sequence]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


# ------------------------------------------------------------------------------------------------ photos
def open_image(source: Photo) -> Image.Image:
    """Open a photo and read its pixels.

    Raises:
        ValueError: it is no image, is cut short or does not exist; the message names it.
    """
    if isinstance(source, Image.Image):
        return source
    try:
        image = Image.open(BytesIO(source) if isinstance(source, bytes) else source)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = f"image of {len(source)} bytes" if isinstance(source, bytes) else f"image {str(source)!r}"
        raise ValueError(f"{name} cannot be read as a photo ({error}). Mend or remove the file.") from error
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any photo as an upright 8-bit RGB one; transparency is laid on white, of an animation the first frame counts."""
    if getattr(image, "is_animated", False) and image.tell() != 0:
        image.seek(0)
    try:
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, ZeroDivisionError):
        pass  # A broken tag block says nothing of the orientation; the pixels are fine.
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_uint8(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """Greys of 16 bits and floats as bytes: a maximum of 1 (floats) or above 255 tells the scale."""
    low, high = float(array.min()), float(array.max())
    fractional = np.issubdtype(array.dtype, np.floating)
    if not (low >= 0 and high <= (255 if fractional else 65535)):
        raise ValueError(f"pixel values run from {low:.4g} to {high:.4g}; wanted [0, 1], [0, 255] or 16 bits.")
    if fractional and high <= 1:
        scale = 255.0
    else:
        scale = 255 / 65535 if array.dtype == np.uint16 or high > 255 else 1.0
    return np.round(array.astype(np.float64) * scale).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ search
@dataclass
class Vectors:
    """Vectors of photos: names (n,), vectors (n, P) float32, where the photos are, and the model's revision."""

    names: list[str]
    vectors: np.ndarray
    folder: str
    revision: str

    def save(self, path: str | os.PathLike) -> None:
        """Write an .npz, whole or not at all."""
        partial = Path(f"{path}.{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.savez(file, **asdict(self))
        partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Vectors:
        """Read what `save` wrote; a ValueError for anything else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                texts = {name: str(file[name]) for name in ("folder", "revision")}
                return cls(names=file["names"].tolist(), vectors=file["vectors"], **texts)
        except (KeyError, ValueError, TypeError, EOFError, BadZipFile) as error:
            raise ValueError(f"{path} holds no vectors ({error}); make it with `client.py index`.") from error


def index_folder(client: Client, folder: str | os.PathLike, batch_size: int = 32) -> tuple[Vectors, list[str]]:
    """Encode all photos under a folder; also returns why those that cannot be read were left out."""
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTOS and path.is_file())
    names, vectors, unread = [], [], []
    for part in _parts(paths, batch_size):
        photos = {}
        for path in part:
            try:
                photos[path.relative_to(folder).as_posix()] = to_rgb(open_image(path))
            except ValueError as error:
                unread.append(str(error))
        names += photos
        vectors.append(client.encode_image(list(photos.values()), batch_size))
    if not names:
        raise ValueError(f"{folder} holds no photo that can be read ({', '.join(PHOTOS)}); {len(unread)} could not.")
    return Vectors(names, np.concatenate(vectors), str(folder.resolve()), client.revision), unread


def search(
    client: Client,
    vectors: Vectors,
    *,
    text: str | None = None,
    image: Photo | None = None,
    k: int = 10,
    rerank: int = 0,
) -> list[dict]:
    """The k best photos for a text, a photo, or a photo with what should differ: [{"photo", "score"[, "match"]}].

    Args:
        rerank: with a text alone, so many of the best by cosine are put in the order of the matching head.

    Raises:
        ValueError: neither text nor image, vectors of another model, or re-ranking by a photo.
    """
    if vectors.revision != client.revision:
        raise ValueError(
            f"the vectors are of revision {vectors.revision[:12]}, the model is {client.revision[:12]}: index again."
        )
    if rerank and (text is None or image is not None):
        raise ValueError("re-ranking compares a text with photos; leave it out for a search by a photo.")
    cosines = vectors.vectors @ _query(client, text, image)
    best = np.argsort(-cosines, kind="stable")[: max(k, rerank)]
    hits = [{"photo": vectors.names[row], "score": float(cosines[row])} for row in best]
    if rerank:
        head, tail = hits[:rerank], hits[rerank:]
        scores = client.match([Path(vectors.folder, hit["photo"]) for hit in head], [text] * len(head))
        head = [hit | {"match": float(score)} for hit, score in zip(head, scores)]
        hits = sorted(head, key=lambda hit: -hit["match"]) + tail
    return hits[:k]


def _query(client: Client, text: str | None, image: Photo | None) -> np.ndarray:
    if text is None and image is None:
        raise ValueError("there is nothing to search for: give a text, a photo, or both.")
    if image is None:
        return client.encode_text([text])[0]
    return client.encode_image([image])[0] if text is None else client.encode_composed([image], [text])[0]


# ------------------------------------------------------------------------------------------ command line
def main(arguments: list[str] | None = None) -> None:
    """Run a command; what the user can mend ends it in one line."""
    args = _parser().parse_args(arguments)
    try:
        args.action(Client(args.model, args.precision, args.threads), args)
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the exported folder; by default the one of this file")
    parser.add_argument("--precision", default="fp32", help="fp32, or int8 where it was exported")
    parser.add_argument("--threads", type=int, default=0, help="of a forward pass; 0 = all cores")
    commands = parser.add_subparsers(required=True)
    index = commands.add_parser("index", help="encode a folder of photos")
    index.add_argument("folder")
    index.add_argument("vectors", help="the .npz to write")
    index.set_defaults(action=_index)
    find = commands.add_parser("search", help="find photos by words, by a photo, or by both")
    find.add_argument("vectors", help="an .npz that `index` wrote, or a folder of photos")
    find.add_argument("--text")
    find.add_argument("--image")
    find.add_argument("--k", type=int, default=10, help="hits")
    find.add_argument("--rerank", type=int, default=0, help="how many of the best the matching head puts in order")
    find.add_argument("--json", action="store_true")
    find.set_defaults(action=_search)
    match = commands.add_parser("match", help="how well a photo and a text go together")
    match.add_argument("image")
    match.add_argument("text")
    match.set_defaults(action=_match)
    return parser


def _index(client: Client, args: argparse.Namespace) -> None:
    vectors = _indexed(client, args.folder)
    vectors.save(args.vectors)
    print(f"{len(vectors.names)} photos in {args.vectors}")


def _search(client: Client, args: argparse.Namespace) -> None:
    vectors = _indexed(client, args.vectors) if Path(args.vectors).is_dir() else Vectors.load(args.vectors)
    hits = search(client, vectors, text=args.text, image=args.image, k=args.k, rerank=args.rerank)
    if args.json:
        print(json.dumps(hits, indent=2))
        return
    for hit in hits:
        matching = f"  {hit['match']:+7.2f}" if "match" in hit else ""
        print(f"{hit['score']:+.3f}{matching}  {hit['photo']}")


def _match(client: Client, args: argparse.Namespace) -> None:
    logit = float(client.match([args.image], [args.text])[0])
    print(f"{logit:+.3f} (probability of a match {1 / (1 + np.exp(-logit)):.3f})")


def _indexed(client: Client, folder: str) -> Vectors:
    vectors, unread = index_folder(client, folder)
    for reason in unread:
        print(f"left out: {reason}", file=sys.stderr)
    return vectors


if __name__ == "__main__":
    main()
