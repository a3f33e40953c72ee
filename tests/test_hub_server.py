"""The hub double against the real client: huggingface_hub in a process of its own, by LFS and by Xet."""

import json
import os
import random
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.hub_server import HubServer
from tests.hub_xet import unpack_lz4

pytestmark = pytest.mark.hub

START = """
import sys
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
api = HfApi()

def status(call, *args, **options):
    try:
        call(*args, **options)
    except HfHubHTTPError as error:
        return f"{error.response.status_code} {type(error).__name__}"
    return "200"

"""


@pytest.fixture
def server():
    with HubServer() as server:
        server.add_user("alice", token="hf_alice", orgs=["org"])
        server.add_user("alice", token="hf_reader", can_write=False)
        server.add_user("bob", token="hf_bob")
        yield server


@pytest.fixture(params=[False, True], ids=["lfs", "xet"])
def xet(request) -> bool:
    return request.param


@pytest.fixture
def start(server, tmp_path_factory):
    """Starts a process that runs Python code with the real client, from an empty cache."""
    started = []

    def start(code: str, *args: object, token: str | None = "hf_alice", xet: bool = False) -> subprocess.Popen:
        home = tmp_path_factory.mktemp("home")
        fast = {"HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment = {**os.environ, **server.environment(home, token, xet), **fast}
        command = [sys.executable, "-c", START + code, *map(str, args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, cwd=home, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def client(start):
    """Runs such code and gives what it printed."""

    def run(code: str, *args: object, token: str | None = "hf_alice", xet: bool = False) -> str:
        process = start(code, *args, token=token, xet=xet)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out.strip()

    return run


@pytest.fixture
def folder(tmp_path) -> Path:
    """What a training run leaves, in small: text, 12 MB that do not compress, weights and text that do."""
    chance = random.Random(0)
    weights = b"".join(struct.pack("<f", chance.gauss(0, 0.02)) for _ in range(60_000))
    files = {
        "README.md": b"---\nlicense: apache-2.0\n---\nA card.\n",
        "logs/notes.txt": "épreuve\n".encode(),
        "optimizer.dat": chance.randbytes(12 * 2**20),
        "model.safetensors": weights,
        "words.bin": b"".join(b"%d words, and the same words again. " % number for number in range(9_000)),
    }
    for name, content in files.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


UPLOAD = """
print(api.create_repo("org/model", private=True))
print(api.upload_folder(repo_id="org/model", folder_path=sys.argv[1], commit_message="All of it").oid)
"""
DOWNLOAD = """
import shutil
shutil.copytree(snapshot_download("org/model"), sys.argv[1])
shutil.copy(hf_hub_download("org/model", "model.safetensors", force_download=True), sys.argv[2])
print(sorted(api.list_repo_files("org/model")))
print(api.file_exists("org/model", "logs/notes.txt"), api.file_exists("org/model", "logs/other.txt"))
"""


def test_a_folder_goes_there_and_back(server, client, folder, tmp_path, xet):
    printed = client(UPLOAD, folder, xet=xet).splitlines()
    repo = server.repos["org/model"]
    first, second = repo.commits("main")
    assert printed == [f"{server.endpoint}/org/model", second.id]
    assert repo.private
    assert (first.message, first.parent, list(first.files)) == ("initial commit", None, [".gitattributes"])
    assert (second.message, second.parent) == ("All of it", first.id)
    files = contents(folder)
    assert {path: second.read(path) for path in files} == files
    large = {"model.safetensors", "optimizer.dat", "words.bin"}
    assert {path for path, blob in second.files.items() if blob.lfs} == large
    assert {path for path, blob in second.files.items() if blob.xet_hash} == (large if xet else set())
    assert bool(server.requests_of("xet_xorb")) == xet
    assert bool(server.requests_of("lfs_put")) != xet
    # Every way to pack a chunk came by, so reading them all back has tried our unpacking.
    schemes = {scheme for xorb in server.xet.xorbs.values() for _, _, scheme, _ in xorb.chunks}
    assert schemes == ({0, 1, 2} if xet else set())

    for mode in (xet, not xet):  # what went one way comes back either way
        copy, one = tmp_path / f"copy {mode}", tmp_path / f"one {mode}"
        listed, exist = client(DOWNLOAD, copy, one, xet=mode).splitlines()
        assert listed == str(sorted([".gitattributes", *files]))
        assert exist == "True False"
        back = contents(copy)
        assert back.pop(".gitattributes") == first.read(".gitattributes")
        assert back == files
        assert one.read_bytes() == files["model.safetensors"]

    stored = [request for request in server.requests if request.origin == "storage"]
    assert stored
    assert all(request.user is None for request in stored), "the hub's token went to the storage"
    assert not any(request.has_authorization for request in stored if request.kind in ("lfs_put", "download"))


def test_one_file_and_again(server, client, xet):
    """What has not changed makes no commit; what a repo holds is not sent to it again."""
    code = """
for repo in ("alice/one", "alice/two"):
    api.create_repo(repo)
    for content in (b"first" * 20_000, b"first" * 20_000, b"second" * 20_000):
        api.upload_file(repo_id=repo, path_in_repo="a/b.bin", path_or_fileobj=content)
"""
    client(code, xet=xet)
    for name in ("alice/one", "alice/two"):
        _, first, second = server.repos[name].commits()
        assert first.read("a/b.bin") == b"first" * 20_000
        assert second.read("a/b.bin") == b"second" * 20_000
    assert len(server.requests_of("lfs_put")) == (0 if xet else 4)


def test_a_large_file_in_parts(server, client, folder):
    server.multipart_above, server.part_size = 5 * 2**20, 5 * 2**20
    client(UPLOAD, folder)
    assert server.repos["org/model"].commits()[-1].read("optimizer.dat") == (folder / "optimizer.dat").read_bytes()
    sizes = [request.body_size for request in server.requests_of("lfs_put") if "/part/" in request.path]
    assert sizes == [5 * 2**20, 5 * 2**20, 2 * 2**20]
    assert [request.status for request in server.requests_of("lfs_complete")] == [200]


def test_branches_and_history(server, client, xet):
    code = """
api.create_repo("alice/model")
for number in range(3):
    api.upload_file(repo_id="alice/model", path_in_repo=f"{number}.txt", path_or_fileobj=b"%d" % number,
                    commit_message=f"number {number}")
api.create_branch("alice/model", branch="side")
print(status(api.create_branch, "alice/model", branch="side"))
api.upload_file(repo_id="alice/model", path_in_repo="w.bin", path_or_fileobj=b"side", revision="side")
operations = [CommitOperationDelete("0.txt"), CommitOperationAdd("d/e.txt", b"e")]
api.create_commit("alice/model", operations, commit_message="two things")
print(sorted(branch.name for branch in api.list_repo_refs("alice/model").branches))
print(api.model_info("alice/model", revision="side").sha)
print([commit.title for commit in api.list_repo_commits("alice/model")][0])
print([entry.path for entry in api.list_repo_tree("alice/model")])
print([entry.path for entry in api.get_paths_info("alice/model", ["d", "1.txt", "none"])])
print(status(api.model_info, "alice/model", revision="none"))
print(status(hf_hub_download, "alice/model", "none.txt"))
"""
    printed = client(code, xet=xet).splitlines()
    repo = server.repos["alice/model"]
    assert printed == [
        "409 HfHubHTTPError",
        "['main', 'side']",
        repo.branches["side"].id,
        "two things",
        "['.gitattributes', '1.txt', '2.txt', 'd']",
        "['d', '1.txt']",
        "404 RevisionNotFoundError",
        "404 RemoteEntryNotFoundError",
    ]
    main = repo.commits("main")
    assert [commit.message for commit in main[1:]] == ["number 0", "number 1", "number 2", "two things"]
    assert [commit.parent for commit in main] == [None, *(commit.id for commit in main[:-1])]
    assert sorted(main[-1].files) == [".gitattributes", "1.txt", "2.txt", "d/e.txt"]
    assert [commit.id for commit in repo.commits("side")[:-1]] == [commit.id for commit in main[:-1]]
    assert repo.commits("side")[-1].read("w.bin") == b"side"


def test_who_may_do_what(server, client):
    client('api.create_repo("alice/open"); api.create_repo("alice/closed", private=True)')
    code = """
print(status(api.whoami), status(api.create_repo, "alice/new"), status(api.model_info, "alice/open"),
      status(api.model_info, "alice/closed"),
      status(api.upload_file, repo_id="alice/open", path_in_repo="a.bin", path_or_fileobj=b"a"), sep=", ")
"""
    missing, forbidden, bad = "RepositoryNotFoundError", "403 HfHubHTTPError", "401 HfHubHTTPError"
    assert client(code, token="hf_reader") == f"200, {forbidden}, 200, 200, {forbidden}"
    assert client(code, token="hf_bob") == f"200, {forbidden}, 200, 404 {missing}, {forbidden}"
    assert client(code, token="hf_wrong") == ", ".join([bad] * 5)
    anonymous = code.replace("status(api.whoami)", "'-'")
    assert client(anonymous, token=None) == f"-, {bad}, 200, 401 {missing}, {bad}"
    assert set(server.repos) == {"alice/open", "alice/closed"}
    assert len(server.repos["alice/open"].commits()) == 1
    client('api.update_repo_settings("alice/closed", visibility="public")')
    assert client('print(api.model_info("alice/closed").private)', token="hf_bob") == "False"
    assert client('print(status(api.create_repo, "alice/open"))') == "409 HfHubHTTPError"
    server.revoke("hf_alice")
    assert client(code) == ", ".join([bad] * 5)


PUSH = """
api.create_repo("alice/model", exist_ok=True)
print(status(api.upload_file, repo_id="alice/model", path_in_repo="w.bin", path_or_fileobj=b"weights" * 1000))
"""


def test_a_refused_commit_surfaces(server, client, xet):
    server.faults.add("commit", nth=1, status=500)
    assert client(PUSH, xet=xet) == "500 HfHubHTTPError"
    assert len(server.repos["alice/model"].commits()) == 1
    assert client(PUSH, xet=xet) == "200"  # the second call of the kind
    assert len(server.repos["alice/model"].commits()) == 2


@pytest.mark.parametrize("after", [False, True])
def test_a_dropped_connection_surfaces(server, start, xet, after):
    server.faults.add("commit", drop=True, after=after)
    process = start(PUSH, xet=xet)
    assert "Server disconnected" in process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert len(server.repos["alice/model"].commits()) == (2 if after else 1)
    assert [request.status for request in server.requests_of("commit")] == [0]


def test_a_token_that_is_revoked_on_the_way(server, client, xet):
    server.faults.add("preupload", run=lambda: server.revoke("hf_alice"), after=True)
    if xet:
        with pytest.raises(AssertionError, match="401"):  # hf_xet has errors of its own
            client(PUSH, xet=True)
    else:
        assert client(PUSH) == "401 HfHubHTTPError"
    assert len(server.repos["alice/model"].commits()) == 1


@pytest.mark.parametrize("kind", ["xet_token", "xet_xorb", "xet_shard"])
def test_faults_of_xet(server, client, kind):
    server.faults.add(kind, nth=range(1, 3), status=503)  # two are tried again
    assert client(PUSH, xet=True) == "200"
    assert [request.status for request in server.requests_of(kind)][:3] == [503, 503, 200]
    server.faults.add(kind, status=400)  # this one is not
    with pytest.raises(AssertionError, match="400"):
        client(PUSH.replace('b"weights"', 'b"other"'), xet=True)
    assert len(server.repos["alice/model"].commits()) == 2


def test_a_request_that_hangs(server, start, client):
    client('api.create_repo("alice/model")')
    server.faults.add("commit", hang=True)
    process = start(PUSH)
    server.wait_for("commit")
    assert process.poll() is None
    assert len(server.repos["alice/model"].commits()) == 1
    server.release()
    assert process.communicate(timeout=120)[0] == "200\n"
    assert len(server.repos["alice/model"].commits()) == 2

    process = start(PUSH.replace("weights", "other"))
    server.wait_for("commit", 2)
    server.close()
    process.communicate(timeout=120)
    assert process.returncode == 1
    assert len(server.repos["alice/model"].commits()) == 2


def test_bytes_are_found_however_they_travel(server, client, folder, xet):
    secret = b"the secret of this house"
    (folder / ".env").write_bytes(secret)
    # Here the secret is cut in two by the parts of LFS, and packed by Xet.
    same = b"much the same. " * 4000
    (folder / "training_args.bin").write_bytes(same + secret + same)
    server.multipart_above = server.part_size = len(same) + 5
    assert server.bytes_seen(secret) == []
    client(UPLOAD, folder, xet=xet)
    commit = server.repos["org/model"].commits()[-1]
    assert [path for path, blob in commit.files.items() if secret in blob.read()] == [".env", "training_args.bin"]
    assert len(server.bytes_seen(secret)) == 3
    wide = same[-50:] + secret + same[:50]
    packed = [request for request in server.requests if request.holds(wide)]
    assert [request.kind for request in packed] == ["xet_xorb" if xet else "lfs_complete"]
    assert wide not in packed[0].body
    assert {request.kind for request in server.requests if request.holds(secret)} == {
        "preupload",
        "commit",
        packed[0].kind,
    }
    assert server.bytes_seen(b"hf_alice") == []


def test_a_commit_is_all_or_nothing(server, client):
    client('api.create_repo("alice/model")')
    lines = [
        {"key": "header", "value": {"summary": "half of it"}},
        {"key": "file", "value": {"path": "a.txt", "content": "YQ==", "encoding": "base64"}},
        {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}},
    ]
    body = "\n".join(json.dumps(line) for line in lines).encode()
    url = f"{server.endpoint}/api/models/alice/model/commit/main"
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(url, body, {"Authorization": "Bearer hf_alice"}))
    assert len(server.repos["alice/model"].commits()) == 1


def test_the_storage_takes_no_token_and_no_other_url(server, client, folder):
    client(UPLOAD, folder)
    oid = server.repos["org/model"].commits()[-1].files["words.bin"].sha256
    url = server.signed(f"/org/model/object/{oid}")
    assert urllib.request.urlopen(url).read() == (folder / "words.bin").read_bytes()
    part = urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=5-8"}))
    assert (part.status, part.read()) == (206, (folder / "words.bin").read_bytes()[5:9])
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": "Bearer hf_alice"}))
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(url[:-1])


def test_a_fault_of_no_kind_is_an_error(server):
    with pytest.raises(ValueError, match="no requests are of kind 'comit'"):
        server.faults.add("comit", status=500)


def test_unpacking_lz4():
    """By hand: `abc` and a match of 20 from 3 back, which reads what it writes, then `xyz`; and a block as it is."""
    header = bytes.fromhex("04224d18 60 40 82")
    block = b"\x3fabc\x03\x00\x01" + b"\x30xyz"
    stored = (0x80000000 | 5).to_bytes(4, "little") + b"plain"
    frame = header + len(block).to_bytes(4, "little") + block + stored + bytes(4)
    assert unpack_lz4(frame) == b"abcabcabcabcabcabcabcab" + b"xyz" + b"plain"
