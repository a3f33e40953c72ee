"""What our hub double holds, and who may do what with it: files, commits, repos, users, and a call with its rights."""

import hashlib
import json
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.hub_xet import XetFile

if TYPE_CHECKING:
    from tests.hub_server import HubServer, Request

# What a new repo's `.gitattributes` sends to large-file storage, as on the real hub.
GITATTRIBUTES = "".join(
    f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n"
    for suffix in ["bin", "ckpt", "gz", "h5", "npy", "npz", "onnx", "parquet", "pkl", "pt", "pth", "safetensors", "zip"]
)


class Blob:
    """One version of a file: its bytes, or the chunks that make them. `lfs` says that git holds a pointer to it."""

    def __init__(self, content: bytes | XetFile, lfs: bool):
        self.content, self.lfs = content, lfs
        is_xet = isinstance(content, XetFile)
        self.xet_hash = content.hash if is_xet else None
        self.size = content.size if is_xet else len(content)
        self.sha256 = content.sha256 if is_xet else hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        self.pointer_size = len(pointer)
        in_git = pointer if lfs else content
        self.oid = hashlib.sha1(b"blob %d\0" % len(in_git) + in_git).hexdigest()

    def read(self) -> bytes:
        return self.content.read() if isinstance(self.content, XetFile) else self.content

    def listed_as(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": self.pointer_size}
        return {**entry, "xetHash": self.xet_hash} if self.xet_hash else entry


@dataclass(frozen=True)
class Commit:
    id: str
    message: str
    parent: str | None
    files: dict[str, Blob]
    author: str
    date: str

    def read(self, path: str) -> bytes:
        return self.files[path].read()


class Repo:
    """As on the real hub, a new one starts with a commit that holds `.gitattributes`."""

    def __init__(self, id: str, private: bool, author: str):
        self.id, self.private, self.gated = id, private, False
        self.branches: dict[str, Commit] = {}
        self.history: dict[str, Commit] = {}
        self.objects: dict[str, Blob] = {}  # large files by sha256, committed or only uploaded
        self.add_commit("main", "initial commit", {".gitattributes": Blob(GITATTRIBUTES.encode(), lfs=False)}, author)

    def add_commit(self, branch: str, message: str, files: dict[str, Blob], author: str) -> Commit:
        parent = self.branches[branch].id if branch in self.branches else None
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        commit = Commit(secrets.token_hex(20), message, parent, files, author, date)
        self.history[commit.id] = self.branches[branch] = commit
        return commit

    def commits(self, branch: str = "main") -> list[Commit]:
        """Oldest first."""
        line = [self.branches[branch]]
        while line[0].parent:
            line.insert(0, self.history[line[0].parent])
        return line


@dataclass(frozen=True)
class User:
    name: str
    orgs: tuple[str, ...]
    can_write: bool

    def belongs_to(self, repo_id: str) -> bool:
        return repo_id.split("/")[0] in {self.name, *self.orgs}


@dataclass
class Answer:
    body: bytes | dict | list = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None, **more: str):
        headers = {"X-Error-Message": message, **(headers or {}), **({"X-Error-Code": code} if code else {})}
        self.answer = Answer({"error": message, **more}, status, headers)


@dataclass
class Call:
    """A request that is being answered: what the route matched in its path, what it asks, and with which token."""

    hub: "HubServer"
    record: "Request"
    groups: tuple[str, ...]
    query: dict[str, str]
    token: str
    range: str | None

    @property
    def user(self) -> User | None:
        return self.hub.users.get(self.token)

    def json(self) -> dict:
        return json.loads(self.record.body)

    def readable(self) -> Repo:
        repo = self.hub.repos.get(self.groups[0])
        if repo is None or (repo.private and not (self.user and self.user.belongs_to(repo.id))):
            message = "Repository not found" if self.user else "Invalid username or password."
            raise Refusal(404 if self.user else 401, message, "RepoNotFound")
        return repo

    def writer_of(self, repo_id: str) -> User:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if not (self.user.can_write and self.user.belongs_to(repo_id)):
            raise Refusal(403, f"You don't have the rights to write to {repo_id}")
        return self.user

    def writable(self) -> Repo:
        repo = self.readable()
        self.writer_of(repo.id)
        return repo

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        commit = repo.branches.get(revision.removeprefix("refs/heads/")) or repo.history.get(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def require_signature(self) -> None:
        """A signed URL grants by itself and wants no token: S3 refuses one, and so do we."""
        if self.query.get("signature") != self.hub.sign(self.record.path.partition("?")[0]):
            raise Refusal(403, "The signature does not match")
        if self.record.has_authorization:
            raise Refusal(400, "Only one auth mechanism allowed: the URL is signed and a token came with it")

    def signed_repo(self) -> Repo:
        self.require_signature()
        return self.hub.repos[self.groups[0]]

    def xet_repo(self, scope: str) -> Repo:
        repo, granted = self.hub.xet_tokens.get(self.token, (None, ""))
        if repo is None:
            raise Refusal(401, "Invalid xet token")
        if scope == "write" != granted:
            raise Refusal(403, "The xet token is not for writing")
        return repo
