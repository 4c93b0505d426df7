"""The whole act: who am I, stage, scan, check, compare with the Hub, one commit of what changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from syncmask import SyncMaskConfig
from syncmask.evaluation.archive import write_text
from syncmask.evaluation.loading import sha256

from .check import check
from .scan import refuse, scan
from .staging import MANIFEST, files_in, run_of_checkpoint, settings_of, stage

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is to be published, and where.

    Attributes:
        run: a run's folder. repo_id: `owner/name` on the Hub.
        private: of a repository that is made now. revision: a branch, made where there is none; None = main.
        create_pr: open a pull request instead of committing. commit_message: None = a plain one.
        checkpoint: `newest` or a checkpoint's name, to publish a run that has not ended; None = its final model.
        base_model: what it was finetuned from, on the Hub; None = read off the run. license: for the card.
        max_shard_size: weights above it are split, as "5GB".
        staged: the folder to stage in; None = publish/OWNER--NAME of the run.
        dry_run: stage, scan and check alone.
    """

    run: Path
    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    checkpoint: str | None = None
    base_model: str | None = None
    license: str = "apache-2.0"
    max_shard_size: str = "5GB"
    staged: Path | None = None
    dry_run: bool = False

    @property
    def folder(self) -> Path:
        """Where it is staged."""
        return self.staged or self.run / "publish" / self.repo_id.replace("/", "--")


@dataclass(frozen=True)
class Published:
    """What came of it: the address (None after a dry run), and the files sent, deleted and left as they were."""

    url: str | None
    sent: list[str]
    deleted: list[str]
    unchanged: list[str]


@dataclass(frozen=True)
class Changes:
    """The way from what the Hub has to what is staged, as file names."""

    send: list[str]
    delete: list[str]
    keep: list[str]


def publish(request: Request, api: HfApi, say: Say = print) -> Published:
    """Publish a run, or tell why not; the staged folder stays, and a second call sends only what is missing.

    Raises:
        FileNotFoundError, ValueError: nothing to publish, a bad name, secrets or paths in it, a model that a stranger
            could not use, a repository of something else, metadata that the Hub refuses.
        ConnectionError: no token, no network, or an upload that broke off.
    """
    check_name(request.repo_id)
    settings_of(request.run)
    if not request.dry_run:
        say(f"publishing as {identify(api, request)} to {api.endpoint}/{request.repo_id}")
    source = run_of_checkpoint(request.run, request.checkpoint) if request.checkpoint else nullcontext((request.run, 0))
    with source as (run, step):
        # The run's name stays at home, as all that a card does not need.
        message = request.commit_message or f"Publish the model{f' after step {step}' if request.checkpoint else ''}"
        prepare(request, run, say)
    names = files_in(request.folder)
    for name in names:
        say(f"  {name}  {size_of(request.folder / name)}")
    if request.dry_run:
        say(f"dry run: nothing was sent; the files are in {request.folder}")
        return Published(None, [], [], names)
    try:
        done = upload(request, api, names, message, say)
    except Exception as problem:
        if isinstance(problem, ValueError) and not isinstance(problem, HfHubHTTPError):
            raise  # it says itself how to mend it; all others mean the same to the user
        raise ConnectionError(
            f"the upload to {request.repo_id} broke off: {reason(problem)}. {request.folder} is kept; the same command "
            "again goes on from there, and files that have arrived are not sent twice"
        ) from problem
    try:
        record(request, done.url)
    except OSError as problem:  # it is published all the same
        say(f"published, but that cannot be noted in the run ({problem}); name --base_model where you finetune it")
    return done


def prepare(request: Request, run: Path, say: Say) -> None:
    """Stage, scan and check; raises ValueError where any of it says no."""
    say(f"staging in {request.folder}")
    options = {"base_model": request.base_model, "license": request.license}
    serves = stage(run, request.folder, request.repo_id, max_shard_size=request.max_shard_size, **options)
    refuse(scan(request.folder, request.run))
    difference = check(request.folder, run / "final", serves)
    say(
        f"loads without the package as {', '.join([*serves.auto, *serves.pipelines])}; largest difference from the "
        f"run's own numbers {difference:.1e}"
    )


def check_name(repo_id: str) -> None:
    """Raise ValueError unless a name is `owner/name`, as the Hub takes it."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as problem:
        raise ValueError(f"--repo_id {repo_id!r} is no name for the Hub: {problem}") from problem
    if repo_id.count("/") != 1:
        raise ValueError(f"--repo_id is {repo_id!r}; wanted owner/name, such as your-name/{repo_id}")


def identify(api: HfApi, request: Request) -> str:
    """Return the name that the token belongs to, before any work is done.

    Raises:
        ConnectionError: no token, one that the Hub refuses or that may not write, offline mode, or no network.
    """
    about = who_am_i(api)
    if about.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConnectionError("the token may read alone: make one with write access in your settings on the Hub")
    owner, owned = request.repo_id.partition("/")[0], [about["name"], *(one["name"] for one in about.get("orgs", []))]
    if owner.lower() not in map(str.lower, owned) and not request.create_pr:
        raise ConnectionError(
            f"the token is {about['name']}'s, who cannot write to {owner}/; names that work: {', '.join(owned)}. "
            "A pull request to somebody else's repository is opened by --create_pr"
        )
    return about["name"]


def who_am_i(api: HfApi) -> dict:
    """Ask the Hub whose token this is; see `identify`."""
    try:
        return api.whoami()
    except LocalTokenNotFoundError as problem:
        raise ConnectionError(
            "no token for the Hub was found: run `hf auth login`, or set HF_TOKEN to a token with write access "
            "(--dry_run needs none)"
        ) from problem
    except OfflineModeIsEnabled as problem:
        raise ConnectionError("offline mode is on: unset HF_HUB_OFFLINE, or use --dry_run") from problem
    except HfHubHTTPError as problem:
        raise ConnectionError(f"{api.endpoint} does not accept the token: {reason(problem)}") from problem
    except Exception as problem:  # of the HTTP library: a name not resolved, a connection refused
        raise ConnectionError(
            f"{api.endpoint} cannot be reached ({reason(problem)}): check the network and HF_ENDPOINT; --dry_run needs "
            "none"
        ) from problem


def reason(problem: Exception) -> str:
    """Say in a line what an exception is about, and what caused it."""
    said = " ".join(str(problem).split()) or type(problem).__name__
    cause = " ".join(str(problem.__cause__ or "").split())
    return said if cause in said else f"{said}; {cause}"


# -------------------------------------------------------------------------------------------------------------- upload


def upload(request: Request, api: HfApi, names: list[str], message: str, say: Say) -> Published:
    """Bring a repository to what is staged by one commit; none where nothing changed."""
    repo_id, target = request.repo_id, request.revision or constants.DEFAULT_REVISION
    open_repository(request, api)
    tree = remote_tree(api, repo_id, target)
    refuse_other_kind(api, repo_id, target, tree)
    changes = compare(request.folder, names, tree, earlier_files(api, repo_id, target, tree))
    url = f"{api.endpoint}/{repo_id}" + (f"/tree/{target}" if request.revision else "")
    if not changes.send and not changes.delete:
        say(f"nothing changed since the last time: no commit. {url}")
        return Published(url, [], [], changes.keep)
    say(f"{len(changes.send)} files to send, {len(changes.keep)} as they were, {len(changes.delete)} to delete")
    operations = [CommitOperationAdd(name, request.folder / name) for name in changes.send]
    operations += [CommitOperationDelete(name) for name in changes.delete]
    where = {"revision": request.revision, "create_pr": request.create_pr}
    done = api.create_commit(repo_id, operations, commit_message=message, **where)
    return Published(done.pr_url or url, changes.send, changes.delete, changes.keep)


def open_repository(request: Request, api: HfApi) -> None:
    """Make repository and branch where they are not there.

    Raises:
        ValueError: asked to be private, but there is a public one, whose readers would see it.
    """
    repo_id = request.repo_id
    try:
        public = not api.model_info(repo_id).private
        if request.private and public:
            raise ValueError(
                f"{repo_id} is public already, and --private makes new repositories private only; make it private in "
                "its settings on the Hub, or take another name"
            )
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=request.private or None, exist_ok=True)
    if request.revision:
        api.create_branch(repo_id, branch=request.revision, exist_ok=True)


def remote_tree(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    """List the files of a branch, by name; {} where it has no commit."""
    try:
        entries = list(api.list_repo_tree(repo_id, recursive=True, revision=revision))
    except (EntryNotFoundError, RevisionNotFoundError):
        return {}
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def refuse_other_kind(api: HfApi, repo_id: str, revision: str, tree: dict[str, RepoFile]) -> None:
    """Raise ValueError where a repository holds a model of another kind, which this one would overwrite."""
    if "config.json" not in tree:
        return
    kind = json.loads(read_remote(api, repo_id, revision, "config.json")).get("model_type")
    if kind != SyncMaskConfig.model_type:
        raise ValueError(
            f"{repo_id} holds a model of type {kind!r}, which would be overwritten by one of type "
            f"{SyncMaskConfig.model_type!r}; take another name"
        )


def earlier_files(api: HfApi, repo_id: str, revision: str, tree: dict[str, RepoFile]) -> set[str]:
    """Name what an earlier publish put there, by the list that it left."""
    if MANIFEST not in tree:
        return set()
    return set(read_remote(api, repo_id, revision, MANIFEST).splitlines())


def read_remote(api: HfApi, repo_id: str, revision: str, name: str) -> str:
    """Read a small text file of a repository."""
    with TemporaryDirectory() as folder:
        return Path(api.hf_hub_download(repo_id, name, revision=revision, cache_dir=folder)).read_text(encoding="utf-8")


def compare(staged: Path, names: list[str], tree: dict[str, RepoFile], earlier: set[str]) -> Changes:
    """Tell by hashes which staged files are new or changed, and which files of an earlier publish are gone."""
    same = {name for name in names if name in tree and is_same(staged / name, tree[name])}
    return Changes(
        send=[name for name in names if name not in same],
        delete=sorted((earlier & tree.keys()) - set(names)),
        keep=sorted(same),
    )


def is_same(file: Path, remote: RepoFile) -> bool:
    """Whether a file has the content of a remote one: of LFS files the sha256 is known, of others git's own hash."""
    if file.stat().st_size != remote.size:
        return False
    return sha256(file) == remote.lfs.sha256 if remote.lfs else git_hash(file.read_bytes()) == remote.blob_id


def record(request: Request, url: str) -> None:
    """Note where a run was published, so that what is finetuned from it can name its base model."""
    file = request.run / "publish" / f"{request.repo_id.replace('/', '--')}.json"
    write_text(file, json.dumps({"repo_id": request.repo_id, "url": url}, indent=2) + "\n")


def size_of(file: Path) -> str:
    """Write a file's size for people.

    Example: 1536 bytes are "1.5 kB".
    """
    size = float(file.stat().st_size)
    for unit in ("B", "kB", "MB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GB"
