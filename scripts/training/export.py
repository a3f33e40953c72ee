"""Results of a finished run: metrics, predictions and the complete best model. Used by train_hf.py."""

import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from modeling.file_utils import write_json, write_text
from modeling.hierarchical_roberta.decision import decision_of
from modeling.training.callbacks import HistoryCallback, is_timing
from modeling.training.metrics import absent_labels_note
from modeling.training.model_card import latex_paragraph, model_card
from modeling.training.trainer import WeightedTrainer
from scripts.common.predictions_io import write_predictions
from scripts.training.kinds import MultiLabel, SingleLabel
from scripts.training.output_dir import EXPORT

logger = logging.getLogger("train_hf")


def evaluate_splits(
    trainer: WeightedTrainer,
    documents: dict[str, Any],
    splits: datasets.DatasetDict,
    kind: SingleLabel | MultiLabel,
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
            kind.fit_decision(config, trainer.args.decision_metric, logits, label_ids)
        decision = decision_of(config)
        predicted, scores = decision.decide(logits), decision.scores(logits)
        if fitted := kind.fitted(config):
            metrics[split] |= kind.metrics(predicted, label_ids, scores)
        if trainer.is_world_process_zero():
            write_predictions(
                Path(trainer.args.output_dir) / f"predictions_{split}.csv", splits[split], kind.names, scores, predicted
            )
        optimistic = f" (optimistic: {fitted} were fitted on it)" if fitted and split == "validation" else ""
        absent = f" ({note})" if (note := absent_labels_note(metrics[split])) else ""
        chosen_by = (trainer.args.metric_for_best_model or "loss").removeprefix("eval_")
        chosen = "" if chosen_by in ("f1_macro", "loss") else f", {chosen_by} {metrics[split][chosen_by]:.4f}"
        logger.info(
            f"{split}: macro-F1 {metrics[split]['f1_macro']:.4f}{absent}{chosen}, loss {metrics[split]['loss']:.4f}{optimistic}."
        )
    return metrics


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
