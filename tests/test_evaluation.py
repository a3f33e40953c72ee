"""Evaluation and explanation: the figures are scikit-learn's, the explanations are what happens when text goes."""

import csv
import html
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, log_loss
from transformers import AutoTokenizer

from data.chunk_dataset import ChunkedDocuments
from data.collator import DocumentCollator
from data.demo_corpus import demo_corpus
from data.prepared_dataset import load_prepared
from modeling.hierarchical_roberta.chunk_attribution import log_odds
from modeling.hierarchical_roberta.chunking import Chunker
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import (
    HierarchicalRobertaForSequenceClassification as Model,
)
from modeling.token_attribution import token_attributions
from modeling.training.calibration import (
    expected_calibration_error,
    fit_logit_weights,
    fit_temperature,
    gains_beyond_error,
)
from modeling.training.metrics import classification_metrics
from scripts.common.cli import USER_ERRORS
from scripts.evaluate_and_explain import main as evaluate_main
from scripts.evaluation.explanations import DocumentResult, explain_chunks, explain_sentences, read_documents
from scripts.evaluation.faithfulness import chunk_curves, sentence_curves
from scripts.evaluation.figures import confusion_png, curves_figure
from scripts.evaluation.report_content import headline_of
from scripts.evaluation.statistics import (
    abstain_curve,
    by_group,
    confusion,
    difference,
    metrics_of,
    metrics_with_intervals,
    operating_points,
    resampled_pair,
)
from tests.conftest import LABELS, assert_refused, options, run_command, train
from tests.processes import ROOT, run

SEVERITY = [0.3, 0.3, 0.4]


def some_predictions(count=200, right=0.7, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, count, p=[0.6, 0.27, 0.13])
    return labels, np.where(rng.random(count) < right, labels, rng.integers(0, 3, count))


# ---- statistics ----


@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_agree_with_classification_metrics(seed):
    labels, predicted = some_predictions(count=[1, 3, 20, 200, 200][seed], seed=seed)
    found = metrics_of(confusion(labels, predicted, 3), LABELS, SEVERITY, absent=0.0)
    expected = classification_metrics(predicted.tolist(), labels.tolist(), LABELS, SEVERITY)
    for name, value in expected.items():
        if not name.startswith("support"):
            assert found[name][0] == pytest.approx(value), name
    assert found["mean_distance"][0] == pytest.approx(np.abs(labels - predicted).mean())
    if (labels == 2).any():
        assert found["missed_Mature"][0] == pytest.approx((predicted[labels == 2] < 2).mean())


def test_intervals_contain_the_value_and_narrow_with_more_documents():
    widths = []
    for count in (50, 500):
        labels, predicted = some_predictions(count)
        found = metrics_with_intervals(labels, predicted, LABELS, SEVERITY)
        for entry in found.values():
            assert entry["low"] <= entry["high"]
        assert found["accuracy"]["low"] < found["accuracy"]["value"] < found["accuracy"]["high"]
        widths.append(found["accuracy"]["high"] - found["accuracy"]["low"])
    # Standard error of a share: 1.96 × 2 × √(p (1 − p) / n)
    p = found["accuracy"]["value"]
    assert widths[1] == pytest.approx(3.92 * np.sqrt(p * (1 - p) / 500), rel=0.15)
    assert widths[1] < widths[0]


def test_intervals_ignore_classes_that_a_resample_lacks():
    labels = np.array([0] * 50 + [1] * 7 + [2] * 3)
    found = metrics_with_intervals(labels, labels, LABELS, SEVERITY)
    for name in ("recall_Mature", "f1_macro", "severity_f1"):
        assert found[name] == {"value": 1.0, "low": 1.0, "high": 1.0}
    [group] = by_group({"mild": labels == 0}, labels, labels, LABELS)
    assert group["f1_macro"] == 1.0
    assert np.isnan(group["missed_Mature"])  # nobody can tell


def test_intervals_count_an_absent_class_as_the_value_does():
    labels, predicted = some_predictions()
    there = labels < 2
    found = metrics_with_intervals(labels[there], predicted[there], LABELS, SEVERITY)
    found["gap"] = difference(labels[there], predicted[there], np.zeros(there.sum(), dtype=int), LABELS)
    for name in ("f1_macro", "recall_macro", "severity_f1", "gap"):
        assert found[name]["low"] < found[name]["value"] < found[name]["high"], name
    assert found["recall_Mature"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_resampled_pair_of_many_labels_holds_only_those_that_occur():
    labels = np.arange(300) % 100  # 100³ cells, of which 300 at most hold a document
    drawn = resampled_pair(labels, labels, (labels + np.arange(300) // 200) % 100, 100)
    assert all((matrices.sum(axis=(1, 2)) == 300).all() for matrices in drawn)
    assert (drawn[0].sum(axis=2) == drawn[1].sum(axis=2)).all()
    assert np.einsum("rkk->r", drawn[0]).mean() == 300
    assert np.einsum("rkk->r", drawn[1]).mean() == pytest.approx(200, abs=1)


def test_difference_is_paired():
    labels, predicted = some_predictions(400)
    same = difference(labels, predicted, predicted, LABELS)
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0}
    by_hand = []
    rng = np.random.default_rng(1)
    worse = np.where(np.arange(400) % 4 == 0, 0, predicted)
    for _ in range(300):
        drawn = rng.integers(400, size=400)
        values = [f1_score(labels[drawn], each[drawn], average="macro") for each in (predicted, worse)]
        by_hand.append(values[0] - values[1])
    gap = difference(labels, predicted, worse, LABELS)
    assert gap["high"] - gap["low"] == pytest.approx(np.diff(np.quantile(by_hand, [0.025, 0.975]))[0], rel=0.2)
    assert 0 < gap["low"] < gap["value"] < gap["high"]


def test_operating_points_are_chosen_on_validation():
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 2000, p=[0.6, 0.27, 0.13])
    severe = np.clip(rng.normal(0.25 + 0.4 * (labels == 2), 0.15), 0, 1)
    scores = np.stack([1 - severe, np.zeros(2000), severe], axis=1)
    first, second = slice(0, 1000), slice(1000, None)
    points = operating_points(scores[first], labels[first], scores[second], labels[second])
    on_validation = [(severe[first][labels[first] == 2] >= point["threshold"]).mean() for point in points]
    for point, recall in zip(points, on_validation, strict=True):
        assert recall >= point["target_recall"]
        assert recall == pytest.approx(point["target_recall"], abs=0.02)
        flagged = severe[second] >= point["threshold"]
        assert point["flagged_share"] == pytest.approx(flagged.mean())
        assert point["recall"] == pytest.approx(flagged[labels[second] == 2].mean())
        assert point["precision"] == pytest.approx((labels[second][flagged] == 2).mean())


def test_logits_are_weighed_as_far_as_they_tell():
    """A noisy and a good part of one truth: better together than the good one alone; a part without signal gets nothing."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=4000)
    good, poor, none = (np.eye(3)[labels] * size + rng.normal(size=(4000, 3)) for size in (2.0, 1.0, 0.0))
    # For normal noise of deviation 1 the likelihood is best with the size of the signal as weight.
    assert fit_logit_weights(np.stack([good, poor, none]), labels) == pytest.approx([2.0, 1.0, 0.0], abs=0.15)
    assert fit_logit_weights(np.stack([-good, poor]), labels)[0] == 0.0
    assert fit_logit_weights(np.stack([none, -good]), labels).tolist() == [1.0, 1.0]  # nothing tells: both as they are


def test_a_gain_within_its_standard_error_does_not_count():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=60)
    words, noise = (np.eye(3)[labels] * size + rng.normal(size=(60, 3)) for size in (2.0, 0.0))
    reader = np.eye(3)[labels] * 2.0 + rng.normal(size=(60, 3))
    assert gains_beyond_error(2 * words + 2 * reader, 2 * words, labels)
    assert not gains_beyond_error(2 * words + 0.01 * noise, 2 * words, labels)
    assert not gains_beyond_error(2 * words, 2 * words, labels)
    # A rare class that is read better counts with its weight.
    labels[:50], labels[50:] = 0, 1
    flat = np.zeros((60, 3))
    better, worse = flat.copy(), flat.copy()
    better[50:, 1] = 1.0
    better[:50, 0] = -0.2
    assert gains_beyond_error(better, worse, labels, np.array([0.1, 5.0, 1.0]))
    assert not gains_beyond_error(better, worse, labels)


def test_fit_temperature_reduces_overconfidence():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3000, 3)) * 1.5
    labels = np.array([rng.choice(3, p=row) for row in np.exp(logits) / np.exp(logits).sum(1, keepdims=True)])
    assert fit_temperature(3.0 * logits, labels) == pytest.approx(3.0, rel=0.1)

    def scores(given):
        return np.exp(given) / np.exp(given).sum(axis=1, keepdims=True)

    sure, mended = scores(3 * logits), scores(3 * logits / fit_temperature(3 * logits, labels))
    assert expected_calibration_error(mended, labels) < 0.03 < expected_calibration_error(sure, labels)
    assert log_loss(labels, mended) < log_loss(labels, sure)
    # All right, which of so few does not say that they always are: 4 of 6 (Platt's targets).
    few = fit_temperature(np.eye(3) * 10, np.arange(3))
    assert scores(np.eye(3) * 10 / few).max() == pytest.approx(4 / 6, abs=1e-3)


def test_abstain_curve_keeps_the_most_confident():
    scores = np.array([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.45, 0.55]])
    curve = abstain_curve(scores, np.array([0, 1, 0, 1]), scores.argmax(axis=1))
    assert curve[0] == {"kept_share": 1.0, "confidence": 0.55, "accuracy": 0.75}
    assert {row["accuracy"] for row in curve if row["kept_share"] <= 0.5} == {1.0}


def test_headline_warns_when_the_best_baseline_is_not_beaten():
    def entry(value, low, high):
        return {"value": value, "low": low, "high": high}

    def headline(gap, best="tuned"):
        baselines = {
            name: {"f1_macro": entry(0.4, 0.3, 0.5), "difference_f1_macro": entry(0.2, 0.1, 0.3)}
            for name in ("tfidf", "tuned", "words")
        }
        baselines[best] = {"f1_macro": entry(0.52, 0.4, 0.6), "difference_f1_macro": gap}
        titles = {"tfidf": "TF-IDF", "tuned": "tuned TF-IDF", "words": "words only"}
        metrics = {"model": {"f1_macro": entry(0.6, 0.5, 0.7)}, "baselines": baselines}
        return headline_of(metrics, "test", 90, titles)

    text, warns = headline(entry(0.1, 0.05, 0.15))
    assert not warns
    for words in ("0.600", "0.500", "0.700", "90 test documents", "tuned TF-IDF", "0.520"):
        assert words in text
    text, warns = headline(entry(-0.1, -0.2, 0.0), best="words")
    assert warns
    assert "not beat the best baseline, words only" in text
    text, warns = headline(entry(0.1, -0.05, 0.2))
    assert warns
    assert "not beat" not in text  # but by so little that it proves nothing


def test_figures_show_labels_with_dollar_signs_as_text():
    names = ["$0_to_$50", "$50_to_$100"]
    assert confusion_png(np.eye(2, dtype=int), names).startswith(b"\x89PNG")
    assert curves_figure(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1]), names).startswith(b"\x89PNG")


# ---- explanation ----


@pytest.fixture(params=["", "The lamp: "], ids=["plain", "prefix"])
def read(request, roberta_model, roberta_folder, splits):
    """The tiny model, the chunks of the test documents (with a prefix, or none), and what it read in them."""
    tokenizer = AutoTokenizer.from_pretrained(roberta_folder)
    roberta_model.eval()
    config = roberta_model.config
    geometry = {"chunk_length": config.chunk_length, "max_chunks": config.max_chunks, "chunk_prefix": request.param}
    chunked = ChunkedDocuments(splits["test"], tokenizer, **geometry)
    readings = list(read_documents(roberta_model, chunked, DocumentCollator(tokenizer.pad_token_id)))
    explain_chunks(roberta_model, readings)
    return roberta_model, tokenizer, chunked, readings


def test_read_documents_gives_the_logits_of_the_document_alone(read, splits):
    model, tokenizer, chunked, readings = read
    for reading in readings:
        batch = DocumentCollator(tokenizer.pad_token_id)([chunked[reading.index]])
        torch.testing.assert_close(
            model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0], reading.logits_K
        )
        text = splits["test"]["text"][reading.index]
        assert reading.spans[0][0] == 0
        assert reading.spans[-1][1] == len(text)


def test_explain_chunks_gives_the_log_odds_lost_without_the_chunk(read):
    model, tokenizer, chunked, readings = read
    reading = max(readings, key=lambda reading: len(reading.read))
    item = chunked[reading.index]
    for place in range(len(reading.read)):
        rest = {**item, "input_ids": [ids for i, ids in enumerate(item["input_ids"]) if i != place]}
        batch = DocumentCollator(tokenizer.pad_token_id)([rest])
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], num_chunks=batch["num_chunks"]
        )
        lost = log_odds(reading.logits_K[None], reading.predicted) - log_odds(logits.logits, reading.predicted)
        assert reading.contributions[place] == pytest.approx(lost.item(), abs=1e-5)


@pytest.mark.parametrize("token_pooling", ["mean", "cls", "last"])
def test_token_attributions_sum_to_the_chunks_share(read, token_pooling):
    model, tokenizer, chunked, _ = read
    model.config.token_pooling = token_pooling
    reading = next(read_documents(model, chunked, DocumentCollator(tokenizer.pad_token_id)))
    ids_L = torch.from_numpy(chunked[reading.index]["input_ids"][0])
    blank_L = ids_L.clone()
    blank_L[1:-1] = 3  # not the padding token, which RoBERTa gives a position of its own
    attributions = token_attributions(model, ids_L, blank_L, reading.chunk_CD, 0, reading.predicted)
    assert attributions.shape == ids_L.shape
    changed = reading.chunk_CD.clone()
    changed[0] = model.encode_batch(blank_L[None], torch.ones_like(blank_L)[None], [len(blank_L)])[0]
    logits, _ = model.classify(torch.cat([reading.chunk_CD, changed]), torch.tensor([len(changed)] * 2))
    whole, blank = log_odds(logits, reading.predicted)
    assert attributions.sum().item() == pytest.approx(
        (whole - blank).item(), abs=0.02 * abs(whole - blank).item() + 1e-4
    )


def test_explain_sentences_gives_offsets_in_the_text(read, splits):
    model, tokenizer, chunked, readings = read
    explain_sentences(model, tokenizer, chunked, readings)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for reading in readings:
        text = splits["test"]["text"][reading.index]
        for sentence in reading.sentences:
            low, high = reading.span_of(sentence.chunk)
            assert low <= sentence.start < sentence.end <= high
            joined = "".join(text[word["start"] : word["end"]] for word in sentence.words)
            assert joined == "".join(text[sentence.start : sentence.end].split())
            assert sum(word["score"] for word in sentence.words) == pytest.approx(sentence.score, abs=1e-4)
            assert all(not set(text[word["start"] : word["end"]]) & set(" \n") for word in sentence.words)
        scores = [sentence.score for sentence in reading.sentences]
        assert scores == sorted(scores, reverse=True)


def test_sentence_curves_begin_at_the_whole_document_with_overlapping_chunks(read):
    model, tokenizer, chunked, _ = read
    chunked.chunker = Chunker(tokenizer, model.config.chunk_length, chunk_overlap=5)
    readings = list(read_documents(model, chunked, DocumentCollator(tokenizer.pad_token_id)))
    explain_chunks(model, readings)
    explain_sentences(model, tokenizer, chunked, readings)
    curves = sentence_curves(model, chunked, readings)
    explained = [reading for reading in readings if len(reading.sentences) > 1]
    whole = [reading.logits_K.softmax(dim=0)[reading.predicted].item() for reading in explained]
    assert curves["documents"] == len(whole)
    assert curves["curves"]["deletion"][0] == pytest.approx(np.mean(whole), abs=1e-6)
    assert curves["curves"]["deletion_random"][0] == pytest.approx(np.mean(whole), abs=1e-6)


def test_chunk_curves_delete_and_keep_the_strongest_chunks_first(roberta_model):
    """As a plain loop does, on a document of five chunks."""
    torch.manual_seed(0)
    chunk_CD, contributions = torch.randn(5, roberta_model.config.hidden_size), np.array([0.1, 0.5, -0.2, 0.4, 0.3])
    roberta_model.eval()
    nothing = {"logits_K": torch.zeros(3), "weights_C": torch.zeros(5), "bounds": [], "spans": [], "input_ids": []}
    result = DocumentResult(0, 1, [1], chunk_CD=chunk_CD, read=list(range(5)), contributions=contributions, **nothing)
    expected = {"deletion": [], "insertion": []}
    for share in np.arange(0, 1.0, 0.1):
        number = min(round(share * 5), 4)
        strongest = [1, 3, 4, 0, 2]
        for name, kept in (("deletion", strongest[number:]), ("insertion", strongest[: max(number, 1)])):
            with torch.no_grad():
                logits, _ = roberta_model.classify(chunk_CD[sorted(kept)], [len(kept)])
            expected[name].append(logits.softmax(dim=1)[0, 1].item())
    curves = chunk_curves(roberta_model, [result])
    assert curves["documents"] == 1
    for name, values in expected.items():
        assert curves["curves"][name] == pytest.approx(values, abs=1e-5)
        assert curves[name] == pytest.approx(np.mean(values), abs=1e-5)
        assert curves["curves"][f"{name}_random"] != pytest.approx(values, abs=1e-5)


# ---- the command ----


@pytest.fixture(scope="module")
def stories(tmp_path_factory, roberta_folder):
    """A few of the demo's stories, whose evidence is known, prepared."""
    folder = tmp_path_factory.mktemp("stories")
    with open(folder / "stories.jsonl", "w", encoding="utf-8") as file:
        for number, document in enumerate(demo_corpus(60, seed=3)):
            document |= {"year": 1960 + number, "source": ("web", "print")[number % 2]}
            file.write(json.dumps(document) + "\n")
    labels, shares = ",".join(LABELS), "0.5,0.25,0.25"
    given = {
        "source": folder / "stories.jsonl",
        "tokenizer": roberta_folder,
        "labels": labels,
        "split_fractions": shares,
        "keep_columns": "year,source",
    }
    done = run_command("scripts.prepare_dataset", **given, output_dir=folder / "data")
    assert done.returncode == 0, done.stderr
    return folder / "data"


@pytest.fixture(scope="module")
def evaluated(stories, roberta_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    trained = train(stories, roberta_folder, folder / "run", chunk_length=64, max_chunks=6, num_train_epochs=1)
    assert trained.returncode == 0, trained.stderr
    given = {"model": folder / "run", "dataset_dir": stories, "output_dir": folder / "report"}
    done = run_command("scripts.evaluate_and_explain", **given)
    assert done.returncode == 0, done.stderr
    return folder


def test_evaluation_leaves_its_files(evaluated):
    folder = evaluated / "report"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"report.html", "metrics.json", "predictions.csv", "evidence.jsonl", "confusion.png"}
    metrics = json.loads((folder / "metrics.json").read_text())
    trained = json.loads((evaluated / "run" / "metrics.json").read_text())["test"]
    for name, entry in metrics["model"].items():
        assert set(entry) == {"value", "low", "high"}
        if name in trained:
            assert entry["value"] == pytest.approx(trained[name])
    assert set(metrics["baselines"]) == {"tfidf_tuned", "tfidf", "first_chunk", "head_tail", "majority"}
    for baseline in metrics["baselines"].values():
        difference = metrics["model"]["f1_macro"]["value"] - baseline["f1_macro"]["value"]
        assert baseline["difference_f1_macro"]["value"] == pytest.approx(difference)
    assert metrics["tfidf_tuned_options"] in html.unescape((folder / "report.html").read_text())
    assert set(metrics["calibration"]) == {"temperature", "ece_before", "ece_after"}
    assert metrics["calibration"]["temperature"] == pytest.approx(
        json.loads((evaluated / "run" / "config.json").read_text())["temperature"]
    )
    assert [point["target_recall"] for point in metrics["operating_points"]] == [0.9, 0.95, 0.99]
    for unit in ("chunk", "sentence"):
        assert set(metrics["faithfulness"][unit]) >= {"deletion", "deletion_random", "insertion", "insertion_random"}
    assert "documents" in metrics["pointing"]


def test_model_card_has_intervals_and_baselines(evaluated):
    card = (evaluated / "run" / "README.md").read_text()
    found = json.loads((evaluated / "report" / "metrics.json").read_text())
    own = found["model"]["f1_macro"]
    assert f"| this model | {own['value']:.3f} ({own['low']:.3f}–{own['high']:.3f}) |" in card
    for name in ("tfidf_tuned", "tfidf"):
        assert f"| {name} | {found['baselines'][name]['f1_macro']['value']:.3f} (" in card
    assert f"softmax(logits / {found['calibration']['temperature']:.3f})" in card


def test_predictions_agree_with_those_of_training(evaluated):
    rows = []
    for path in (evaluated / "run" / "predictions_test.csv", evaluated / "report" / "predictions.csv"):
        with open(path, encoding="utf-8") as file:
            rows.append(list(csv.DictReader(file)))
    for ours, theirs in zip(*rows, strict=True):
        assert ours["id"] == theirs["id"]
        for label in LABELS:
            assert float(ours[label]) == pytest.approx(float(theirs[label]), abs=1e-5)


def test_kept_columns_reach_predictions_evidence_and_subgroups(evaluated, stories):
    splits, _ = load_prepared(str(stories))
    kept = {row["id"]: json.loads(row["metadata"]) for row in splits["test"]}
    for path in (evaluated / "run" / "predictions_test.csv", evaluated / "report" / "predictions.csv"):
        with open(path, encoding="utf-8") as file:
            assert {
                row["id"]: {"year": int(row["year"]), "source": row["source"]} for row in csv.DictReader(file)
            } == kept
    for line in map(json.loads, (evaluated / "report" / "evidence.jsonl").read_text().splitlines()):
        assert line["metadata"] == kept[line["id"]]
    groups = {
        g["group"]: g["documents"] for g in json.loads((evaluated / "report" / "metrics.json").read_text())["by_group"]
    }
    assert groups["source: web"] + groups["source: print"] == len(kept)
    years = {name: count for name, count in groups.items() if name.startswith("year ")}
    assert (len(years), sum(years.values())) == (4, len(kept))


def test_evidence_is_quoted_from_the_text(evaluated, stories):
    splits, _ = load_prepared(str(stories))
    texts = dict(zip(splits["test"]["id"], splits["test"]["text"], strict=True))
    lines = [json.loads(line) for line in (evaluated / "report" / "evidence.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(texts)
    for line in lines:
        text = texts[line["id"]]
        assert line["chunks"]
        assert sum(chunk["attention"] for chunk in line["chunks"]) == pytest.approx(1, abs=1e-4)
        for found in line["evidence"]:
            assert found["text"] == text[found["start"] : found["end"]]
            for word in found["words"]:
                assert found["start"] <= word["start"] < word["end"] <= found["end"]


def test_prepared_data_keeps_known_evidence(stories):
    splits, _ = load_prepared(str(stories))
    documents = {document["id"]: document for document in demo_corpus(60, seed=3)}
    for split in splits.values():
        for id_, evidence in zip(split["id"], split["evidence"], strict=True):
            assert json.loads(evidence or "[]") == documents[id_]["evidence"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "tset"}, "tset.*train, validation, test"),
        ({"model": "no/such"}, "no/such"),
        ({"dataset_dir": "nowhere"}, "nowhere"),
    ],
)
def test_mistaken_option_is_named(arguments, message, evaluated, stories, tmp_path, call_command):
    given = {"model": evaluated / "run", "dataset_dir": stories, "output_dir": tmp_path / "out"}
    with pytest.raises(USER_ERRORS, match=message):
        call_command(evaluate_main, **(given | arguments))
    assert not (tmp_path / "out").exists()


def test_mistake_ends_the_command_with_a_paragraph_and_status_1(stories, tmp_path):
    given = {"model": "no/such", "dataset_dir": stories, "output_dir": tmp_path / "out"}
    command = [sys.executable, "-m", "scripts.evaluate_and_explain", *options(**given)]
    assert_refused(run(command, cwd=ROOT, cold=True), "no/such")
    assert not (tmp_path / "out").exists()


def test_evaluation_fits_a_missing_temperature(evaluated, stories, tmp_path):
    model = shutil.copytree(evaluated / "run", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "temperature": None}))
    given = {"model": model, "dataset_dir": stories, "output_dir": tmp_path / "report"}
    done = run_command("scripts.evaluate_and_explain", "--no_sentences", **given)
    assert done.returncode == 0, done.stderr
    assert Model.from_pretrained(model).config.temperature == pytest.approx(config["temperature"], rel=1e-3)


def test_baselines_of_a_dataset_are_printed(prepared_folder):
    done = run_command("scripts.baselines", dataset_dir=prepared_folder)
    assert done.returncode == 0, done.stderr
    *lines, chosen = done.stdout.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        [split, name] for split in ("validation", "test") for name in ("tfidf", "tfidf_tuned", "majority")
    ]
    # General is half of the documents, and always said: F1 2/3, and 0 for the other two labels.
    assert [line.split(": ")[2] for line in lines[2::3]] == ["macro-F1 0.2222, accuracy 0.5000"] * 2
    assert re.fullmatch(r"tfidf_tuned: .*\bwords\b.*\bC \d+.*\bGeneral [+-].*\bMature [+-].*", chosen)
