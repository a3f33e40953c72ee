"""Starts the commands under test: forked off a server that has imported the libraries, or cold.

An import of torch, transformers, datasets and scikit-learn takes 6 s, a tiny training takes 1 s. `start` and `run` take what
`subprocess.Popen` and `subprocess.run` take. A command of this Python (`-m MODULE`, `-c CODE` or a file) is forked off
tests/fork_server.py, unless `cold` says otherwise or its environment differs in a variable that a library reads when it
is imported. The process that results has its own argv, environment, folder, streams, exit status and signals.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
# What a library reads when it is imported. Processes with other values of these have a server of their own.
READ_AT_IMPORT = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_", "OMP_", "MKL_", "OPENBLAS_", "PYTHON")
NOT_AT_IMPORT = ("HF_TOKEN",)


class Server:
    """The server of one environment, started when it is first needed; it ends at the latest with this process."""

    def __init__(self, environment: dict[str, str]):
        self.socket, theirs = socket.socketpair()
        self.lock = threading.Lock()
        command = [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], start_new_session=True
        )
        theirs.close()

    def fork(self, request: dict[str, Any], streams: list[int]) -> tuple[int, int]:
        """The process id, and a pipe that tells the exit status."""
        status, theirs = os.pipe()
        with tempfile.TemporaryFile() as file:
            file.write(json.dumps(request).encode())
            file.flush()
            with self.lock:
                socket.send_fds(self.socket, [b"."], [file.fileno(), theirs, *streams])
            os.close(theirs)
        return int(os.read(status, 8)), status

    def close(self) -> None:
        self.socket.close()
        self.process.wait()


_servers: dict[tuple[tuple[str, str], ...], Server] = {}
_lock = threading.Lock()


def close_servers() -> None:
    while _servers:
        _servers.popitem()[1].close()


def server_for(environment: dict[str, str]) -> Server:
    key = tuple(
        sorted(
            (name, value)
            for name, value in environment.items()
            if name.startswith(READ_AT_IMPORT) and name not in NOT_AT_IMPORT
        )
    )
    with _lock:
        if key not in _servers:
            _servers[key] = Server(environment)
        return _servers[key]


class Forked:
    """A forked process; the part of `subprocess.Popen` that the tests use. A PIPE is a file that is read at the end."""

    def __init__(
        self,
        command: list[str],
        cwd: str | os.PathLike[str] | None = None,
        env: dict[str, str] | None = None,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        text: bool = True,
        start_new_session: bool = False,
    ):
        self.args, self.returncode = command, None
        self._read: dict[str, IO[str]] = {}
        null = os.open(os.devnull, os.O_RDWR)

        def file_of(stream: int | IO[Any] | None, name: str, default: int) -> int:
            if stream is None:
                return default
            if stream == subprocess.PIPE:
                self._read[name] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
                return self._read[name].fileno()
            if stream == subprocess.DEVNULL:
                return null
            return stream if isinstance(stream, int) else stream.fileno()

        streams = [file_of(stdin, "stdin", null), file_of(stdout, "stdout", 1)]
        streams.append(streams[1] if stderr == subprocess.STDOUT else file_of(stderr, "stderr", 2))
        environment = dict(os.environ if env is None else env)
        request = {"argv": [str(word) for word in command], "cwd": str(cwd or os.getcwd()), "env": environment}
        request["new_session"] = start_new_session
        self.pid, self._status = server_for(environment).fork(request, streams)
        os.close(null)

    def poll(self) -> int | None:
        return self.returncode if self.returncode is not None or not self._ends_within(0) else self.wait()

    def _ends_within(self, timeout: float | None) -> bool:
        return bool(select.select([self._status], [], [], timeout)[0])

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not self._ends_within(timeout):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            said = os.read(self._status, 20)
            os.close(self._status)
            assert said, "the fork server has ended"
            self.returncode = int(said)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        self.wait(timeout)
        for file in self._read.values():
            file.seek(0)
        said = {name: file.read() for name, file in self._read.items()}
        return said.get("stdout"), said.get("stderr")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()


def start(command: list[Any], *, cold: bool = False, **how: Any) -> "Forked | subprocess.Popen":
    """As `subprocess.Popen`."""
    words = [str(word) for word in command]
    if cold or words[0] != sys.executable:
        return subprocess.Popen(words, **how)
    return Forked(words, **how)


def run(
    command: list[Any],
    *,
    timeout: float = 300,
    input: str | None = None,
    check: bool = False,
    capture_output: bool = True,
    **how: Any,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`, with the output as text."""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how} if capture_output else how
    with tempfile.TemporaryFile("w+", encoding="utf-8") as given:
        given.write(input or "")
        given.seek(0)
        process = start(command, stdin=given, **how)
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def start_ranks(commands: list[list[Any]], env: dict[str, str] | None = None, **how: Any) -> list[Any]:
    """A process for each rank of one job, without a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    count = str(len(commands))
    processes = []
    for rank, command in enumerate(commands):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        processes.append(start(command, env={**(env or os.environ), **meeting, **place}, **how))
    return processes


def wait_for(folder: Path, pattern: str, process: Any = None, timeout: float = 120) -> None:
    """Until the folder has a file of that name."""
    deadline = time.monotonic() + timeout
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern} in {folder}"
        assert process is None or process.poll() is None, f"the process ended before {pattern} was there"
        time.sleep(0.01)
