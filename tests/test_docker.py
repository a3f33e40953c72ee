"""The Dockerfile agrees with the rest of the repository. .ci/check_dockerfile.py, which downloads gigabytes, executes it."""

import ast
import importlib.util
import json
import re
import sys
from importlib import metadata
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT
from tests.test_docs import check_command


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_dockerfile", ROOT / ".ci" / "check_dockerfile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def instructions(check) -> list[tuple[str, str]]:
    return check.parse((ROOT / "Dockerfile").read_text(encoding="utf-8"))


def all_of(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [rest for instruction, rest in instructions if instruction == name]


def test_parsing_joins_lines_and_leaves_out_comments(check):
    text = '# syntax\nFROM a:1\n\nRUN one \\\n  # between\n  && two # kept\nCMD ["x"]\n'
    assert [(name, rest.split()) for name, rest in check.parse(text)] == [
        ("FROM", ["a:1"]),
        ("RUN", ["one", "&&", "two", "#", "kept"]),
        ("CMD", ['["x"]']),
    ]


def test_what_is_copied_exists_and_nothing_else_is_sent_to_the_builder(instructions):
    sources = {rest.split()[0] for rest in all_of(instructions, "COPY")}
    assert all((ROOT / source).exists() for source in sources)
    assert sources >= {"data", "modeling", "scripts"}  # all that the commands import
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert [rule for rule in rules if not rule.startswith(("#", "!"))] == ["*", "**/__pycache__"]
    assert {rule[1:] for rule in rules if rule.startswith("!")} == sources


def test_versions_are_those_of_the_repository(instructions):
    [image] = all_of(instructions, "FROM")
    python = re.fullmatch(r"python:(3\.\d+)-slim", image)[1]
    assert f"Programming Language :: Python :: {python}\n" in (ROOT / "setup.cfg").read_text(encoding="utf-8")
    pins = re.findall(r"torch==[\w.]+", " ".join(all_of(instructions, "RUN")))
    assert pins == re.findall(r"^TORCH := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    [pip] = re.findall(r"pip==\S+", " ".join(all_of(instructions, "RUN")))
    assert f"\n{pip} \\\n" in (ROOT / "requirements.lock").read_text(encoding="utf-8")


def third_party_imports(*commands: str) -> set[str]:
    """Top names of the packages that commands import, at any depth and inside functions too."""
    todo, seen, found = list(commands), set(), set()
    while todo:
        path = ROOT / todo.pop().replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        text = path.read_text(encoding="utf-8")
        names = re.findall(r"import_extra\(\"(\w+)\"", text)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                module = f"{node.module}." if node.module else ""
                if node.level:
                    module = ".".join([*path.relative_to(ROOT).parts[: -node.level], module])
                names += [module + alias.name for alias in node.names]
        for name in names:
            top, *rest = name.split(".")
            if (ROOT / top).is_dir():
                todo += [".".join([top, *rest[:depth]]) for depth in range(len(rest) + 1)]
            elif top not in sys.stdlib_module_names:
                found.add(top)
    return found


def test_the_image_has_what_its_commands_import(instructions):
    [line] = [line for line in all_of(instructions, "RUN") if "requirements.lock" in line]
    options, names = line.split("requirements.lock")
    assert options.endswith("--require-hashes --constraint ")
    listed = set(names.split())
    requirements = [Requirement(text) for name in listed for text in metadata.requires(name) or []]
    direct = {found.name for found in requirements if not found.marker or found.marker.evaluate({"extra": ""})}
    imported = third_party_imports("scripts.app", "scripts.predict")
    assert {"gradio", "mammoth", "onnxruntime", "pypdfium2", "python_calamine"} <= imported
    available = {name.lower().replace("-", "_") for name in listed | direct | {"torch"}}
    assert imported <= available, imported - available
    assert {name.replace("-", "_") for name in listed} <= imported


def test_the_command_is_one_of_the_project_and_does_not_run_as_root(instructions):
    [command] = map(json.loads, all_of(instructions, "CMD"))
    check_command(command)
    assert command[command.index("--host") + 1] == "0.0.0.0"  # reachable through a published port
    assert all_of(instructions, "USER")[-1] not in ("0", "root")
    [health] = all_of(instructions, "HEALTHCHECK")
    assert f":{all_of(instructions, 'EXPOSE')[0]}'" in health


def test_the_check_executes_instructions_in_a_folder_of_its_own(check, tmp_path):
    image = check.Image(tmp_path, sys.executable, {"GIVEN": "5"})
    text = """ARG GIVEN=1
ENV HOME=/cache
WORKDIR /app
COPY requirements.lock ./
COPY data data/
RUN mkdir -m 1777 /cache && test "$GIVEN $HOME" = "5 /cache" && test -f /app/data/readers.py && echo http://a/b > c
HEALTHCHECK --start-period=1s CMD test -f /app/alive
CMD ["sh", "-c", "touch /app/alive; exec sleep 60"]
"""
    for instruction, rest in check.parse(text):
        image.execute(instruction, rest)
    assert (tmp_path / "app" / "c").read_text() == "http://a/b\n"
    assert (tmp_path / "cache").stat().st_mode & 0o7777 == 0o1777
    assert not list(tmp_path.rglob("__pycache__"))
    image.serve()
    with pytest.raises(ValueError, match="before the command is started"):
        image.serve()
    (tmp_path / "app" / "alive").unlink()
    image.command = ["false"]
    with pytest.raises(ValueError, match="did not pass"):
        image.serve()
    with pytest.raises(check.subprocess.CalledProcessError):
        image.execute("RUN", "test -f /etc/passwd")  # of the folder, not of this machine
    with pytest.raises(ValueError, match="ONBUILD"):
        image.execute("ONBUILD", "RUN true")
    with pytest.raises(ValueError, match="--python"):
        image.execute("FROM", "python:3.1-slim")
