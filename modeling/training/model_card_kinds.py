"""What model cards of one label a document, and of several, say differently. `kind_of` chooses."""

from collections.abc import Sequence
from typing import Any

# With more labels than this, only the most frequent ones are listed.
MOST_LISTED = 50


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """The items, or the first of many and how many more there are.

    >>> listed(["a", "b"])
    'a, b'
    """
    rest = len(items) - MOST_LISTED
    return separator.join(items[:MOST_LISTED]) + (f" and {rest:,} more" if rest > 0 else "")


class SingleLabelCard:
    """A card for classes of which each document has one."""

    index = {"f1_macro": ("f1", "Macro-F1"), "accuracy": ("accuracy", "Accuracy"), "f1_weighted": ("f1", "Weighted F1")}
    metrics = ("loss", "accuracy", "f1_macro", "f1_weighted", "severity_f1", "quadratic_kappa")
    result = 'result["label"], result["score"], result["scores"], result["evidence"]'
    per_label = {"precision": "Precision", "recall": "recall", "f1": "F1 per class"}
    loss = "cross entropy, weighted by class over the whole effective batch"

    def purpose(self, labels: list[str]) -> str:
        return f"Classifies documents of any length as {listed(labels)}"

    def compared(self, labels: list[str]) -> tuple[str, ...]:
        """Metrics of the comparison with baselines."""
        return ("f1_macro", "accuracy", f"recall_{labels[-1]}", "quadratic_kappa")

    def decision(self, config: dict[str, Any]) -> str:
        if not config.get("decision_metric"):
            return "the label with the highest score"
        return (
            "the label with the highest log score plus class bias; the biases, in config.json, are fitted on validation for "
            f"{config['decision_metric']}"
        )

    def decision_note(self, config: dict[str, Any]) -> str:
        """What to know about the table of results; "" for nothing."""
        if not config.get("decision_metric"):
            return ""
        return (
            "With class biases (see Decision below): a label need not have the highest score. They were fitted on validation, "
            "whose metrics are therefore optimistic."
        )

    def calibration(self, calibration: dict[str, Any]) -> str:
        return (
            f"Scores are softmax(logits / {calibration['temperature']:.3f}); expected calibration error "
            f"{calibration['ece_before']:.3f} before temperature scaling, {calibration['ece_after']:.3f} after."
        )

    def shown(self, metrics: dict[str, dict[str, float]], labels: list[str]) -> list[str]:
        """Labels with a row in the table of each label's metrics."""
        return labels

    def results(self, values: dict[str, float], labels: list[str]) -> dict[str, float]:
        """Names and values for a sentence."""
        most_severe = labels[-1]
        return {
            "macro-F1": values["f1_macro"],
            "accuracy": values["accuracy"],
            f"recall of {most_severe}": values[f"recall_{most_severe}"],
        }

    def misses(self, split: str, values: dict[str, float], labels: list[str]) -> str:
        most_severe, miss_rate = labels[-1], 1 - values[f"recall_{labels[-1]}"]
        if not values[f"support_{most_severe}"]:
            return f"unknown for {most_severe} documents, since {split} has none"
        return f"on {split}, {miss_rate:.0%} of the {most_severe} documents were assigned a lower class"


class MultiLabelCard:
    """A card for labels of which a document has any number."""

    index = {
        "f1_macro": ("f1", "Macro-F1"),
        "f1_micro": ("f1", "Micro-F1"),
        "f1_weighted": ("f1", "Weighted F1"),
        "f1_samples": ("f1", "Samples F1"),
        "subset_accuracy": ("accuracy", "Subset accuracy"),
        "average_precision_macro": ("mean_average_precision", "Mean average precision"),
    }
    metrics = (
        *("loss", "f1_macro", "f1_micro", "f1_weighted", "f1_samples", "subset_accuracy", "hamming_loss"),
        *("label_ranking_average_precision", "average_precision_macro"),
    )
    result = 'result["labels"], result["scores"], result["evidence"]'
    per_label = {
        "precision": "Precision",
        "recall": "recall",
        "f1": "F1",
        "average_precision": "average precision of each label",
    }
    loss = "binary cross entropy of each label, with weights for the documents that have it"

    def purpose(self, labels: list[str]) -> str:
        return f"Assigns documents of any length any number of the labels {listed(labels)}"

    def compared(self, labels: list[str]) -> tuple[str, ...]:
        return ("f1_macro", "f1_micro", "f1_samples", "average_precision_macro")

    def decision(self, config: dict[str, Any]) -> str:
        return (
            "every label whose score reaches its threshold; the thresholds, in config.json, are fitted on validation for "
            f"{config.get('decision_metric') or 'f1_macro'}"
        )

    def decision_note(self, config: dict[str, Any]) -> str:
        return "With thresholds (see Decision below) that were fitted on validation, whose metrics are therefore optimistic."

    def calibration(self, calibration: dict[str, Any]) -> str:
        return (
            "Scores are sigmoid(slope × logit + intercept), with a slope and an intercept for each label; expected calibration "
            f"error over all labels {calibration['ece_before']:.3f} before this calibration, "
            f"{calibration['ece_after']:.3f} after."
        )

    def shown(self, metrics: dict[str, dict[str, float]], labels: list[str]) -> list[str]:
        values = list(metrics.values())[-1]
        most = sorted(labels, key=lambda label: -values[f"support_{label}"])[:MOST_LISTED]
        return [label for label in labels if label in set(most)]

    def results(self, values: dict[str, float], labels: list[str]) -> dict[str, float]:
        return {
            "macro-F1": values["f1_macro"],
            "micro-F1": values["f1_micro"],
            "mean average precision": values["average_precision_macro"],
        }

    def misses(self, split: str, values: dict[str, float], labels: list[str]) -> str:
        occurring = [label for label in labels if values[f"support_{label}"]]
        if not occurring:
            return f"unknown, since no document of {split} has a label"
        missed = sorted(
            (label for label in occurring if values[f"recall_{label}"] < 1), key=lambda label: values[f"recall_{label}"]
        )[:3]
        if not missed:
            return f"none on {split}, which is no promise for other documents"
        shares = ", ".join(f"{label} in {1 - values[f'recall_{label}']:.0%}" for label in missed)
        return f"on {split}, the labels most often missed, of the documents that have them: {shares}"


def kind_of(config: dict[str, Any]) -> SingleLabelCard | MultiLabelCard:
    """The card's kind, from the `config` of a training history."""
    return MultiLabelCard() if config.get("problem_type") == "multi_label_classification" else SingleLabelCard()
