"""How good a model is, on which texts it fails, where in them the evidence stands, and when to ask a person.

    python -m scripts.evaluate_and_explain --model outputs/run --dataset_dir outputs/stories --output_dir outputs/report

Writes report.html, metrics.json, predictions.csv, evidence.jsonl and the figures. Thresholds come from the validation
split, and so does the temperature of the scores where the model brings none.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
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
from scripts.common.cli import UserParser, run_main
from scripts.common.loading import load_classifier
from scripts.common.predictions_io import write_lines, write_predictions
from scripts.evaluation.baselines import majority_predictions, tfidf_scores, vector_scores
from scripts.evaluation.explanations import DocumentResult, explain_chunks, explain_sentences, read_documents
from scripts.evaluation.faithfulness import chunk_curves, pointing_game, sentence_curves
from scripts.evaluation.figures import (
    abstain_figure,
    confusion_figure,
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

BASELINES = {
    "tfidf": "TF-IDF + logistic regression",
    "first_chunk": "first chunk only",
    "head_tail": "first and last chunk",
    "majority": "always the most frequent label",
    "words_alone": "this model's lexical view alone",
}


def parse_arguments() -> argparse.Namespace:
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run's output_dir, or a model on the hub")
    parser.add_argument("--dataset_dir", required=True, help="a folder made by scripts.prepare_dataset")
    parser.add_argument("--split", default="test")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--severity_weights", help="of the labels in severity_f1: 0.3,0.3,0.4 (the default for three)")
    parser.add_argument("--no_sentences", action="store_true", help="chunks only: no token attributions, much faster")
    parser.add_argument("--cpu_threads", type=int, default=0)
    return parser.parse_args()


@dataclass
class EvaluationContext:
    """What is evaluated: a model, its tokenizer, and prepared splits."""

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
        """A split's documents in the model's chunks."""
        config = self.model.config
        own = {name: getattr(config, name) for name in ("chunk_length", "chunk_overlap", "max_chunks", "chunk_policy")}
        return ChunkedDocuments(self.splits[split], self.tokenizer, **(own | geometry))

    def read(self, chunked: ChunkedDocuments) -> list[DocumentResult]:
        return list(read_documents(self.model, chunked, DocumentCollator(self.tokenizer.pad_token_id)))


def load_subject(model_name: str, dataset_dir: str, split: str) -> EvaluationContext:
    """Raises ValueError where model, data and split do not go together."""
    model, tokenizer = load_classifier(model_name)
    splits, manifest = load_prepared(dataset_dir, tokenizer)
    if missing := [name for name in ("train", "validation", split) if name not in splits]:
        raise ValueError(f"{dataset_dir} has no split {', '.join(missing)}; there are {', '.join(splits)}.")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    subject = EvaluationContext(model.to(device), tokenizer, splits, manifest)
    own = [model.config.id2label[k] for k in range(model.config.num_labels)]
    if own != subject.names:
        raise ValueError(
            f"The model's labels are {', '.join(own)}, and those of {dataset_dir} are {', '.join(subject.names)}."
        )
    return subject


def evaluate_baselines(subject: EvaluationContext, split: str, readings: list[DocumentResult]) -> dict[str, np.ndarray]:
    """Predictions (B,) of the honest neighbours of what was read of a split. Those that read a chunk or two are logistic regressions on this very
    encoder's vectors of the training documents."""
    train, part = subject.splits["train"], subject.splits[split]
    size = subject.model.config.hidden_size
    vectors = {}
    for name in ("train", split):
        ends = subject.read(subject.chunked(name, max_chunks=2, chunk_policy="head_tail"))
        vectors[name] = np.stack([r.chunk_CD[[0, -1], :size].flatten().cpu().numpy() for r in ends])
    labels, num_labels = subject.labels("train"), len(subject.names)
    view = subject.model.lexical
    alone = (
        [] if view is None else [view(r.chunk_CD[:, size:].to(view.weight.device), [len(r.chunk_CD)]) for r in readings]
    )
    return {
        "tfidf": tfidf_scores(train, part).argmax(axis=1),
        "first_chunk": vector_scores(vectors["train"][:, :size], labels, vectors[split][:, :size], num_labels).argmax(
            axis=1
        ),
        "head_tail": vector_scores(vectors["train"], labels, vectors[split], num_labels).argmax(axis=1),
        "majority": majority_predictions(train, part),
    } | ({"words_alone": torch.cat(alone).argmax(dim=1).cpu().numpy()} if alone else {})


def groups_of(readings: list[DocumentResult], texts: list[str]) -> dict[str, np.ndarray]:
    """Documents by length, by number of chunks, by where their strongest chunk stands, and those that were cut."""
    groups = {}
    for unit, sizes in (
        ("characters", np.array([len(text) for text in texts])),
        ("chunks", np.array([len(reading.bounds) for reading in readings])),
    ):
        marks = np.unique(np.quantile(sizes, [0, 0.25, 0.5, 0.75, 1]).round().astype(int)).tolist()
        for low, high in pairwise(marks):
            first = low if low == marks[0] else low + 1
            name = f"{first:,} to {high:,} {unit}" if first < high else f"{high:,} {unit}"
            groups[name] = (sizes >= first) & (sizes <= high)
    groups["read whole"] = np.array([not reading.truncated for reading in readings])
    groups["cut at max_chunks"] = np.array([reading.truncated for reading in readings])
    if not any(end for reading in readings for _, end in reading.spans):
        return groups  # the older tensors do not say where in the text a chunk stands
    middle = np.array([sum(reading.span_of(reading.strongest()[0])) / 2 for reading in readings])
    place = middle / np.maximum([len(text) for text in texts], 1)
    groups["evidence in the first third"] = place < 1 / 3
    groups["evidence in the middle third"] = (place >= 1 / 3) & (place < 2 / 3)
    groups["evidence in the last third"] = place >= 2 / 3
    return groups


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and the seconds that it took."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def evaluate(subject: EvaluationContext, split: str, severity: list[float], with_sentences: bool) -> dict[str, Any]:
    """Everything that is measured, in `metrics.json`'s layout, with what the report shows beside it."""
    names, labels = subject.names, subject.labels(split)
    chunked = subject.chunked(split)
    validation = np.stack([r.logits_K.cpu().numpy() for r in subject.read(subject.chunked("validation"))])
    readings, predict_seconds = timed(lambda: subject.read(chunked))
    logits = np.stack([reading.logits_K.cpu().numpy() for reading in readings]).astype(np.float64)
    temperature = subject.model.config.temperature
    if temperature is None:
        temperature = fit_temperature(validation, subject.labels("validation"))
    scores, before = softmax(logits / temperature, axis=1), softmax(logits, axis=1)
    predicted = logits.argmax(axis=1)
    print(f"{len(readings)} documents read in {predict_seconds:.1f} s; now the neighbours", flush=True)
    others = evaluate_baselines(subject, split, readings)
    print("Now the explanations", flush=True)
    _, chunk_seconds = timed(lambda: explain_chunks(subject.model, readings))
    sentence_seconds = 0.0
    if with_sentences:
        _, sentence_seconds = timed(lambda: explain_sentences(subject.model, subject.tokenizer, chunked, readings))
    part = subject.splits[split]
    evidence = list(part["evidence"]) if "evidence" in part.column_names else [""] * len(part)
    measured = {
        "model": metrics_with_intervals(labels, predicted, names, severity),
        "baselines": {
            name: metrics_with_intervals(labels, other, names, severity)
            | {"difference_f1_macro": difference(labels, predicted, other, names)}
            for name, other in others.items()
        },
        "calibration": {
            "temperature": temperature,
            "ece_before": expected_calibration_error(before, labels),
            "ece_after": expected_calibration_error(scores, labels),
        },
        "operating_points": operating_points(
            softmax(validation / temperature, axis=1), subject.labels("validation"), scores, labels
        ),
        "abstain": abstain_curve(scores, labels),
        "by_group": by_group(groups_of(readings, part["text"]), labels, predicted, names),
        "confusion": confusion(labels, predicted, len(names))[0].tolist(),
        "faithfulness": {
            "chunk": chunk_curves(subject.model, readings),
            "sentence": sentence_curves(subject.model, chunked, readings) if with_sentences else {},
        },
        "cost": {
            "predict_seconds": predict_seconds,
            "explain_chunks_seconds": chunk_seconds,
            "explain_sentences_seconds": sentence_seconds,
        },
    }
    if any(evidence):
        measured["pointing"] = pointing_game(readings, evidence, labels, len(names) - 1)
    return {"metrics": measured, "readings": readings, "scores": scores, "before": before, "labels": labels}


def figures_of(found: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """`{"name", "title", "caption", "png"}` of each figure."""
    metrics, labels = found["metrics"], found["labels"]
    figures = [
        ("confusion", "Confusion", "Documents by label and rating; the share is of the label.",
         confusion_figure(np.array(metrics["confusion"]), names)),
        ("curves", "Precision and recall, and ROC", "Each class against the rest, over all thresholds.",
         curves_figure(found["scores"], labels, names)),
        ("reliability", "Reliability", "On the diagonal, scores mean what they say.",
         reliability_figure(found["before"], found["scores"], labels)),
        ("abstain", "When a person is asked", "Accuracy on the rest when the least confident documents are handed over.",
         abstain_figure(metrics["abstain"])),
    ]  # fmt: skip
    for unit, what in (("chunk", "chunks, share"), ("sentence", "sentences")):
        if curves := metrics["faithfulness"][unit]:
            caption = f"Mean over {curves['documents']} documents. Left, lower is better; right, higher is better."
            figures.append(
                (f"faithfulness_{unit}", f"Is the {unit} evidence true?", caption, faithfulness_figure(curves, what))
            )
    return [dict(zip(("name", "title", "caption", "png"), figure, strict=True)) for figure in figures]


def main() -> None:
    arguments = parse_arguments()
    set_num_threads(arguments.cpu_threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder: Path = arguments.output_dir
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; expected a folder or a new name.")
    if folder.exists() and folder.resolve() == Path(arguments.model).resolve():
        raise ValueError(
            f"output_dir {folder} is the model's own folder, whose metrics.json would be lost: name another."
        )
    subject = load_subject(arguments.model, arguments.dataset_dir, arguments.split)
    severity = parse_severity_weights(arguments.severity_weights, len(subject.names))
    found = evaluate(subject, arguments.split, severity, not arguments.no_sentences)
    figures = figures_of(found, subject.names)
    part = subject.splits[arguments.split]
    content = report_content(arguments.model, arguments.split, part, subject, found, BASELINES)
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        (folder / f"{figure['name']}.png").write_bytes(figure["png"])
    write_predictions(folder / "predictions.csv", part, subject.names, found["scores"])
    write_lines(folder / "evidence.jsonl", content.pop("evidence_lines"))
    write_json(folder / "metrics.json", found["metrics"])
    write_report({**content, "figures": figures}, folder / "report.html")
    print(content["headline"])
    if "pointing" in found["metrics"]:
        print(f"Evidence where it is known to stand: {json.dumps(found['metrics']['pointing'])}")
    print(f"Open {folder / 'report.html'} in a browser.")
    try:
        keep_temperature(arguments.model, subject.model, found["metrics"]["calibration"]["temperature"])
        rewrite_card(Path(arguments.model), {**found["metrics"], "split": arguments.split}, subject)
    except OSError as error:
        print(f"The model's own folder was left as it was: {error}", file=sys.stderr)


def keep_temperature(name: str, model: HierarchicalRobertaForSequenceClassification, temperature: float) -> None:
    """A model from before there was one, in a folder of one's own, gets its temperature. (A trained one brings it.)"""
    path = Path(name) / "config.json"
    if model.config.temperature is None and path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, config | {"temperature": temperature})
        print(f"The temperature {temperature:.3f}, fitted on validation, is now part of {path}.")


def rewrite_card(folder: Path, evaluation: dict[str, Any], subject: EvaluationContext) -> None:
    """The card of a model in a folder of one's own, with what was measured here beside what training said, where both
    are of the same data."""
    history, metrics = folder / "training_history.json", folder / "metrics.json"
    if history.is_file() and metrics.is_file():
        record, trained = (json.loads(path.read_text(encoding="utf-8")) for path in (history, metrics))
        if record["config"].get("data_fingerprint") != subject.manifest["data_fingerprint"]:
            print(f"These are not the data that {folder} was trained on: its card stays as it was.")
            return
        write_text(folder / "README.md", model_card(record, trained, subject.names, evaluation))
        write_text(folder / "training.tex", latex_paragraph(record, trained, subject.names, evaluation))
        print(f"{folder / 'README.md'} and training.tex now have these figures too.")


if __name__ == "__main__":
    sys.exit(run_main(main))
