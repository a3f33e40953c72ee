"""The folder of a Space that serves a model of the Hub with scripts/app.py. Used by scripts/push_to_hub.py."""

import importlib.metadata
import shutil
import sys
from pathlib import Path

import data

APP = Path(__file__).parents[1] / "app.py"
# What app.py imports of the project, and of which packages; gradio comes with the Space.
MODULES = ("__init__", "demo_corpus", "document_files", "pdf_text", "text_files")
PACKAGES = "torch transformers numpy pyarrow charset-normalizer pypdfium2 mammoth pysubs2".split()
README = """---
title: {name}
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
models:
  - {model_id}
---

Classifies a pasted text or an uploaded file with [{model_id}](https://huggingface.co/{model_id}), and shows scores, chunks
and evidence. The variable MODEL_ID of the Space serves another model; a private one needs the secret HF_TOKEN.
"""


def write_space(target: Path, model_id: str) -> None:
    """Write app.py, what it imports, requirements.txt with the versions installed here, and README.md.

    Raises:
        ValueError: a package of the page is not installed.
    """
    try:
        versions = {name: importlib.metadata.version(name).split("+")[0] for name in [*PACKAGES, "gradio"]}
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"--space takes the versions installed here, and there is no {error.name}: pip install -e '.[app,files]'."
        ) from error
    shutil.rmtree(target, ignore_errors=True)
    (target / "data").mkdir(parents=True)
    for name in MODULES:
        shutil.copyfile(Path(data.__file__).parent / f"{name}.py", target / "data" / f"{name}.py")
    before, line, after = APP.read_text(encoding="utf-8").partition('\nMODEL = ""')
    assert line, "app.py has no line for the model"
    (target / "app.py").write_text(f"{before}\nMODEL = {model_id!r}{after}", encoding="utf-8")
    lines = [f"{name}=={versions[name]}" for name in PACKAGES]
    (target / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    readme = README.format(name=model_id.split("/")[-1], gradio=versions["gradio"], python=python, model_id=model_id)
    (target / "README.md").write_text(readme, encoding="utf-8")
