"""What must not reach the Hub: secrets, and paths that tell of the machine; found in every staged text."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# Names of secrets in settings and on command lines: `api_key`, `WANDB_API_KEY`, `hub_token`; not `tokens`, `tokenizer`.
_NAMES = r"(?:api[_-]?key|access[_-]?key|private[_-]?key|secret(?:[_-]?key)?|token|passwd|password|pwd|credentials?)"
SECRETS = {
    "a Hugging Face token": re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})"),
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a Weights & Biases key": re.compile(r"(?i)wandb\W{0,3}[\w-]*\W{1,4}[0-9a-f]{40}\b|\bwandb_v\d_\w{20,}"),
    "an API key": re.compile(r"\b(?:sk-[\w-]{20,}|xox[abeprs]-[\w-]{10,}|AIza[\w-]{35}|glpat-[\w-]{20,}|pypi-\w{20,})"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a name and password in an address": re.compile(r"://[^/\s:@\"']+:[^/\s:@\"']+@"),
    "a bearer token": re.compile(r"(?i)\bbearer\s+[\w.~+/=-]{16,}"),
    "a password": re.compile(r"""(?i)(?<![a-z])(?:passwd|password|pwd)["']?\s*[:=]\s*["'][^"'\s]{4,}["']"""),
    "a secret on a command line": re.compile(rf"(?i)--[\w-]*{_NAMES}[= ]\s*\w[\w./+=@!$%^&*~-]{{5,}}"),
    # Letters and digits mixed and no file, since `pad_token: [PAD]`, `token = batch.input_ids` and the shard that holds
    # the weight `mask_token` are no secrets.
    "a secret": re.compile(
        rf"""(?i)(?<![a-z]){_NAMES}["']?\s*[:=]\s*["']?(?![\w./-]*\.(?:safetensors|json|txt)\b)"""
        r"""(?=[a-z_./+=-]*\d)(?=[\d_./+=-]*[a-z])[\w./+=-]{16,}"""
    ),
}
# Of variables whose values are searched for as they are.
SECRET_VARIABLE = re.compile(r"(?i)(?:token|secret|password|passwd|api_?key|access_?key)$")
POSIX_PATH = re.compile(r"""(?<![\w./~-])(?:file://)?(/[^\s/"'`<>|:;,()\[\]{}\\]+(?:/[^\s/"'`<>|:;,()\[\]{}\\]+)+)/?""")
WINDOWS_PATH = re.compile(r"""(?<![A-Za-z])[A-Za-z]:(?:\\{1,2}|/)(?:[\w .$~-]+(?:\\{1,2}|/))+[\w.$~-]*""")
# Where people's and clusters' files are, whether or not they are on this machine.
PRIVATE_ROOTS = {"home", "Users", "root", "mnt", "media", "tmp", "var", "opt", "srv", "scratch", "workspace", "Volumes"}
# The system's own, the same on every machine.
SYSTEM_ROOTS = {"dev", "proc", "sys"}
# A line of a tokenizer's vocabulary: what stands there is a piece of some language's texts.
VOCABULARY_LINE = re.compile(r'^\s*"(?:[^"\\]|\\.)*": \d+,?$')


@dataclass(frozen=True)
class Finding:
    """Something that must not be published: where it is, and what (a secret is shown by its first letters)."""

    file: str
    line: int
    what: str
    shown: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}: {self.shown}"


def scan(staged: Path, run: Path) -> list[Finding]:
    """Look through every text file and every header of safetensors of a staged folder.

    Args:
        run: the folder that it was staged from; its own place is looked for too.
    """
    places = [str(path) for path in {run.absolute(), run.resolve(), Path.home()} if len(path.parts) > 1]
    own = re.compile(rf"(?<![\w./])(?:{'|'.join(map(re.escape, places))})(?!\w)") if places else None
    values = {name: value for name, value in os.environ.items() if SECRET_VARIABLE.search(name) and len(value) >= 12}
    findings = []
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        name = path.relative_to(staged).as_posix()
        for number, line in enumerate(lines_of(path), start=1):
            for what, shown in (*secrets_in(line, values), *paths_in(line, own)):
                findings.append(Finding(name, number, what, shown))
    return findings


def refuse(findings: list[Finding]) -> None:
    """Raise a ValueError that lists the findings and says how to mend them; nothing where there are none."""
    if not findings:
        return
    lines = "\n".join(f"  {finding}" for finding in findings[:20])
    more = f"\n  ... and {len(findings) - 20} more" if len(findings) > 20 else ""
    raise ValueError(
        f"nothing is published, for secrets or paths of this machine were found ({len(findings)}):\n{lines}{more}\n"
        "Mend them where they come from, and publish again: a config or tokenizer file in the run's final/ of that "
        "name, results/ by evaluating again, the card by its settings. A secret that stood in a file is known to "
        "others who read it: revoke it."
    )


def lines_of(path: Path) -> list[str]:
    """Lines of a text file; the header of a safetensors file, a line a note; [] for pictures and other binaries."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return [*(f"{name}: {note}" for name, note in header.pop("__metadata__", {}).items()), *header]
    data = path.read_bytes()
    if b"\0" in data:
        return []
    return data.decode("utf-8", errors="replace").splitlines()


def secrets_in(line: str, values: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (what, how it is shown) for each secret of a line; `values` are secrets that are known."""
    for name, value in values.items():
        if value in line:
            yield f"the value of ${name}", masked(value)
    for what, pattern in SECRETS.items():
        for match in pattern.finditer(line):
            yield what, masked(match.group())


def masked(secret: str) -> str:
    """Show a secret by its first letters.

    Example:
        >>> masked("hf_abcdefghijklmnop")
        'hf_abc...'
    """
    return f"{secret[: min(6, len(secret) // 2)]}..."


def paths_in(line: str, own: re.Pattern | None = None) -> Iterator[tuple[str, str]]:
    """Yield (what, path) for each absolute path of a line that tells of a machine; `own` are places of this one."""
    if VOCABULARY_LINE.match(line):
        return
    for match in WINDOWS_PATH.finditer(line):
        yield "an absolute path", match.group()
    found = [match.group(1).rstrip(".") for match in POSIX_PATH.finditer(line)]
    for path in found:
        if tells(path):
            yield "an absolute path", path
    for match in own.finditer(line) if own else ():
        if not any(match.group() in path for path in found):
            yield "an absolute path", match.group()


def tells(path: str) -> bool:
    """Whether a path is one of somebody's files: by its root, or since it (or a folder that it is in) is here."""
    parts = PurePosixPath(path).parts
    if parts[1] in SYSTEM_ROOTS or path == "/usr/bin/env":
        return False
    return parts[1] in PRIVATE_ROOTS or any(os.path.exists("/".join(["", *parts[1:end]])) for end in range(3, 7))
