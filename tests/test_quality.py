"""The quality protocol: no document is judged by a model that saw it, and nothing is run twice."""

import json
import re

import datasets
import numpy as np
import pytest
import yaml

from data.prepared_dataset import load_prepared
from scripts.benchmark.candidates import parse_candidate
from scripts.benchmark.folds import columns_of
from scripts.benchmark.quality_measures import flagged
from scripts.benchmark.quality_table import markdown, summary
from scripts.common.predictions_io import write_predictions
from tests.conftest import LABELS, TRAINING, assert_refused, run_command, tiny_rows, write_csv

NAMES = ["mild", "severe"]


@pytest.mark.slow
def test_protocol_classifies_every_document_once_and_resumes(roberta_folder, tmp_path):
    rows = tiny_rows(48)
    for row in rows:
        del row["id"]
    for number, row in enumerate(rows):
        row["fold"] = "first" if number % 2 else "second"
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({**TRAINING, "max_chunks": 99, "freeze_encoder": True, "lexical_features": 20}))
    given = {
        "source": write_csv(tmp_path / "stories.csv", rows),
        "labels": ",".join(LABELS),
        "fold_column": "fold",
        "encoder": roberta_folder,
        "output_dir": tmp_path / "quality",
        "seeds": "7",
        "candidate": f"words={recipe}",
    }
    wrong = run_command("scripts.benchmark.quality", **{**given, "labels": "General,Teen"})
    assert_refused(wrong)
    # Documents that no run has read are prepared again when they are mended.
    cut = [*rows[:40], {**rows[40], "text": "Another text.", "fold": ""}, *rows[41:]]
    source = given["source"].read_bytes()
    write_csv(given["source"], cut)
    wrong = run_command("scripts.benchmark.quality", **given)
    assert wrong.returncode == 1
    assert re.search(r"\bfold\b.*row-41\b", " ".join(wrong.stderr.split()))
    given["source"].write_bytes(source)
    # A candidate that never ran is mended under its name.
    for refused in ("lexical_featurs=9", "pooling=median"):
        wrong = run_command("scripts.benchmark.quality", **{**given, "candidate": f"words={recipe},{refused}"})
        assert wrong.returncode == 1
        assert refused.partition("=")[0] in wrong.stderr
    done = run_command("scripts.benchmark.quality", **given)
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "quality" / "quality.json").read_text())
    assert measured["folds"] == 2
    assert measured["documents"] == 48
    assert re.search(r"first_chunk.*head_tail.*\b16 tokens", (tmp_path / "quality" / "quality.md").read_text())
    names = {"words", "tfidf_tuned", "tfidf", "words_alone", "first_chunk", "head_tail", "majority"}
    assert set(measured["systems"]) == names
    assert measured["systems"]["words"]["f1_macro"]["mean"] == 1.0  # a word gives the label away
    assert measured["systems"]["words"]["peak_mib"] > 100
    fold_of = {f"row-{number}": row["fold"] for number, row in enumerate(rows, 1)}
    for number, fold in enumerate(("first", "second")):
        splits, _ = load_prepared(str(tmp_path / "quality" / f"fold-{number}"))
        ids = {split: set(splits[split]["id"]) for split in splits}
        assert all(text != "Another text." for split in splits for text in splits[split]["text"])
        assert ids["test"] == {id_ for id_, its in fold_of.items() if its == fold}
        assert not ids["test"] & (ids["train"] | ids["validation"])
        assert not ids["train"] & ids["validation"]
        assert 2 <= len(ids["validation"]) <= 5  # an eighth of 24

    costs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("quality/runs/*/*/cost.json")}
    assert len(costs) == 2 * len(names)
    lost = tmp_path / "quality" / "runs" / "words" / "fold-1-seed-7" / "cost.json"
    lost.unlink()
    again = run_command("scripts.benchmark.quality", **given)
    assert again.returncode == 0, again.stderr
    changed = [path for path, time in costs.items() if path.stat().st_mtime_ns != time]
    assert changed == [lost]
    assert [line for line in again.stdout.splitlines() if re.search(r"fold 0, words, seed 7\b.*before", line)]
    assert again.stdout.count("before") == 1
    other = run_command("scripts.benchmark.quality", **{**given, "candidate": f"words={recipe},lexical_features=9"})
    assert other.returncode == 1
    assert re.search(r"\bwords\b.*options|options.*\bwords\b", " ".join(other.stderr.split()))
    other = run_command("scripts.benchmark.quality", **{**given, "labels": "Teen,General,Mature"})
    assert other.returncode == 1
    assert "labels" in other.stderr
    assert json.loads((tmp_path / "quality" / "quality.json").read_text())["systems"].keys() == names


@pytest.mark.slow
def test_several_labels_a_document_are_compared(roberta_folder, tmp_path):
    words = {"drugs": "needle", "language": "curse", "violence": "knife"}
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(72):
        own = [name for name in words if rng.random() < 0.4]
        text = " ".join(rng.permutation("the cat sat on a mat and looked at two dogs near an old tree".split()))
        rows.append({"text": " ".join([text, *(words[name] for name in own)]), "label": ";".join(own)})
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({**TRAINING, "freeze_encoder": True, "lexical_features": 20}))
    given = {
        "source": write_csv(tmp_path / "stories.csv", rows),
        "label_separator": ";",
        "folds": 2,
        "encoder": roberta_folder,
        "output_dir": tmp_path / "quality",
        "seeds": "7",
        "candidate": f"words={recipe}",
    }
    done = run_command("scripts.benchmark.quality", **given)
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "quality" / "quality.json").read_text())
    assert (measured["folds"], measured["documents"], measured["is_multi_label"]) == (2, 72, True)
    systems = measured["systems"]
    assert set(systems) == {"words", "tfidf_tuned", "tfidf", "words_alone", "first_chunk", "head_tail", "majority"}
    assert systems["tfidf_tuned"]["f1_macro"]["mean"] > 0.9
    assert systems["words_alone"]["f1_micro"] > 0.9
    assert systems["majority"]["f1_micro_less_tfidf_tuned"]["high"] < 0
    tested = []
    for fold in range(2):
        splits, _ = load_prepared(str(tmp_path / "quality" / f"fold-{fold}"), None)
        names = splits["test"].features["label"].feature.names
        share = [np.mean([k in own for own in splits["test"]["label"]]) for k in range(len(names))]
        every = [np.mean([name in row["label"] for row in rows]) for name in names]
        assert np.abs(np.subtract(share, every)).max() < 2 / 36
        tested += splits["test"]["id"]
    assert sorted(tested) == sorted(f"row-{number}" for number in range(1, 73))
    table = (tmp_path / "quality" / "quality.md").read_text()
    assert "micro-F1" in table
    assert "missed" not in table
    assert_refused(
        run_command("scripts.benchmark.quality", **given | {"label_separator": ","}), "another several_labels: choose"
    )
    wrong = run_command("scripts.benchmark.quality", **given, problem_type="single_label_classification")
    assert_refused(wrong, "--label_separator.*several labels")
    assert_refused(
        run_command("scripts.benchmark.quality", **given | {"folds": 100, "output_dir": tmp_path / "many"}),
        "--folds 72",
    )
    # A label that some fold could not learn, in one column a label.
    marked = [{"text": row["text"], **{name: int(name in row["label"]) for name in words}, "war": 0} for row in rows]
    marked[0]["war"] = 1
    given |= {"source": write_csv(tmp_path / "rare.csv", marked), "output_dir": tmp_path / "rare"}
    del given["label_separator"]
    wrong = run_command("scripts.benchmark.quality", **given, label_columns=",".join([*words, "war"]))
    assert_refused(wrong, r"1 of 4 labels have no training document in some fold: war\b")


def test_columns_of_takes_the_first_of_two_rows_with_one_id(tmp_path):
    rows = [
        {"id": "x", "text": "a", "label": "mild", "fold": "0"},
        {"id": "x", "text": "b", "label": "mild", "fold": "1"},
    ]
    assert columns_of(str(write_csv(tmp_path / "a.csv", rows)), ["fold"])("x") == {"fold": "0"}


def lay_out(
    runs, name: str, seed: int, scores: list[list[float]], labels: list[int], predicted: list[int] | None = None
) -> None:
    """Predictions of two folds, the documents dealt out in turn."""
    predicted = predicted or np.argmax(scores, axis=1).tolist()
    for fold in range(2):
        folder = runs / name / f"fold-{fold}-seed-{seed}"
        folder.mkdir(parents=True)
        ids = [f"d{i}" for i in range(fold, len(labels), 2)]
        part = datasets.Dataset.from_dict({"id": ids, "label": labels[fold::2]})
        write_predictions(
            folder / "predictions_test.csv", part, NAMES, np.array(scores[fold::2]), np.array(predicted[fold::2])
        )
        (folder / "cost.json").write_text(json.dumps({"seconds": 2.0, "peak_mib": None}))


def test_summary_is_paired_with_both_references_and_averaged_over_seeds(tmp_path):
    labels = [0, 0, 1, 1] * 20
    right = [[0.9, 0.1] if label == 0 else [0.2, 0.8] for label in labels]
    half = [row if number % 8 < 4 else row[::-1] for number, row in enumerate(right)]
    lay_out(tmp_path, "tfidf_tuned", 0, half, labels)
    lay_out(tmp_path, "words_alone", 0, right, labels)
    lay_out(tmp_path, "good", 1, right, labels)
    lay_out(tmp_path, "good", 2, half, labels)
    measured = summary(tmp_path, NAMES, {"tfidf_tuned": [0], "words_alone": [0], "good": [1, 2]})
    good, tfidf = measured["systems"]["good"], measured["systems"]["tfidf_tuned"]
    assert tfidf["f1_macro"]["mean"] == pytest.approx(0.5)
    assert good["f1_macro"]["mean"] == pytest.approx(0.75)
    less = good["f1_macro_less_tfidf_tuned"]
    assert less["value"] == pytest.approx(0.25)
    assert 0.1 < less["low"] < 0.25 < less["high"] < 0.4
    less = good["f1_macro_less_words_alone"]
    assert less["value"] == pytest.approx(-0.25)
    assert -0.4 < less["low"] < -0.25 < less["high"] < -0.1
    assert tfidf["missed_at_rate"] == pytest.approx(0.5)
    assert good["missed_at_rate"] == pytest.approx(0.25)
    assert good["missed_at_rate_less_tfidf_tuned"]["value"] == pytest.approx(-0.25)
    for name in ("tfidf_tuned", "words_alone"):
        assert measured["systems"][name][f"f1_macro_less_{name}"] == {"value": 0, "low": 0, "high": 0}
    table = markdown(measured)
    assert table.index("| good |") < table.index("| tfidf_tuned |")
    good_row = next(line for line in table.splitlines() if line.startswith("| good |"))
    assert good_row.index("| +0.250 [") < good_row.index("| -0.250 [")


def test_summary_is_of_the_decisions_and_not_of_the_highest_scores(tmp_path):
    labels = [0, 0, 1, 1] * 4
    scores = [[0.9, 0.1] if label == 0 else [0.6, 0.4] for label in labels]
    lay_out(tmp_path, "tfidf_tuned", 0, scores, labels)
    lay_out(tmp_path, "words_alone", 0, scores, labels)
    lay_out(tmp_path, "decided", 1, scores, labels, predicted=labels)
    measured = summary(tmp_path, NAMES, {"tfidf_tuned": [0], "words_alone": [0], "decided": [1]})
    systems = measured["systems"]
    assert systems["tfidf_tuned"]["f1_macro"]["mean"] == pytest.approx(1 / 3)
    assert systems["decided"]["f1_macro"]["mean"] == systems["decided"]["by_fold"][0] == pytest.approx(1)
    assert systems["decided"]["f1_macro_less_tfidf_tuned"]["value"] == pytest.approx(2 / 3)
    assert systems["decided"]["recall"] == [1, 1]


def test_summary_leaves_out_unfinished_folds(tmp_path):
    labels = [0, 1] * 8
    right = [[0.9, 0.1] if label == 0 else [0.2, 0.8] for label in labels]
    lay_out(tmp_path, "tfidf_tuned", 0, right, labels)
    lay_out(tmp_path, "words_alone", 0, right, labels)
    lay_out(tmp_path, "late", 1, right, labels)
    (tmp_path / "late" / "fold-1-seed-1" / "cost.json").unlink()
    measured = summary(tmp_path, NAMES, {"tfidf_tuned": [0], "words_alone": [0], "late": [1]})
    assert measured["folds"] == 1
    assert measured["documents"] == 8


def test_flagged_takes_the_asked_number_of_each_fold():
    scores = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.8, 0.2]])
    assert flagged(scores, np.array([0, 0, 1, 1]), {0: 1, 1: 2}).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("films", "NAME=RECIPE"),
        ("films=none.yaml", "none.yaml"),
        ("a b=x.yaml", "NAME=RECIPE"),
        ("tfidf=x.yaml", "tfidf"),
        ("tfidf_tuned=x.yaml", "tfidf_tuned"),
        ("x=README.md", "README.md"),
    ],
)
def test_impossible_candidate_is_named(text, said):
    with pytest.raises(ValueError, match=said):
        parse_candidate(text)
