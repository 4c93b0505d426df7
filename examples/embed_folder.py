"""Embed a folder of photos: a file of vectors, and which photos are most alike.

    python examples/embed_folder.py
    python examples/embed_folder.py --model runs/quickstart --photos path/to/photos

For a shop that changes, or for more than a script's worth of photos, keep a catalogue instead: search.py.
"""

import numpy as np
from example_data import HOME, arguments
from PIL import Image

from syncmask.retrieval.encoder import Encoder

given = arguments(__doc__, out=str(HOME / "vectors.npz"))
encoder = Encoder.from_pretrained(given.model)

endings = set(Image.registered_extensions())
photos = sorted(path for path in given.photos.rglob("*") if path.suffix.lower() in endings)
vectors = encoder.encode_image(photos, batch_size=64, as_numpy=True)  # (photos, P) float32, unit length
names = [path.relative_to(given.photos).as_posix() for path in photos]
# The revision names the model and its preprocessing: only vectors of one revision can be compared.
np.savez(given.out, names=names, vectors=vectors, revision=encoder.revision)
print(f"{len(names)} photos as vectors of {encoder.dim} numbers, written to {given.out}")

similarities = vectors[:5] @ vectors.T
similarities[np.arange(len(similarities)), np.arange(len(similarities))] = -1  # not itself
for name, row in zip(names, similarities):
    print(f"{name} is most like {names[row.argmax()]} (cosine {row.max():.3f})")
