"""The layout that CONTRIBUTING.md promises and the README draws."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

TRAVELLING = ["configuration_hierarchical_roberta", "modeling_hierarchical_roberta", "pooling", "pipeline"]
TRAVELLING += [
    "contributions",
    "chunking",
    "lexical",
    "encoder_batches",
    "encoders",
    "precision",
    "prefetch",
    "recomputation",
]


def imports_of(path: Path) -> set[str]:
    """Top-level names of what a file imports; relative imports as `.name`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or "") if node.level else (node.module or "").split(".")[0])
    return names


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_imports_go_one_way():
    for path in files("data"):
        assert not imports_of(path) & {"modeling", "scripts", "train_hf"}, path
    for path in files("modeling"):
        assert not imports_of(path) & {"data", "scripts", "train_hf", "modeling"}, path
    for path in files("scripts"):
        assert "train_hf" not in imports_of(path), path


@pytest.mark.parametrize("name", TRAVELLING)
def test_files_that_travel_import_only_one_another(name):
    relative = {module.lstrip(".") for module in imports_of(ROOT / "modeling" / f"{name}.py") if module.startswith(".")}
    assert relative <= set(TRAVELLING)


def test_data_and_models_cut_texts_alike():
    assert (ROOT / "modeling" / "chunking.py").samefile(ROOT / "data" / "chunking.py")


def tracked() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def test_the_readmes_tree_is_the_project():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## What is where\n+```\n(.*?)```", readme, re.DOTALL)
    assert tree
    drawn, folder = set(), ""
    for line in tree.group(1).splitlines():
        name = line.split()[0] if line.strip() else ""
        if not name:
            continue
        if line.startswith("  "):
            drawn.add(folder + name)
        elif name.endswith("/"):
            folder = name
            drawn.add(name)
        else:
            drawn.add(name)
    found = {name for name in tracked() if name.endswith(".py") and not name.startswith("tests/")}
    assert {name for name in drawn if name.endswith(".py")} == found - {
        f"{p}/__init__.py" for p in ("data", "modeling", "scripts", "scripts/benchmark", "scripts/evaluation")
    }
    for name in drawn:
        assert (ROOT / name).exists(), name


def test_no_python_file_is_a_god_file():
    for name in tracked():
        if name.endswith(".py"):
            assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 420, name


def test_documents_link_to_files_that_exist():
    for name in tracked():
        if name.endswith(".md"):
            text = (ROOT / name).read_text(encoding="utf-8")
            for target in re.findall(r"\]\(([^)#:]+)\)", text):
                assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"
