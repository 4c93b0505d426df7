"""One page in the browser: search a catalogue by words, a photo or both, and see why a hit is a hit.

It asks no other host for anything: fonts are the system's, there is no telemetry and no tunnel. Texts of products and
users are escaped, or shown by elements that know text alone.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from .app_hits import Found, filter_options, find, gallery, problem, reasons, summary, why
from .catalogue import Catalogue
from .explain import Explanation

try:
    import gradio as gr
except ImportError as error:
    raise ImportError(f"the page needs Gradio ({error}): pip install 'syncmask[app]'") from error

BEST = "the best supported words"
MINE, THEIRS = "what I searched for", "the item's own text"
HINT = "Type words, give a photo, or both: the photo, but with what the words say."
FONTS = ["system-ui", "DejaVu Sans", "sans-serif"]
CSS = """
.gradio-container { max-width: 84rem !important; margin: 0 auto !important; }
#hits .caption-label { left: 0; right: 0; max-width: 100%; border-radius: 0; text-align: left; font-size: .8rem; }
#hits .thumbnail-item.selected .caption-label { opacity: 1; }
#hits .grid-wrap { max-height: none; overflow: visible; }
#status, #why .note { color: var(--body-text-color-subdued); font-size: .9rem; }
#status .error, #why .error { color: #c2540a; font-weight: 600; }
#why .row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(14rem, 100%), 1fr)); gap: 1rem 1.5rem; }
#why h3 { margin: 1.2rem 0 .4rem; } #why p { margin: .4rem 0; }
#why figure { margin: 0; } #why figure b { display: block; margin-bottom: .3rem; }
#why img { width: 100%; max-width: 18rem; height: auto; border: 1px solid var(--border-color-primary); }
#why .strip { display: flex; flex-wrap: wrap; gap: .5rem; } #why .strip img { width: 96px; }
#why mark { padding: 0 .15em; border-radius: .15em; } #why mark.hidden { background: #3d3d3d; color: #fff; }
@media (max-width: 640px) { #hits .grid-container { grid-template-columns: repeat(2, 1fr) !important; } }
"""
# One handler at a time uses the model; none of them is an API for other programs.
ALONE = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}


def serve(
    catalogue: Catalogue, host: str = "127.0.0.1", port: int | None = None, *, browser: bool = False, block: bool = True
) -> tuple[gr.Blocks, str]:
    """Serves the page on this machine alone.

    Args:
        catalogue: open; its model is loaded when it is needed.
        host: "0.0.0.0" lets other machines in, as a Space must.
        port: the first free one from 7860 on when None.
        browser: open one.
        block: until interrupted; otherwise the page is returned and is closed by its `close()`.

    Returns:
        The page and its address.
    """
    page = build_app(catalogue)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=browser,
        prevent_thread_lock=not block,
        quiet=True,
        theme=gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=["monospace"]),
        css=CSS,
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    return page, address


def build_app(catalogue: Catalogue) -> gr.Blocks:
    """The page, not yet served."""
    with gr.Blocks(title="Search the catalogue", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        found, chosen, explained = gr.State(None), gr.State(0), gr.State(None)
        gr.HTML(_head(catalogue))
        with gr.Row():
            with gr.Column(scale=1, min_width=290):
                question, go = _question(catalogue)
            with gr.Column(scale=3, min_width=320):
                status = gr.HTML(HINT, elem_id="status")
                hits = gr.Gallery(
                    columns=4, height="auto", allow_preview=False, show_label=False, buttons=[], elem_id="hits"
                )
        with gr.Column(visible=False) as panel:
            with gr.Row():
                side = gr.Radio([MINE, THEIRS], value=MINE, label="Explain it by", min_width=280, elem_id="side")
                word = gr.Dropdown([BEST], value=BEST, label="Heatmaps of", min_width=280, elem_id="word")
            text = gr.HTML(elem_id="why")
        _connect_search(catalogue, question, go, [status, hits, found, panel])
        _connect_reasons(catalogue, hits, found, chosen, explained, side, word, text, panel)
    return page


def _head(catalogue: Catalogue) -> str:
    about = catalogue.describe()
    model = "/".join(Path(about["model"]).parts[-2:]) or "given in memory"  # no visitor needs the whole path
    counts = f"{about['items']:,} items, {about['photos']:,} photos"
    return f"<h2>Search the catalogue</h2><p>{counts} · model {escape(model)}</p>"


def _question(catalogue: Catalogue) -> tuple[list, gr.Button]:
    """The left column: words, the button, a photo, and folded away filters, how many, how ordered."""
    words = gr.Textbox(label="Words", placeholder="black hoodie with zip", max_lines=3, elem_id="words")
    go = gr.Button("Search", variant="primary", elem_id="go")
    photo = gr.Image(label="Photo", type="pil", height=190, sources=["upload", "clipboard"], elem_id="photo")
    with gr.Accordion("Filters and order", open=False, elem_id="more"):
        conditions = gr.Dropdown(
            filter_options(catalogue), value=[], multiselect=True, allow_custom_value=True, label="Filters",
            info="choose, or type such as price<50; of one column any, of several all", elem_id="filters",
        )  # fmt: skip
        k = gr.Slider(4, 48, value=12, step=4, label="Items", elem_id="k")
        rerank = gr.Checkbox(False, label="Order by the matching head (slower)", elem_id="rerank")
    return [words, photo, conditions, k, rerank], go


def _connect_search(catalogue: Catalogue, question: list, go: gr.Button, outputs: list) -> None:
    def search(words, photo, conditions, k, rerank):
        try:
            found = find(catalogue, words, photo, conditions, k, rerank)
        except (ValueError, OSError) as error:
            return problem(error), [], None, gr.update(visible=False)
        pictures = gr.update(value=gallery(found), selected_index=None)
        return summary(found), pictures, found, gr.update(visible=False)

    # A question that comes while another is being answered is answered too: Gradio would drop it.
    gr.on([go.click, question[0].submit], search, question, outputs, trigger_mode="always_last", **ALONE)


def _connect_reasons(catalogue, hits, found, chosen, explained, side, word, text, panel) -> None:
    """A click on a hit, another side or another word: the reasons change."""

    def show(found: Found | None, place: int, side: str):
        if not found or place >= len(found.ranking):
            return "", None, gr.update(), gr.update(visible=False)
        try:
            explanation = why(catalogue.encoder, found, place, side == THEIRS)
        except (ValueError, OSError) as error:
            return problem(error), None, gr.update(choices=[BEST], value=BEST), gr.update(visible=True)
        choices = [BEST, *dict.fromkeys(explanation.words)]
        html = reasons(found.ranking[place], explanation)
        return html, explanation, gr.update(choices=choices, value=BEST), gr.update(visible=True)

    def click(found: Found | None, side: str, event: gr.SelectData):
        return event.index, *show(found, event.index, side)

    def turn(found: Found | None, place: int, explanation: Explanation | None, word: str):
        if explanation is None:
            return gr.update()
        return reasons(found.ranking[place], explanation, None if word == BEST else word)

    shown = [text, explained, word, panel]
    hits.select(click, [found, side], [chosen, *shown], scroll_to_output=True, **ALONE)
    side.input(show, [found, chosen, side], shown, **ALONE)
    word.input(turn, [found, chosen, explained, word], text, **ALONE)
