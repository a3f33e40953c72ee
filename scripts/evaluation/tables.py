"""Tables of the report that do not depend on how many labels a document has."""

from typing import Any


def with_interval(entry: dict[str, float]) -> str:
    return f"{entry['value']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"


def faithfulness_table(faithfulness: dict[str, dict[str, Any]], counted: str) -> list[dict[str, Any]]:
    """Deletion and insertion curves in a row for each kind of evidence; [] without any. `counted`: what the means are over."""
    rows = [
        [unit, curves["documents"]]
        + [f"{curves[name]:.3f}" for name in ("deletion", "deletion_random", "insertion", "insertion_random")]
        for unit, curves in faithfulness.items()
        if curves
    ]
    if not rows:
        return []
    return [
        {
            "title": "Faithfulness (deletion and insertion)",
            "caption": "Whether the evidence drives the prediction: mean probability of the predicted label as the "
            "strongest evidence is deleted (lower is better) or only it is kept (higher is better), next to a "
            "random order.",
            "columns": ["evidence", counted, "deletion", "random", "insertion", "random"],
            "rows": rows,
        }
    ]


def pointing_table(metrics: dict[str, Any], what: str) -> list[dict[str, Any]]:
    """The pointing game; [] without gold evidence. `what` says what was counted, such as "correctly given labels"."""
    if "pointing" not in metrics:
        return []
    hits = metrics["pointing"]
    return [
        {
            "title": "Pointing game",
            "caption": f"How often the model's top evidence overlaps the gold evidence, on {hits['documents']} {what}.",
            "columns": ["evidence", "hit rate"],
            "rows": [[f"top {unit}", f"{hits[unit]:.3f}"] for unit in ("chunk", "sentence") if unit in hits],
        }
    ]
