"""Results of a finished run: metrics, predictions and the complete best model. Used by train_hf.py."""

import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from scipy.special import log_softmax

from data.documents import shorten
from modeling.file_utils import write_json, write_text
from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.decision import SeveralLabels, decide, decision_of
from modeling.training.calibration import fit_label_calibration, fit_temperature
from modeling.training.callbacks import HistoryCallback, is_timing
from modeling.training.decision_metric import fit_decision, parse_decision_metric
from modeling.training.metrics import classification_metrics, multi_label_metrics
from modeling.training.model_card import latex_paragraph, model_card
from modeling.training.thresholds import fit_thresholds, parse_threshold_metric
from modeling.training.trainer import WeightedTrainer
from scripts.common.predictions_io import write_predictions
from scripts.training.output_dir import EXPORT

logger = logging.getLogger("train_hf")


def evaluate_splits(
    trainer: WeightedTrainer,
    documents: dict[str, Any],
    splits: datasets.DatasetDict,
    labels: list[str],
    severity_weights: list[float],
) -> dict[str, dict[str, float]]:
    """Metrics of the best model on validation and test, and predictions_SPLIT.csv of each.

    The weights of the encoder and the lexical features, the calibration of the scores, and the class biases of
    `--decision_metric` or the thresholds of several labels are fitted on validation, in this order, and saved with the
    model: figures of validation are optimistic. With class biases or thresholds, metrics (but for the loss) and predictions
    are of the decisions."""
    metrics: dict[str, dict[str, float]] = {}
    config = trainer.accelerator.unwrap_model(trainer.model).config
    for split in ("validation", "test"):
        if split not in documents:
            continue
        output = trainer.predict(documents[split], metric_key_prefix=split)
        named = {name.removeprefix(f"{split}_"): value for name, value in (output.metrics or {}).items()}
        metrics[split] = {name: value for name, value in named.items() if not is_timing(name)}
        logits, label_ids = np.asarray(output.predictions, dtype=np.float64), np.asarray(output.label_ids)
        if split == "validation":
            if config.lexical_features:
                unused = "" if config.encoder_weight else " (what it adds to the words there may be chance)"
                logger.info(
                    f"Weights, fitted on validation: encoder {config.encoder_weight:.3f}{unused}, lexical features "
                    f"{config.lexical_weight:.3f}."
                )
            fit_decision_of(config, trainer.args.decision_metric, logits, label_ids, labels, severity_weights)
        decision = decision_of(config)
        predicted, scores = decision.decide(logits), decision.scores(logits)
        fitted = "thresholds" if config.is_multi_label else "class biases" if config.class_biases is not None else ""
        if config.is_multi_label:
            metrics[split] |= multi_label_metrics(predicted, label_ids, scores, labels)
        elif fitted:
            metrics[split] |= classification_metrics(predicted.tolist(), label_ids.tolist(), labels, severity_weights)
        if trainer.is_world_process_zero():
            write_predictions(
                Path(trainer.args.output_dir) / f"predictions_{split}.csv", splits[split], labels, scores, predicted
            )
        optimistic = f" (optimistic: {fitted} were fitted on it)" if fitted and split == "validation" else ""
        logger.info(
            f"{split}: macro-F1 {metrics[split]['f1_macro']:.4f}, loss {metrics[split]['loss']:.4f}{optimistic}."
        )
    return metrics


def fit_decision_of(
    config: HierarchicalRobertaConfig,
    decision_metric: str | None,
    logits_BK: np.ndarray,
    labels: np.ndarray,
    label_names: list[str],
    severity_weights: list[float],
) -> None:
    """Fit in `config` what turns logits into scores and labels, on validation documents.

    Args:
        labels: ids (B,), or with several labels a document 0 and 1 (B, K).
    """
    if config.is_multi_label:
        config.decision_metric = decision_metric or "f1_macro"
        config.label_calibration = fit_label_calibration(logits_BK, labels).tolist()
        scores_BK = SeveralLabels(config.label_calibration).scores(logits_BK)
        metric, recalls = parse_threshold_metric(config.decision_metric, label_names)
        config.thresholds = fit_thresholds(scores_BK, labels, metric, recalls).tolist()
        listed = [f"{name} {value:.3f}" for name, value in zip(label_names, config.thresholds, strict=True)]
        logger.info(
            f"Scores are calibrated for each label, and thresholds chosen for {config.decision_metric}, on validation: "
            f"{shorten(listed, 20)}."
        )
        return
    config.temperature = fit_temperature(logits_BK, labels)
    logger.info(f"Scores are softmax(logits / {config.temperature:.3f}), fitted on validation.")
    if decision_metric is not None:
        choose_class_biases(decision_metric, config, logits_BK, labels, label_names, severity_weights)


def choose_class_biases(
    decision_metric: str,
    config: HierarchicalRobertaConfig,
    logits_BK: np.ndarray,
    labels_B: np.ndarray,
    label_names: list[str],
    severity_weights: list[float],
) -> None:
    """Set the class biases in `config` that are best by `decision_metric` on validation documents."""
    metric = parse_decision_metric(decision_metric, label_names)
    log_scores_BK = log_softmax(logits_BK / config.temperature, axis=1)
    config.class_biases = fit_decision(metric, log_scores_BK, labels_B, severity_weights).tolist()
    config.decision_metric = decision_metric
    before, after = (
        classification_metrics(decide(log_scores_BK, biases).tolist(), labels_B.tolist(), label_names, severity_weights)
        for biases in (None, config.class_biases)
    )
    biases = ", ".join(f"{name} {bias:+.3f}" for name, bias in zip(label_names, config.class_biases, strict=True))
    recall = f"recall_{label_names[-1 if metric.label is None else metric.label]}"
    changes = ", ".join(
        f"{name} {before[name]:.4f} → {after[name]:.4f}" for name in dict.fromkeys(["f1_macro", metric.name, recall])
    )
    logger.info(f"Class biases for {decision_metric}, fitted on validation: {biases}; there {changes}.")
    if after[recall] < metric.recall - 1e-9:
        logger.warning(f"No class bias reaches {decision_metric} on validation.")


def export(
    trainer: WeightedTrainer, history: HistoryCallback, metrics: dict[str, dict[str, float]], labels: list[str]
) -> None:
    """Write the complete best model to output_dir, with its metrics and its card."""
    args = trainer.args
    folder = Path(args.output_dir)
    partial = folder / EXPORT
    trainer.save_model(str(partial))
    if not trainer.is_world_process_zero():
        return
    # Weights last: once they exist, everything else does.
    for path in sorted(partial.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        path.replace(folder / path.name)
    partial.rmdir()
    write_json(folder / "metrics.json", metrics)
    record = history.record(args, trainer.state)
    write_text(folder / "README.md", model_card(record, metrics, labels))
    write_text(folder / "training.tex", latex_paragraph(record, metrics, labels))
    best = (record["best"] or {}).get("epoch")
    chosen = f"Best epoch {best}" if args.load_best_model_at_end else "Last epoch"
    logger.info(
        f"{chosen}: the model, its metrics and its card are in {folder}. "
        f"Watch the curves with: tensorboard --logdir {folder}/runs"
    )
