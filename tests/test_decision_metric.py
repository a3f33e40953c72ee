"""--decision_metric: class biases fitted on validation, and the same decisions wherever a label is decided."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import pipeline

from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.decision import decide
from modeling.training.decision_metric import (
    check_decision_metric,
    fit_decision,
    fit_recall_bias,
    parse_decision_metric,
)
from modeling.training.metrics import classification_metrics
from scripts.evaluation.statistics import abstain_curve
from tests.conftest import LABELS, run_command, tiny_config, tiny_rows, train, write_csv
from tests.test_decision import skewed

METRIC = "recall_Mature=0.75"
OPTIONS = {"decision_metric": METRIC, "learning_rate": 1e-4, "num_train_epochs": 1, "class_weights": "none"}


# ---- fitting ----


@pytest.mark.parametrize("name", ["f1_macro", "severity_f1"])
def test_mean_over_the_classes_is_better_with_biases_on_other_documents_too(name):
    (scores, labels), (other_scores, other_labels) = skewed(300), skewed(300, seed=1)
    severity = [0.1, 0.1, 0.8]
    biases = fit_decision(parse_decision_metric(name, LABELS), scores, labels, severity)
    before, after = (
        classification_metrics(decide(other_scores, each).tolist(), other_labels.tolist(), LABELS, severity)[name]
        for each in (None, biases)
    )
    assert after > before + 0.02


def test_severity_weights_are_those_of_the_metric():
    scores, labels = skewed(300)
    macro = fit_decision(parse_decision_metric("f1_macro", LABELS), scores, labels, [0.1, 0.1, 0.8])
    equal, unequal = (
        fit_decision(parse_decision_metric("severity_f1", LABELS), scores, labels, severity)
        for severity in ([2.0, 2.0, 2.0], [0.1, 0.1, 0.8])
    )
    assert equal == pytest.approx(macro)
    assert np.abs(unequal - macro).max() > 0.01


@pytest.mark.parametrize("recall", [0.01, 0.5, 0.55, 0.95, 1.0])
def test_recall_is_reached_with_the_smallest_bias(recall):
    scores, labels = skewed(200)
    for label in range(3):
        biases = fit_recall_bias(scores, labels, label, recall)
        assert np.flatnonzero(biases).tolist() == [label]
        num_documents = (labels == label).sum()
        found = (decide(scores, biases)[labels == label] == label).sum()
        assert found == np.ceil(recall * num_documents - 1e-9)
        # A bias just below the last threshold under it decides one document less.
        thresholds = np.delete(scores, label, axis=1).max(axis=1) - scores[:, label]
        biases[label] = thresholds[thresholds < biases[label]].max()
        lower = (decide(scores, biases - 1e-9 * np.eye(3)[label])[labels == label] == label).sum()
        assert lower < recall * num_documents


def test_recall_with_equal_scores_and_with_scores_that_rule_a_class_out():
    equal = np.log(np.tile([0.7, 0.3], (10, 1)))
    labels = np.array([1] * 4 + [0] * 6)
    biases = fit_recall_bias(equal, labels, 1, 0.25)
    assert decide(equal, biases).tolist() == [1] * 10
    equal[:2, 1] = -np.inf
    biases = fit_recall_bias(equal, labels, 1, 1.0)
    assert np.isfinite(biases).all()
    assert decide(equal, biases).tolist() == [0, 0] + [1] * 8
    equal[:, 1] = -np.inf
    assert fit_recall_bias(equal, labels, 1, 0.5).tolist() == [0, 0]
    alone = np.array([[-np.inf, 0.0]] * 3)
    assert fit_recall_bias(alone, np.ones(3, dtype=int), 1, 0.5).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f1", "f1_macro, severity_f1.*recall_Mature=0.95"),
        ("recall_Mature", "recall_Mature=0.95"),
        ("f1_macro=0.5", "recall_Mature=0.95"),
        ("recall_Matur=0.9", "'Matur'.*General, Teen, Mature"),
        ("recall_Mature=0", "above 0 and at most 1"),
        ("recall_Mature=1.01", "above 0 and at most 1"),
        ("recall_Mature=nan", "above 0 and at most 1"),
        ("recall_Mature=high", "above 0 and at most 1"),
        ("", "f1_macro"),
    ],
)
def test_invalid_metric_is_refused_in_a_sentence(text, message):
    with pytest.raises(ValueError, match=rf"^Invalid `decision_metric` '{text}'.*{message}"):
        parse_decision_metric(text, LABELS)


def test_a_recall_may_be_one_and_a_label_may_have_an_equals_sign():
    metric = parse_decision_metric("recall_a=b=1.0", ["a", "a=b"])
    assert (metric.label, metric.recall) == (1, 1.0)


def test_recall_of_a_label_without_validation_documents_is_refused():
    check_decision_metric(METRIC, LABELS, np.array([0, 2]))
    check_decision_metric("f1_macro", LABELS, np.array([0, 0]))
    with pytest.raises(ValueError, match=r"no validation document.*Mature"):
        check_decision_metric(METRIC, LABELS, np.array([0, 1]))


def test_biases_of_another_length_are_refused_and_none_are_the_default():
    with pytest.raises(ValueError, match=r"class_biases.*\b3\b"):
        tiny_config(class_biases=[0.0, 1.0])
    earlier = {name: value for name, value in tiny_config().to_dict().items() if "decision" not in name}
    del earlier["class_biases"]
    config = HierarchicalRobertaConfig.from_dict(earlier)
    assert (config.class_biases, config.decision_metric) == (None, None)


def test_selective_prediction_is_of_the_decisions():
    scores = np.array([[0.9, 0.1], [0.6, 0.4], [0.55, 0.45]])
    curve = abstain_curve(scores, np.array([0, 1, 1]), np.array([0, 1, 1]))
    assert {row["accuracy"] for row in curve} == {1.0}
    assert curve[0]["confidence"] == pytest.approx(0.4)


# ---- a run ----


@pytest.fixture(scope="module")
def data(tmp_path_factory, roberta_folder) -> Path:
    folder = tmp_path_factory.mktemp("decisions")
    given = {"source": write_csv(folder / "stories.csv", tiny_rows()), "tokenizer": roberta_folder}
    given |= {"labels": ",".join(LABELS), "split_fractions": "0.4,0.3,0.3"}
    done = run_command("scripts.prepare_dataset", **given, output_dir=folder / "data")
    assert done.returncode == 0, done.stderr
    return folder / "data"


@pytest.fixture(scope="module")
def decided(data, roberta_folder) -> Path:
    """A model that has learned next to nothing, so that a recall to reach changes many decisions."""
    done = train(data, roberta_folder, data.parent / "run", **OPTIONS)
    assert done.returncode == 0, done.stderr
    return data.parent / "run"


def predictions(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_bias(rows: list[dict[str, str]]) -> set[str]:
    """Ids of the documents whose label does not have the highest score."""
    return {row["id"] for row in rows if row["predicted"] != max(LABELS, key=lambda label: float(row[label]))}


def test_metrics_and_predictions_of_a_run_are_its_decisions(decided):
    config = json.loads((decided / "config.json").read_text())
    metrics = json.loads((decided / "metrics.json").read_text())
    assert config["decision_metric"] == METRIC
    assert config["class_biases"][:2] == [0, 0]
    for split in ("validation", "test"):
        rows = predictions(decided / f"predictions_{split}.csv")
        log_scores = np.log([[float(row[label]) for label in LABELS] for row in rows])
        assert [row["predicted"] for row in rows] == [LABELS[k] for k in decide(log_scores, config["class_biases"])]
        assert by_bias(rows)
        labels, predicted = ([LABELS.index(row[column]) for row in rows] for column in ("label", "predicted"))
        expected = classification_metrics(predicted, labels, LABELS, [0.3, 0.3, 0.4])
        assert {name: metrics[split][name] for name in expected} == pytest.approx(expected)
    assert metrics["validation"]["recall_Mature"] >= 0.75
    history = json.loads((decided / "training_history.json").read_text())
    assert history["best"]["eval_f1_macro"] != pytest.approx(metrics["validation"]["f1_macro"])  # of the argmax
    log = (decided / "training.log").read_text()
    assert re.search(rf"{METRIC}.*Mature [+-]\d.*f1_macro.*recall_Mature", log)


def test_pipeline_and_predict_decide_as_training_does(decided, data):
    rows = {row["id"]: row for row in predictions(decided / "predictions_test.csv")}
    texts = {row["id"]: row["text"] for row in predictions(data.parent / "stories.csv")}
    classify = pipeline("text-classification", model=str(decided), trust_remote_code=True)
    done = run_command("scripts.predict", model=decided, source=data.parent / "stories.csv")
    assert done.returncode == 0, done.stderr
    predicted = {row["id"]: row for row in map(json.loads, done.stdout.splitlines())}
    for id_, row in rows.items():
        [result] = classify(texts[id_])
        assert result["label"] == predicted[id_]["label"] == row["predicted"]
        assert (
            result["score"]
            == result["scores"][result["label"]]
            == pytest.approx(float(row[row["predicted"]]), abs=1e-5)
        )
        assert sum(result["scores"].values()) == pytest.approx(1)
        # The label decided for comes first, then the others by score.
        first, *others = [found["label"] for found in classify(texts[id_], top_k=None)]
        assert first == row["predicted"]
        assert others == sorted(set(LABELS) - {first}, key=lambda label: -result["scores"][label])


def test_report_has_the_decisions_and_marks_those_by_bias(decided, data, tmp_path):
    model = shutil.copytree(decided, tmp_path / "run")
    done = run_command(
        "scripts.evaluate_and_explain", "--no_sentences", model=model, dataset_dir=data, output_dir=tmp_path / "report"
    )
    assert done.returncode == 0, done.stderr
    rows = predictions(tmp_path / "report" / "predictions.csv")
    decided_of = {row["id"]: row["predicted"] for row in predictions(decided / "predictions_test.csv")}
    assert {row["id"]: row["predicted"] for row in rows} == decided_of
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    expected = json.loads((decided / "metrics.json").read_text())["test"]
    for name in ("f1_macro", "recall_Mature", "precision_Mature"):
        assert metrics["model"][name]["value"] == pytest.approx(expected[name])
    assert sum(row[2] for row in metrics["confusion"]) == list(decided_of.values()).count("Mature")
    assert metrics["abstain"][0]["accuracy"] == pytest.approx(expected["accuracy"])
    biases = json.loads((decided / "config.json").read_text())["class_biases"]
    assert metrics["decision"] == {
        "metric": METRIC,
        "class_biases": dict(zip(LABELS, biases, strict=True)),
        "not_highest_score": len(by_bias(rows)),
    }
    html = (tmp_path / "report" / "report.html").read_text()
    assert f"{len(by_bias(rows))} of {len(rows)} documents, marked" in html
    assert f"Mature {biases[2]:+.3f}" in html
    [summary] = re.findall(r'id="summary">(.*?)</script>', html)
    listed = {document["id"]: document for document in json.loads(summary)["documents"]}
    assert {id_ for id_, document in listed.items() if document["by_bias"]} == by_bias(rows)
    assert {id_: document["predicted"] for id_, document in listed.items()} == decided_of
    for row in rows:
        assert listed[row["id"]]["confidence"] == pytest.approx(float(row[row["predicted"]]), abs=1e-5)
    # Explanations are of the label that is decided for.
    texts = {row["id"]: row["text"] for row in predictions(data.parent / "stories.csv")}
    classify = pipeline("text-classification", model=str(decided), trust_remote_code=True)
    evidence = (tmp_path / "report" / "evidence.jsonl").read_text(encoding="utf-8")
    lines = {line["id"]: line for line in map(json.loads, evidence.splitlines())}
    for id_ in by_bias(rows):
        strongest = max(chunk["contribution"] for chunk in lines[id_]["chunks"])
        assert classify(texts[id_])[0]["evidence"][0]["score"] == pytest.approx(strongest, abs=1e-5)
    card = (model / "README.md").read_text()
    assert "Comparison with baselines" in card
    for text in (card, (decided / "README.md").read_text()):
        assert METRIC in text
        assert "optimistic" in text


def test_resumed_run_has_the_same_biases_and_one_without_the_option_has_none(decided, data, roberta_folder, tmp_path):
    config = json.loads((decided / "config.json").read_text())
    folder = shutil.copytree(decided, tmp_path / "run")
    for name in ("config.json", "model.safetensors", "metrics.json"):
        (folder / name).unlink()
    done = train(data, roberta_folder, folder, resume_from_checkpoint="auto", **OPTIONS)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "config.json").read_text())["class_biases"] == config["class_biases"]
    plain = {name: value for name, value in OPTIONS.items() if name != "decision_metric"}
    done = train(data, roberta_folder, folder, resume_from_checkpoint="auto", **plain)
    assert done.returncode == 0, done.stderr
    saved = json.loads((folder / "config.json").read_text())
    assert (saved.get("class_biases"), saved.get("decision_metric")) == (None, None)
    assert not by_bias(predictions(folder / "predictions_test.csv"))
