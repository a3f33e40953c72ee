"""Evaluation of one label a document: what differs from several (multi_label.py, which has the same methods)."""

from typing import Any, ClassVar

import numpy as np

from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.decision import SingleLabelDecision
from modeling.training.calibration import expected_calibration_error, fit_temperature
from scripts.evaluation.baselines import majority_predictions, tfidf_scores, tuned_tfidf_scores, vector_scores
from scripts.evaluation.explanations import DocumentResult
from scripts.evaluation.faithfulness import pointing_game
from scripts.evaluation.figures import abstain_figure, confusion_png, curves_figure, reliability_figure
from scripts.evaluation.statistics import (
    Prediction,
    TextBaseline,
    abstain_curve,
    by_group,
    confusion,
    difference,
    metrics_with_intervals,
    operating_points,
)
from scripts.evaluation.tables import faithfulness_table, pointing_table, with_interval
from scripts.training import kinds

REVIEWED = 25


def highest(scores_BK: np.ndarray, options: str = "") -> Prediction:
    return Prediction(scores_BK.argmax(axis=1), scores_BK, options)


class SingleLabel(kinds.SingleLabel):
    """Metrics, baselines and the report's parts for one label a document."""

    counted: ClassVar[str] = "documents"
    baseline_titles: ClassVar[dict[str, str]] = {}
    printed: ClassVar[dict[str, str]] = {"macro-F1": "f1_macro", "accuracy": "accuracy"}

    def decision(
        self, config: HierarchicalRobertaConfig, validation_BK: np.ndarray, labels_B: np.ndarray
    ) -> tuple[SingleLabelDecision, dict[str, Any]]:
        """The model's decision, and what it takes that the config lacks (of older models, the temperature), fitted on
        validation."""
        fitted = {} if config.temperature is not None else {"temperature": fit_temperature(validation_BK, labels_B)}
        return SingleLabelDecision(fitted.get("temperature", config.temperature), config.class_biases), fitted

    # ---- baselines ----

    def text_baselines(self) -> dict[str, TextBaseline]:
        """TF-IDF, untuned and tuned, and the most frequent class."""
        return {
            "tfidf": lambda train, test: highest(tfidf_scores(train, test)),
            "tfidf_tuned": lambda train, test: highest(*tuned_tfidf_scores(train, test)),
            "majority": lambda train, test: highest(np.eye(len(self.names))[majority_predictions(train, test)]),
        }

    def vector_baseline(self, train_BD: np.ndarray, labels_B: np.ndarray, test_BD: np.ndarray) -> Prediction:
        return highest(vector_scores(train_BD, labels_B, test_BD, len(self.names)))

    def lexical_baseline(self, validation_BK: np.ndarray, labels_B: np.ndarray, logits_BK: np.ndarray) -> Prediction:
        return highest(logits_BK)

    # ---- metrics ----

    def intervals(
        self, prediction: Prediction, labels_B: np.ndarray, is_model: bool = True
    ) -> dict[str, dict[str, float]]:
        return metrics_with_intervals(labels_B, prediction.predicted, self.names, self.severity)

    def difference(self, labels_B: np.ndarray, model: Prediction, other: Prediction) -> dict[str, float]:
        return difference(labels_B, model.predicted, other.predicted, self.names)

    def measures(
        self,
        fields: dict[str, Any],
        model: Prediction,
        before_BK: np.ndarray,
        labels_B: np.ndarray,
        validation_BK: np.ndarray,
        validation_labels_B: np.ndarray,
        groups: dict[str, np.ndarray],
    ) -> dict[str, Any]:
        """The parts of metrics.json after the comparison with baselines.

        Args:
            fields: of the config, with what was fitted.
            before_BK: scores before calibration.
            validation_BK: calibrated scores.
        """
        predicted, scores = model.predicted, model.scores
        return {
            "calibration": {
                "temperature": fields["temperature"],
                "ece_before": expected_calibration_error(before_BK, labels_B),
                "ece_after": expected_calibration_error(scores, labels_B),
            },
            "operating_points": operating_points(validation_BK, validation_labels_B, scores, labels_B),
            "abstain": abstain_curve(scores, labels_B, predicted),
            "by_group": by_group(groups, labels_B, predicted, self.names),
            "confusion": confusion(labels_B, predicted, len(self.names))[0].tolist(),
        }

    def decision_measures(self, config: HierarchicalRobertaConfig, model: Prediction) -> dict[str, Any]:
        """The class biases and what they change; {} without any."""
        if (biases := config.class_biases) is None:
            return {}
        changed = int((model.predicted != model.scores.argmax(axis=1)).sum())
        biases_of = dict(zip(self.names, biases, strict=True))
        return {"decision": {"metric": config.decision_metric, "class_biases": biases_of, "not_highest_score": changed}}

    def pointing(
        self, results: list[DocumentResult], evidence: list[str], model: Prediction, labels_B: np.ndarray
    ) -> dict[str, Any]:
        """Pointing game on the documents of the most severe class, if classified correctly."""
        most_severe = len(self.names) - 1
        counted = [result for result in results if labels_B[result.index] == result.predicted == most_severe]
        return pointing_game(counted, evidence, self.names)

    # ---- the report ----

    def figures(self, evaluation: dict[str, Any]) -> list[tuple[str, str, str, bytes]]:
        """Name, title, caption and PNG of each figure."""
        metrics, labels = evaluation["metrics"], evaluation["labels"]
        return [
            ("confusion", "Confusion matrix",
             "Documents by label (row) and prediction (column), with the share of the row.",
             confusion_png(np.array(metrics["confusion"]), self.names)),
            ("curves", "Precision-recall and ROC curves", "Each class against the rest, over all thresholds.",
             curves_figure(evaluation["scores"], labels, self.names)),
            ("reliability", "Calibration (reliability diagram)",
             "On the diagonal, confidence equals accuracy; below it, the model is overconfident. Larger points hold more "
             "documents.",
             reliability_figure(evaluation["before"], evaluation["scores"], labels)),
            ("abstain", "Selective prediction",
             "Accuracy on the remaining documents when the least confident ones are sent to a human reviewer.",
             abstain_figure(metrics["abstain"])),
        ]  # fmt: skip

    def facts(self, metrics: dict[str, Any]) -> list[list[str]]:
        """The class biases, if any, and what they were fitted for."""
        if "decision" not in metrics:
            return []
        biases = ", ".join(f"{name} {bias:+.3f}" for name, bias in metrics["decision"]["class_biases"].items())
        return [["Decision", f"highest log score plus class bias ({biases}), fitted on validation for "
                 f"{metrics['decision']['metric']}"]]  # fmt: skip

    def calibration_facts(self, metrics: dict[str, Any]) -> list[list[str]]:
        return [["Temperature", f"{metrics['calibration']['temperature']:.3f}"]]

    def documents_note(self, metrics: dict[str, Any], count: int) -> str:
        """How to read the predictions, and what class biases change in them."""
        note = "“Too mild” means that the prediction is milder than the label, “too strict” that it is more severe."
        if "decision" not in metrics:
            return note
        return (
            f"{note} The prediction has the highest log score plus class bias, so that it need not have the highest score: "
            f"{metrics['decision']['not_highest_score']} of {count} documents, marked “by bias”, would be predicted "
            "otherwise without the biases."
        )

    def listed(self, metrics: dict[str, Any]) -> list[str]:
        """Labels in tables: all."""
        return self.names

    def headline_numbers(self, metrics: dict[str, Any]) -> list[dict[str, Any]]:
        """The headline metrics, each with a short explanation."""
        most_severe = self.names[-1]
        headline = [
            ("f1_macro", "Macro-F1", "mean F1 over the classes, equally weighted"),
            ("accuracy", "Accuracy", "share of documents classified correctly"),
            (
                f"missed_{most_severe}",
                f"Missed {most_severe}",
                f"share of {most_severe} documents predicted as a milder class",
            ),
            ("severity_f1", "Severity-weighted F1", "the most severe class counts most"),
            ("quadratic_kappa", "Quadratic kappa", "agreement beyond chance; larger errors cost more"),
        ]
        return [{"name": title, "note": note, **metrics["model"][key]} for key, title, note in headline]

    def compared(self) -> dict[str, str]:
        """Metrics of the comparison with baselines, and their titles."""
        most_severe = self.names[-1]
        return {"f1_macro": "Macro-F1", "accuracy": "Accuracy", f"recall_{most_severe}": f"Recall of {most_severe}"}

    def tables(self, metrics: dict[str, Any], documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Per-class metrics, operating points, subgroups, calibration, faithfulness and labels to review."""
        names, most_severe = self.names, self.names[-1]

        model, calibration = metrics["model"], metrics["calibration"]
        tables = [
            {
                "title": "Per-class metrics",
                "caption": "Precision: share of the predictions of a class that are correct. Recall: share of its "
                "documents that are found. With 95 % bootstrap intervals.",
                "columns": ["class", "precision", "recall", "F1"],
                "rows": [
                    [n, *(with_interval(model[f"{kind}_{n}"]) for kind in ("precision", "recall", "f1"))] for n in names
                ],
            },
            {
                "title": f"Operating points for {most_severe}",
                "caption": "Score thresholds chosen on validation for the target recall; documents with at least that "
                "score are flagged. The other columns are measured on this split.",
                "columns": ["target recall", "threshold", "recall", "precision", "flagged"],
                "rows": [
                    [f"{p['target_recall']:.0%}", f"{p['threshold']:.6g}"]
                    + [f"{p[key]:.1%}" for key in ("recall", "precision", "flagged_share")]
                    for p in metrics["operating_points"]
                ],
            },
            {
                "title": "Subgroup metrics",
                "caption": "Which documents are harder: by length, number of chunks, truncation, position of the strongest "
                "chunk, and the kept columns.",
                "columns": ["subgroup", "documents", "accuracy", "macro-F1", f"{most_severe} missed"],
                "rows": [
                    [g["group"], g["documents"], f"{g['accuracy']:.3f}", f"{g['f1_macro']:.3f}",
                     "–" if np.isnan(g[f"missed_{most_severe}"]) else f"{g[f'missed_{most_severe}']:.3f}"]
                    for g in metrics["by_group"]
                ],
            },
            {
                "title": "Error distance",
                "caption": "How many steps the prediction is from the label: "
                f"{model['mean_distance']['value']:.3f} on average.",
                "columns": ["prediction", "documents", "share"],
                "rows": distances(np.array(metrics["confusion"])),
            },
            {
                "title": "Selective prediction",
                "caption": "The model classifies the documents with at least the threshold confidence (coverage), with this "
                "accuracy; the others go to a human reviewer.",
                "columns": ["threshold", "coverage", "accuracy"],
                "rows": [
                    [f"{row['confidence']:.3f}", f"{row['kept_share']:.0%}", f"{row['accuracy']:.3f}"]
                    for row in metrics["abstain"][::4]
                ],
            },
            {
                "title": "Calibration",
                "caption": "Whether confidence can be trusted. Expected calibration error: mean gap between confidence and "
                "accuracy.",
                "columns": ["", "expected calibration error"],
                "rows": [
                    ["before temperature scaling", f"{calibration['ece_before']:.3f}"],
                    [f"after, with temperature {calibration['temperature']:.2f}", f"{calibration['ece_after']:.3f}"],
                ],
            },
        ]  # fmt: skip
        tables += faithfulness_table(metrics["faithfulness"], self.counted)
        tables += pointing_table(metrics, f"correctly classified {most_severe} documents")
        disagreements = sorted((d for d in documents if d["review"]), key=lambda d: -d["confidence"])
        if disagreements:
            tables.append(
                {
                    "title": "Labels to review",
                    "caption": "Possible labeling errors: documents where the model most confidently disagrees with the "
                    "label.",
                    "columns": ["document", "label", "prediction", "confidence"],
                    "rows": [[d["id"], d["label"], d["predicted"], f"{d['confidence']:.3f}"] for d in disagreements],
                }
            )
        return tables

    def describe(self, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
        """What the list of documents shows of each: label, prediction, confidence, whether to review it, scores."""
        scores, labels, predicted = evaluation["scores"], evaluation["labels"], evaluation["predicted"]
        confidence = scores[np.arange(len(scores)), predicted]
        wrong = np.flatnonzero(predicted != labels)
        review = set(wrong[np.argsort(-confidence[wrong], kind="stable")][:REVIEWED].tolist())
        return [
            {
                "label": self.names[labels[i]],
                "predicted": self.names[predicted[i]],
                "confidence": float(confidence[i]),
                "by_bias": bool(predicted[i] != score_K.argmax()),
                "review": i in review,
                "scores": dict(zip(self.names, score_K.tolist(), strict=True)),
            }
            for i, score_K in enumerate(scores)
        ]

    def explained(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """The explanation in a row of evidence.jsonl."""
        [part] = parts
        return {"chunks": part["chunks"], "evidence": part["evidence"]}


def distances(confusion_KK: np.ndarray) -> list[list[Any]]:
    """Documents by signed distance between prediction and label."""
    size, total = len(confusion_KK), max(int(confusion_KK.sum()), 1)
    rows = []
    for step in range(1 - size, size):
        count = int(np.trace(confusion_KK, offset=step))
        distance = f"{abs(step)} step{'s' if abs(step) > 1 else ''} too {'strict' if step > 0 else 'mild'}"
        name = distance if step else "correct"
        rows.append([name, count, f"{count / total:.1%}"])
    return rows
