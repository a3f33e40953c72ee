"""What README and docs tell people to type exists: make targets, modules, files, options."""

import re
import shlex
from dataclasses import fields

import pytest
from accelerate.commands.launch import launch_command_parser

from modeling.training.training_args import HierarchicalTrainingArguments
from scripts.training.arguments import DataArguments, ModelArguments, SearchArguments
from tests.conftest import ROOT

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/guide.md", "docs/benchmarks.md", "docs/encoders.md")
KINDS = (ModelArguments, DataArguments, HierarchicalTrainingArguments)
TRAINING = {"--config"} | {f"--{field.name}" for kind in KINDS for field in fields(kind)}
SEARCH = {f"--{field.name}" for field in fields(SearchArguments)}
LAUNCHER = set(launch_command_parser()._option_string_actions)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands_of(text: str) -> list[list[str]]:
    """The words of each command in a Markdown file's fenced and indented blocks, without comments."""
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.M | re.S) + re.findall(r"^ {4}.*\n", text, re.M)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    starts = re.compile(r"\s*(make|python|accelerate|train_hf\.py|\.venv/bin/\w+)\s")
    return [shlex.split(line.strip().removeprefix(".venv/bin/"), comments=True) for line in lines if starts.match(line)]


def source_of(module: str) -> str:
    """The source of a module that is run as `python -m module`, and of the options that it shares with another."""
    path = ROOT / module.replace(".", "/")
    source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    shared = "scripts/common/preparation_options.py"
    return source + (text_of(shared) if "add_preparation_options(" in source else "")


def options_of(source: str) -> set[str]:
    """The options that a module's source adds to its parser; those of columns are added in a loop."""
    columns = re.findall(r'"(\w+)"', re.search(r"^COLUMN_KINDS = \((.*)\)|$", source, re.M)[0])
    return set(re.findall(r'"(--\w+)"', source)) | {f"--{kind}_column" for kind in columns}


def check_command(words: list[str]) -> None:
    """Raises AssertionError or OSError where a command names what does not exist."""
    if words[0] == "make":
        makefile = text_of("Makefile")
        assert re.search(rf"^{words[1]}:", makefile, re.M), f"no target {words[1]}"
        assert all(f"$({word.split('=')[0]})" in makefile for word in words[2:] if "=" in word), "no such variable"
        return
    start = next((index for index, word in enumerate(words) if word in ("-m", "train_hf.py")), len(words))
    given = [{word.split("=")[0] for word in part if word.startswith("--")} for part in (words[:start], words[start:])]
    assert given[0] <= LAUNCHER, given[0] - LAUNCHER
    if start < len(words):
        known = TRAINING if words[start] == "train_hf.py" else options_of(source_of(words[start + 1]))
        known |= TRAINING | SEARCH if words[start + 1] == "scripts.search" else set()
        assert given[1] <= known, given[1] - known
    for path in re.findall(r"scripts/[\w/]+\.yaml|\b\w+\.yaml\b", " ".join(words)):
        assert (ROOT / path).exists() or f"/{path}" in " ".join(words), path


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_in_blocks_name_what_exists(name):
    for words in commands_of(text_of(name)):
        try:
            check_command(words)
        except (AssertionError, OSError) as error:
            raise AssertionError(f"{name}: {' '.join(words)}: {error}") from error


def test_commands_are_found_and_mistakes_in_them_too():
    commands = commands_of(text_of("README.md"))
    assert ["make", "demo"] in commands
    assert sum("train_hf.py" in words for words in commands) == 1
    for wrong in ("make nothing", "python -m scripts.nothing", "python -m scripts.predict --sauce x"):
        with pytest.raises((AssertionError, OSError)):
            check_command(wrong.split())
    for wrong in ("accelerate launch --queit train_hf.py", "accelerate launch train_hf.py --config scripts/none.yaml"):
        with pytest.raises(AssertionError):
            check_command(wrong.split())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_names_in_running_text_exist(name):
    options = TRAINING | SEARCH | LAUNCHER
    for path in [*(ROOT / "scripts").rglob("*.py"), *(ROOT / "tests" / "faults").glob("*.py")]:
        options |= options_of(path.read_text(encoding="utf-8"))
    for span in re.findall(r"`([^`\n]+)`", text_of(name)):
        if not span.startswith("tensorboard "):  # the one program in the docs that is not ours
            assert set(re.findall(r"(?<!\S)--\w+", span)) <= options, span
        for module in re.findall(r"\bscripts(?:\.[a-z_]+)+", span):
            assert source_of(module), span
        for path in re.findall(r"(?<![\w/.])(?:data|modeling|scripts|tests|docs)/[\w/.]+\w", span):
            assert (ROOT / path).exists(), span


def test_readme_is_short_and_links_to_the_rest():
    readme = text_of("README.md")
    assert len(readme.splitlines()) <= 120
    for target in ("docs/guide.md", "docs/benchmarks.md", "docs/log.md", "docs/quickstart.ipynb", "CONTRIBUTING.md"):
        assert f"({target})" in readme


def test_files_listed_in_contributing_exist():
    folder = ROOT
    for line in text_of("CONTRIBUTING.md").split("## Files")[1].split("```")[1].splitlines()[1:]:
        names = line.split("  ")[0] if not line.startswith("  ") else line[2:].split("  ")[0]
        for name in names.split(", "):
            base = folder if line.startswith("  ") else ROOT
            assert (base / name.strip()).exists(), line
        if not line.startswith("  ") and names.endswith("/"):
            folder = ROOT / names
