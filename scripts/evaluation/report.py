"""The evaluation report: one HTML page that opens from disk, without network, for people who look rather than read.

    write_report(report, Path("outputs/evaluation/report.html"))

The page is scripts/evaluation/report_template.html, filled by Jinja2; its styles and its script are inside it. Every document lies
in a JSON block of its own, which the page reads only when the document is opened.
"""

import base64
import math
from pathlib import Path
from typing import Any

import jinja2

from modeling.file_utils import atomic_write

# What the table of documents shows; the rest of a document is read when it is opened.
SUMMARY = ("id", "label", "predicted", "confidence", "truncated", "num_chunks", "review")


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the page to `path`, under another name first, and rename it when it is whole.

    Numbers are Python's own (not NumPy's). An interval is `{"value", "low", "high"}`: an estimate and the ends of its
    95 % interval. Offsets are in characters (code points) of the document's text. `report` holds:

        title                 the page's name
        headline              the one sentence to take away; headline_is_warning: whether it warns
        labels                names of the labels, mildest first
        facts                 [[name, value], …]: what was evaluated (model, data, split, versions)
        metrics               [interval with "name" and "note", …]: the headline numbers, mostly in 0..1
        neighbours            [{"name", "f1_macro", "accuracy", "recall_severest", "difference"}, …]: intervals; the model
                              itself first, its difference None; difference: the model's macro-F1 minus this row's
        figures               [{"title", "caption", "png": bytes}, …]
        tables                [{"title", "caption", "columns": [str], "rows": [[str | float | int]]}, …]
        documents             [{"id", "label", "predicted", "confidence": 0..1, "scores": {label: 0..1},
                                "truncated": bool, "num_chunks": int, "review": bool, "text": str,
                                "chunks": [{"start", "end", "contribution", "attention": 0..1, "read": bool}, …],
                                "evidence": [{"start", "end", "score"}, …]}, …]
                              chunks: in order of their start, may overlap; contribution: above 0 speaks for the
                              predicted label, below 0 against it; read False: past max_chunks, the model never saw it
                              evidence: the sentences that speak most for the predicted label, strongest first

    Raises ValueError where a document holds a number that is not finite, jinja2.UndefinedError where a key is missing;
    `path` is untouched then.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # JSON.parse knows no NaN; scores stay in the labels' order (Jinja2 would sort the keys).
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    environment.filters |= {"number": readable_number, "data_uri": data_uri}
    summary = {
        "labels": report["labels"],
        "documents": [{name: document[name] for name in SUMMARY} for document in report["documents"]],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.writelines(environment.get_template("report_template.html").generate(**report, summary=summary))


def readable_number(value: str | float | int | None, sign: bool = False) -> str:
    """Floats with three decimals, counts with thousands separators, "–" for what is not there, text as it stands."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, str | bool):
        return str(value)
    shown = f"{value:{'+' if sign else ''},.3f}" if isinstance(value, float) else f"{value:{'+' if sign else ''},}"
    return shown.replace("-", "−")


def data_uri(png: bytes) -> str:
    """A PNG image as the address of itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
