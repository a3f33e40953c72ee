"""What the report says, in the layout that scripts/evaluation/report.py draws."""

from importlib.metadata import version
from typing import Any

import datasets
import numpy as np

from scripts.evaluation.explanations import DocumentResult

EVIDENCE_SENTENCES = 3
REVIEWED = 25


def report_content(
    model_name: str, split: str, part: datasets.Dataset, subject: Any, found: dict[str, Any], neighbours: dict[str, str]
) -> dict[str, Any]:
    """The `report` of `write_report` without its figures, and `evidence_lines`, the rows of evidence.jsonl."""
    metrics, names = found["metrics"], subject.names
    headline, is_warning = headline_of(metrics, split, len(part))
    documents, lines = documents_of(part, found, names)
    config = subject.model.config
    facts = [
        ["Model", model_name],
        ["Data", ", ".join(source.get("name", "") for source in subject.manifest["sources"])],
        ["Split", f"{split}, {len(part)} documents; thresholds from validation"
         + (", on which they are also measured here: too good to be true" if split == "validation" else "")],
        ["Read", f"at most {config.max_chunks} chunks of {config.chunk_length} tokens a document "
                 f"({config.chunk_policy} past that), {config.pooling} pooling"],
        *strongest_words(subject),
        ["Temperature", f"{metrics['calibration']['temperature']:.3f}"],
        ["Versions", ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "scikit-learn"))],
    ]  # fmt: skip
    return {
        "title": f"How {model_name.rstrip('/').split('/')[-1]} rates {split} documents",
        "headline": headline,
        "headline_is_warning": is_warning,
        "labels": names,
        "facts": facts,
        "metrics": headline_numbers(metrics, names),
        "neighbours": comparison(metrics, names, neighbours),
        "tables": tables_of(metrics, documents, names),
        "documents": documents,
        "evidence_lines": lines,
    }


def strongest_words(subject: Any, number: int = 12) -> list[list[str]]:
    """Of a lexical view, the tokens that speak most for each class against the mean of the classes; else nothing."""
    view = subject.model.lexical
    if view is None:
        return []
    against_mean_KM = view.weight - view.weight.mean(dim=0)
    tokens_M = np.zeros(view.weight.shape[1], dtype=np.int64)
    feature_V = view.feature_of_token.cpu().numpy()
    tokens_M[feature_V[feature_V < len(tokens_M)]] = np.flatnonzero(feature_V < len(tokens_M))
    rows = []
    for name, weight_M in zip(subject.names, against_mean_KM, strict=True):
        best = [place for place in weight_M.argsort(descending=True)[:number].tolist() if weight_M[place] > 0]
        words = ", ".join(subject.tokenizer.decode([int(tokens_M[place])]).strip() for place in best)
        rows.append([f"Words for {name}", words])
    return rows


def headline_of(metrics: dict[str, Any], split: str, count: int) -> tuple[str, bool]:
    """The report's first line, and whether it is a warning: it is where TF-IDF is not clearly beaten."""
    own, tfidf = metrics["model"]["f1_macro"], metrics["baselines"]["tfidf"]
    gap, other = tfidf["difference_f1_macro"], tfidf["f1_macro"]["value"]
    reached = f"Macro-F1 {own['value']:.3f} ({own['low']:.3f} to {own['high']:.3f}) on {count} {split} documents"
    if gap["value"] <= 0:
        return f"This model does not beat TF-IDF + logistic regression ({other:.3f}). {reached}.", True
    if gap["low"] <= 0:
        least = f"{gap['low']:+.3f} to {gap['high']:+.3f}"
        return (
            f"{reached}; TF-IDF reaches {other:.3f}, and on so few documents the difference may be chance ({least}).",
            True,
        )
    return f"{reached}; TF-IDF + logistic regression reaches {other:.3f}.", False


def headline_numbers(metrics: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """The big numbers, each with what it means."""
    shown = [
        ("f1_macro", "Macro-F1", "mean over the classes, each counting the same"),
        ("accuracy", "Accuracy", "documents rated right"),
        (f"missed_{names[-1]}", f"Missed {names[-1]}", f"{names[-1]} documents that are rated lower"),
        ("severity_f1", "Severity-weighted F1", "the severest class counts most"),
        ("quadratic_kappa", "Quadratic kappa", "agreement beyond chance, far errors costing more"),
    ]
    return [{"name": title, "note": note, **metrics["model"][key]} for key, title, note in shown]


def comparison(metrics: dict[str, Any], names: list[str], neighbours: dict[str, str]) -> list[dict[str, Any]]:
    """The model and its neighbours, a row each."""
    baselines = metrics["baselines"]
    rows = {"this model": metrics["model"]}
    rows |= {title: baselines[key] for key, title in neighbours.items() if key in baselines}
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
    """Classes, operating points, groups of documents, labels to review, calibration and faithfulness."""
    severest = names[-1]

    def shown(entry: dict[str, float]) -> str:
        return f"{entry['value']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"

    model, calibration = metrics["model"], metrics["calibration"]
    tables = [
        {
            "title": "Each class",
            "caption": "With 95 % bootstrap intervals.",
            "columns": ["class", "precision", "recall", "F1"],
            "rows": [[n, *(shown(model[f"{kind}_{n}"]) for kind in ("precision", "recall", "f1"))] for n in names],
        },
        {
            "title": f"Thresholds on the score of {severest}",
            "caption": "Chosen on validation for the recall in the first column; the rest is measured here.",
            "columns": ["recall wanted", "threshold", "recall", "precision", "documents flagged"],
            "rows": [
                [f"{p['target_recall']:.0%}", f"{p['threshold']:.6g}"]
                + [f"{p[key]:.1%}" for key in ("recall", "precision", "flagged_share")]
                for p in metrics["operating_points"]
            ],
        },
        {
            "title": "Which documents are hard",
            "caption": "By length, by number of chunks, by where the strongest chunk stands, and by whether anything was cut.",
            "columns": ["documents", "number", "accuracy", "macro-F1", f"{severest} missed"],
            "rows": [
                [g["group"], g["documents"], f"{g['accuracy']:.3f}", f"{g['f1_macro']:.3f}",
                 "none there" if np.isnan(g[f"missed_{severest}"]) else f"{g[f'missed_{severest}']:.3f}"]
                for g in metrics["by_group"]
            ],
        },
        {
            "title": "How far off",
            "caption": f"Mean distance of rating and label: {model['mean_distance']['value']:.3f} steps.",
            "columns": ["labels between rating and truth", "documents", "share"],
            "rows": distances(np.array(metrics["confusion"])),
        },
        {
            "title": "When to ask a person",
            "caption": "A document rated with less confidence goes to a person; accuracy is that on the others.",
            "columns": ["below this confidence", "share that the model rates", "accuracy on them"],
            "rows": [
                [f"{row['confidence']:.3f}", f"{row['kept_share']:.0%}", f"{row['accuracy']:.3f}"]
                for row in metrics["abstain"][::4]
            ],
        },
        {
            "title": "Can the scores be believed?",
            "caption": "Expected calibration error: mean distance of confidence and accuracy.",
            "columns": ["", "expected calibration error"],
            "rows": [
                ["as trained", f"{calibration['ece_before']:.3f}"],
                [f"with the temperature {calibration['temperature']:.2f}", f"{calibration['ece_after']:.3f}"],
            ],
        },
    ]  # fmt: skip
    rows = [
        [unit, found["documents"]]
        + [f"{found[name]:.3f}" for name in ("deletion", "deletion_random", "insertion", "insertion_random")]
        for unit, found in metrics["faithfulness"].items()
        if found
    ]
    if rows:
        tables.append(
            {
                "title": "Are the explanations true?",
                "caption": "Mean probability of the rating while evidence is deleted (lower is better), or alone left "
                "(higher is better), beside doing it at random.",
                "columns": ["unit", "documents", "deletion", "at random", "insertion", "at random"],
                "rows": rows,
            }
        )
    if "pointing" in metrics:
        found = metrics["pointing"]
        tables.append(
            {
                "title": "Does the evidence stand where it is known to stand?",
                "caption": f"Among {found['documents']} rightly rated {severest} documents.",
                "columns": ["", "share that hits"],
                "rows": [
                    [f"strongest {unit}", f"{found[unit]:.3f}"] for unit in ("chunk", "sentence") if unit in found
                ],
            }
        )
    contradicted = sorted((d for d in documents if d["review"]), key=lambda d: -d["confidence"])
    if contradicted:
        tables.append(
            {
                "title": "Labels worth a second look",
                "caption": "The documents whose label the model contradicts with most confidence.",
                "columns": ["document", "labelled", "rated", "confidence"],
                "rows": [[d["id"], d["label"], d["predicted"], f"{d['confidence']:.3f}"] for d in contradicted],
            }
        )
    return tables


def distances(confusion_KK: np.ndarray) -> list[list[Any]]:
    """Documents by how many labels lie between rating and truth, milder and stricter apart."""
    size, total = len(confusion_KK), max(int(confusion_KK.sum()), 1)
    rows = []
    for step in range(1 - size, size):
        count = int(np.trace(confusion_KK, offset=step))
        name = "right" if step == 0 else f"{abs(step)} too {'strict' if step > 0 else 'mild'}"
        rows.append([name, count, f"{count / total:.1%}"])
    return rows


def documents_of(
    part: datasets.Dataset, found: dict[str, Any], names: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each document as the report shows it, and its row of evidence.jsonl."""
    scores, labels = found["scores"], found["labels"]
    wrong = np.flatnonzero(scores.argmax(axis=1) != labels)
    review = set(wrong[np.argsort(-scores[wrong].max(axis=1), kind="stable")][:REVIEWED].tolist())
    documents, lines = [], []
    for reading, row, score_K in zip(found["readings"], part, scores, strict=True):
        text = row["text"]
        chunks = chunks_of(reading)
        sentences = [
            {"start": s.start, "end": s.end, "score": s.score, "text": text[s.start : s.end], "words": s.words}
            for s in reading.sentences
            if s.score > 0
        ][:EVIDENCE_SENTENCES]
        evidence = sentences or [
            {
                "start": start,
                "end": end,
                "score": float(reading.contributions[place]),
                "text": text[start:end],
                "words": [],
            }
            for place in reading.strongest()
            for start, end in [reading.span_of(place)]
            if start < end
        ]
        common = {"id": row["id"], "label": names[row["label"]], "predicted": names[int(score_K.argmax())]}
        documents.append(
            common
            | {
                "confidence": float(score_K.max()),
                "scores": dict(zip(names, score_K.tolist(), strict=True)),
                "truncated": reading.truncated,
                "num_chunks": len(reading.bounds),
                "review": reading.index in review,
                "text": text,
                "chunks": chunks,
                "evidence": [{key: e[key] for key in ("start", "end", "score")} for e in evidence],
            }
        )
        lines.append(common | {"chunks": [chunk for chunk in chunks if chunk["read"]], "evidence": evidence})
    return documents, lines


def chunks_of(reading: DocumentResult) -> list[dict[str, Any]]:
    """All chunks of a document in order; contribution and attention are 0 for those that were not read."""
    place_of = {chunk: place for place, chunk in enumerate(reading.read)}
    weights = reading.weights_C.tolist()
    chunks = []
    for number, (start, end) in enumerate(reading.spans):
        place = place_of.get(number)
        chunks.append(
            {
                "start": start,
                "end": end,
                "contribution": 0.0 if place is None else float(reading.contributions[place]),
                "attention": 0.0 if place is None else weights[place],
                "read": place is not None,
            }
        )
    return chunks
