"""The `syncmask` command: mounts each room's commands, which are imported only when they are called."""

import importlib

import typer
from typer.core import TyperGroup

COMMANDS = {
    "corpus": ("syncmask.processing.cli", "Make, check and convert corpora."),
    "evaluate": ("syncmask.evaluation.cli", "Score a checkpoint by a named protocol."),
    "compare": ("syncmask.evaluation.cli", "Tell whether two results differ."),
    "report": ("syncmask.evaluation.cli", "Rebuild a run's report."),
    "index": ("syncmask.retrieval.cli", "Bring a catalogue to what a folder of photos holds."),
    "search": ("syncmask.retrieval.cli", "Search a catalogue by words, a photo, or both."),
    "explain": ("syncmask.retrieval.cli", "Show why a photo and a text go together."),
    "app": ("syncmask.retrieval.cli", "Search a catalogue in the browser."),
    "export": ("syncmask.retrieval.cli", "Write a model as ONNX, with a client that needs no torch."),
    "publish": ("syncmask.hub_cards.cli", "Publish a run on the Hub, checked first."),
    "card": ("syncmask.hub_cards.cli", "Write the card of a run or a corpus."),
}


class LazyCommands(TyperGroup):
    """Lists commands from the table above and imports a room when one of its commands is called."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        """Name the commands without importing them."""
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, name: str):
        """Import the room of one command; its app is either the command itself or holds it by name."""
        if name not in COMMANDS:
            return None
        command = typer.main.get_command(importlib.import_module(COMMANDS[name][0]).app)
        return getattr(command, "commands", {}).get(name, command)

    def format_commands(self, ctx: typer.Context, formatter) -> None:
        """Write the list of commands for `--help`."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


app = typer.Typer(cls=LazyCommands, no_args_is_help=True, rich_markup_mode=None, add_completion=False)


@app.callback()
def _about() -> None:
    """SyncMask: pretraining on shop items with several photos and one text.

    Training has a command of its own: accelerate launch -m syncmask.training.pretrain --config quickstart
    """


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
