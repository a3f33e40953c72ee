"""Evaluation of a split: metrics, baselines, explanations, report. Used by scripts/evaluate_and_explain.py."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
import transformers
from scipy.special import softmax
from transformers import PreTrainedTokenizerBase

from data.chunk_dataset import ChunkedDocuments
from data.collator import DocumentCollator
from data.prepared_dataset import load_prepared
from modeling.file_utils import write_json, write_text
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.training.calibration import expected_calibration_error, fit_temperature
from modeling.training.model_card import latex_paragraph, model_card
from modeling.training.runtime import set_num_threads
from modeling.training.training_args import parse_severity_weights
from scripts.common.loading import load_classifier
from scripts.common.predictions_io import metadata_columns, write_lines, write_predictions
from scripts.evaluation.baselines import majority_predictions, tfidf_scores, tuned_tfidf_scores, vector_scores
from scripts.evaluation.explanations import DocumentResult, explain_chunks, explain_sentences, read_documents
from scripts.evaluation.faithfulness import chunk_curves, pointing_game, sentence_curves
from scripts.evaluation.figures import (
    abstain_figure,
    confusion_png,
    curves_figure,
    faithfulness_figure,
    reliability_figure,
)
from scripts.evaluation.report import write_report
from scripts.evaluation.report_content import report_content
from scripts.evaluation.statistics import (
    abstain_curve,
    by_group,
    confusion,
    difference,
    metrics_with_intervals,
    operating_points,
)

MOST_GROUPS = 8  # subgroups of a kept column
BASELINES = {
    "tfidf_tuned": "tuned TF-IDF + logistic regression",
    "tfidf": "TF-IDF + logistic regression, untuned",
    "first_chunk": "first chunk only",
    "head_tail": "first and last chunk only",
    "majority": "majority class",
    "words_alone": "this model's lexical features only",
}


@dataclass
class EvaluationContext:
    """The model, its tokenizer and the prepared splits that are evaluated."""

    model: HierarchicalRobertaForSequenceClassification
    tokenizer: PreTrainedTokenizerBase
    splits: datasets.DatasetDict
    manifest: dict[str, Any]

    @property
    def names(self) -> list[str]:
        return self.splits["train"].features["label"].names

    def labels(self, split: str) -> np.ndarray:
        return np.asarray(self.splits[split]["label"], dtype=np.int64)

    def chunked(self, split: str, **geometry: Any) -> ChunkedDocuments:
        """The documents of a split, chunked as the model's config says, except for `geometry`."""
        config = self.model.config
        names = ("chunk_length", "chunk_overlap", "max_chunks", "chunk_policy", "chunk_prefix")
        defaults = {name: getattr(config, name) for name in names}
        lexical = self.model.lexical_features_on_host() if config.chunk_policy == "lexical" else None
        return ChunkedDocuments(self.splits[split], self.tokenizer, lexical=lexical, **(defaults | geometry))

    def predict(self, chunked: ChunkedDocuments) -> list[DocumentResult]:
        return list(read_documents(self.model, chunked, DocumentCollator(self.tokenizer.pad_token_id)))


def load_context(model_name: str, dataset_dir: str, split: str) -> EvaluationContext:
    """Load the model and the data.

    Raises:
        ValueError: a split is missing, or the model's labels are not those of the data.
    """
    model, tokenizer = load_classifier(model_name)
    splits, manifest = load_prepared(dataset_dir, tokenizer)
    if missing := [name for name in ("train", "validation", split) if name not in splits]:
        raise ValueError(f"{dataset_dir} has no split {', '.join(missing)}; available: {', '.join(splits)}.")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    context = EvaluationContext(model.to(device), tokenizer, splits, manifest)
    labels = [model.config.id2label[k] for k in range(model.config.num_labels)]
    if labels != context.names:
        raise ValueError(
            f"The labels of {model_name} ({', '.join(labels)}) differ from those of {dataset_dir} "
            f"({', '.join(context.names)}): prepare the data with --labels in the model's order."
        )
    return context


def evaluate_baselines(
    context: EvaluationContext, split: str, results: list[DocumentResult]
) -> tuple[dict[str, np.ndarray], str]:
    """Predictions (B,) of each baseline on a split, and what the tuned TF-IDF chose. Those on one or two chunks are
    logistic regressions on this encoder's vectors of the training documents."""
    train, test = context.splits["train"], context.splits[split]
    size = context.model.config.hidden_size
    vectors = {}
    for name in ("train", split):
        ends = context.predict(context.chunked(name, max_chunks=2, chunk_policy="head_tail"))
        vectors[name] = np.stack([r.chunk_CD[[0, -1], :size].flatten().cpu().numpy() for r in ends])
    labels, num_labels = context.labels("train"), len(context.names)
    lexical = context.model.lexical
    lexical_logits = []
    if lexical is not None:
        counts = (result.document_counts(context.model) for result in results)
        lexical_logits = [lexical(count_M[None]) for count_M in counts if count_M is not None]
    tuned_BK, chosen = tuned_tfidf_scores(train, test)
    baselines = {
        "tfidf_tuned": tuned_BK.argmax(axis=1),
        "tfidf": tfidf_scores(train, test).argmax(axis=1),
        "first_chunk": vector_scores(vectors["train"][:, :size], labels, vectors[split][:, :size], num_labels).argmax(
            axis=1
        ),
        "head_tail": vector_scores(vectors["train"], labels, vectors[split], num_labels).argmax(axis=1),
        "majority": majority_predictions(train, test),
    }
    if lexical_logits:
        baselines["words_alone"] = torch.cat(lexical_logits).argmax(dim=1).cpu().numpy()
    return baselines, chosen


def subgroups(results: list[DocumentResult], texts: list[str]) -> dict[str, np.ndarray]:
    """Masks (B,) by length, number of chunks, truncation and position of the strongest chunk."""
    groups = {}
    for unit, sizes in (
        ("characters", np.array([len(text) for text in texts])),
        ("chunks", np.array([len(result.bounds) for result in results])),
    ):
        edges = np.unique(np.quantile(sizes, [0, 0.25, 0.5, 0.75, 1]).round().astype(int)).tolist()
        for low, high in pairwise(edges):
            first = low if low == edges[0] else low + 1
            name = f"{first:,} to {high:,} {unit}" if first < high else f"{high:,} {unit}"
            groups[name] = (sizes >= first) & (sizes <= high)
    groups["not truncated"] = np.array([not result.truncated for result in results])
    groups["truncated at max_chunks"] = np.array([result.truncated for result in results])
    if not any(end for result in results for _, end in result.spans):
        return groups  # legacy tensors have no character offsets
    middle = np.array([sum(result.span_of(result.strongest()[0])) / 2 for result in results])
    position = middle / np.maximum([len(text) for text in texts], 1)
    groups["evidence in the first third"] = position < 1 / 3
    groups["evidence in the middle third"] = (position >= 1 / 3) & (position < 2 / 3)
    groups["evidence in the last third"] = position >= 2 / 3
    return groups


def metadata_groups(columns: dict[str, list[Any]]) -> dict[str, np.ndarray]:
    """Masks (B,) by the values of each kept column: the most frequent ones, or quarters of more numbers than that."""
    groups = {}
    for name, values in columns.items():
        texts = ["" if value is None else str(value) for value in values]
        counts = Counter(text for text in texts if text)
        numbers = pd.to_numeric(pd.Series(texts), errors="coerce").to_numpy()
        if len(counts) > MOST_GROUPS and np.isfinite(numbers).sum() == counts.total():
            edges = np.unique(np.nanquantile(numbers, [0, 0.25, 0.5, 0.75, 1]))
            for low, high in pairwise(edges):
                mask = (numbers <= high) & ((numbers > low) | (low == edges[0]) & (numbers == low))
                groups[f"{name} {'from' if low == edges[0] else 'above'} {low:g} to {high:g}"] = mask
        elif counts.most_common(1) and counts.most_common(1)[0][1] > 1:  # not a column of names
            for value, _ in counts.most_common(MOST_GROUPS):
                groups[f"{name}: {value[:60]}"] = np.array([text == value for text in texts])
    return groups


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Result and duration (seconds) of `function`."""
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def evaluate(context: EvaluationContext, split: str, severity: list[float], with_sentences: bool) -> dict[str, Any]:
    """Evaluate `split`.

    Returns:
        `metrics` in the layout of metrics.json, and for the report `results` (B), `scores` and `before` (B, K, after
        and before temperature scaling), `labels` and `predicted` (B,).
    """
    names, labels = context.names, context.labels(split)
    chunked = context.chunked(split)
    validation = np.stack([r.logits_K.cpu().numpy() for r in context.predict(context.chunked("validation"))])
    results, predict_seconds = timed(lambda: context.predict(chunked))
    logits = np.stack([result.logits_K.cpu().numpy() for result in results]).astype(np.float64)
    temperature = context.model.config.temperature
    if temperature is None:
        temperature = fit_temperature(validation, context.labels("validation"))
    scores, before = softmax(logits / temperature, axis=1), softmax(logits, axis=1)
    predicted = np.array([result.predicted for result in results])
    print(f"Evaluated {len(results)} documents in {predict_seconds:.1f} s. Running baselines…", flush=True)
    baselines, chosen = evaluate_baselines(context, split, results)
    print("Computing explanations…", flush=True)
    _, chunk_seconds = timed(lambda: explain_chunks(context.model, results))
    sentence_seconds = 0.0
    if with_sentences:
        _, sentence_seconds = timed(lambda: explain_sentences(context.model, context.tokenizer, chunked, results))
    documents = context.splits[split]
    gold_evidence = list(documents["evidence"]) if "evidence" in documents.column_names else [""] * len(documents)
    metrics = {
        "model": metrics_with_intervals(labels, predicted, names, severity),
        "baselines": {
            name: metrics_with_intervals(labels, baseline, names, severity)
            | {"difference_f1_macro": difference(labels, predicted, baseline, names)}
            for name, baseline in baselines.items()
        },
        "tfidf_tuned_options": chosen,
        "calibration": {
            "temperature": temperature,
            "ece_before": expected_calibration_error(before, labels),
            "ece_after": expected_calibration_error(scores, labels),
        },
        "operating_points": operating_points(
            softmax(validation / temperature, axis=1), context.labels("validation"), scores, labels
        ),
        "abstain": abstain_curve(scores, labels, predicted),
        "by_group": by_group(
            subgroups(results, documents["text"]) | metadata_groups(metadata_columns(documents)),
            labels,
            predicted,
            names,
        ),
        "confusion": confusion(labels, predicted, len(names))[0].tolist(),
        "faithfulness": {
            "chunk": chunk_curves(context.model, results),
            "sentence": sentence_curves(context.model, chunked, results) if with_sentences else {},
        },
        "cost": {
            "predict_seconds": predict_seconds,
            "explain_chunks_seconds": chunk_seconds,
            "explain_sentences_seconds": sentence_seconds,
        },
    }
    if (biases := context.model.config.class_biases) is not None:
        metrics["decision"] = {
            "metric": context.model.config.decision_metric,
            "class_biases": dict(zip(names, biases, strict=True)),
            "not_highest_score": int((predicted != scores.argmax(axis=1)).sum()),
        }
    if any(gold_evidence):
        metrics["pointing"] = pointing_game(results, gold_evidence, labels, len(names) - 1)
    arrays = {"scores": scores, "before": before, "labels": labels, "predicted": predicted}
    return {"metrics": metrics, "results": results, **arrays}


def figures_of(evaluation: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """`{"name", "title", "caption", "png"}` of each figure."""
    metrics, labels = evaluation["metrics"], evaluation["labels"]
    figures = [
        ("confusion", "Confusion matrix",
         "Documents by label (row) and prediction (column), with the share of the row.",
         confusion_png(np.array(metrics["confusion"]), names)),
        ("curves", "Precision-recall and ROC curves", "Each class against the rest, over all thresholds.",
         curves_figure(evaluation["scores"], labels, names)),
        ("reliability", "Calibration (reliability diagram)",
         "On the diagonal, confidence equals accuracy; below it, the model is overconfident. Larger points hold more "
         "documents.",
         reliability_figure(evaluation["before"], evaluation["scores"], labels)),
        ("abstain", "Selective prediction",
         "Accuracy on the remaining documents when the least confident ones are sent to a human reviewer.",
         abstain_figure(metrics["abstain"])),
    ]  # fmt: skip
    for unit, amount in (("chunk", "share of chunks"), ("sentence", "sentences")):
        if curves := metrics["faithfulness"][unit]:
            title = f"Faithfulness of {unit} attributions"
            caption = (
                f"Mean over {curves['documents']} documents. Left: the strongest {unit}s are deleted, lower is better. "
                "Right: only they are kept, higher is better."
            )
            figures.append((f"faithfulness_{unit}", title, caption, faithfulness_figure(curves, amount)))
    return [dict(zip(("name", "title", "caption", "png"), figure, strict=True)) for figure in figures]


def evaluate_and_explain(arguments: argparse.Namespace) -> None:
    """Evaluate a split and write the report, metrics, predictions, evidence and figures."""
    set_num_threads(arguments.cpu_threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder: Path = arguments.output_dir
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; expected a directory or a new path.")
    if folder.exists() and folder.resolve() == Path(arguments.model).resolve():
        raise ValueError(
            f"--output_dir {folder} is the model's directory, whose metrics.json would be overwritten: choose another."
        )
    context = load_context(arguments.model, arguments.dataset_dir, arguments.split)
    severity = parse_severity_weights(arguments.severity_weights, len(context.names))
    evaluation = evaluate(context, arguments.split, severity, not arguments.no_sentences)
    figures = figures_of(evaluation, context.names)
    documents = context.splits[arguments.split]
    content = report_content(arguments.model, arguments.split, documents, context, evaluation, BASELINES)
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        (folder / f"{figure['name']}.png").write_bytes(figure["png"])
    write_predictions(
        folder / "predictions.csv", documents, context.names, evaluation["scores"], evaluation["predicted"]
    )
    write_lines(folder / "evidence.jsonl", content.pop("evidence_lines"))
    write_json(folder / "metrics.json", evaluation["metrics"])
    write_report({**content, "figures": figures}, folder / "report.html")
    print(content["headline"])
    if "pointing" in evaluation["metrics"]:
        print(f"Pointing game: {json.dumps(evaluation['metrics']['pointing'])}")
    print(f"Report: {folder / 'report.html'} (open it in a browser).")
    try:
        keep_temperature(arguments.model, context.model, evaluation["metrics"]["calibration"]["temperature"])
        rewrite_card(Path(arguments.model), {**evaluation["metrics"], "split": arguments.split}, context)
    except OSError as error:
        print(f"{arguments.model} was not updated: {error}", file=sys.stderr)


def keep_temperature(name: str, model: HierarchicalRobertaForSequenceClassification, temperature: float) -> None:
    """Save the temperature in the config of a local model that has none, i.e. an older one."""
    path = Path(name) / "config.json"
    if model.config.temperature is None and path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, config | {"temperature": temperature})
        print(f"Saved the temperature {temperature:.3f}, fitted on validation, to {path}.")


def rewrite_card(folder: Path, evaluation: dict[str, Any], context: EvaluationContext) -> None:
    """Add this evaluation to the model card of a local run, if it was trained on the same data."""
    history, metrics = folder / "training_history.json", folder / "metrics.json"
    if history.is_file() and metrics.is_file():
        record, trained = (json.loads(path.read_text(encoding="utf-8")) for path in (history, metrics))
        if record["config"].get("data_fingerprint") != context.manifest["data_fingerprint"]:
            print(f"{folder} was trained on other data: its model card was not updated.")
            return
        write_text(folder / "README.md", model_card(record, trained, context.names, evaluation))
        write_text(folder / "training.tex", latex_paragraph(record, trained, context.names, evaluation))
        print(f"Added these results to {folder / 'README.md'} and training.tex.")
