"""docs/quickstart.ipynb runs from a CSV to predictions with evidence, headless and offline."""

import json

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from tests.conftest import LABELS, ROOT, TRAINING

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def html_of(cell) -> str:
    return "".join(output.get("data", {}).get("text/html", "") for output in cell.outputs)


def test_quickstart_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) == 10
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
def test_quickstart_notebook_runs_on_a_csv(tmp_path, monkeypatch, csv_file, roberta_folder):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(TRAINING), encoding="utf-8")
    parameters = {"SOURCE": csv_file, "LABELS": ",".join(LABELS), "ENCODER": roberta_folder, "RECIPE": recipe}
    for name, value in (parameters | {"OUTPUT_DIR": tmp_path / "quickstart"}).items():
        monkeypatch.setenv(f"QUICKSTART_{name}", str(value))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)

    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()

    run = tmp_path / "quickstart" / "run"
    assert (
        {"train", "validation", "test"} >= set(json.loads((run / "metrics.json").read_text(encoding="utf-8"))) > set()
    )
    assert (run / "report" / "report.html").is_file()
    cells = {cell.id: cell for cell in notebook.cells}
    assert "this model" in html_of(cells["evaluate"])
    assert "tfidf" in html_of(cells["evaluate"])
    assert "<iframe srcdoc=" in html_of(cells["report"])
    predictions = html_of(cells["predict"])
    assert predictions.count("Predicted: ") == 3
    assert "<mark>" in predictions
