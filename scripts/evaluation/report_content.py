"""The content of the report, in the layout that scripts/evaluation/report.py renders."""

import json
from importlib.metadata import version
from typing import Any

import datasets

from data.documents import section_at
from modeling.training.metrics import highest_macro
from modeling.training.model_card import describe_embeddings
from scripts.evaluation.explanations import DocumentResult
from scripts.evaluation.multi_label import MultiLabel
from scripts.evaluation.single_label import SingleLabel

EVIDENCE_SENTENCES = 3


def report_content(
    model_name: str,
    split: str,
    split_documents: datasets.Dataset,
    context: Any,
    evaluation: dict[str, Any],
    baselines: dict[str, str],
) -> dict[str, Any]:
    """The `report` argument of `write_report` without figures, plus `evidence_lines`, the rows of evidence.jsonl."""
    metrics, names, kind = evaluation["metrics"], context.names, context.kind
    headline, is_warning = headline_of(metrics, split, len(split_documents), baselines)
    documents, lines = documents_of(split_documents, evaluation, kind)
    config = context.model.config
    facts = [
        ["Model", model_name],
        ["Data", ", ".join(source.get("name", "") for source in context.manifest["sources"])],
        ["Split", f"{split}, {len(split_documents)} documents; thresholds chosen on "
         + ("this split, so these results are optimistic" if split == "validation" else "validation")],
        ["Input", f"up to {config.max_chunks} chunks of {config.chunk_length} tokens per document "
                  f"(chunk_policy {config.chunk_policy} beyond that){describe_embeddings(config.to_dict())}, "
                  f"{config.pooling} pooling"],
        *kind.facts(metrics),
        ["Tuned TF-IDF", metrics["tfidf_tuned_options"]],
        *kind.calibration_facts(metrics),
        ["Versions", ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "scikit-learn"))],
        *strongest_words(context, kind.listed(metrics)),
    ]  # fmt: skip
    return {
        "title": f"Evaluation of {model_name.rstrip('/').split('/')[-1]} on the {split} split",
        "headline": headline,
        "headline_is_warning": is_warning,
        "is_multi_label": kind.is_multi_label,
        "labels": names,
        "facts": facts,
        "metrics": kind.headline_numbers(metrics),
        "comparison_columns": list(kind.compared().values()),
        "baselines": comparison(metrics, list(kind.compared()), baselines),
        "tables": kind.tables(metrics, documents),
        "documents_note": kind.documents_note(metrics, len(documents)),
        "documents": documents,
        "evidence_lines": lines,
    }


def strongest_words(context: Any, listed: list[str], number: int = 12) -> list[list[str]]:
    """Per listed class, the lexical features whose weight is furthest above the mean over classes. Empty without any."""
    lexical = context.model.lexical
    if lexical is None:
        return []
    above_mean_KM = lexical.weight - lexical.weight.mean(dim=0)
    if lexical.idf is not None:
        above_mean_KM = above_mean_KM * lexical.idf
    tokens_of = lexical.tokens_of_features()
    rows = []
    for name in listed:
        weight_M = above_mean_KM[context.names.index(name)]
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
    supports = metrics.get("support", {}).values()
    if 0 in supports:  # labels without documents count 0
        score += f", where {highest_macro(supports):.3f} is the highest possible"
    if gap["value"] <= 0:
        return f"This model does not beat {best} ({other}). {score}.", True
    if gap["low"] <= 0:
        margin = f"{gap['low']:+.3f} to {gap['high']:+.3f}"
        return f"{score}; {best}, reaches {other}. The difference may be chance ({margin}).", True
    return f"{score}; {best}, reaches {other}.", False


def comparison(metrics: dict[str, Any], compared: list[str], titles: dict[str, str]) -> list[dict[str, Any]]:
    """One row for the model and each baseline; `titles` names the baselines."""
    baselines = metrics["baselines"]
    rows = {"this model": metrics["model"]}
    rows |= {title: baselines[key] for key, title in titles.items() if key in baselines}
    return [
        {
            "name": title,
            "values": [values[metric] for metric in compared],
            "difference": values.get("difference_f1_macro"),
        }
        for title, values in rows.items()
    ]


def documents_of(
    split_documents: datasets.Dataset, evaluation: dict[str, Any], kind: SingleLabel | MultiLabel
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The report's entry of each document, and its row of evidence.jsonl."""
    documents, lines = [], []
    rows = zip(evaluation["explained"], split_documents, kind.describe(evaluation), strict=True)
    for results, row, described in rows:
        result, metadata = results[0], json.loads(row.get("metadata") or "{}")
        parts = [
            {
                "label": kind.names[part.predicted],
                "score": float(evaluation["scores"][part.index, part.predicted]),
                "chunks": chunks_of(part),
                "evidence": evidence_of(part, row),
            }
            for part in results
        ]
        shown = [
            part
            | {"evidence": [{key: e[key] for key in ("start", "end", "score", "section")} for e in part["evidence"]]}
            for part in parts
        ]
        documents.append(
            {"id": row["id"]}
            | described
            | {
                "truncated": result.truncated,
                "counted": result.rest_M is not None,
                "num_chunks": len(result.bounds),
                "text": row["text"],
                "explained": shown,
                "metadata": [[name, "–" if value is None else str(value)] for name, value in metadata.items()],
            }
        )
        line = {"id": row["id"]} | {name: described[name] for name in ("label", "predicted")}
        read = [part | {"chunks": [chunk for chunk in part["chunks"] if chunk["read"]]} for part in parts]
        lines.append(line | ({"metadata": metadata} if metadata else {}) | kind.explained(read))
    return documents, lines


def evidence_of(result: DocumentResult, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The sentences with the highest attribution; without any, the chunk that contributes most."""
    text, sections = row["text"], json.loads(row.get("sections") or "[]")
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
    return evidence


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
