"""Our own double of the Hugging Face hub: what huggingface_hub (1.33 and 2.4) asks of it over HTTP, in both transfer modes.

    with HubServer() as server:
        server.add_user("alice", token="hf_alice", orgs=["org"])
        environment = {**os.environ, **server.environment(tmp_path, token="hf_alice", xet=True)}
        subprocess.run([sys.executable, "train_hf.py", ...], env=environment)
        assert server.repos["alice/model"].commits("main")[-1].read("config.json")

Two origins: the hub on 127.0.0.1, and the storage that it sends large files to (signed URLs for LFS, the Xet service) on
127.0.0.2, since huggingface_hub 1.x knows a storage by its host, whatever the port.
Models, and Spaces of small files under other names: no pull requests, tags or datasets.
"""

import base64
import binascii
import hashlib
import json
import re
import secrets
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, unquote, unquote_to_bytes

from tests.hub_api import HUB_ROUTES, KINDS, STORAGE_ROUTES, byte_range
from tests.hub_repos import Answer, Call, Refusal, Repo, User
from tests.hub_xet import XetStore, Xorb


@dataclass
class Request:
    """A request as it came. `user` is who its Authorization header named with a hub token, if anyone."""

    method: str
    path: str
    kind: str
    origin: str  # "hub" or "storage"
    has_authorization: bool
    user: str | None
    body: bytes = field(repr=False)
    status: int | None = None  # None: not answered yet, 0: the connection was dropped
    assembled: bytes = field(default=b"", repr=False)  # what a multipart upload came to

    @property
    def body_size(self) -> int:
        return len(self.body)

    def holds(self, needle: bytes) -> bool:
        """Whether the bytes are in the URL or in the body, packed or not."""
        places = [self.path.encode(), unquote_to_bytes(self.path), self.body, self.assembled]
        for encoded in re.findall(rb'"(?:content|sample)": ?"([A-Za-z0-9+/=]+)"', self.body):
            with suppress(binascii.Error):
                places.append(base64.b64decode(encoded))
        if self.kind == "xet_xorb":
            with suppress(ValueError, IndexError):
                places.append(b"".join(Xorb(self.body).unpacked))
        return any(needle in place for place in places)


@dataclass
class Fault:
    kind: str
    nth: int | Container[int] | None
    status: int | None
    delay: float
    drop: bool
    hang: bool
    run: Callable[[], object] | None
    after: bool
    calls: int = 0

    def strikes(self) -> bool:
        self.calls += 1
        if isinstance(self.nth, int):
            return self.calls == self.nth
        return self.nth is None or self.calls in self.nth


class Faults:
    """What goes wrong, in which calls."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(
        self,
        kind: str,
        nth: int | Container[int] | None = None,
        status: int | None = None,
        delay: float = 0.0,
        drop: bool = False,
        hang: bool = False,
        run: Callable[[], object] | None = None,
        after: bool = False,
    ) -> None:
        """In the nth call of a kind from now on (a number, a container of numbers, None: every call): run `run`, wait
        `delay` seconds, hang until release() or close(), and then drop the connection or answer `status`.
        `after` does so when the request has been carried out, so that only its answer is lost."""
        if kind not in KINDS:
            raise ValueError(f"no requests are of kind {kind!r}: take one of {', '.join(sorted(KINDS))}.")
        with self._lock:
            self._faults.append(Fault(kind, nth, status, delay, drop, hang, run, after))

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def striking(self, kind: str) -> list[Fault]:
        with self._lock:
            return [fault for fault in self._faults if fault.kind in (kind, "any") and fault.strikes()]


class Dropped(Exception):
    """The connection is to be closed without an answer."""


class HubServer:
    """Serves from its making until close(), on this port (0: any). LFS uploads above `multipart_above` bytes go in parts of `part_size`."""

    def __init__(self, port: int = 0, multipart_above: int = 64 * 2**20, part_size: int = 16 * 2**20):
        self.multipart_above, self.part_size = multipart_above, part_size
        self.users: dict[str, User] = {}  # by token
        self.repos: dict[str, Repo] = {}
        self.xet = XetStore()
        self.xet_tokens: dict[str, tuple[Repo, str]] = {}
        self.parts: dict[tuple[str, str], dict[int, bytes]] = {}
        self.faults = Faults()
        self.requests: list[Request] = []
        self.errors: list[str] = []  # our own, not the client's
        self.lock = threading.RLock()  # held while a request is carried out, not while one waits
        self.changed = threading.Condition()  # a request came, hanging ones were released, or we close
        self.releases, self.closed = 0, False
        self._secret = secrets.token_hex()
        self._origins = {name: _Origin(self, name, number) for name, number in (("hub", port), ("storage", 0))}
        self.endpoint, self.storage = (origin.url for origin in self._origins.values())
        for origin in self._origins.values():
            threading.Thread(target=origin.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, exception_type, *_) -> None:
        self.close()
        if self.errors and exception_type is None:
            raise AssertionError("the hub double itself failed:\n" + "\n".join(self.errors))

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        for origin in self._origins.values():
            origin.close()

    def add_user(self, name: str, token: str, orgs: list[str] | tuple[str, ...] = (), can_write: bool = True) -> None:
        """A token of a user's: call again with another token for a second one, read-only say."""
        self.users[token] = User(name, tuple(orgs), can_write)

    def revoke(self, token: str) -> None:
        self.users.pop(token, None)

    def release(self) -> None:
        """Let those requests go on that have come and are to hang."""
        with self.changed:
            self.releases += 1
            self.changed.notify_all()

    def wait_for(self, kind: str, count: int = 1, timeout: float = 60) -> None:
        """Wait until so many requests of a kind have come, answered or not."""
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.requests_of(kind)) >= count, timeout):
                raise TimeoutError(f"waited {timeout} s for {count} requests of kind {kind}: {self.requests}")

    def requests_of(self, kind: str) -> list[Request]:
        return [request for request in list(self.requests) if request.kind == kind]

    def bytes_seen(self, needle: bytes) -> list[str]:
        """The requests in whose URL or body the bytes came: plain, in base64, or packed in a xorb."""
        return [f"{request.method} {request.path}" for request in list(self.requests) if request.holds(needle)]

    def environment(self, home: Path, token: str | None, xet: bool) -> dict[str, str]:
        """What a client needs to talk to us; `home` is to be fresh, for hf_xet remembers what it uploaded."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_TOKEN": token or "",
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,127.0.0.2,localhost",
            "no_proxy": "127.0.0.1,127.0.0.2,localhost",
        }

    def sign(self, path: str) -> str:
        return hashlib.sha256(f"{self._secret} {path}".encode()).hexdigest()

    def signed(self, path: str, base: str | None = None) -> str:
        return f"{base or self.storage}{path}?signature={self.sign(path)}"

    def suffer(self, faults: list[Fault], releases: int) -> Answer | None:
        for fault in faults:
            if fault.run:
                fault.run()
            with self.changed:
                self.changed.wait_for(lambda: self.closed, fault.delay)
                if fault.hang:
                    self.changed.wait_for(lambda: self.closed or self.releases > releases)
                if fault.drop or self.closed:
                    raise Dropped
            if fault.status:
                return Answer({"error": f"as the test wants: {fault.status}"}, fault.status)
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "_Origin"

    def log_message(self, *_) -> None:
        pass

    def answer(self) -> None:
        hub, body = self.server.hub, self._read_body()
        if body is None:  # the client went away in the middle of it
            self.close_connection = True
            return
        kind, endpoint, groups = self.server.route(self.command, self.path.partition("?")[0])
        authorization = self.headers.get("Authorization")
        token = (authorization or "").removeprefix("Bearer ")
        user = hub.users.get(token)
        record = Request(
            self.command, self.path, kind, self.server.name, authorization is not None, user and user.name, body
        )
        call = Call(hub, record, groups, dict(parse_qsl(self.path.partition("?")[2])), token, self.headers.get("Range"))
        faults = hub.faults.striking(kind)
        with hub.changed:
            hub.requests.append(record)
            releases = hub.releases  # a release() counts for it from now on, even before it hangs
            hub.changed.notify_all()
        try:
            answer = hub.suffer([fault for fault in faults if not fault.after], releases)
            if answer is None:
                answer = self._carry_out(call, endpoint)
                answer = hub.suffer([fault for fault in faults if fault.after], releases) or answer
            record.status = answer.status
            self._send(answer, len(hub.requests))
        except Dropped:
            record.status = 0
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def _carry_out(self, call: Call, endpoint: Callable[[Call], Answer | dict | list] | None) -> Answer:
        try:
            if endpoint is None:
                raise Refusal(404, "This hub has no such endpoint")
            # Public things too are refused to a token that is not one.
            if self.server.name == "hub" and call.token and call.user is None:
                raise Refusal(401, "Invalid credentials in Authorization header")
            with call.hub.lock:
                answer = endpoint(call)
            if not isinstance(answer, Answer):
                answer = Answer(answer)
            if call.range and "Accept-Ranges" in answer.headers and answer.status == 200:
                size = len(answer.body)
                first, end = byte_range(call.range, size)
                answer.headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
                answer.body, answer.status = answer.body[first:end], 206
        except Refusal as refusal:
            answer = refusal.answer
        except (ValueError, KeyError) as error:
            call.hub.errors.append(f"{call.record.method} {call.record.path}: {error!r}")
            answer = Answer({"error": f"malformed request: {error!r}"}, 400)
        return answer

    def _read_body(self) -> bytes | None:
        """The whole body, or None where it broke off."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            size = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(size)
            return body if len(body) == size else None
        body = b""
        while size := int(self.rfile.readline().split(b";")[0] or b"-1", 16):
            chunk = self.rfile.read(size) if size > 0 else b""
            if len(chunk) != size:
                return None
            body += chunk
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, answer: Answer, number: int) -> None:
        body, headers = answer.body, {"X-Request-Id": f"request-{number}", **answer.headers}
        if not isinstance(body, bytes):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Origin(ThreadingHTTPServer):
    """One of the two ports."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub: HubServer, name: str, port: int):
        host = "127.0.0.1" if name == "hub" else "127.0.0.2"
        super().__init__((host, port), _Handler)
        self.hub, self.name = hub, name
        self.url = f"http://{host}:{self.server_address[1]}"
        self.connections: set[socket.socket] = set()

    def route(self, method: str, path: str) -> tuple[str, Callable | None, tuple[str, ...]]:
        for route_method, pattern, kind, endpoint in HUB_ROUTES if self.name == "hub" else STORAGE_ROUTES:
            matched = re.fullmatch(pattern, path)
            if matched and ("GET" if method == "HEAD" else method) == route_method:
                return kind, endpoint, tuple(unquote(group or "") for group in matched.groups())
        return "other", None, ()

    def process_request(self, request, client_address) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that went away is no error of ours
            self.hub.errors.append(traceback.format_exc())

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
