"""What our hub double answers: a function for each endpoint, and the table of which request goes to which."""

import base64
import hashlib
import json
import re
import secrets
import time
from fnmatch import fnmatch
from urllib.parse import parse_qs

from tests.hub_repos import Answer, Blob, Call, Commit, Refusal, Repo

LFS_ABOVE = 10 * 2**20
GIT_FILES = (".gitattributes", ".gitignore")


def whoami(call: Call) -> dict:
    if call.user is None:
        raise Refusal(401, "Invalid username or password.")
    role = "write" if call.user.can_write else "read"
    return {
        "type": "user",
        "name": call.user.name,
        "fullname": call.user.name,
        "isPro": False,
        "orgs": [{"type": "org", "name": org, "fullname": org, "roleInOrg": role} for org in call.user.orgs],
        "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
    }


def validate_yaml(call: Call) -> dict:
    licence = re.search(r"^license: (.*)$", call.json()["content"], re.MULTILINE)
    if licence and licence[1] not in ("apache-2.0", "mit", "other"):
        raise Refusal(400, '"license" must be one of [apache-2.0, mit, other]')
    return {"errors": [], "warnings": []}


def _named_repo(call: Call) -> str:
    if call.user is None:
        raise Refusal(401, "Invalid username or password.")
    asked = call.json()
    if asked.get("type") not in (None, "model", "space"):
        raise Refusal(400, "This hub holds models and Spaces only")
    repo_id = f"{asked.get('organization') or call.user.name}/{asked['name']}"
    call.writer_of(repo_id)
    return repo_id


def create(call: Call) -> dict:
    repo_id, url = _named_repo(call), call.hub.endpoint
    if repo_id in call.hub.repos:
        raise Refusal(409, "You already created this model repo", url=f"{url}/{repo_id}")
    call.hub.repos[repo_id] = Repo(repo_id, _is_private(call.json(), False), call.user.name)
    return {"url": f"{url}/{repo_id}", "name": repo_id, "private": call.hub.repos[repo_id].private}


def delete(call: Call) -> dict:
    if call.hub.repos.pop(_named_repo(call), None) is None:
        raise Refusal(404, "Repository not found", "RepoNotFound")
    return {}


def _is_private(asked: dict, otherwise: bool) -> bool:
    return asked["visibility"] == "private" if "visibility" in asked else asked.get("private", otherwise)


def settings(call: Call) -> dict:
    repo = call.writable()
    repo.private = _is_private(call.json(), repo.private)
    repo.gated = call.json().get("gated", repo.gated)
    return {"private": repo.private, "gated": repo.gated}


def model_info(call: Call) -> dict:
    repo = call.readable()
    commit = call.commit_of(repo, call.groups[1] or "main")
    return {
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.id,
        "createdAt": repo.commits("main")[0].date,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [{"rfilename": path} for path in sorted(commit.files)],
    }


def auth_check(call: Call) -> dict:
    call.writable()
    return {}


def refs(call: Call) -> dict:
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit.id}
        for name, commit in call.readable().branches.items()
    ]
    return {"branches": branches, "tags": [], "converts": []}


def list_commits(call: Call) -> list:
    repo = call.readable()
    call.commit_of(repo, call.groups[1])
    return [
        {"id": commit.id, "title": commit.message, "message": "", "date": commit.date, "authors": []}
        for commit in reversed(repo.commits(call.groups[1]))
    ]


def _entries(commit: Commit) -> dict[str, dict]:
    """Every file and every folder, by its path."""
    entries = {path: blob.listed_as(path) for path, blob in commit.files.items()}
    for path in commit.files:
        parts = path.split("/")[:-1]
        for folder in ("/".join(parts[: i + 1]) for i in range(len(parts))):
            oid = hashlib.sha1(f"{commit.id} {folder}".encode()).hexdigest()
            entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
    return dict(sorted(entries.items()))


def tree(call: Call) -> list:
    entries = _entries(call.commit_of(call.readable(), call.groups[1]))
    folder = call.groups[2]
    if folder and entries.get(folder, {}).get("type") != "directory":
        raise Refusal(404, f"{folder} does not exist on this revision", "EntryNotFound")
    start = f"{folder}/" if folder else ""
    recursive = call.query.get("recursive", "").lower() in ("true", "1")
    return [
        entry
        for path, entry in entries.items()
        if path.startswith(start) and (recursive or "/" not in path[len(start) :])
    ]


def paths_info(call: Call) -> list:
    entries = _entries(call.commit_of(call.readable(), call.groups[1]))
    return [entries[path] for path in parse_qs(call.record.body.decode())["paths"] if path in entries]


def create_branch(call: Call) -> dict:
    repo = call.writable()
    if call.groups[1] in repo.branches:
        raise Refusal(409, f"Reference already exists: {call.groups[1]}")
    repo.branches[call.groups[1]] = call.commit_of(repo, call.json().get("startingPoint", "main"))
    return {}


def _matches(path: str, patterns: list[str]) -> bool:
    return any(
        fnmatch(path, pattern) or fnmatch(path.split("/")[-1], pattern) or path.startswith(f"{pattern.rstrip('/')}/")
        for pattern in patterns
    )


def preupload(call: Call) -> dict:
    repo = call.writable()
    files = call.commit_of(repo, call.groups[1]).files
    attributes, hosted = (files[name].read().decode() if name in files else "" for name in GIT_FILES)
    large = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
    ignored = [line for line in call.json().get("gitIgnore", hosted).splitlines() if line and line[0] != "#"]
    answers = []
    for asked in call.json()["files"]:
        path = asked["path"]
        mode = "lfs" if asked["size"] > LFS_ABOVE or _matches(path, large) else "regular"
        answer = {"path": path, "uploadMode": mode, "shouldIgnore": _matches(path, ignored)}
        if path in files:
            answer["oid"] = files[path].sha256 if files[path].lfs else files[path].oid
        answers.append(answer)
    return {"files": answers}


def lfs_batch(call: Call) -> dict:
    repo, hub = call.writable(), call.hub
    objects = []
    for asked in call.json()["objects"]:
        oid, size = asked["oid"], asked["size"]
        objects.append({"oid": oid, "size": size, "authenticated": True})
        if oid in repo.objects:
            continue
        upload = {"href": hub.signed(f"/{repo.id}/upload/{oid}")}
        if size > hub.multipart_above:
            parts = range(1, -(-size // hub.part_size) + 1)
            upload["href"] = hub.signed(f"/api/complete/{repo.id}/{oid}", hub.endpoint)
            upload["header"] = {str(part): hub.signed(f"/{repo.id}/part/{oid}/{part}") for part in parts}
            upload["header"]["chunk_size"] = str(hub.part_size)
        verify = {"href": f"{hub.endpoint}/{repo.id}.git/info/lfs/objects/verify"}
        objects[-1]["actions"] = {"upload": upload, "verify": verify}
    return {"transfer": "basic", "objects": objects}


def _store(repo: Repo, oid: str, content: bytes) -> None:
    blob = Blob(content, lfs=True)
    if blob.sha256 != oid:
        raise Refusal(400, f"The bytes have sha256 {blob.sha256} and were to have {oid}")
    repo.objects[oid] = blob


def put_object(call: Call) -> Answer:
    _store(call.signed_repo(), call.groups[1], call.record.body)
    return Answer()


def put_part(call: Call) -> Answer:
    repo, body = call.signed_repo(), call.record.body
    call.hub.parts.setdefault((repo.id, call.groups[1]), {})[int(call.groups[2])] = body
    return Answer(headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})


def complete_parts(call: Call) -> dict:
    repo, oid = call.signed_repo(), call.groups[1]
    parts = call.hub.parts.get((repo.id, oid), {})
    for named in call.json()["parts"]:
        if named["etag"] != f'"{hashlib.md5(parts.get(named["partNumber"], b"")).hexdigest()}"':
            raise Refusal(400, f"Part {named['partNumber']} was not uploaded as it is named")
    call.record.assembled = b"".join(parts[named["partNumber"]] for named in call.json()["parts"])
    _store(repo, oid, call.record.assembled)
    del call.hub.parts[repo.id, oid]
    return {}


def verify(call: Call) -> dict:
    blob = call.writable().objects.get(call.json()["oid"])
    if blob is None or blob.size != call.json()["size"]:
        raise Refusal(422, "The object was not uploaded, or has another size")
    return {}


def commit(call: Call) -> dict:
    """One commit of all that the lines of the body say, or none."""
    repo, branch = call.writable(), call.groups[1].removeprefix("refs/heads/")
    head = call.commit_of(repo, branch)
    if branch not in repo.branches:
        raise Refusal(400, "One commits to a branch, not to a commit")
    files, summary = dict(head.files), ""
    for line in call.record.body.splitlines():
        key, value = json.loads(line)["key"], json.loads(line)["value"]
        if key == "header":
            summary = value["summary"]
            if value.get("parentCommit", head.id) != head.id:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"], validate=True), lfs=False)
        elif key == "lfsFile":
            blob = repo.objects.get(value["oid"])
            if blob is None or value.get("size", blob.size) != blob.size:
                raise Refusal(400, f"LFS pointer of {value['path']} points to an object that was never uploaded")
            files[value["path"]] = blob
        elif key in ("deletedFile", "deletedFolder"):
            folder = f"{value['path'].rstrip('/')}/" if key == "deletedFolder" else None
            gone = [path for path in files if (path.startswith(folder) if folder else path == value["path"])]
            if not gone:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            files = {path: blob for path, blob in files.items() if path not in gone}
        else:
            raise Refusal(400, f"This hub does not know the operation {key}")
    made = repo.add_commit(branch, summary, files, call.user.name)
    url = f"{call.hub.endpoint}/{repo.id}/commit/{made.id}"
    return {"success": True, "commitOid": made.id, "commitUrl": url, "hookOutput": ""}


def resolve(call: Call) -> Answer:
    repo = call.readable()
    commit, path = call.commit_of(repo, call.groups[1]), call.groups[2]
    headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
    if repo.gated and not (call.user and call.user.belongs_to(repo.id)):
        raise Refusal(403 if call.user else 401, f"Access to model {repo.id} is restricted", "GatedRepo", headers)
    if path not in commit.files:
        raise Refusal(404, "Entry not found", "EntryNotFound", headers)
    blob = commit.files[path]
    if not blob.lfs:
        return Answer(blob.read(), 200, {**headers, "ETag": f'"{blob.oid}"'})
    headers |= {"ETag": f'"{blob.sha256}"', "X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
    headers["Location"] = call.hub.signed(f"/{repo.id}/object/{blob.sha256}")
    if blob.xet_hash:
        token_url = f"{call.hub.endpoint}/api/models/{repo.id}/xet-read-token/{commit.id}"
        headers |= {"X-Xet-Hash": blob.xet_hash, "Link": f'<{token_url}>; rel="xet-auth"'}
    return Answer(b"", 302, headers)


def get_object(call: Call) -> Answer:
    return Answer(call.signed_repo().objects[call.groups[1]].read(), 200, {"Accept-Ranges": "bytes"})


def _xet_token(call: Call, repo: Repo, scope: str) -> Answer:
    call.commit_of(repo, call.groups[1])
    token, expires = f"xet_{secrets.token_hex(16)}", int(time.time()) + 3600
    call.hub.xet_tokens[token] = (repo, scope)
    headers = {"X-Xet-Cas-Url": call.hub.storage, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    return Answer({"casUrl": call.hub.storage, "accessToken": token, "exp": expires}, 200, headers)


def xet_write_token(call: Call) -> Answer:
    return _xet_token(call, call.writable(), "write")


def xet_read_token(call: Call) -> Answer:
    return _xet_token(call, call.readable(), "read")


def put_xorb(call: Call) -> dict:
    call.xet_repo("write")
    return {"was_inserted": call.hub.xet.put_xorb(call.groups[0], call.record.body)}


def put_shard(call: Call) -> dict:
    """From here on the files of the shard can be committed in the repo of the token."""
    repo = call.xet_repo("write")
    for file in call.hub.xet.put_shard(call.record.body):
        repo.objects[file.sha256] = Blob(file, lfs=True)
    return {"result": 1} if call.groups[0] == "1" else {"type": "result"}


def reconstruction(call: Call) -> dict:
    call.xet_repo("read")
    file = call.hub.xet.files.get(call.groups[0])
    if file is None:
        raise Refusal(404, "No such file")
    first, end = byte_range(call.range, file.size)
    return call.hub.xet.reconstruction(file, first, end, lambda xorb: call.hub.signed(f"/xorb/{xorb}"))


def get_xorb(call: Call) -> Answer:
    call.require_signature()
    return Answer(call.hub.xet.xorbs[call.groups[0]].packed, 200, {"Accept-Ranges": "bytes"})


def byte_range(header: str | None, size: int) -> tuple[int, int]:
    """The bytes that a Range header asks for, the end not included."""
    if header is None:
        return 0, size
    first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", header).groups()
    if not first:
        return max(size - int(last), 0), size
    if int(first) >= size:
        raise Refusal(416, "The range begins past the end", headers={"Content-Range": f"bytes */{size}"})
    return int(first), min(int(last) + 1, size) if last else size


REPO, MODEL, REV = r"/([^/]+/[^/]+)", r"/api/(?:models|spaces)/([^/]+/[^/]+)", r"/([^/]+)"
# Method, path, the kind that a fault names, who answers. HEAD is answered as GET, without the body.
HUB_ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami", whoami),
    ("POST", r"/api/validate-yaml", "validate_yaml", validate_yaml),
    ("POST", r"/api/repos/create", "create", create),
    ("DELETE", r"/api/repos/delete", "delete", delete),
    ("GET", rf"{MODEL}(?:/revision{REV})?", "info", model_info),
    ("PUT", rf"{MODEL}/settings", "settings", settings),
    ("GET", rf"{MODEL}/auth-check/write", "auth_check", auth_check),
    ("GET", rf"{MODEL}/refs", "refs", refs),
    ("GET", rf"{MODEL}/commits{REV}", "commits", list_commits),
    ("GET", rf"{MODEL}/tree{REV}(?:/(.+))?", "tree", tree),
    ("POST", rf"{MODEL}/paths-info{REV}", "paths_info", paths_info),
    ("POST", rf"{MODEL}/branch{REV}", "branch", create_branch),
    ("POST", rf"{MODEL}/preupload{REV}", "preupload", preupload),
    ("POST", rf"{REPO}\.git/info/lfs/objects/batch", "lfs_batch", lfs_batch),
    ("POST", rf"{REPO}\.git/info/lfs/objects/verify", "verify", verify),
    ("POST", rf"/api/complete{REPO}/(\w+)", "lfs_complete", complete_parts),
    ("POST", rf"{MODEL}/commit{REV}", "commit", commit),
    ("GET", rf"{MODEL}/xet-write-token{REV}", "xet_token", xet_write_token),
    ("GET", rf"{MODEL}/xet-read-token{REV}", "xet_token", xet_read_token),
    ("GET", rf"{REPO}/resolve{REV}/(.+)", "resolve", resolve),
]
# hf_xet tries `/v1/xorb-grants` and `/v1/chunks` first; our 404 sends it on.
STORAGE_ROUTES = [
    ("PUT", rf"{REPO}/upload/(\w+)", "lfs_put", put_object),
    ("PUT", rf"{REPO}/part/(\w+)/(\d+)", "lfs_put", put_part),
    ("GET", rf"{REPO}/object/(\w+)", "download", get_object),
    ("POST", r"/v1/xorbs/default/(\w+)", "xet_xorb", put_xorb),
    ("POST", r"/v([12])/shards", "xet_shard", put_shard),
    ("GET", r"/v2/reconstructions/(\w+)", "xet_reconstruction", reconstruction),
    ("GET", r"/xorb/(\w+)", "download", get_xorb),
]
KINDS = {kind for _, _, kind, _ in HUB_ROUTES + STORAGE_ROUTES} | {"any"}
