"""The layout that CONTRIBUTING.md promises."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from transformers import Trainer

from modeling.training.trainer import WeightedTrainer
from tests.conftest import ROOT

PUSHED = "modeling.hierarchical_roberta"


def imports_of(path: Path) -> set[str]:
    """The absolute names of the modules that a file imports."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            names.add(f"{base}.{node.module}" if base and node.module else node.module or base)
    return names


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def project_imports(path: Path) -> set[str]:
    return {name for name in imports_of(path) if name.split(".")[0] in ("data", "modeling", "scripts", "train_hf")}


def test_imports_go_one_way():
    for path in files("data"):
        assert all(name.startswith(("data", PUSHED, "modeling.file_utils")) for name in project_imports(path)), path
    for path in files("modeling"):
        assert all(name.startswith("modeling") for name in project_imports(path)), path
    for path in files("modeling/hierarchical_roberta"):
        assert all(name.startswith(PUSHED + ".") for name in project_imports(path)), path
        assert not re.search(r"^from \.\.|^import modeling|^from modeling", path.read_text(encoding="utf-8"), re.M), (
            path
        )


def test_what_a_pushed_file_needs_it_imports_itself():
    """Of the files that transformers starts from: its releases before 5.10 look one import deep."""
    needs = {f"{PUSHED}.{path.stem}": project_imports(path) for path in files("modeling/hierarchical_roberta")}
    for name in ("modeling_hierarchical_roberta", "pipeline"):
        direct = needs[f"{PUSHED}.{name}"]
        assert set().union(*(needs[each] for each in direct)) <= direct, name


def test_nothing_imports_a_command():
    commands = {f"scripts.{path.stem}" for path in (ROOT / "scripts").glob("[a-z]*.py")} | {"train_hf"}
    assert {"scripts.prepare_dataset", "scripts.predict", "scripts.search"} <= commands
    for path in [*files("data"), *files("modeling"), *files("scripts"), ROOT / "train_hf.py"]:
        assert not project_imports(path) & commands, path


def test_commands_alone_stand_at_the_top_of_scripts():
    for path in (ROOT / "scripts").glob("[a-z]*.py"):
        assert "__name__ ==" in path.read_text(encoding="utf-8"), path


def test_the_main_names_can_be_imported_from_modeling():
    import modeling

    assert [getattr(modeling, name).__name__ for name in modeling.__all__] == modeling.__all__


def test_preparing_documents_imports_no_torch():
    code = "import data.documents, data.readers, data.splits, modeling, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def tracked() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def test_documents_link_to_files_that_exist():
    for name in tracked():
        if name.endswith(".md"):
            text = (ROOT / name).read_text(encoding="utf-8")
            for target in re.findall(r"\]\(([^)#:]+)\)", text):
                assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


def test_few_private_methods_of_trainer_are_overridden():
    """Public hooks and callbacks first: private methods change from one release of transformers to the next."""
    own = [kind for kind in WeightedTrainer.__mro__ if kind.__module__.startswith("modeling.")]
    overridden = {name for kind in own for name in vars(kind) if name[:2] != "__" and name in dir(Trainer)}
    private = sorted(name for name in overridden if name.startswith("_"))
    assert private == [
        "_finalize_training",
        "_get_grad_norm",
        "_get_output_dir",
        "_load_best_model",
        "_save_checkpoint",
    ]
    assert {"compute_loss", "create_optimizer"} <= overridden
