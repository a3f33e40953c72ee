"""Several labels a document after training: the card, evaluation, explanations of each label, report, and comparison of runs."""

import csv
import json
import shutil
import sys

import datasets
import numpy as np
import pytest
import torch
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select
from sklearn.metrics import average_precision_score, f1_score, hamming_loss, label_ranking_average_precision_score

from data.labels import MULTI, label_array, label_feature, label_names
from data.prepared_dataset import load_prepared
from modeling.hierarchical_roberta.chunk_attribution import leave_one_out_attributions, log_odds
from modeling.training.metrics import absent_labels_note, multi_label_metrics
from modeling.training.model_card import latex_paragraph, model_card
from modeling.training.thresholds import fit_thresholds
from scripts.benchmark.synthetic_documents import topic_documents
from scripts.common.cli import USER_ERRORS
from scripts.compare_runs import main as compare_main
from scripts.evaluate_and_explain import main as evaluate_main
from scripts.evaluation import multi_label_baselines as baselines
from scripts.evaluation.multi_label import MultiLabel
from scripts.evaluation.multi_label_statistics import (
    calibration_of_labels,
    difference,
    errors_together,
    metrics_with_intervals,
    resample_counts,
    resampled_average_precision,
    resampled_metrics,
)
from scripts.evaluation.report import write_report
from scripts.evaluation.statistics import Prediction
from tests.conftest import SENTENCES, assert_refused, run_command, train

NAMES = ["drugs & drink", "language", "violence", "war"]
CUES = dict(zip(NAMES, ("needle", "curse", "knife", "cannon"), strict=True))


def some_labels(count: int, seed: int = 0) -> tuple[np.ndarray, Prediction]:
    """Labels of different frequencies, one of which no document has, and predictions that are often right."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, 4)) < [0.5, 0.3, 0.1, 0.0]).astype(np.int8)
    scores = np.round(np.clip(rng.normal(0.3 + 0.4 * labels, 0.2), 0, 1), 1)
    return labels, Prediction(scores > 0.5, scores)


# ---- statistics ----


def test_resampled_metrics_are_those_of_the_resampled_documents():
    labels, prediction = some_labels(40)
    counts = resample_counts(40)
    found = resampled_metrics(labels, prediction, 4)
    average = resampled_average_precision(labels, prediction.scores, 30)
    assert counts.sum(axis=0).tolist() == [40] * counts.shape[1]
    for draw in range(30):
        rows = np.repeat(np.arange(40), counts[:, draw])
        own, predicted, scores = labels[rows], prediction.predicted[rows], prediction.scores[rows]
        assert found["f1_micro"][draw] == pytest.approx(f1_score(own, predicted, average="micro"))
        assert found["hamming_loss"][draw] == pytest.approx(hamming_loss(own, predicted))
        ranking = label_ranking_average_precision_score(own, scores)
        assert found["label_ranking_average_precision"][draw] == pytest.approx(ranking)
        there = np.flatnonzero(own.any(axis=0))
        for k in there:
            assert found[f"f1_{k}"][draw] == pytest.approx(f1_score(own[:, k], predicted[:, k], zero_division=0))
            assert average[k, draw] == pytest.approx(average_precision_score(own[:, k], scores[:, k]), abs=1e-5)
        macro = f1_score(own[:, there], predicted[:, there], average="macro", zero_division=0)
        assert found["f1_macro"][draw] == pytest.approx(0.75 * macro)  # one label of four has no documents
    assert np.isnan(average[3]).all()


def test_intervals_contain_the_values_of_scikit_learn():
    labels, prediction = some_labels(150)
    found = metrics_with_intervals(labels, prediction, NAMES, most=2)
    values = multi_label_metrics(prediction.predicted, labels, prediction.scores, NAMES)
    for name, entry in found.items():
        assert entry["value"] == values[name]
        assert name.endswith(("_violence", "_war")) != ("low" in entry), name  # the least frequent two
        if "low" in entry and not name.startswith("hamming"):
            assert entry["low"] <= entry["value"] <= entry["high"], name
    assert found["f1_macro"]["high"] - found["f1_macro"]["low"] < 0.3


def test_intervals_contain_the_values_of_many_rare_labels():
    rng = np.random.default_rng(0)
    labels = (rng.random((100, 300)) < 0.01).astype(np.int8)
    predicted = (labels == 1) ^ (rng.random(labels.shape) < 0.005)
    found = metrics_with_intervals(labels, Prediction(predicted, predicted * 0.6), [str(k) for k in range(300)], most=0)
    for name in ("f1_macro", "f1_weighted", "precision_macro", "recall_macro", "average_precision_macro"):
        entry = found[name]
        assert entry["low"] < entry["value"] < entry["high"], name
        assert entry["high"] - entry["low"] < 0.25


def test_labels_without_documents_are_told():
    assert absent_labels_note({"support_a": 3, "support_b": 1}) == ""
    assert "2 of 3 labels have no document here and count 0, so that it is at most 0.333" in absent_labels_note(
        {"support_a": 3, "support_b": 0, "support_c": 0, "f1_a": 0.0}
    )


@pytest.mark.parametrize("absent", [0, 90])
def test_intervals_of_rare_labels_contain_the_mean_over_test_sets(absent):
    # 90 labels that 0.2 to 30 % of the documents have, and others that none has; a model that finds the rarer ones more rarely.
    frequency = np.append(0.3 / np.arange(1, 91) ** 1.1, np.zeros(absent))
    recall = np.append(0.95 - 0.17 * np.log(np.arange(1, 91)), np.zeros(absent))
    names = [str(k) for k in range(90 + absent)]
    entries = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        labels = rng.random((200, 90 + absent)) < frequency
        predicted = rng.random(labels.shape) < np.where(labels, recall, 0.5 * frequency * (1 - recall))
        prediction = Prediction(predicted, predicted * 0.6)
        entries.append(metrics_with_intervals(labels.astype(np.int8), prediction, names, most=0)["f1_macro"])
    mean = np.mean([entry["value"] for entry in entries])
    # 95 % of them; 40 draws leave 85 % within chance.
    assert np.mean([entry["low"] <= mean <= entry["high"] for entry in entries]) >= 0.85
    width = np.mean([entry["high"] - entry["low"] for entry in entries])
    assert width == pytest.approx(3.92 * np.std([entry["value"] for entry in entries]), rel=0.25)


def test_intervals_stay_within_the_range_of_a_metric():
    rng = np.random.default_rng(1)
    labels = (rng.random((60, 30)) < 0.08).astype(np.int8)
    one_missed, one_found = labels == 1, np.zeros_like(labels, dtype=bool)
    first = tuple(np.argwhere(labels)[0])
    one_missed[first], one_found[first] = False, True
    for predicted in (labels == 1, one_missed, one_found):
        found = metrics_with_intervals(
            labels, Prediction(predicted, predicted * 0.6), [str(k) for k in range(30)], most=0
        )
        for name, entry in found.items():
            assert "low" not in entry or 0 <= entry["low"] <= entry["high"] <= 1, (name, entry)


def test_difference_is_paired():
    labels, prediction = some_labels(150)
    assert difference(labels, prediction, prediction) == {"value": 0.0, "low": 0.0, "high": 0.0}
    # A document that a third of the resamples lack is no difference beyond chance.
    for seed in range(6):
        sure, _ = some_labels(60, seed)
        one_wrong = sure == 1
        one_wrong[5, 1] = ~one_wrong[5, 1]
        gap = difference(sure, Prediction(sure == 1, sure), Prediction(one_wrong, sure))
        assert gap["low"] <= 0 < gap["value"] < gap["high"]
    worse = Prediction(np.zeros_like(prediction.predicted), prediction.scores)
    gap = difference(labels, prediction, worse)
    assert gap["value"] == pytest.approx(f1_score(labels, prediction.predicted, average="macro", zero_division=0))
    assert 0 < gap["low"] < gap["value"] < gap["high"]


def test_errors_together_counts_a_missed_label_beside_an_added_one():
    labels = np.array([[1, 0, 0], [1, 0, 1], [0, 1, 0], [1, 0, 0]])
    predicted = np.array([[0, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=bool)
    assert errors_together(labels, predicted, ["a", "b", "c"]) == [
        {"missed": "a", "predicted": "b", "documents": 2},
        {"missed": "b", "predicted": "a", "documents": 1},
    ]


def test_calibration_of_a_label_is_the_gap_between_its_score_and_its_share():
    labels = np.zeros((10, 2))
    labels[:3, 0] = 1
    before, after = np.full((10, 2), 0.5), np.tile([0.3, 0.0], (10, 1))
    found = calibration_of_labels(before, after, labels, ["a", "b"])
    assert found["labels"]["a"] == {"ece_before": pytest.approx(0.2), "ece_after": pytest.approx(0.0)}
    assert found["labels"]["b"] == {"ece_before": 0.5, "ece_after": 0.0}
    assert found["ece_before"] == pytest.approx(0.35)  # a share of 0.15 at a score of 0.5


def test_a_label_that_cannot_be_told_is_not_given_to_everyone():
    rng = np.random.default_rng(0)
    labels = np.zeros((100, 2))
    labels[:4, 0], labels[:50, 1] = 1, 1
    scores = np.stack([np.concatenate([np.zeros(4), rng.random(96)]), labels[:, 1] * 0.5 + 0.2], axis=1)
    thresholds = fit_thresholds(scores, labels, "f1_macro", {})
    assert (scores[:, 0] >= thresholds[0]).mean() < 0.7
    assert thresholds[1] == pytest.approx(0.45)


# ---- the card ----


def test_card_of_many_labels_lists_the_frequent_ones(finished):
    history = json.loads((finished / "run" / "training_history.json").read_text())
    names = ["<b>", *(f"label {k}" for k in range(1, 2000))]
    counts = {name: 2000 - k for k, name in enumerate(names)}
    splits = ("train", "validation", "test")
    history["config"] |= {
        "labels": names,
        "label_counts": dict.fromkeys(splits, counts),
        "class_weight_values": dict.fromkeys(names, 1.0),
        "num_documents": dict.fromkeys(splits, 5000),
    }
    labels = np.random.default_rng(0).random((50, 2000)) < 0.1
    values = multi_label_metrics(labels, labels, labels.astype(float), names) | {"loss": 0.5}
    for text in (model_card(history, {"test": values}, names), latex_paragraph(history, {"test": values}, names)):
        assert len(text) < 20_000
        assert "5000" in text
        assert "1,950 more" in text
        assert "label 1" in text
    assert "<b>" not in model_card(history, {"test": values}, names)


# ---- the commands ----


def write_documents(path, count: int = 90):
    """Sentences of which one gives away each label, and is its gold evidence."""
    rng = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            own = [name for name, share in zip(NAMES, (0.4, 0.3, 0.4, 0.1), strict=True) if rng.random() < share]
            sentences = [SENTENCES[i] for i in rng.integers(len(SENTENCES), size=rng.integers(4, 20))]
            places = dict(zip(rng.permutation(len(sentences)).tolist(), own, strict=False))
            for place, name in places.items():
                sentences[place] = f"There was a {CUES[name]} again, {number}."
            starts = np.cumsum([0, *(len(sentence) + 1 for sentence in sentences)]).tolist()
            evidence = [
                {"start": starts[place], "end": starts[place] + len(sentences[place]), "label": name}
                for place, name in sorted(places.items())
            ]
            row = {"id": f"d{number}", "text": " ".join(sentences), "label": own, "evidence": evidence}
            file.write(json.dumps(row | {"source": ("web", "print")[number % 2]}) + "\n")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, roberta_folder):
    """Documents with several labels, a model of them and its evaluation."""
    folder = tmp_path_factory.mktemp("several")
    given = {"source": write_documents(folder / "documents.jsonl"), "tokenizer": roberta_folder}
    given |= {
        "problem_type": "multi_label_classification",
        "split_fractions": "0.5,0.25,0.25",
        "keep_columns": "source",
    }
    done = run_command("scripts.prepare_dataset", **given, output_dir=folder / "data")
    assert done.returncode == 0, done.stderr
    options = {"chunk_length": 48, "max_chunks": 8, "num_train_epochs": 1, "lexical_features": 200}
    done = train(folder / "data", roberta_folder, folder / "run", **options)
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "run", folder / "trained")
    done = run_command(
        "scripts.evaluate_and_explain", model=folder / "run", dataset_dir=folder / "data", output_dir=folder / "report"
    )
    assert done.returncode == 0, done.stderr
    return folder


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def predictions(path) -> dict[str, dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def test_training_writes_the_card(finished):
    card, section = ((finished / "trained" / name).read_text() for name in ("README.md", "training.tex"))
    values, splits = read(finished / "trained" / "metrics.json")["test"], load_prepared(str(finished / "data"))[0]
    assert (
        f"| f1_micro | {read(finished / 'trained' / 'metrics.json')['validation']['f1_micro']:.4f} | {values['f1_micro']:.4f} |"
        in card
    )
    assert f"test ({len(splits['test'])} documents)" in card
    assert 'result["labels"]' in card
    assert "name: Micro-F1" in card
    assert "threshold" in card
    assert f"micro-F1 {values['f1_micro']:.3f}" in section
    assert "binary cross entropy" in section


def test_evaluation_has_the_metrics_of_scikit_learn(finished):
    metrics = read(finished / "report" / "metrics.json")
    rows = predictions(finished / "report" / "predictions.csv")
    splits, _ = load_prepared(str(finished / "data"))
    labels, names = label_array(splits["test"]), label_names(splits["test"])
    scores = np.array([[float(rows[id_][name]) for name in names] for id_ in splits["test"]["id"]])
    predicted = np.array(
        [[name in json.loads(rows[id_]["predicted"]) for name in names] for id_ in splits["test"]["id"]]
    )
    model = metrics["model"]
    for average in ("macro", "micro", "weighted"):
        expected = f1_score(labels, predicted, average=average, zero_division=0)
        assert model[f"f1_{average}"]["value"] == pytest.approx(expected)
        assert model[f"f1_{average}"]["low"] <= expected <= model[f"f1_{average}"]["high"]
    for k, name in enumerate(names):
        expected = average_precision_score(labels[:, k], scores[:, k])
        assert model[f"average_precision_{name}"]["value"] == pytest.approx(expected, abs=1e-3)
    thresholds = metrics["decision"]["thresholds"]
    assert thresholds == dict(zip(names, read(finished / "run" / "config.json")["thresholds"], strict=True))
    assert (predicted == (scores >= list(thresholds.values()))).mean() > 0.99  # scores are rounded in the file
    assert metrics["support"] == dict(zip(names, labels.sum(axis=0).tolist(), strict=True))
    assert set(metrics["calibration"]["labels"]) == set(names)
    trained = read(finished / "run" / "metrics.json")["test"]
    assert {name: trained[name] for name in ("f1_macro", "f1_samples", "subset_accuracy")} == {
        name: pytest.approx(model[name]["value"]) for name in ("f1_macro", "f1_samples", "subset_accuracy")
    }
    groups = {group["group"]: group["documents"] for group in metrics["by_group"]}
    assert groups["source: web"] + groups["source: print"] == len(labels)


def test_model_is_compared_with_baselines_on_the_same_documents(finished):
    metrics = read(finished / "report" / "metrics.json")
    assert list(metrics["baselines"]) == ["tfidf_tuned", "tfidf", "first_chunk", "head_tail", "majority", "words_alone"]
    for baseline in metrics["baselines"].values():
        gap = metrics["model"]["f1_macro"]["value"] - baseline["f1_macro"]["value"]
        assert baseline["difference_f1_macro"]["value"] == pytest.approx(gap)
    card = (finished / "run" / "README.md").read_text()
    assert f"| tfidf_tuned | {metrics['baselines']['tfidf_tuned']['f1_macro']['value']:.3f} (" in card
    done = run_command("scripts.baselines", dataset_dir=finished / "data")
    assert done.returncode == 0, done.stderr
    found = metrics["baselines"]["tfidf_tuned"]
    assert (
        f"test: tfidf_tuned: macro-F1 {found['f1_macro']['value']:.4f}, micro-F1 {found['f1_micro']['value']:.4f}"
        in (done.stdout)
    )


def test_the_first_line_says_that_a_linear_baseline_is_better(roberta_folder, tmp_path):
    """Reports with many rare topics, which made-up terms tell: after one epoch a linear model of all words knows more."""
    source = tmp_path / "topics.jsonl"
    source.write_text("".join(f"{json.dumps(document)}\n" for document in topic_documents(500, 30)), encoding="utf-8")
    given = {"problem_type": "multi_label_classification", "tokenizer": roberta_folder}
    done = run_command("scripts.prepare_dataset", **given, source=source, output_dir=tmp_path / "data")
    assert done.returncode == 0, done.stderr
    done = train(tmp_path / "data", roberta_folder, tmp_path / "run", num_train_epochs=1, freeze_encoder=True)
    assert done.returncode == 0, done.stderr
    given = {"model": tmp_path / "run", "dataset_dir": tmp_path / "data", "output_dir": tmp_path / "report"}
    done = run_command("scripts.evaluate_and_explain", "--no_sentences", **given)
    assert done.returncode == 0, done.stderr
    metrics = read(tmp_path / "report" / "metrics.json")
    values = {name: entry["f1_macro"]["value"] for name, entry in metrics["baselines"].items()}
    best = max(values, key=values.__getitem__)
    assert best.startswith("tfidf")
    assert values["tfidf_tuned"] > 0.15 > 0.05 > metrics["model"]["f1_macro"]["value"], (
        values,
        metrics["model"]["f1_macro"],
    )
    first = next(line for line in done.stdout.splitlines() if line.startswith("This model"))
    assert first.startswith("This model does not beat the best baseline")
    assert f"({values[best]:.3f})" in first


def test_tuned_baseline_finds_words_and_rare_labels(finished):
    splits, _ = load_prepared(str(finished / "data"))
    prediction = baselines.tuned_tfidf(splits["train"], splits["test"])
    labels = label_array(splits["test"])
    assert f1_score(labels, prediction.predicted, average="micro") > 0.8
    assert "thresholds" in prediction.options
    reports = topic_documents(400, 20)
    names = sorted({topic for report in reports for topic in report["label"]})
    part = datasets.Dataset.from_list(
        [{"text": report["text"], "label": [names.index(topic) for topic in report["label"]]} for report in reports],
        features=datasets.Features({"text": datasets.Value("string"), "label": label_feature(names, MULTI)}),
    )
    chosen = baselines.tuned_tfidf(part.select(range(300)), part.select(range(300, 400)))
    assert "class weights balanced" in chosen.options  # most topics are rare
    most = baselines.most_frequent(splits["train"], splits["test"]).predicted
    assert most[0].sum() == round(label_array(splits["train"]).sum(axis=1).mean())
    # A label that no training document has, or all have.
    logits = baselines.fit_predict(np.eye(4), np.array([[0, 1], [0, 1], [0, 1], [0, 1]]), np.eye(4), 1.0)
    assert (logits[:, 0] < 0).all()
    assert (logits[:, 1] > 0).all()


def test_each_label_that_a_document_got_is_explained(finished):
    lines = [json.loads(line) for line in (finished / "report" / "evidence.jsonl").read_text().splitlines()]
    rows, splits = predictions(finished / "report" / "predictions.csv"), load_prepared(str(finished / "data"))[0]
    texts = dict(zip(splits["test"]["id"], splits["test"]["text"], strict=True))
    assert [line["id"] for line in lines] == list(texts)
    for line in lines:
        assert line["predicted"] == json.loads(rows[line["id"]]["predicted"])
        explained = [part["label"] for part in line["explanations"]]
        scores = [float(rows[line["id"]][name]) for name in explained]
        assert scores == sorted(scores, reverse=True)
        likeliest = max(NAMES, key=lambda name: float(rows[line["id"]][name]))
        assert set(explained) == set(line["predicted"] or [likeliest])
        for part, score in zip(line["explanations"], scores, strict=True):
            assert part["score"] == pytest.approx(score, abs=1e-5)
            for found in part["evidence"]:
                assert found["text"] == texts[line["id"]][found["start"] : found["end"]]
    pointing = read(finished / "report" / "metrics.json")["pointing"]
    assert pointing["documents"] == sum(hits["documents"] for hits in pointing["labels"].values()) > 0
    kept = [span for row in splits["test"]["evidence"] for span in json.loads(row or "[]")]
    assert {span["label"] for span in kept} <= set(NAMES)


def test_contributions_to_a_label_do_not_depend_on_the_other_labels(roberta_model):
    roberta_model.config.problem_type = "multi_label_classification"
    roberta_model.eval()
    chunk_CD = torch.randn(4, 32)
    before = leave_one_out_attributions(roberta_model, chunk_CD, 1)
    with torch.no_grad():
        roberta_model.classifier.weight[0] += 5
        full = roberta_model.classify(chunk_CD, [4])[0]
        without = roberta_model.classify(chunk_CD[1:], [3])[0]
    torch.testing.assert_close(leave_one_out_attributions(roberta_model, chunk_CD, 1), before)
    assert before[0].item() == pytest.approx((full[0, 1] - without[0, 1]).item(), abs=1e-5)
    assert log_odds(full, 1, is_multi_label=True).item() == full[0, 1].item()


def test_faithfulness_begins_at_the_sigmoid_of_the_explained_label(finished):
    curves = read(finished / "report" / "metrics.json")["faithfulness"]["chunk"]["curves"]
    assert 0 < curves["deletion"][0] <= 1
    assert curves["deletion"][0] == pytest.approx(curves["deletion_random"][0], abs=1e-6)


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium") or not shutil.which("chromedriver"), reason="no chromium")
def test_report_shows_the_explanation_of_a_chosen_label(finished, browser):
    browser.get((finished / "report" / "report.html").as_uri())
    rows = browser.execute_script("return documents.map(row => [row.predictions.length, row.shown])")
    number = max(range(len(rows)), key=lambda i: rows[i][0])
    browser.execute_script("arguments[0].click()", browser.find_elements(By.CSS_SELECTOR, "button.open")[number])
    choice = Select(browser.find_element(By.CSS_SELECTOR, ".explained select"))
    assert len(choice.options) == rows[number][0] > 1
    choice.select_by_index(1)
    label = choice.options[1].text.rsplit(",", 1)[0]
    assert f"Evidence for {label}" in browser.find_element(By.CSS_SELECTOR, ".detail").text
    missed = [shown for _, shown in rows if "missed" in shown]
    Select(browser.find_element(By.NAME, "result")).select_by_visible_text("missed")
    assert browser.find_element(By.ID, "count").text.startswith(f"{len(missed)} of")
    browser.find_element(By.ID, "clear").click()
    Select(browser.find_element(By.NAME, "label")).select_by_visible_text("none")
    without = sum(not own for own in load_prepared(str(finished / "data"))[0]["test"]["label"])
    assert browser.find_element(By.ID, "count").text.startswith(f"{without} of")
    assert browser.get_log("browser") == []


def test_report_of_many_labels_stays_small(tmp_path):
    names = [f"label {k}" for k in range(2000)]
    rng = np.random.default_rng(0)
    labels = (rng.random((30, 2000)) < 0.002).astype(np.int8)
    scores = np.clip(rng.random((30, 2000)) * 0.4 + labels * 0.5, 0, 1)
    kind, model = MultiLabel(names), Prediction(scores > 0.5, scores)
    fields = {"label_calibration": None}
    metrics = {"model": kind.intervals(model, labels), "faithfulness": {}}
    metrics |= kind.measures(fields, model, scores, labels, scores, labels, {"all": np.ones(30, dtype=bool)})
    metrics["decision"] = {"metric": "f1_macro", "thresholds": dict.fromkeys(names, 0.5)}
    documents = kind.describe({"metrics": metrics, "scores": scores, "labels": labels, "predicted": model.predicted})
    assert all(
        len(document["scores"]) <= 5 + len(set(document["label"] + document["predicted"])) for document in documents
    )
    rest = {
        "id": "d",
        "truncated": False,
        "counted": False,
        "num_chunks": 1,
        "text": "",
        "explained": [],
        "metadata": [],
    }
    tables = kind.tables(metrics, [document | rest for document in documents])
    assert max(len(table["rows"]) for table in tables) <= 51
    report = {
        "title": "", "headline": "", "headline_is_warning": False, "labels": names, "is_multi_label": True,
        "facts": kind.facts(metrics), "metrics": kind.headline_numbers(metrics), "comparison_columns": [],
        "baselines": [], "figures": [], "tables": tables, "documents_note": kind.documents_note(metrics, 30),
        "documents": [document | rest for document in documents],
    }  # fmt: skip
    write_report(report, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 500_000
    absent = sum(not count for count in labels.sum(axis=0))
    assert f"{absent:,} of {len(names):,} labels have no document here" in (tmp_path / "report.html").read_text()


def test_mistaken_options_are_named(finished, finished_run, prepared_folder, tmp_path, call_command):
    given = {"model": finished / "run", "dataset_dir": finished / "data", "output_dir": tmp_path / "out"}
    with pytest.raises(USER_ERRORS, match="severity_weights"):
        call_command(evaluate_main, **given, severity_weights="1,1,1,1")
    with pytest.raises(USER_ERRORS, match=r"several labels.*one label"):
        call_command(evaluate_main, **(given | {"dataset_dir": prepared_folder}))
    with pytest.raises(USER_ERRORS, match=r"one label.*several labels"):
        call_command(evaluate_main, **(given | {"model": finished_run}))


# ---- comparison of runs ----


def test_runs_are_compared_by_macro_f1(finished, tmp_path, monkeypatch, capsys):
    other = shutil.copytree(finished / "trained", tmp_path / "other")
    rows = predictions(other / "predictions_test.csv")
    with open(other / "predictions_test.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(next(iter(rows.values()))))
        writer.writeheader()
        writer.writerows(row | {"predicted": row["label"]} for row in rows.values())
    monkeypatch.setattr(sys, "argv", ["command", str(finished / "trained"), str(other), "--split", "test"])
    compare_main()
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| other |") and "+" in line]
    splits, _ = load_prepared(str(finished / "data"))
    names, labels = label_names(splits["test"]), label_array(splits["test"])
    first = predictions(finished / "trained" / "predictions_test.csv")
    predicted = [[name in json.loads(first[id_]["predicted"]) for name in names] for id_ in splits["test"]["id"]]
    right = f1_score(labels, labels, average="macro", zero_division=0)
    gap = right - f1_score(labels, np.array(predicted), average="macro", zero_division=0)
    assert f"| {gap:+.3f} (" in line


def test_runs_of_two_kinds_are_refused(finished, finished_run):
    assert_refused(
        run_command("scripts.compare_runs", str(finished / "trained"), str(finished_run)), "several labels and run one"
    )
