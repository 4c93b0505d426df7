"""A small Hub on this machine: speaks the HTTP protocol that the real huggingface_hub client expects.

Repositories are dictionaries in memory: a branch names a commit, a commit holds {file name: Blob}. Known: whoami,
creating repositories and branches, validation of a card's metadata, preupload, LFS batch and PUT, commits, pull
requests, trees, information and downloads. Uploads are counted, and can be made to fail.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "x" * 34
USER = "me"


@dataclass(frozen=True)
class Blob:
    """A file's content, and whether it is kept as LFS (a file with a zero byte, or of more than 1 MB)."""

    data: bytes
    lfs: bool

    @property
    def sha256(self):
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self):
        """Git's hash of a blob; of an LFS file's pointer on the real Hub, where nobody compares it."""
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def entry(self, path):
        lfs = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        about = {"type": "file", "path": path, "oid": self.oid, "size": len(self.data)}
        return about | ({"lfs": lfs} if self.lfs else {})


@dataclass
class Repo:
    private: bool = False
    branches: dict = field(default_factory=dict)  # name -> commit
    commits: dict = field(default_factory=dict)  # commit -> {path: Blob}
    messages: list = field(default_factory=list)

    def files(self, revision="main"):
        return self.commits[self.branches.get(revision, revision)]

    def commit(self, branch, files, message):
        self.messages.append(message)
        content = json.dumps([len(self.commits), message, sorted(files)])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.branches[branch], self.commits[oid] = oid, files
        return oid


class Refused(Exception):
    """An answer that is an error: status, the Hub's code of the error, message."""


class Hub:
    """The state that requests work on.

    Attributes:
        repos: by `owner/name`. lfs: content by sha256, committed or not.
        received: names of files that came with commits; sha256 of the content of each LFS upload.
        break_puts: {n: how}, what befalls the nth LFS upload (from 1): an HTTP status, or "cut" for a dead connection.
        down: status that every request is answered with, if any. role: of the token.
    """

    def __init__(self):
        self.repos, self.lfs = {}, {}
        self.received, self.puts, self.break_puts, self.down = [], 0, {}, None
        self.role = "write"
        self.lock = threading.Lock()
        self.url = ""

    def repo(self, name, request):
        repo = self.repos.get(name)
        if repo is None or (repo.private and not request.is_user()):
            raise Refused(404, "RepoNotFound", f"no repository {name}")
        return repo

    def files(self, name, revision, request):
        repo = self.repo(name, request)
        if repo.branches.get(revision, revision) not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"no revision {revision}")
        return repo.files(revision)

    def whoami(self, request):
        request.must_be_user()
        return {"name": USER, "type": "user", "orgs": [{"name": "shop"}], "auth": {"accessToken": {"role": self.role}}}

    def create(self, request):
        request.must_be_user()
        asked = request.json()
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if name in self.repos:
            raise Refused(409, "Conflict", "You already created this model repo")
        repo = self.repos[name] = Repo(private=asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        return {"url": f"{self.url}/{name}", "name": name, "private": repo.private}

    def validate(self, request):
        head = re.match(r"---\n(.*?)\n---", request.json()["content"], re.DOTALL)
        try:
            data = yaml.safe_load(head.group(1)) if head else {}
            errors = [] if isinstance(data, dict) else ["the metadata is no mapping"]
            errors += [] if isinstance(data.get("license", ""), str) else ['"license" must be a string']
        except (yaml.YAMLError, AttributeError) as problem:
            errors = [str(problem)]
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        return answer if not errors else (400, answer)

    def info(self, name, revision, request):
        files, repo = self.files(name, revision, request), self.repo(name, request)
        about = {"id": name, "modelId": name, "private": repo.private, "tags": []}
        siblings = [{"rfilename": path} for path in files]
        return about | {"sha": repo.branches.get(revision, revision), "siblings": siblings}

    def tree(self, name, revision, folder, request):
        files = self.files(name, revision, request)
        inside = {path: blob for path, blob in files.items() if not folder or path.startswith(folder + "/")}
        if folder and not inside:
            raise Refused(404, "EntryNotFound", f"no folder {folder}")
        return [blob.entry(path) for path, blob in inside.items()]

    def branch(self, name, branch, request):
        request.must_be_user()
        repo = self.repo(name, request)
        if branch in repo.branches:
            raise Refused(409, "Conflict", "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return {}

    def preupload(self, name, revision, request):
        files, answer = self.files(name, revision, request), []
        for asked in request.json()["files"]:
            big = asked["size"] > 1_000_000 or b"\0" in base64.b64decode(asked["sample"])
            blob = files.get(asked["path"])
            oid = blob and (blob.sha256 if blob.lfs else blob.oid)
            mode = "lfs" if big else "regular"
            answer.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def batch(self, name, request):
        request.must_be_user()
        objects = []
        for asked in request.json()["objects"]:
            upload = {"upload": {"href": f"{self.url}/lfs/{asked['oid']}"}}
            objects.append(asked | ({} if asked["oid"] in self.lfs else {"actions": upload}))
        return {"transfer": "basic", "objects": objects}

    def put(self, oid, request):
        with self.lock:
            self.puts += 1
            how = self.break_puts.get(self.puts)
        if how == "cut":
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
            return None
        if how:
            raise Refused(how, "Broken", "the storage is broken")
        assert hashlib.sha256(request.body).hexdigest() == oid
        self.lfs[oid] = request.body
        self.received.append(oid)
        return {}

    def commit(self, name, revision, request):
        request.must_be_user()
        lines = [json.loads(line) for line in request.body.splitlines()]
        files, repo = dict(self.files(name, revision, request)), self.repo(name, request)
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "deletedFile":
                del files[value["path"]]
            elif kind == "lfsFile":
                files[value["path"]] = Blob(self.lfs[value["oid"]], True)
            else:
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            self.received.append(value["path"])
        number = None
        if "create_pr" in request.query:
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repo.branches)
            revision = f"refs/pr/{number}"
        oid = repo.commit(revision, files, lines[0]["value"]["summary"])
        pull = f"{self.url}/{name}/discussions/{number}" if number else None
        return {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": pull}

    def resolve(self, name, revision, path, request):
        files, repo = self.files(name, revision, request), self.repo(name, request)
        if path not in files:
            commit = {"X-Repo-Commit": repo.branches.get(revision, revision)}
            raise Refused(404, "EntryNotFound", f"no file {path}", commit)
        blob = files[path]
        headers = {"ETag": f'"{blob.sha256 if blob.lfs else blob.oid}"'}
        request.send(200, blob.data, headers | {"X-Repo-Commit": repo.branches.get(revision, revision)})


ROUTES = [
    ("GET", r"/api/whoami-v2", Hub.whoami),
    ("POST", r"/api/repos/create", Hub.create),
    ("POST", r"/api/validate-yaml", Hub.validate),
    ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", Hub.tree),
    ("GET", r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", Hub.info),
    ("GET", r"/api/models/([^/]+/[^/]+)()", lambda hub, name, _, request: hub.info(name, "main", request)),
    ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", Hub.branch),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", Hub.preupload),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", Hub.commit),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", r"/lfs/([0-9a-f]+)", Hub.put),
    ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Hub.resolve),
]


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def answer(self):
        address = urlsplit(self.path)
        self.query, self.body = parse_qs(address.query), self.read_body()
        method = "GET" if self.command == "HEAD" else self.command
        try:
            if self.hub.down:
                raise Refused(self.hub.down, "Down", "the Hub is down")
            for wanted, pattern, action in ROUTES:
                match = re.fullmatch(pattern, address.path)
                if match and wanted == method:
                    return self.reply(action(self.hub, *(unquote(part or "") for part in match.groups()), self))
            raise Refused(404, "NotFound", f"{self.command} {self.path} is not known to this Hub")
        except Refused as problem:
            status, code, message, *more = problem.args
            headers = {"X-Error-Code": code, "X-Error-Message": message, **(more[0] if more else {})}
            self.send(status, json.dumps({"error": message}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def reply(self, result):
        if result is not None:
            status, content = result if isinstance(result, tuple) else (200, result)
            self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send(self, status, data, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def read_body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def json(self):
        return json.loads(self.body)

    def is_user(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def must_be_user(self):
        if not self.is_user():
            raise Refused(401, "Unauthorized", "Invalid username or password.")

    def log_message(self, *_):
        pass


@contextmanager
def serve():
    """Run a Hub on a free port of this machine; yields it, its address in `.url`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Request,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
