"""Index a folder of photos once, then search it by words, by a photo, and by both; and see why the first hit is one.

    python examples/search.py
    python examples/search.py --model runs/quickstart --photos path/to/photos --words "black hoodie with zip"

The same on the command line: syncmask index, syncmask search, syncmask explain, syncmask app.
"""

from example_data import HOME, arguments

from syncmask.retrieval.embed import index
from syncmask.retrieval.explain import explain
from syncmask.retrieval.explain_page import write_explanation
from syncmask.retrieval.sheet import save_sheet

given = arguments(__doc__, words="red dress", catalogue=str(HOME / "catalogue"))

# Photos that are there unchanged cost nothing: run it again after every update of the shop.
report, catalogue = index(given.photos, given.catalogue, given.model)
print(report)

hits = catalogue.search(text=given.words, k=5)
for place, hit in enumerate(hits, 1):
    print(f"{place}. {hit.vector:.3f}  {hit.item_id}  {hit.text[:70]}")
save_sheet(HOME / "hits.png", hits, given.words)

photo = hits[0].photos[0].open()
print("like the first hit:     ", [hit.item_id for hit in catalogue.search(image=photo, k=5)])
print("like it, but 'blue':    ", [hit.item_id for hit in catalogue.search(image=photo, text="blue", k=5)])
print("re-ranked, matching head:", [hit.item_id for hit in catalogue.search(text=given.words, k=5, rerank=20)])

others = [hit.photos[0].open() for hit in hits[1:4]]
explanation = explain(catalogue.encoder, photo, given.words, others=others)
for word, support in zip(explanation.words, explanation.support):
    print(f"the first photo speaks {'for' if support > 0 else 'against'} {word!r} ({support:+.2f})")
print("pictures:", HOME / "hits.png", write_explanation(explanation, HOME / "why.html"))
