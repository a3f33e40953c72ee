"""The content of the report, in the layout that scripts/evaluation/report.py renders."""

import json
from importlib.metadata import version
from typing import Any

import datasets
import numpy as np

from data.documents import section_at
from modeling.training.model_card import describe_embeddings
from scripts.evaluation.explanations import DocumentResult

EVIDENCE_SENTENCES = 3
REVIEWED = 25


def report_content(
    model_name: str,
    split: str,
    split_documents: datasets.Dataset,
    context: Any,
    evaluation: dict[str, Any],
    baselines: dict[str, str],
) -> dict[str, Any]:
    """The `report` argument of `write_report` without figures, plus `evidence_lines`, the rows of evidence.jsonl."""
    metrics, names = evaluation["metrics"], context.names
    headline, is_warning = headline_of(metrics, split, len(split_documents), baselines)
    documents, lines = documents_of(split_documents, evaluation, names)
    config = context.model.config
    facts = [
        ["Model", model_name],
        ["Data", ", ".join(source.get("name", "") for source in context.manifest["sources"])],
        ["Split", f"{split}, {len(split_documents)} documents; thresholds chosen on "
         + ("this split, so these results are optimistic" if split == "validation" else "validation")],
        ["Input", f"up to {config.max_chunks} chunks of {config.chunk_length} tokens per document "
                  f"(chunk_policy {config.chunk_policy} beyond that){describe_embeddings(config.to_dict())}, "
                  f"{config.pooling} pooling"],
        *strongest_words(context),
        *decision_fact(metrics),
        ["Tuned TF-IDF", metrics["tfidf_tuned_options"]],
        ["Temperature", f"{metrics['calibration']['temperature']:.3f}"],
        ["Versions", ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "scikit-learn"))],
    ]  # fmt: skip
    return {
        "title": f"Evaluation of {model_name.rstrip('/').split('/')[-1]} on the {split} split",
        "headline": headline,
        "headline_is_warning": is_warning,
        "labels": names,
        "facts": facts,
        "metrics": headline_numbers(metrics, names),
        "baselines": comparison(metrics, names, baselines),
        "tables": tables_of(metrics, documents, names),
        "documents_note": decision_note(metrics, len(documents)),
        "documents": documents,
        "evidence_lines": lines,
    }


def decision_fact(metrics: dict[str, Any]) -> list[list[str]]:
    """The class biases and what they were fitted for; empty without any."""
    if "decision" not in metrics:
        return []
    biases = ", ".join(f"{name} {bias:+.3f}" for name, bias in metrics["decision"]["class_biases"].items())
    return [["Decision", f"highest log score plus class bias ({biases}), fitted on validation for "
             f"{metrics['decision']['metric']}"]]  # fmt: skip


def decision_note(metrics: dict[str, Any], count: int) -> str:
    """What class biases change in the predictions; empty without any."""
    if "decision" not in metrics:
        return ""
    return (
        f"The prediction has the highest log score plus class bias, so that it need not have the highest score: "
        f"{metrics['decision']['not_highest_score']} of {count} documents, marked “by bias”, would be predicted otherwise "
        "without the biases."
    )


def strongest_words(context: Any, number: int = 12) -> list[list[str]]:
    """Per class, the lexical features whose weight is furthest above the mean over classes. Empty without any."""
    lexical = context.model.lexical
    if lexical is None:
        return []
    above_mean_KM = lexical.weight - lexical.weight.mean(dim=0)
    if lexical.idf is not None:
        above_mean_KM = above_mean_KM * lexical.idf
    tokens_of = lexical.tokens_of_features()
    rows = []
    for name, weight_M in zip(context.names, above_mean_KM, strict=True):
        best = [index for index in weight_M.argsort(descending=True)[:number].tolist() if weight_M[index] > 0]
        words = ", ".join(context.tokenizer.decode(tokens_of[index]).strip() for index in best)
        rows.append([f"Words for {name}", words])
    return rows


def headline_of(metrics: dict[str, Any], split: str, count: int, titles: dict[str, str]) -> tuple[str, bool]:
    """The report's headline, and whether it is a warning: the model is not significantly better than the best baseline.

    The best baseline is the one with the highest macro-F1 on this split; `titles` names the baselines.
    """
    own = metrics["model"]["f1_macro"]
    name = max(metrics["baselines"], key=lambda name: metrics["baselines"][name]["f1_macro"]["value"])
    baseline = metrics["baselines"][name]
    gap, best = baseline["difference_f1_macro"], f"the best baseline, {titles[name]}"
    other = f"{baseline['f1_macro']['value']:.3f}"
    score = f"Macro-F1 {own['value']:.3f} ({own['low']:.3f} to {own['high']:.3f}) on {count} {split} documents"
    if gap["value"] <= 0:
        return f"This model does not beat {best} ({other}). {score}.", True
    if gap["low"] <= 0:
        margin = f"{gap['low']:+.3f} to {gap['high']:+.3f}"
        return f"{score}; {best}, reaches {other}. The difference may be chance ({margin}).", True
    return f"{score}; {best}, reaches {other}.", False


def headline_numbers(metrics: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """The headline metrics, each with a short explanation."""
    headline = [
        ("f1_macro", "Macro-F1", "mean F1 over the classes, equally weighted"),
        ("accuracy", "Accuracy", "share of documents classified correctly"),
        (f"missed_{names[-1]}", f"Missed {names[-1]}", f"share of {names[-1]} documents predicted as a milder class"),
        ("severity_f1", "Severity-weighted F1", "the most severe class counts most"),
        ("quadratic_kappa", "Quadratic kappa", "agreement beyond chance; larger errors cost more"),
    ]
    return [{"name": title, "note": note, **metrics["model"][key]} for key, title, note in headline]


def comparison(metrics: dict[str, Any], names: list[str], titles: dict[str, str]) -> list[dict[str, Any]]:
    """One row for the model and each baseline; `titles` names the baselines."""
    baselines = metrics["baselines"]
    rows = {"this model": metrics["model"]}
    rows |= {title: baselines[key] for key, title in titles.items() if key in baselines}
    return [
        {
            "name": title,
            "f1_macro": values["f1_macro"],
            "accuracy": values["accuracy"],
            "recall_severest": values[f"recall_{names[-1]}"],
            "difference": values.get("difference_f1_macro"),
        }
        for title, values in rows.items()
    ]


def tables_of(metrics: dict[str, Any], documents: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Per-class metrics, operating points, subgroups, calibration, faithfulness and labels to review."""
    most_severe = names[-1]

    def with_interval(entry: dict[str, float]) -> str:
        return f"{entry['value']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"

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
    rows = [
        [unit, curves["documents"]]
        + [f"{curves[name]:.3f}" for name in ("deletion", "deletion_random", "insertion", "insertion_random")]
        for unit, curves in metrics["faithfulness"].items()
        if curves
    ]
    if rows:
        tables.append(
            {
                "title": "Faithfulness (deletion and insertion)",
                "caption": "Whether the evidence drives the prediction: mean probability of the predicted label as the "
                "strongest evidence is deleted (lower is better) or only it is kept (higher is better), next to a "
                "random order.",
                "columns": ["evidence", "documents", "deletion", "random", "insertion", "random"],
                "rows": rows,
            }
        )
    if "pointing" in metrics:
        hits = metrics["pointing"]
        tables.append(
            {
                "title": "Pointing game",
                "caption": "How often the model's top evidence overlaps the gold evidence, on "
                f"{hits['documents']} correctly classified {most_severe} documents.",
                "columns": ["evidence", "hit rate"],
                "rows": [[f"top {unit}", f"{hits[unit]:.3f}"] for unit in ("chunk", "sentence") if unit in hits],
            }
        )
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


def documents_of(
    split_documents: datasets.Dataset, evaluation: dict[str, Any], names: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The report's entry of each document, and its row of evidence.jsonl."""
    scores, labels, predicted = evaluation["scores"], evaluation["labels"], evaluation["predicted"]
    confidence = scores[np.arange(len(scores)), predicted]
    wrong = np.flatnonzero(predicted != labels)
    review = set(wrong[np.argsort(-confidence[wrong], kind="stable")][:REVIEWED].tolist())
    documents, lines = [], []
    for result, row, score_K in zip(evaluation["results"], split_documents, scores, strict=True):
        text, sections = row["text"], json.loads(row.get("sections") or "[]")
        metadata = json.loads(row.get("metadata") or "{}")
        chunks = chunks_of(result)
        sentences = [
            {"start": s.start, "end": s.end, "score": s.score, "text": text[s.start : s.end], "words": s.words}
            for s in result.sentences
            if s.score > 0
        ][:EVIDENCE_SENTENCES]
        evidence = sentences or [
            {
                "start": start,
                "end": end,
                "score": float(result.contributions[position]),
                "text": text[start:end],
                "words": [],
            }
            for position in result.strongest()
            for start, end in [result.span_of(position)]
            if start < end
        ]
        for sentence in evidence:
            sentence["section"] = section_at(sections, sentence["start"])
        common = {"id": row["id"], "label": names[row["label"]], "predicted": names[result.predicted]}
        documents.append(
            common
            | {
                "confidence": float(score_K[result.predicted]),
                "by_bias": bool(result.predicted != score_K.argmax()),
                "scores": dict(zip(names, score_K.tolist(), strict=True)),
                "truncated": result.truncated,
                "counted": result.rest_M is not None,
                "num_chunks": len(result.bounds),
                "review": result.index in review,
                "text": text,
                "chunks": chunks,
                "evidence": [{key: e[key] for key in ("start", "end", "score", "section")} for e in evidence],
                "metadata": [[name, "–" if value is None else str(value)] for name, value in metadata.items()],
            }
        )
        common |= {"metadata": metadata} if metadata else {}
        lines.append(common | {"chunks": [chunk for chunk in chunks if chunk["read"]], "evidence": evidence})
    return documents, lines


def chunks_of(result: DocumentResult) -> list[dict[str, Any]]:
    """All chunks of a document in order; contribution and attention are 0 for unread chunks."""
    positions = {chunk: position for position, chunk in enumerate(result.read)}
    weights = result.weights_C.tolist()
    chunks = []
    for number, (start, end) in enumerate(result.spans):
        position = positions.get(number)
        chunks.append(
            {
                "start": start,
                "end": end,
                "contribution": 0.0 if position is None else float(result.contributions[position]),
                "attention": 0.0 if position is None else weights[position],
                "read": position is not None,
            }
        )
    return chunks
