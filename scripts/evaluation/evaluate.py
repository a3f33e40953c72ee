"""Evaluation of a split: metrics, baselines, explanations, report. Used by scripts/evaluate_and_explain.py."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from data.chunk_dataset import ChunkedDocuments
from data.collator import DocumentCollator
from data.documents import shorten
from data.labels import label_array
from data.prepared_dataset import load_prepared
from modeling.file_utils import write_json, write_text
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.training.model_card import latex_paragraph, model_card
from modeling.training.runtime import set_num_threads
from scripts.common.loading import load_classifier
from scripts.common.predictions_io import metadata_columns, write_lines, write_predictions
from scripts.evaluation.explanations import DocumentResult, explain_chunks, explain_sentences, read_documents
from scripts.evaluation.faithfulness import chunk_curves, sentence_curves
from scripts.evaluation.figures import faithfulness_figure
from scripts.evaluation.kinds import kind_of
from scripts.evaluation.multi_label import MultiLabel
from scripts.evaluation.report import write_report
from scripts.evaluation.report_content import report_content
from scripts.evaluation.single_label import SingleLabel
from scripts.evaluation.statistics import Prediction

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
    kind: SingleLabel | MultiLabel

    @property
    def names(self) -> list[str]:
        return self.kind.names

    def labels(self, split: str) -> np.ndarray:
        return label_array(self.splits[split])

    def chunked(self, split: str, **geometry: Any) -> ChunkedDocuments:
        """The documents of a split, chunked as the model's config says, except for `geometry`."""
        config = self.model.config
        names = ("chunk_length", "chunk_overlap", "max_chunks", "chunk_policy", "chunk_prefix")
        defaults = {name: getattr(config, name) for name in names}
        lexical = self.model.lexical_features_on_host() if config.chunk_policy == "lexical" else None
        return ChunkedDocuments(self.splits[split], self.tokenizer, lexical=lexical, **(defaults | geometry))

    def predict(self, chunked: ChunkedDocuments) -> list[DocumentResult]:
        return list(read_documents(self.model, chunked, DocumentCollator(self.tokenizer.pad_token_id)))


def load_context(
    model_name: str, dataset_dir: str, split: str, severity_weights: str | None = None
) -> EvaluationContext:
    """Load the model and the data.

    Raises:
        ValueError: a split is missing, the model's labels are not those of the data, or one has several labels a document and
            the other one.
    """
    model, tokenizer = load_classifier(model_name)
    splits, manifest = load_prepared(dataset_dir, tokenizer)
    if missing := [name for name in ("train", "validation", split) if name not in splits]:
        raise ValueError(f"{dataset_dir} has no split {', '.join(missing)}; available: {', '.join(splits)}.")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    kind = kind_of(splits["train"], severity_weights)
    if kind.is_multi_label != model.config.is_multi_label:
        number = {True: "several labels", False: "one label"}
        raise ValueError(
            f"{model_name} gives a document {number[model.config.is_multi_label]}, and {dataset_dir} has "
            f"{number[kind.is_multi_label]} a document: evaluate it on data prepared with its --problem_type."
        )
    context = EvaluationContext(model.to(device), tokenizer, splits, manifest, kind)
    labels = [model.config.id2label[k] for k in range(model.config.num_labels)]
    if labels != context.names:
        raise ValueError(
            f"The labels of {model_name} ({shorten(labels, 20)}) differ from those of {dataset_dir} "
            f"({shorten(context.names, 20)}): prepare the data with --labels in the model's order."
        )
    return context


def evaluate_baselines(
    context: EvaluationContext, split: str, results: list[DocumentResult], validation_results: list[DocumentResult]
) -> dict[str, Prediction]:
    """Predictions of each baseline on a split. Those on one or two chunks are logistic regressions on this encoder's vectors of
    the training documents."""
    kind, size, labels = context.kind, context.model.config.hidden_size, context.labels("train")
    vectors = {}
    for name in ("train", split):
        ends = context.predict(context.chunked(name, max_chunks=2, chunk_policy="head_tail"))
        vectors[name] = np.stack([r.chunk_CD[[0, -1], :size].flatten().cpu().numpy() for r in ends])
    parts = context.splits["train"], context.splits[split]
    text = {name: baseline(*parts) for name, baseline in kind.text_baselines().items()}
    baselines = {
        "tfidf_tuned": text["tfidf_tuned"],
        "tfidf": text["tfidf"],
        "first_chunk": kind.vector_baseline(vectors["train"][:, :size], labels, vectors[split][:, :size]),
        "head_tail": kind.vector_baseline(vectors["train"], labels, vectors[split]),
        "majority": text["majority"],
    }
    if context.model.lexical is not None:
        validation, logits = (lexical_logits(context.model, each) for each in (validation_results, results))
        baselines["words_alone"] = kind.lexical_baseline(validation, context.labels("validation"), logits)
    return baselines


@torch.no_grad()
def lexical_logits(model: HierarchicalRobertaForSequenceClassification, results: list[DocumentResult]) -> np.ndarray:
    """Logits (B, K) of the model's lexical features alone."""
    assert model.lexical is not None
    counts = (result.document_counts(model) for result in results)
    return torch.cat([model.lexical(count_M[None]) for count_M in counts if count_M is not None]).cpu().numpy()


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


def evaluate(context: EvaluationContext, split: str, with_sentences: bool) -> dict[str, Any]:
    """Evaluate `split`.

    Returns:
        `metrics` in the layout of metrics.json; `fitted`, what the model's config lacks; and for the report `explained` (of
        each document, a result for each label), `scores` and `before` (B, K, after and before calibration), `labels` and
        `predicted` (B,), or with several labels a document (B, K).
    """
    kind, config, labels, validation_labels = (
        context.kind,
        context.model.config,
        *map(context.labels, (split, "validation")),
    )
    chunked = context.chunked(split)
    validation_results = context.predict(context.chunked("validation"))
    results, predict_seconds = timed(lambda: context.predict(chunked))
    validation, logits = logits_of(validation_results), logits_of(results)
    decision, fitted = kind.decision(config, validation, validation_labels)
    model, before = Prediction(decision.decide(logits), decision.scores(logits)), type(decision)().scores(logits)
    print(f"Evaluated {len(results)} documents in {predict_seconds:.1f} s. Running baselines…", flush=True)
    baselines = evaluate_baselines(context, split, results, validation_results)
    print("Computing explanations…", flush=True)
    explained = [result.by_label() for result in results]
    each = list(chain.from_iterable(explained))
    _, chunk_seconds = timed(lambda: explain_chunks(context.model, each))
    sentence_seconds = 0.0
    if with_sentences:
        _, sentence_seconds = timed(lambda: explain_sentences(context.model, context.tokenizer, chunked, each))
    documents = context.splits[split]
    gold_evidence = list(documents["evidence"]) if "evidence" in documents.column_names else [""] * len(documents)
    groups = subgroups(results, documents["text"]) | metadata_groups(metadata_columns(documents))
    metrics = {
        "model": kind.intervals(model, labels),
        "baselines": {
            name: kind.intervals(baseline, labels, is_model=False)
            | {"difference_f1_macro": kind.difference(labels, model, baseline)}
            for name, baseline in baselines.items()
        },
        "tfidf_tuned_options": baselines["tfidf_tuned"].options,
        **kind.measures(
            config.to_dict() | fitted, model, before, labels, decision.scores(validation), validation_labels, groups
        ),
        "faithfulness": {
            "chunk": chunk_curves(context.model, each),
            "sentence": sentence_curves(context.model, chunked, each) if with_sentences else {},
        },
        "cost": {
            "predict_seconds": predict_seconds,
            "explain_chunks_seconds": chunk_seconds,
            "explain_sentences_seconds": sentence_seconds,
        },
        **kind.decision_measures(config, model),
    }
    if any(gold_evidence):
        metrics["pointing"] = kind.pointing(each, gold_evidence, model, labels)
    arrays = {"scores": model.scores, "before": before, "labels": labels, "predicted": model.predicted}
    return {"metrics": metrics, "fitted": fitted, "explained": explained, **arrays}


def logits_of(results: list[DocumentResult]) -> np.ndarray:
    """(B, K), float64."""
    return np.stack([result.logits_K.cpu().numpy() for result in results]).astype(np.float64)


def figures_of(evaluation: dict[str, Any], kind: SingleLabel | MultiLabel) -> list[dict[str, Any]]:
    """`{"name", "title", "caption", "png"}` of each figure."""
    figures = kind.figures(evaluation)
    for unit, amount in (("chunk", "share of chunks"), ("sentence", "sentences")):
        if curves := evaluation["metrics"]["faithfulness"][unit]:
            title = f"Faithfulness of {unit} attributions"
            caption = (
                f"Mean over {curves['documents']} {kind.counted}. Left: the strongest {unit}s are deleted, lower is better. "
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
    context = load_context(arguments.model, arguments.dataset_dir, arguments.split, arguments.severity_weights)
    evaluation = evaluate(context, arguments.split, not arguments.no_sentences)
    figures = figures_of(evaluation, context.kind)
    documents = context.splits[arguments.split]
    titles = BASELINES | context.kind.baseline_titles
    content = report_content(arguments.model, arguments.split, documents, context, evaluation, titles)
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
        hits = evaluation["metrics"]["pointing"]
        shares = [f"top {unit} {hits[unit]:.3f}" for unit in ("chunk", "sentence") if unit in hits]
        print(f"Pointing game, on {hits['documents']} {context.kind.counted}: {', '.join(shares) or 'none'}")
    print(f"Report: {folder / 'report.html'} (open it in a browser).")
    try:
        keep_fitted(arguments.model, evaluation["fitted"])
        rewrite_card(Path(arguments.model), {**evaluation["metrics"], "split": arguments.split}, context)
    except OSError as error:
        print(f"{arguments.model} was not updated: {error}", file=sys.stderr)


def keep_fitted(name: str, fitted: dict[str, Any]) -> None:
    """Save in the config of a local model what it lacks, i.e. the temperature of an older one."""
    path = Path(name) / "config.json"
    if fitted and path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, config | fitted)
        values = ", ".join(f"{key} {value:.3f}" for key, value in fitted.items())
        print(f"Saved the {values}, fitted on validation, to {path}.")


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
