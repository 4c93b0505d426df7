"""Publishing while and after a run trains: `syncmask publish` as a process of its own, which no step waits for.

The command does all the work (hub_cards), so a failure costs the run nothing but a warning.
"""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

from huggingface_hub import constants, get_token

from .arguments import TrainArguments
from .faults import RunStopped
from .run_folder import RunFolder
from .trainer import Trainer

logger = logging.getLogger(__name__)

LOG = "publish.log"
# Config and processor, which a checkpoint lacks; hub_cards looks for them there.
SKELETON = Path("publish") / "skeleton"
# Seconds for which the end of a run waits for an upload.
PATIENCE = 3600
# What launchers tell their processes: the publishing one is none of them.
LAUNCHERS = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_")


def check_publishing(arguments: TrainArguments) -> None:
    """Stop before training where a run could not be published.

    Raises:
        RunStopped: no token, offline mode, or checkpoints that no model can be made of.
    """
    run = arguments.run
    if not run.push_to_hub:
        return
    if get_token() is None:
        raise RunStopped(
            "push_to_hub is on, but there is no token for the Hub: run `hf auth login`, set HF_TOKEN, or train without "
            "it and publish later by `syncmask publish`"
        )
    if constants.HF_HUB_OFFLINE:
        raise RunStopped("push_to_hub is on, but HF_HUB_OFFLINE is set: unset one of them")
    if run.hub_strategy == "checkpoint" and arguments.model.lora_rank is not None:
        raise RunStopped("checkpoints with lora_rank hold adapters, not whole models: set hub_strategy to end")


class Publisher:
    """Starts `syncmask publish` for a run, one at a time; does nothing unless `push_to_hub` is on.

    Args:
        arguments: of the run. folder: the run's; only the process that writes there publishes.
    """

    def __init__(self, arguments: TrainArguments, folder: RunFolder):
        self.settings, self.path = arguments.run, folder.path
        self.on = arguments.run.push_to_hub and folder.is_main
        self.process: subprocess.Popen | None = None

    def follow(self, trainer: Trainer) -> None:
        """Publish checkpoints as they are saved, where that is asked for."""
        if not self.on or self.settings.hub_strategy != "checkpoint":
            return
        config = trainer.student.config.__class__.from_dict(trainer.student.config.to_dict())
        config.architectures = [type(trainer.student).__name__]
        config.save_pretrained(self.path / SKELETON)
        trainer.task.processor.save_pretrained(self.path / SKELETON)
        save = trainer.save

        def save_and_publish(trainer: Trainer) -> None:
            save(trainer)
            self.start("--checkpoint", "newest")

        trainer.save = save_and_publish

    def finish(self) -> None:
        """Publish the finished run and wait for that; a failure is a warning that tells how to do it again."""
        if not self.on:
            return
        self.wait()
        logger.info("publishing %s as %s; its log is %s", self.path, self.settings.hub_model_id, self.path / LOG)
        self.start()
        if self.wait():
            logger.info((self.path / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-1])

    def start(self, *options: str) -> None:
        """Begin to publish in the background; left out where an earlier publish still runs, or none can be started."""
        if self.process is not None and self.process.poll() is None:
            return
        self.wait()
        try:
            with (self.path / LOG).open("ab") as log:
                self.process = subprocess.Popen(
                    self.command(*options),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=quiet_environment(),
                    start_new_session=True,  # Ctrl-C stops the training, and lets an upload end
                )
            os.setpriority(os.PRIO_PROCESS, self.process.pid, 10)
        except OSError as problem:
            logger.warning("not published (%s); do it later by: %s", problem, shlex.join(self.command()))

    def wait(self) -> bool:
        """Wait for the publish that runs, if one does; warn where it failed. Tells whether one ended well."""
        if self.process is None:
            return False
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = f"still running after {PATIENCE} seconds; process {self.process.pid} is left to it"
        self.process = None
        if code:
            again = shlex.join(self.command())
            logger.warning("publishing failed (%s), see %s; do it again by: %s", code, self.path / LOG, again)
        return code == 0

    def command(self, *options: str) -> list[str]:
        """Return the words of the command."""
        private = ["--private"] if self.settings.hub_private else []
        words = ["publish", str(self.path), "--repo_id", self.settings.hub_model_id, *private, *options]
        return [sys.executable, "-m", "syncmask", *words]


def quiet_environment() -> dict[str, str]:
    """Return the environment of a process beside the training: none of its ranks, no GPU, one thread, no bars."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
