"""The evaluation report: one self-contained HTML page that opens from disk, without network access.

    write_report(report, Path("outputs/evaluation/report.html"))

The page is scripts/evaluation/report_template.html, rendered by Jinja2 (see data/report_page.py), with inline styles and
script. Each document is a JSON block of its own, parsed only when the document is opened.
"""

import base64
from pathlib import Path
from typing import Any

from data.report_page import page_environment
from modeling.file_utils import atomic_write

# Columns of the table of documents; the rest of a document is parsed when it is opened.
SUMMARY = ("id", "label", "predicted", "confidence", "by_bias", "truncated", "num_chunks", "review")


def write_report(report: dict[str, Any], path: Path) -> None:
    """Render the report and write it to `path` atomically.

    Numbers are Python's, not NumPy's. An interval is `{"value", "low", "high"}`: an estimate and the bounds of its 95 %
    interval. Offsets are in characters (code points) of the document's text. `report` holds:

        title                 title of the page
        headline              the main result in one sentence; headline_is_warning: whether it is a warning
        labels                label names, mildest first
        is_multi_label        whether a document may have several
        facts                 [[name, value], …]: what was evaluated (model, data, split, versions)
        metrics               [interval with "name" and "note", …]: the headline metrics, mostly in 0..1
        comparison_columns    titles of the values in baselines
        baselines             [{"name", "values": [interval, …], "difference"}, …]; the model itself first, with difference
                              None; difference: the interval of the model's macro-F1 minus this row's
        figures               [{"title", "caption", "png": bytes}, …]
        tables                [{"title", "caption", "columns": [str], "rows": [[str | float | int]]}, …]; of a wide one
                              also "is_wide": True
        documents_note        sentences about the predictions, or ""
        documents             [{"id", "label", "predicted", "confidence": 0..1, "scores": {label: 0..1},
                                "by_bias": bool, "truncated": bool, "counted": bool, "num_chunks": int, "review": bool,
                                "text": str,
                                "explained": [{"label", "score": 0..1,
                                               "chunks": [{"start", "end", "contribution", "attention": 0..1,
                                                           "read": bool}, …],
                                               "evidence": [{"start", "end", "score", "section"}, …]}, …],
                                "metadata": [[name, value], …]}, …]
                              label, predicted: lists of names if is_multi_label; there also "thresholds": {label: 0..1}
                              confidence: score of the predicted label, or with several the highest score; by_bias: another
                              label has a higher one; scores: of all labels, or with several of those that matter
                              explained: the predicted label; with several each, or if there is none the likeliest one
                              chunks: sorted by start, may overlap; contribution: above 0 for the explained label,
                              below 0 against it; read: False beyond max_chunks, where the encoder did not read the chunk;
                              counted: whether the lexical features read the others
                              evidence: the sentences with the highest attribution, strongest first; section: the
                              page, time code or column that it is in, or ""; metadata: the kept columns

    Raises:
        ValueError: a document has a non-finite number.
        jinja2.UndefinedError: a key is missing. `path` is untouched in both cases.
    """
    environment = page_environment(Path(__file__).parent)
    # JSON.parse rejects NaN. Without sort_keys, which is Jinja2's default, scores stay in label order.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    environment.filters["data_uri"] = data_uri
    summary = {
        "labels": report["labels"],
        "isMultiLabel": report["is_multi_label"],
        "documents": [{name: document[name] for name in SUMMARY} for document in report["documents"]],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.writelines(environment.get_template("report_template.html").generate(**report, summary=summary))


def data_uri(png: bytes) -> str:
    """A PNG image as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
