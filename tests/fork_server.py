"""Forks processes that have the libraries imported already: python -m tests.fork_server SOCKET (see tests/processes.py)

It imports what the project imports of others, nothing of the project, and starts no thread. A forked process then runs its
command as Python would have done.
"""

import ast
import gc
import importlib.util
import json
import os
import selectors
import signal
import socket
import sys
import types
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = ("data", "modeling", "scripts", "train_hf", "tests")
# A package that starts a thread when it is imported, which a forked process would wait for in vain.
NOT_IMPORTED = (*OURS, "onnxruntime")


def import_libraries() -> None:
    """All that the project's files import of others, at their head or in a function."""
    for path in [ROOT / "train_hf.py", *(path for name in OURS[:3] for path in (ROOT / name).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            with suppress(ImportError):
                if isinstance(node, ast.Import):
                    for alias in node.names:
                        if alias.name.split(".")[0] not in NOT_IMPORTED:
                            importlib.import_module(alias.name)
                elif (
                    isinstance(node, ast.ImportFrom)
                    and not node.level
                    and node.module.split(".")[0] not in NOT_IMPORTED
                ):
                    __import__(node.module, fromlist=[alias.name for alias in node.names])


def serve(requests: socket.socket) -> dict:
    """Fork for each request until the other side ends. Returns, in a forked process only, what it is to run."""
    waiting = selectors.DefaultSelector()
    waiting.register(requests, selectors.EVENT_READ)
    running: dict[int, tuple[int, int]] = {}
    while True:
        for key, _ in waiting.select():
            if key.fileobj is not requests:
                pid, status = running.pop(key.fd)
                waiting.unregister(key.fd)
                os.close(key.fd)
                _, ended = os.waitpid(pid, 0)
                with suppress(BrokenPipeError):
                    os.write(status, b"%d" % os.waitstatus_to_exitcode(ended))
                os.close(status)
                continue
            message, files, _, _ = socket.recv_fds(requests, 1, 5)
            if not message:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            pid = os.fork()
            if pid == 0:
                waiting.close()
                requests.close()
                for fd, status in running.items():
                    os.close(fd)
                    os.close(status[1])
                return take_over(files)
            request, status, *streams = files
            for fd in {request, *streams}:
                os.close(fd)
            running[os.pidfd_open(pid)] = (pid, status)
            os.write(status, b"%8d" % pid)
            waiting.register(list(running)[-1], selectors.EVENT_READ)


def take_over(files: list[int]) -> dict:
    """Make this process one of its own: streams, folder, environment."""
    request_file, status, *streams = files
    os.lseek(request_file, 0, os.SEEK_SET)
    with open(request_file, "rb") as file:
        request = json.load(file)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for fd in {status, *streams}:
        os.close(fd)
    if request["new_session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    return request


def run(argv: list[str]) -> None:
    """The command `python …` in this process."""
    main = types.ModuleType("__main__")
    option, word, *_ = [*argv[1:], ""]
    if option == "-m":
        spec = importlib.util.find_spec(word)
        if spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{word}.__main__")
        main.__spec__, main.__file__, main.__package__ = spec, spec.origin, spec.parent
        code, rest = spec.loader.get_code(spec.name), argv[3:]
    elif option == "-c":
        sys.path[0] = ""
        main.__file__, code, rest = "-c", compile(word, "<string>", "exec"), argv[3:]
    else:
        main.__file__ = option
        sys.path[0] = str(Path(option).resolve().parent)
        code, rest = compile(Path(option).read_bytes(), option, "exec"), argv[2:]
    sys.argv = [main.__file__, *rest]
    sys.orig_argv = argv
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


if __name__ == "__main__":
    channel = socket.socket(fileno=int(sys.argv[1]))
    import_libraries()
    gc.freeze()  # a collection would copy every page of what has been imported
    run(serve(channel)["argv"])
