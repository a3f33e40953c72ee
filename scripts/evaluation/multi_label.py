"""Evaluation of several labels a document: what differs from one (single_label.py, which has the same methods)."""

from typing import Any, ClassVar

import numpy as np

from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.decision import THRESHOLD, MultiLabelDecision, decision_of
from modeling.training.calibration import binary_reliability
from modeling.training.metrics import absent_labels_note
from scripts.evaluation import multi_label_baselines as baselines
from scripts.evaluation.explanations import DocumentResult
from scripts.evaluation.faithfulness import pointing_game
from scripts.evaluation.figures import label_curves_figure, label_reliability_figure
from scripts.evaluation.multi_label_statistics import (
    by_group,
    calibration_of_labels,
    difference,
    errors_together,
    metrics_with_intervals,
)
from scripts.evaluation.statistics import Prediction, TextBaseline
from scripts.evaluation.tables import faithfulness_table, pointing_table, with_interval
from scripts.training import kinds

# Labels in tables and figures, the most frequent ones; (document, label) pairs to review; scores shown of a document.
MOST_LISTED, MOST_CURVES, REVIEWED, MOST_SCORES = 50, 7, 25, 5


class MultiLabel(kinds.MultiLabel):
    """Metrics, baselines and the report's parts for several labels a document."""

    counted: ClassVar[str] = "labels of documents"
    baseline_titles: ClassVar[dict[str, str]] = {"majority": "the most frequent labels"}
    printed: ClassVar[dict[str, str]] = {"macro-F1": "f1_macro", "micro-F1": "f1_micro"}

    def decision(
        self, config: HierarchicalRobertaConfig, validation_BK: np.ndarray, labels_BK: np.ndarray
    ) -> tuple[MultiLabelDecision, dict[str, Any]]:
        """The model's decision, which training always fits: nothing is missing in the config."""
        decision = decision_of(config)
        assert isinstance(decision, MultiLabelDecision)
        return decision, {}

    # ---- baselines ----

    def text_baselines(self) -> dict[str, TextBaseline]:
        """TF-IDF, untuned and tuned, and the most frequent labels."""
        return {
            "tfidf": baselines.tfidf,
            "tfidf_tuned": baselines.tuned_tfidf,
            "majority": baselines.most_frequent,
        }

    def vector_baseline(self, train_BD: np.ndarray, labels_BK: np.ndarray, test_BD: np.ndarray) -> Prediction:
        return baselines.vectors(train_BD, labels_BK, test_BD)

    def lexical_baseline(self, validation_BK: np.ndarray, labels_BK: np.ndarray, logits_BK: np.ndarray) -> Prediction:
        return baselines.lexical(validation_BK, labels_BK, logits_BK)

    # ---- metrics ----

    def intervals(
        self, prediction: Prediction, labels_BK: np.ndarray, is_model: bool = True
    ) -> dict[str, dict[str, float]]:
        """Metrics with intervals; of single labels, only the model's most frequent ones have some."""
        most = MOST_LISTED if is_model else 0
        return metrics_with_intervals(labels_BK, prediction, self.names, most)

    def difference(self, labels_BK: np.ndarray, model: Prediction, other: Prediction) -> dict[str, float]:
        return difference(labels_BK, model, other)

    def measures(
        self,
        fields: dict[str, Any],
        model: Prediction,
        before_BK: np.ndarray,
        labels_BK: np.ndarray,
        validation_BK: np.ndarray,
        validation_labels_BK: np.ndarray,
        groups: dict[str, np.ndarray],
    ) -> dict[str, Any]:
        """The parts of metrics.json after the comparison with baselines.

        Args:
            fields: of the config, with what was fitted.
            before_BK: scores before calibration.
            validation_BK: calibrated scores.
        """
        calibration = calibration_of_labels(before_BK, model.scores, labels_BK, self.names)
        for entry, (slope, intercept) in zip(
            calibration["labels"].values(), fields["label_calibration"] or [(1.0, 0.0)] * len(self.names), strict=True
        ):
            entry |= {"slope": slope, "intercept": intercept}
        return {
            "support": dict(zip(self.names, labels_BK.sum(axis=0, dtype=np.int64).tolist(), strict=True)),
            "calibration": calibration,
            "by_group": by_group(groups, labels_BK, model, self.names),
            "errors_together": errors_together(labels_BK, model.predicted, self.names),
        }

    def decision_measures(self, config: HierarchicalRobertaConfig, model: Prediction) -> dict[str, Any]:
        """The thresholds and what they were fitted for."""
        thresholds = config.thresholds or [THRESHOLD] * len(self.names)
        thresholds_of = dict(zip(self.names, thresholds, strict=True))
        return {"decision": {"metric": config.decision_metric, "thresholds": thresholds_of}}

    def pointing(
        self, results: list[DocumentResult], evidence: list[str], model: Prediction, labels_BK: np.ndarray
    ) -> dict[str, Any]:
        """Pointing game on labels that were given correctly: all together, and `labels`: each that has gold evidence."""
        right_BK = model.predicted & (labels_BK == 1)
        counted = [result for result in results if right_BK[result.index, result.predicted]]
        by_label: dict[int, list[DocumentResult]] = {}
        for result in counted:
            by_label.setdefault(result.predicted, []).append(result)
        own = {self.names[k]: pointing_game(by_label[k], evidence, self.names) for k in sorted(by_label)}
        labels = {name: hits for name, hits in own.items() if hits["documents"]}
        return {**pointing_game(counted, evidence, self.names), "labels": labels}

    # ---- the report ----

    def listed(self, metrics: dict[str, Any]) -> list[str]:
        """The labels that most documents of the split have, at most `MOST_LISTED`."""
        return sorted(self.names, key=lambda name: -metrics["support"][name])[:MOST_LISTED]

    def figures(self, evaluation: dict[str, Any]) -> list[tuple[str, str, str, bytes]]:
        """Name, title, caption and PNG of each figure."""
        labels, metrics = evaluation["labels"], evaluation["metrics"]
        most = [self.names.index(name) for name in self.listed(metrics)[:MOST_CURVES]]
        shown = "Each label" if len(most) == len(self.names) else f"The {len(most)} most frequent labels"
        names = [self.names[k] for k in most]
        pooled = [binary_reliability(evaluation[when].ravel(), labels.ravel()) for when in ("before", "scores")]
        return [
            ("curves", "Precision-recall and ROC curves", f"{shown}, over all thresholds.",
             label_curves_figure(evaluation["scores"][:, most], labels[:, most], names)),
            ("reliability", "Calibration (reliability diagram)",
             "All labels together. On the diagonal, a label's score is the share of documents that have it; below it, the "
             "model is overconfident. Larger points hold more scores.",
             label_reliability_figure(*pooled)),
        ]  # fmt: skip

    def facts(self, metrics: dict[str, Any]) -> list[list[str]]:
        """What the thresholds were fitted for, and their range."""
        decision = metrics["decision"]
        low, middle, high = np.quantile(list(decision["thresholds"].values()), [0, 0.5, 1])
        fitted = f", fitted on validation for {decision['metric']}" if decision["metric"] else ""
        return [
            ["Decision", f"every label whose score reaches its threshold ({low:.3f} to {high:.3f}, median {middle:.3f}){fitted}"]
        ]  # fmt: skip

    def calibration_facts(self, metrics: dict[str, Any]) -> list[list[str]]:
        return []

    def documents_note(self, metrics: dict[str, Any], count: int) -> str:
        """How to read the predictions."""
        return (
            "A document gets every label whose score reaches the label's threshold. “Missed” is a label that is not predicted, "
            "“added” one that is predicted only. An opened document shows scores beside the thresholds."
        )

    def headline_numbers(self, metrics: dict[str, Any]) -> list[dict[str, Any]]:
        """The headline metrics, each with a short explanation."""
        absent = absent_labels_note({f"support_{name}": count for name, count in metrics["support"].items()})
        headline = [
            ("f1_macro", "Macro-F1", "mean F1 over the labels, equally weighted" + (f"; {absent}" if absent else "")),
            ("f1_micro", "Micro-F1", "F1 over all labels of all documents together"),
            ("f1_samples", "Samples F1", "mean F1 over the documents"),
            ("average_precision_macro", "Mean average precision", "how well scores rank the documents of each label"),
            ("subset_accuracy", "Subset accuracy", "share of documents with exactly the right labels"),
            ("hamming_loss", "Hamming loss", "share of wrong decisions, lower is better"),
        ]
        return [{"name": title, "note": note, **metrics["model"][key]} for key, title, note in headline]

    def compared(self) -> dict[str, str]:
        """Metrics of the comparison with baselines, and their titles."""
        return {"f1_macro": "Macro-F1", "f1_micro": "Micro-F1", "average_precision_macro": "Mean average precision"}

    def tables(self, metrics: dict[str, Any], documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Metrics and calibration of each label, errors, subgroups, faithfulness and labels to review."""
        return [
            *self.label_tables(metrics),
            *self.error_tables(metrics),
            *faithfulness_table(metrics["faithfulness"], self.counted),
            *pointing_table(metrics, "labels that were given correctly"),
            *self.review_table(documents),
        ]

    def label_tables(self, metrics: dict[str, Any]) -> list[dict[str, Any]]:
        model, support, calibration = metrics["model"], metrics["support"], metrics["calibration"]
        shown, thresholds = self.listed(metrics), metrics["decision"]["thresholds"]
        rest = f" The {len(shown)} most frequent of {len(self.names):,} labels; metrics.json has all." if len(
            shown) < len(self.names) else ""  # fmt: skip

        def cell(entry: dict[str, float]) -> str:
            return with_interval(entry) if "low" in entry else f"{entry['value']:.3f}"

        kinds = {"precision": "precision", "recall": "recall", "f1": "F1", "average_precision": "average precision"}
        rows = [
            [
                *(name, support[name]),
                *(cell(model[f"{kind}_{name}"]) if support[name] else "–" for kind in kinds),
                f"{thresholds[name]:.3f}",
            ]
            for name in shown
        ]
        errors = [
            [name, *(f"{calibration['labels'][name][when]:.3f}" for when in ("ece_before", "ece_after"))]
            for name in shown
        ]
        together = [f"{calibration[when]:.3f}" for when in ("ece_before", "ece_after")]
        return [
            {
                "title": "Metrics of each label",
                "caption": "Precision: share of the documents that got a label that have it. Recall: share of the documents "
                "that have it that got it. With 95 % bootstrap intervals. A document gets a label if its score reaches "
                f"the threshold.{rest}",
                "columns": ["label", "documents", *kinds.values(), "threshold"],
                "rows": rows,
                "is_wide": True,
            },
            {
                "title": "Calibration",
                "caption": "Whether a score can be read as a probability. Expected calibration error: mean gap between a "
                f"label's score and the share of documents that have it.{rest}",
                "columns": ["label", "before calibration", "after"],
                "rows": [["all together", *together], *errors],
            },
        ]

    def error_tables(self, metrics: dict[str, Any]) -> list[dict[str, Any]]:
        def shown(value: float | None) -> str:
            return "–" if value is None else f"{value:.3f}"

        tables = [
            {
                "title": "Subgroup metrics",
                "caption": "Which documents are harder: by length, number of chunks, truncation, position of the strongest "
                "chunk, and the kept columns. Macro-F1 is over the labels that occur in the subgroup.",
                "columns": ["subgroup", "documents", "macro-F1", "micro-F1", "subset accuracy"],
                "rows": [
                    [
                        g["group"],
                        g["documents"],
                        *(shown(g[name]) for name in ("f1_macro", "f1_micro", "subset_accuracy")),
                    ]
                    for g in metrics["by_group"]
                ],
            }
        ]
        if metrics["errors_together"]:
            tables.append(
                {
                    "title": "Errors that go together",
                    "caption": "Documents where one label is missed and another, which they do not have, is predicted: labels "
                    "that the model may take for each other. The most frequent pairs.",
                    "columns": ["missed", "predicted", "documents"],
                    "rows": [
                        [pair["missed"], pair["predicted"], pair["documents"]] for pair in metrics["errors_together"]
                    ],
                }
            )
        return tables

    def review_table(self, documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
        pairs = []
        for document in documents:
            for name in document["label"] + document["predicted"] if document["review"] else ():
                if (has_it := name in document["label"]) != (name in document["predicted"]):
                    score = document["scores"][name]
                    pairs.append((1 - score if has_it else score, document["id"], name, has_it, score))
        pairs.sort(key=lambda pair: -pair[0])
        if not pairs:
            return []
        return [
            {
                "title": "Labels to review",
                "caption": "Possible labeling errors: documents and labels where the model most confidently disagrees.",
                "columns": ["document", "label", "labeled", "score"],
                "rows": [
                    [id_, name, "yes" if has_it else "no", f"{score:.3f}"]
                    for _, id_, name, has_it, score in pairs[:REVIEWED]
                ],
            }
        ]

    def describe(self, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
        """What the list of documents shows of each: labels, predictions, highest score, whether to review it, and the scores
        and thresholds of its labels, of those predicted, and of others with the highest scores."""
        scores_BK, labels_BK, predicted_BK = evaluation["scores"], evaluation["labels"] == 1, evaluation["predicted"]
        thresholds = evaluation["metrics"]["decision"]["thresholds"]
        wrong = np.argwhere(labels_BK != predicted_BK)
        doubt = np.abs(scores_BK - labels_BK)[tuple(wrong.T)]
        review = set(wrong[np.argsort(-doubt, kind="stable")[:REVIEWED], 0].tolist())
        described = []
        for i, (score_K, label_K, predicted_K) in enumerate(zip(scores_BK, labels_BK, predicted_BK, strict=True)):
            highest = np.argsort(-score_K, kind="stable")
            kept = {*np.flatnonzero(label_K | predicted_K).tolist(), *highest[:MOST_SCORES].tolist()}
            shown = [k for k in highest.tolist() if k in kept]
            described.append(
                {
                    "label": [self.names[k] for k in np.flatnonzero(label_K)],
                    "predicted": [self.names[k] for k in np.flatnonzero(predicted_K)],
                    "confidence": float(score_K.max()),
                    "by_bias": False,
                    "review": i in review,
                    "scores": {self.names[k]: float(score_K[k]) for k in shown},
                    "thresholds": {self.names[k]: thresholds[self.names[k]] for k in shown},
                }
            )
        return described

    def explained(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """The explanations in a row of evidence.jsonl, one for each label."""
        return {"explanations": parts}
