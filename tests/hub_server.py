"""A Hugging Face Hub on loopback: real HTTP, repositories in memory, as much of the API as `huggingface_hub` calls.

Models only. Files are committed as the Hub takes them: small text in the commit itself, safetensors and
large files through LFS, with a storage at another origin that the Hub redirects downloads to.
`huggingface_hub` speaks to it once `HF_ENDPOINT` names it, and with `HF_HUB_DISABLE_XET=1`, which is its
documented switch from the Xet storage to LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_LARGE = 10 << 20
_GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
_DATE = "2024-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        """What git knows the file by."""
        return self.sha256 if self.lfs else hashlib.sha1(b"blob %d\0%b" % (len(self.data), self.data)).hexdigest()


@dataclass(frozen=True)
class Commit:
    title: str
    author: str
    parent: str | None
    files: dict[str, Blob]

    @property
    def oid(self) -> str:
        tree = [f"{path} {blob.etag}" for path, blob in sorted(self.files.items())]
        return hashlib.sha1("\n".join([self.title, self.author, str(self.parent), *tree]).encode()).hexdigest()


@dataclass
class Repository:
    owner: str
    private: bool
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, commit: Commit) -> str:
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit.oid

    def resolve(self, revision: str) -> str:
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return oid


class HubError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, *, code: str | None = None, **body) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.body = {"error": message, **body}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, handler: type[_Handler], hub: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.hub = hub
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def handle_error(self, request, client_address) -> None:
        error = sys.exception() if sys.version_info >= (3, 11) else sys.exc_info()[1]
        if not isinstance(error, ConnectionError):  # a client may hang up at any time
            self.hub.errors.append(error)

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class HubServer:
    """A Hub that serves until its `with` block ends.

    Args:
        users: name of each user by access token.

    Attributes:
        url: what `HF_ENDPOINT` must be.
        repositories: by id.
        objects: content of large files by SHA-256, as the storage serves it.
        requests: of the form `GET /path`, in order.
        errors: exceptions of the server itself.
        fault: is given each request's handler first; where it returns `True`, the request is done with.
    """

    def __init__(self, users: dict[str, str]) -> None:
        self.users = users
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.errors: list[BaseException | None] = []
        self.fault: Callable[[BaseHTTPRequestHandler], bool] = lambda handler: False
        self.lock = threading.RLock()

    def __enter__(self) -> HubServer:
        self._storage = _Server(_StorageHandler, self)
        self._server = _Server(_HubHandler, self)
        self.storage_url, self.url = self._storage.url, self._server.url
        return self

    def __exit__(self, *_) -> None:
        self._server.stop()
        self._storage.stop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_) -> None:
        pass

    def handle_one_request(self) -> None:
        """Answer one request: errors that `respond` raises are answers too."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline:
            self.close_connection = True
        elif self.parse_request():
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            target = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(target.query).items()}
            self.server.hub.requests.append(f"{self.command} {self.path}")
            if self.server.hub.fault(self):
                self.close_connection = True
                return
            try:
                with self.server.hub.lock:
                    self.respond(target.path, query, body)
            except HubError as error:
                self.send(error.status, error.body, error.headers)

    def respond(self, path: str, query: dict[str, str], body: bytes) -> None:
        raise NotImplementedError

    def send(self, status: int, body: object = b"", headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()


class _StorageHandler(_Handler):
    """The storage of large files: it serves whoever has a signed URL, and must never be sent a token."""

    def respond(self, path: str, query: dict[str, str], body: bytes) -> None:
        oid = path[1:]
        if "Authorization" in self.headers or query.get("signature") != _signature(oid):
            raise HubError(400, "InvalidArgument: exactly one way of authentication, the signature, is needed")
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                raise HubError(400, "BadDigest")
            self.server.hub.objects[oid] = body
            self.send(200)
        elif oid in self.server.hub.objects:
            self.send(200, self.server.hub.objects[oid], {"ETag": f'"{oid}"'})
        else:
            raise HubError(404, "NoSuchKey")


def _signature(oid: str) -> str:
    return hashlib.sha1(f"secret {oid}".encode()).hexdigest()


class _HubHandler(_Handler):
    _ID = r"(?P<repo_id>[^/]+/[^/]+?)"
    _API = rf"/api/models/{_ID}"
    _ROUTES = [
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("GET", rf"{_API}(/revision/(?P<revision>[^/]+))?", "describe"),
        ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "list_tree"),
        ("GET", rf"{_API}/commits/(?P<revision>[^/]+)", "list_commits"),
        ("GET", rf"{_API}/refs", "list_refs"),
        ("PUT", rf"{_API}/settings", "change_settings"),
        ("POST", rf"{_API}/branch/(?P<branch>[^/]+)", "create_branch"),
        ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", rf"/{_ID}\.git/info/lfs/verify", "lfs_verify"),
        ("GET", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
        ("HEAD", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
    ]

    def respond(self, path: str, query: dict[str, str], body: bytes) -> None:
        self.query, self.body = query, body
        self.user = self.authenticate()
        for method, pattern, name in self._ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                arguments = {key: value and unquote(value) for key, value in match.groupdict().items()}
                return getattr(self, name)(**arguments)
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    # Who may do what

    def authenticate(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.server.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def repository(self, repo_id: str, *, write: bool = False) -> Repository:
        repository = self.server.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.user != repository.owner):
            if self.user is None:
                # The Hub sends no code with this one; over https `huggingface_hub` infers it from the URL.
                raise HubError(401, "Invalid username or password.", code="RepoNotFound")
            raise HubError(404, "Repository not found", code="RepoNotFound")
        if write and self.user is None:
            raise HubError(401, "Invalid username or password.")
        if write and self.user != repository.owner and "create_pr" not in self.query:
            raise HubError(403, f"Forbidden: pass `create_pr=1` as a query parameter to open a PR on {repo_id}")
        return repository

    # Repositories

    def create_repository(self) -> None:
        request = json.loads(self.body)
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        owner = request.get("organization") or self.user
        if owner != self.user:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        repo_id = f"{owner}/{request['name']}"
        url = f"{self.server.url}/{repo_id}"
        if repo_id in self.server.hub.repositories:
            raise HubError(409, "You already created this model repo", url=url)
        repository = Repository(owner, private=request.get("visibility") == "private")
        repository.commit("main", Commit("initial commit", owner, None, {".gitattributes": Blob(_GITATTRIBUTES)}))
        self.server.hub.repositories[repo_id] = repository
        self.send(200, {"url": url, "name": repo_id})

    def describe(self, repo_id: str, revision: str | None) -> None:
        repository = self.repository(repo_id)
        oid = repository.resolve(revision or "main")
        card = repository.commits[oid].files.get("README.md")
        metadata = _front_matter(card.data.decode()) if card else {}
        self.send(
            200,
            {
                "id": repo_id,
                "modelId": repo_id,
                "author": repository.owner,
                "sha": oid,
                "private": repository.private,
                "lastModified": _DATE,
                "tags": metadata.get("tags", []),
                "cardData": metadata,
                "siblings": [{"rfilename": path} for path in repository.commits[oid].files],
            },
        )

    def list_tree(self, repo_id: str, revision: str, path: str | None) -> None:
        repository = self.repository(repo_id)
        files = repository.commits[repository.resolve(revision)].files
        prefix = f"{path}/" if path else ""
        inside = {name: blob for name, blob in files.items() if name.startswith(prefix)}
        if prefix and not inside:
            raise HubError(404, f"{path} does not exist on {revision!r}", code="EntryNotFound")
        entries: dict[str, dict[str, object]] = {}
        for name, blob in inside.items():
            parts = name[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                folder = prefix + "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            entries[name] = {"type": "file", "path": name, "oid": blob.etag, "size": len(blob.data)}
            if blob.lfs:
                entries[name]["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 134}
        if self.query.get("recursive", "").lower() != "true":
            entries = {name: entry for name, entry in entries.items() if "/" not in name[len(prefix) :]}
        self.send(200, list(entries.values()))

    def list_commits(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id)
        oid: str | None = repository.resolve(revision)
        found = []
        while oid is not None:
            commit = repository.commits[oid]
            authors = [{"user": commit.author}]
            found.append({"id": oid, "title": commit.title, "message": "", "authors": authors, "date": _DATE})
            oid = commit.parent
        self.send(200, found)

    def list_refs(self, repo_id: str) -> None:
        refs = self.repository(repo_id).refs.items()
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in refs
            if not name.startswith("refs/")
        ]
        requests = [{"name": name, "ref": name, "targetCommit": oid} for name, oid in refs if name.startswith("refs/")]
        self.send(200, {"branches": branches, "converts": [], "tags": [], "pullRequests": requests})

    def create_branch(self, repo_id: str, branch: str) -> None:
        repository = self.repository(repo_id, write=True)
        if branch.startswith("refs/"):
            raise HubError(400, f"Invalid reference for a branch: {branch}")
        if branch in repository.refs:
            raise HubError(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.refs[branch] = repository.resolve(start)
        self.send(200, {})

    def change_settings(self, repo_id: str) -> None:
        self.repository(repo_id, write=True).gated = bool(json.loads(self.body)["gated"])
        self.send(200, {})

    # Uploads

    def validate_card(self) -> None:
        errors, warnings = _judge_card(json.loads(self.body)["content"])
        self.send(400 if errors else 200, {"errors": errors, "warnings": warnings})

    def preupload(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id, write=True)
        present = repository.commits[repository.resolve(revision)].files
        answers = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] > _LARGE
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in present:
                answer["oid"] = present[file["path"]].etag
            answers.append(answer)
        self.send(200, {"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self.repository(repo_id)
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        objects = []
        for item in json.loads(self.body)["objects"]:
            oid = item["oid"]
            answer = {"oid": oid, "size": item["size"]}
            if oid not in self.server.hub.objects:
                answer["actions"] = {
                    "upload": {"href": _storage_url(self.server.hub, oid)},
                    "verify": {"href": f"{self.server.url}/{repo_id}.git/info/lfs/verify"},
                }
            objects.append(answer)
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_verify(self, repo_id: str) -> None:
        item = json.loads(self.body)
        if len(self.server.hub.objects.get(item["oid"], b"")) != item["size"]:
            raise HubError(404, "Object not found")
        self.send(200, {})

    def commit(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id, write=True)
        parent = repository.resolve(revision)
        files = dict(repository.commits[parent].files)
        title = ""
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[value["path"]] = Blob(self.server.hub.objects[value["oid"]], lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(400, f"Invalid key {key!r}")
        if "README.md" in files and (errors := _judge_card(files["README.md"].data.decode())[0]):
            raise HubError(400, f"Invalid metadata in README.md: {errors}")
        answer = {}
        if "create_pr" in self.query:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.server.url}/{repo_id}/discussions/{number}"
        oid = repository.commit(revision, Commit(title, str(self.user), parent, files))
        self.send(200, {"commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}", **answer})

    # Downloads

    def download(self, repo_id: str, revision: str, path: str) -> None:
        repository = self.repository(repo_id)
        oid = repository.resolve(revision)
        blob = repository.commits[oid].files.get(path)
        headers = {"X-Repo-Commit": oid}
        if repository.gated and self.user != repository.owner:
            status = 403 if self.user else 401
            raise HubError(status, f"Access to model {repo_id} is restricted.", code="GatedRepo")
        if blob is None:
            error = HubError(404, "Entry not found", code="EntryNotFound")
            self.send(404, error.body, error.headers | headers)
        elif blob.lfs:
            linked = {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
            location = {"Location": _storage_url(self.server.hub, blob.sha256)}
            self.send(302, b"", headers | linked | location)
        else:
            self.send(200, blob.data, headers | {"ETag": f'"{blob.etag}"'})


def _storage_url(hub: HubServer, oid: str) -> str:
    return f"{hub.storage_url}/{oid}?signature={_signature(oid)}"


def _front_matter(text: str) -> dict:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return (yaml.safe_load(match[1]) or {}) if match else {}


def _judge_card(text: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Errors and warnings of the Hub over a model card."""
    try:
        metadata = _front_matter(text)
    except yaml.YAMLError as error:
        return [{"message": f"YAML is invalid: {error}"}], []
    if not metadata:
        return [], [{"message": "empty or missing yaml metadata in repo card"}]
    base = metadata.get("base_model", "gpt2")
    if not isinstance(base, str) or not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", base):
        return [{"message": f'"base_model" with value "{base}" is not valid. Use a model id.'}], []
    return [], []
