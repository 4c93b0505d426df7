"""`syncmask publish` and `syncmask card`. Heavy imports wait for the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from syncmask.evaluation.exits import or_exit

app = typer.Typer(
    help="Publish runs on the Hub; write cards.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
)
# Options are spelt as training's are, with _; with - they are understood too.
SPELLING = {"token_normalize_func": lambda name: name.replace("-", "_")}

PUBLISH_EXAMPLES = """Examples:

    syncmask publish runs/quickstart --repo_id me/garments --dry_run

    syncmask publish runs/quickstart --repo_id me/garments --private

    syncmask publish runs/retrieval --repo_id me/garments-retrieval --base_model me/garments

    syncmask publish runs/quickstart --repo_id me/garments --create_pr

    syncmask publish runs/long --repo_id me/long --revision in-training --checkpoint newest
"""


@app.command(epilog=PUBLISH_EXAMPLES, context_settings=SPELLING)
def publish(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    repo_id: Annotated[str, typer.Option("--repo_id", help="owner/name of the model on the Hub")],
    private: Annotated[bool, typer.Option("--private", help="make the new repository private")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="branch, made where there is none; none = main")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create_pr", help="open a pull request instead of committing")] = False,
    commit_message: Annotated[str | None, typer.Option("--commit_message", help="none = a plain one")] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="newest, or step_XXXXXXXX: a run that has not ended")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base_model", help="what it was finetuned from, on the Hub; none = where that run was published"
        ),
    ] = None,
    license: Annotated[str, typer.Option("--license", help="of the weights, for the card")] = "apache-2.0",
    max_shard_size: Annotated[str, typer.Option("--max_shard_size", help="larger weights are split")] = "5GB",
    staged: Annotated[
        Path | None, typer.Option("--staged", help="folder to stage in; none = publish/ of the run; it is emptied")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="all but sending; needs no token and no network")] = False,
) -> None:
    """Publish a run on the Hub: staged, scanned for secrets, checked in a process without the package, uploaded."""
    from huggingface_hub import HfApi

    from syncmask import register_auto_classes

    from .publish import Request
    from .publish import publish as run_publish

    register_auto_classes()
    request = Request(
        run=run,
        repo_id=repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        checkpoint=checkpoint,
        base_model=base_model,
        license=license,
        max_shard_size=max_shard_size,
        staged=staged,
        dry_run=dry_run,
    )
    done = or_exit(run_publish, request, HfApi(), typer.echo)
    if done.url is not None:
        typer.echo(f"{len(done.sent)} files sent, {len(done.deleted)} deleted, {len(done.unchanged)} as they were")
        typer.echo(f"published at {done.url}")


CARD_EXAMPLES = """Examples:

    syncmask card runs/quickstart --repo_id me/garments

    syncmask card runs/quickstart --repo_id me/garments --out README.md

    syncmask card garments/ --repo_id me/garments-corpus --out garments/README.md
"""


@app.command(epilog=CARD_EXAMPLES, context_settings=SPELLING)
def card(
    path: Annotated[Path, typer.Argument(help="a run folder, or the folder of a corpus")],
    repo_id: Annotated[str, typer.Option("--repo_id", help="owner/name on the Hub")],
    out: Annotated[
        Path | None, typer.Option("--out", help="file for the card, with what it shows beside it; none = print it")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base_model", help="of a run: what it was finetuned from, on the Hub")
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", help="none = apache-2.0; must be given for photos that are not generated")
    ] = None,
) -> None:
    """Write the card of a run, or of a corpus, without publishing anything."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        written = or_exit(_write_card, path, Path(folder), repo_id, base_model, license)
        if out is None:
            typer.echo(written.read_text(encoding="utf-8"))
            return
        out = or_exit(_put_beside, Path(folder), out)
    typer.echo(f"written to {out}")


def _write_card(path: Path, folder: Path, repo_id: str, base_model: str | None, license: str | None) -> Path:
    """A run is known by its config.yaml; whatever else is a folder may be a corpus."""
    if (path / "config.yaml").is_file():
        from .card import write_model_card

        return write_model_card(path, folder, repo_id, base_model, license or "apache-2.0")
    from .dataset_card import write_dataset_card

    if base_model is not None:
        raise ValueError(f"{path} is no run folder (it has no config.yaml), so it has no --base_model")
    return write_dataset_card(path, folder, repo_id, license)


def _put_beside(folder: Path, out: Path) -> Path:
    """Move a card to its file (in a folder that is given: README.md), and what it shows to the same folder.

    Raises:
        ValueError: that is a run's folder, whose results, with what only its owner may know, would be overwritten.
    """
    import shutil

    out = out / "README.md" if out.is_dir() else out
    if (out.parent / "config.yaml").is_file():
        raise ValueError(
            f"{out.parent} is a run, whose own results those of the card would replace; name a file in another "
            f"folder, such as {out.parent / 'card' / out.name}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder / "README.md", out)
    shutil.copytree(folder, out.parent, dirs_exist_ok=True)
    return out
