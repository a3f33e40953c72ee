"""Several labels a document: from sources to a trained model."""

import copy
import csv
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sklearn import metrics as sklearn_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import EvalPrediction

from data.demo_corpus import DESCRIPTORS, descriptor_corpus
from data.documents import Columns, read_documents
from data.labels import MULTI, label_array, label_names
from data.preparation import prepare_dataset
from data.prepared_dataset import load_prepared
from data.readers import ReadOptions, Source
from data.splits import make_splits, stratified_parts
from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.decision import MultiLabelDecision, decision_of
from modeling.training.calibration import fit_label_calibration, fit_logit_weights
from modeling.training.losses import balanced_positive_weights, weight_sum, weighted_loss_sum
from modeling.training.metrics import multi_label_metrics, multi_label_metrics_fn
from modeling.training.thresholds import best_threshold, fit_thresholds, parse_threshold_metric
from scripts.training.kinds import MultiLabel
from tests.conftest import assert_refused, run_command, tiny_rows, train
from tests.test_sources import write_workbook
from tests.tiny_training import SplitLengths, trainer_for

NAMES = ["drugs", "language", "violence"]


def rows_with_labels(count: int = 60) -> list[dict]:
    """Rows of `tiny_rows`, each with a sentence for each label that it has; every fourth has none."""
    rng = np.random.default_rng(1)
    rows = []
    for number, row in enumerate(tiny_rows(count)):
        own = [] if number % 4 == 0 else sorted(rng.permutation(NAMES)[: 1 + number % 3].tolist())
        text = row["text"] + "".join(f" There was {name}, and {name} again." for name in own)
        rows.append({"id": row["id"], "text": text, "label": own})
    return rows


def write_table(path, rows, **columns):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "text", *columns])
        writer.writeheader()
        for row in rows:
            made = {name: make(row["label"]) for name, make in columns.items()}
            writer.writerow({"id": row["id"], "text": row["text"]} | made)
    return path


@pytest.fixture(scope="module")
def multi_folder(tmp_path_factory, roberta_folder):
    folder = tmp_path_factory.mktemp("multi")
    source = folder / "stories.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows_with_labels()), encoding="utf-8")
    columns = Columns(problem_type=MULTI)
    prepare_dataset(str(source), str(roberta_folder), folder / "data", columns=columns, keep=["duplicate"])
    return folder / "data"


# ---- data ----


def test_every_form_of_the_labels_gives_the_same_documents(tmp_path):
    rows = rows_with_labels(12)
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "text": datasets.Value("string"),
            "label": datasets.List(datasets.ClassLabel(names=NAMES)),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "ids.parquet")
    marks = {name: lambda own, name=name: int(name in own) for name in NAMES}
    several = {"problem_type": MULTI}
    sources = [
        (tmp_path / "lists.jsonl", Columns(**several)),
        (tmp_path / "ids.parquet", Columns(**several)),
        (write_table(tmp_path / "json.csv", rows, label=json.dumps), Columns(**several)),
        (
            write_table(tmp_path / "text.csv", rows, tags="; ".join),
            Columns(label="tags", label_separator=";", **several),
        ),
        (write_table(tmp_path / "marks.csv", rows, **marks), Columns(label_columns=NAMES, **several)),
    ]
    for path, columns in sources:
        documents, _ = read_documents(Source([str(path)]), columns)
        assert [sorted(own) for own in documents["label"]] == [row["label"] for row in rows], path.name
        assert list(documents["id"]) == [row["id"] for row in rows]


def test_no_label_is_an_answer_and_a_missing_cell_is_not(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "One.", "label": []}\n{"text": "Two.", "label": null}\n')
    with pytest.raises(ValueError, match=r"1 with no label \[missing_label\]: row 2"):
        read_documents(Source([str(tmp_path / "a.jsonl")]), Columns(problem_type=MULTI))
    documents, _ = read_documents(
        Source([str(tmp_path / "a.jsonl")]), Columns(problem_type=MULTI), drop=["missing_label"]
    )
    assert list(documents["label"]) == [[]]


def test_label_hygiene_is_that_of_one_label(tmp_path):
    rows = [["Drugs", "drugs "], ["Drugs", "1.0"], ["drugs"], ["1"]]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"Text {i}.", "label": own}) + "\n" for i, own in enumerate(rows))
    )
    source, columns = Source([str(tmp_path / "a.jsonl")]), Columns(problem_type=MULTI)
    with pytest.raises(ValueError, match="looks like a more frequent one"):
        read_documents(source, columns)
    merged, _ = read_documents(source, columns, merge_labels=True)
    [names] = {tuple(own) for own in list(merged["label"])[:1]}
    assert list(merged["label"]) == [list(names), [*names, "1"], list(names), ["1"]]
    named, _ = read_documents(source, columns, labels=["DRUGS", "1"], merge_labels=True)
    assert list(named["label"]) == [["DRUGS"], ["DRUGS", "1"], ["DRUGS"], ["1"]]
    with pytest.raises(ValueError, match=r"not in --labels \[unknown_label\].*'drugs'"):
        read_documents(source, columns, labels=["Drugs", "1"])


def test_labels_are_read_in_the_odd_forms_of_tables():
    several = {"problem_type": MULTI}
    tags = Columns(label_separator=";", **several)
    read = [tags.labels_of({"label": value}) for value in ("1;2", 1, 2.0, "", None, float("nan"))]
    assert read == [["1", "2"], ["1"], ["2"], [], None, None]
    lists = Columns(**several)
    assert [lists.labels_of({"label": value}) for value in ("NaN", float("nan"), '["a"]')] == [None, None, ["a"]]
    marks = Columns(label_columns=["1.0", "b"], **several)
    assert [marks.labels_of({"1.0": 1, "b": value}) for value in (0, "yes", "", None)] == [
        ["1"],
        ["1", "b"],
        None,
        None,
    ]
    for columns, value in ((tags, '["a", "b"]'), (lists, '[["a"]]'), (lists, "[[1]]")):
        with pytest.raises(ValueError, match="a list"):
            columns.labels_of({"label": value})


def test_an_empty_cell_of_a_spreadsheet_is_no_label(tmp_path):
    write_workbook(tmp_path / "a.xlsx", {"Texts": [["text", "label"], ["One.", "a; b"], ["Two.", None]]})
    documents, _ = read_documents(Source([str(tmp_path / "a.xlsx")]), Columns(problem_type=MULTI, label_separator=";"))
    assert list(documents["label"]) == [["a", "b"], []]


def test_columns_of_labels_win_over_a_label_column_and_can_be_merged(roberta_folder, tmp_path):
    rows = [row | {"Teen": int(k % 2 == 0), "teen": int(k % 5 == 0), "c": 1} for k, row in enumerate(tiny_rows())]
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("id", "text")}
        | {"label": datasets.ClassLabel(names=["General", "Teen", "Mature"])}
        | {name: datasets.Value("int64") for name in ("Teen", "teen", "c")}
    )
    rows = [{name: row[name] for name in features} for row in rows]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    columns = Columns(problem_type=MULTI, label_columns=["Teen", "teen", "c"])
    given = {"columns": columns, "merge_labels": True, "keep": ["duplicate"]}
    prepare_dataset(str(tmp_path / "a.parquet"), str(roberta_folder), tmp_path / "data", **given)
    about = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert about["labels"] == ["Teen", "c"]
    numbers = [split["labels"]["Teen"] for split in about["splits"].values()]
    assert sum(numbers) == sum(row["Teen"] or row["teen"] for row in rows)


def test_labels_of_evidence_are_those_of_the_document(tmp_path):
    spans = [[{"start": 0, "end": 3, "label": name}] for name in ("teen ", "1.0", "war")]
    rows = [
        {"text": f"A text {k}.", "label": own, "evidence": span}
        for k, (own, span) in enumerate(zip((["Teen"], ["1"], ["Teen"]), spans, strict=True))
    ]
    rows += [{"text": "Another.", "label": ["TEEN"], "evidence": [{"start": 0, "end": 3, "label": "TEEN"}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, columns = Source([str(tmp_path / "a.jsonl")]), Columns(problem_type=MULTI)
    for labels in (None, ["Teen", "1"]):
        documents, issues = read_documents(source, columns, labels=labels, merge_labels=True)
        found = [[span["label"] for span in json.loads(text or "[]")] for text in documents["evidence"]]
        assert found == [["Teen"], ["1"], [], ["Teen"]]
        assert len(issues.rows["evidence"]) == 1
        assert "row 3" in issues.rows["evidence"][0]


def test_evidence_of_one_label_and_of_labels_that_look_alike(tmp_path):
    spans = [{"start": 0, "end": 3}, {"start": 0, "end": 3, "label": "violence"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "A text.", "label": "Mature", "evidence": spans}) + "\n")
    documents, issues = read_documents(Source([str(tmp_path / "a.jsonl")]), Columns())
    assert json.loads(documents["evidence"][0]) == spans
    row = {"text": "A text.", "label": ["01", "1"], "evidence": [{"start": 0, "end": 3, "label": "01"}]}
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n")
    documents, _ = read_documents(
        Source([str(tmp_path / "b.jsonl")]), Columns(problem_type=MULTI), keep=["similar_label"]
    )
    assert json.loads(documents["evidence"][0]) == row["evidence"]
    write_workbook(tmp_path / "c.xlsx", {"Texts": [["title", "body", "label", "evidence"], ["One", "Two.", "a", None]]})
    _, issues = read_documents(
        Source([str(tmp_path / "c.xlsx")], ReadOptions(text_columns=("title", "body"))), Columns("title,body")
    )
    assert "evidence" not in issues.rows


def test_mistakes_are_told_in_a_sentence(tmp_path, roberta_folder):
    rows = rows_with_labels(8)
    table = write_table(tmp_path / "a.csv", rows, label=";".join, mark=lambda own: "x")
    given = {"source": table, "tokenizer": roberta_folder, "output_dir": tmp_path / "data"}
    for extra, words in (
        ({"problem_type": MULTI}, "set --label_separator"),
        ({"label_columns": "mark"}, "expected 0 or 1 in the column 'mark', got 'x'"),
        ({"label_columns": "none"}, "no column for --label_columns none"),
        ({"label_columns": "mark", "label_separator": ";"}, "set one"),
        ({"label_separator": ";", "problem_type": "single_label_classification"}, f"set --problem_type {MULTI}"),
    ):
        assert_refused(run_command("scripts.prepare_dataset", **given, **extra), words)
    lists = write_table(tmp_path / "b.csv", rows, label=json.dumps)
    assert_refused(run_command("scripts.prepare_dataset", **given | {"source": lists}), f"--problem_type {MULTI}")


def test_splits_keep_the_shares_of_rare_labels_and_groups_together():
    rng = np.random.default_rng(0)
    shares = {f"label {k}": 0.5 / (k + 1) for k in range(10)}
    labels = [[name for name, share in shares.items() if rng.random() < share] for _ in range(2000)]
    groups = [int(group) for group in rng.integers(1500, size=2000)]
    splits = make_splits(labels, groups, (0.8, 0.1, 0.1), seed=1)
    for name in [*shares, None]:
        has = [name in own if name else not own for own in labels]
        number = sum(has)
        for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
            found = sum(split == here for here, is_in in zip(splits, has, strict=True) if is_in)
            assert found == pytest.approx(share * number, abs=max(2.5, 0.02 * number)), (name, split)
    assert all(len({splits[i] for i in np.flatnonzero(np.array(groups) == group)}) <= 1 for group in range(1500))


def test_rare_labels_are_in_train_and_do_not_swell_the_small_splits():
    rng = np.random.default_rng(0)
    labels = [
        [f"label {k}" for k in np.flatnonzero(rng.random(600) < 3 / (k + 1 + np.arange(600)) ** 0.5 / 9)]
        for k in range(1500)
    ]
    splits = make_splits(labels, list(range(1500)), (0.8, 0.1, 0.1), seed=1)
    assert {name for own, split in zip(labels, splits, strict=True) if split == "train" for name in own} == {
        name for own in labels for name in own
    }
    # Documents with many rare labels are rather in train: the shares of the labels come before those of the documents.
    assert [splits.count(split) for split in ("train", "validation", "test")] == pytest.approx([1200, 150, 150], abs=15)


def test_splits_of_frequent_labels_are_even():
    marks = np.random.default_rng(0).random((1000, 10)) < 0.2
    labels = [np.flatnonzero(row).tolist() for row in marks]
    parts = np.array(stratified_parts(labels, list(range(1000)), [0.2] * 5, seed=0))
    for part in range(5):
        assert (parts == part).sum() == 200
        assert np.abs(marks[parts == part].sum(axis=0) - marks.sum(axis=0) / 5).max() < 3  # at random up to 14
    # At most one label a document.
    topics = np.random.default_rng(0).choice(30, 600, p=1 / np.arange(1, 31) / (1 / np.arange(1, 31)).sum())
    parts = np.array(stratified_parts([[k] for k in topics], list(range(600)), [0.2] * 5, seed=0))
    assert np.bincount(parts).tolist() == pytest.approx([120] * 5, abs=2)


def test_the_prepared_dataset_has_ids_counts_and_what_occurs_together(multi_folder):
    splits, manifest = load_prepared(str(multi_folder))
    assert manifest["problem_type"] == MULTI
    assert label_names(splits["train"]) == NAMES
    rows = {row["id"]: row["label"] for row in rows_with_labels()}
    for part in splits.values():
        found = label_array(part)
        for id_, marks in zip(part["id"], found, strict=True):
            assert [NAMES[k] for k in np.flatnonzero(marks)] == rows[id_]
    about, train_labels = manifest["splits"]["train"], label_array(splits["train"])
    assert about["labels"] == dict(zip(NAMES, train_labels.sum(axis=0).tolist(), strict=True))
    assert about["labels_of_a_document"]["0"] == int((train_labels.sum(axis=1) == 0).sum())
    together = {(first, second): both for first, second, both in about["labels_together"]}
    assert together["drugs", "violence"] == int((train_labels[:, 0] & train_labels[:, 2]).sum())
    page = (multi_folder / "dataset_report.html").read_text(encoding="utf-8")
    assert "Labels together" in page
    assert f"<td>{together['drugs', 'violence']}</td>" in page


# ---- loss, decisions, metrics ----


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, torch.tensor([2.0, 0.5, 7.0])])
def test_the_parts_add_up_to_torchs_loss(weights, label_smoothing):
    torch.manual_seed(0)
    logits, labels = torch.randn(16, 3), torch.randint(2, (16, 3)).float()
    parts = [weighted_loss_sum(logits[i : i + 1], labels[i : i + 1], weights, label_smoothing) for i in range(16)]
    smooth = labels * (1 - label_smoothing) + label_smoothing / 2
    whole = torch.nn.functional.binary_cross_entropy_with_logits(logits, smooth, pos_weight=weights)
    torch.testing.assert_close(sum(parts) / weight_sum(labels, weights), whole)
    labels[3, 1] = labels[5] = -100
    known = labels != -100
    one_by_one = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, smooth, pos_weight=weights, reduction="none"
    )
    found = weighted_loss_sum(logits, labels, weights, label_smoothing) / weight_sum(labels, weights)
    torch.testing.assert_close(found, one_by_one[known].mean())


def test_positive_weights_are_negatives_by_positives():
    assert balanced_positive_weights([20, 1, 0], 500).tolist() == [24.0, 100.0, 100.0]


class MultiLabelDocuments(SplitLengths):
    """Random documents with up to three labels; one of a document's is unknown now and then."""

    def __init__(self, count: int = 50):
        super().__init__(count)
        rng = np.random.default_rng(2)
        for item in self.items:
            item["labels"] = rng.choice([0, 1, -100], 3, p=[0.6, 0.35, 0.05]).astype(np.float32)


@pytest.fixture
def multi_model(roberta_model):
    roberta_model.config.problem_type = MULTI
    return roberta_model


@pytest.mark.parametrize("label_smoothing_factor", [0.0, 0.1])
def test_16x1_and_4x4_and_1x16_are_the_same(multi_model, tmp_path, label_smoothing_factor, recwarn):
    trained = []
    for batch, accumulation in ((16, 1), (4, 4), (1, 16)):
        trainer = trainer_for(
            copy.deepcopy(multi_model),
            tmp_path,
            MultiLabelDocuments(),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            label_smoothing_factor=label_smoothing_factor,
            logging_steps=1,
        )
        trainer.compute_metrics = None
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trained.append((trainer.model.state_dict(), losses))
    assert not [str(warning.message) for warning in recwarn if "smoothing" in str(warning.message)]
    (reference, losses), *others = trained
    assert len(losses) == 4
    for weights, other in others:
        assert other == pytest.approx(losses, abs=1e-5)
        for name, value in reference.items():
            torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0)


def test_the_models_own_loss_leaves_unknown_labels_out(multi_model):
    documents = MultiLabelDocuments(6)
    trainer_batch = {
        "input_ids": torch.randint(5, 99, (6, 8)),
        "num_chunks": torch.ones(6, dtype=torch.long),
        "labels": torch.from_numpy(np.stack([item["labels"] for item in documents.items])),
    }
    output = multi_model.eval()(**trainer_batch)
    known = trainer_batch["labels"] != -100
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        output.logits[known], trainer_batch["labels"][known]
    )
    torch.testing.assert_close(output.loss, expected)


def test_metrics_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels, scores = rng.random((40, 3)) < 0.3, rng.random((40, 3))
    labels[:5] = False
    predicted = scores > 0.6
    found = multi_label_metrics(predicted, labels, scores, NAMES)
    for average in ("micro", "macro", "weighted"):
        expected = sklearn_metrics.f1_score(labels, predicted, average=average, zero_division=0)
        assert found[f"f1_{average}"] == pytest.approx(expected)
    # Of documents without labels and predictions, scikit-learn takes the value of zero_division.
    assert found["f1_samples"] == pytest.approx(
        sklearn_metrics.f1_score(labels, predicted, average="samples", zero_division=1)
    )
    assert found["average_precision_macro"] == pytest.approx(sklearn_metrics.average_precision_score(labels, scores))
    assert found["label_ranking_average_precision"] == pytest.approx(
        sklearn_metrics.label_ranking_average_precision_score(labels, scores)
    )
    assert found["hamming_loss"] == pytest.approx((labels != predicted).mean())
    assert found["subset_accuracy"] == pytest.approx((labels == predicted).all(axis=1).mean())
    for k, name in enumerate(NAMES):
        assert found[f"recall_{name}"] == pytest.approx(sklearn_metrics.recall_score(labels[:, k], predicted[:, k]))
        expected = sklearn_metrics.average_precision_score(labels[:, k], scores[:, k])
        assert found[f"average_precision_{name}"] == pytest.approx(expected)
        assert found[f"support_{name}"] == labels[:, k].sum()


def test_thresholds_are_best_by_f1_or_reach_a_recall():
    rng = np.random.default_rng(0)
    labels = rng.random((200, 3)) < [0.4, 0.1, 0.005]
    scores = np.clip(0.3 * labels + 0.5 * rng.random((200, 3)), 0, 1)
    thresholds = fit_thresholds(scores, labels, *parse_threshold_metric("f1_macro", NAMES))
    for k in (0, 1):
        best = max(sklearn_metrics.f1_score(labels[:, k], scores[:, k] >= t) for t in np.unique(scores[:, k]))
        assert sklearn_metrics.f1_score(labels[:, k], scores[:, k] >= thresholds[k]) == best
    # Too few documents to choose by: as over all labels together.
    assert labels[:, 2].sum() < 3
    assert thresholds[2] == best_threshold(scores.ravel(), labels.ravel())
    assert len(set(fit_thresholds(scores, labels, *parse_threshold_metric("f1_micro", NAMES)))) == 1
    reached = fit_thresholds(scores, labels, *parse_threshold_metric("recall=0.95", NAMES))
    recalls = [sklearn_metrics.recall_score(labels[:, k], scores[:, k] >= reached[k]) for k in (0, 1)]
    assert min(recalls) >= 0.95
    only = fit_thresholds(scores, labels, *parse_threshold_metric("recall_drugs=1.0", NAMES))
    assert only[0] < thresholds[0]
    assert only[1:].tolist() == thresholds[1:].tolist()
    adjacent = np.array([np.nextafter(0.7, 1), 0.7, 0.7, 0.2])
    assert (adjacent >= best_threshold(adjacent, np.array([1, 0, 0, 0]))).tolist() == [True, False, False, False]
    for wrong in ("accuracy", "recall=2", "recall_none=0.5", "recall_drugs"):
        with pytest.raises(ValueError, match="Invalid `decision_metric`"):
            parse_threshold_metric(wrong, NAMES)


def test_calibration_finds_the_slope_and_intercept_of_each_label():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 2))
    truth = np.array([[2.0, -1.0], [0.5, 0.7]])
    labels = rng.random(logits.shape) < MultiLabelDecision(truth.tolist()).scores(logits)
    np.testing.assert_allclose(fit_label_calibration(logits, labels), truth, atol=0.1)
    # Of a few documents that are all decided rightly, nothing is certain; nor of a label that none has.
    few = fit_label_calibration(np.array([[9.0, 1.0], [8.0, 0.0], [-9.0, 2.0]]), np.array([[1, 0], [1, 0], [0, 0]]))
    assert 0.6 < MultiLabelDecision(few.tolist()).scores(np.array([[9.0, 1.0]]))[0, 0] < 0.9
    assert np.isfinite(few).all()
    # The scores of rare labels stay comparable with those of the others.
    logits = rng.normal(size=(300, 40))
    labels = rng.random(logits.shape) < MultiLabelDecision([[2.0, -6.0]] * 40).scores(logits)
    assert labels.sum(axis=0).min() == 0
    assert labels.sum(axis=0).max() <= 12
    np.testing.assert_allclose(fit_label_calibration(logits, labels), [[2.0, -6.0]] * 40, atol=0.8)


def test_encoder_and_words_are_weighed_by_the_likelihood_under_sigmoids():
    rng = np.random.default_rng(0)
    good, noise = rng.normal(size=(2, 3000, 3))
    labels = (rng.random(good.shape) < MultiLabelDecision().scores(2 * good)).astype(int)
    assert fit_logit_weights(np.stack([good, noise]), labels) == pytest.approx([2.0, 0.0], abs=0.1)


def test_a_config_tells_what_a_document_gets():
    config = HierarchicalRobertaConfig(
        num_labels=3,
        problem_type=MULTI,
        label_calibration=[[1.0, 0.0], [2.0, 0.0], [1.0, 5.0]],
        thresholds=[0.5, 0.2, 0.9],
    )
    decision = decision_of(config)
    assert decision.labels_of(np.array([-0.1, -0.5, 0.0])) == [2, 1]
    assert decision.labels_of(np.array([-9.0, -9.0, -9.0])) == []
    with pytest.raises(ValueError, match="`thresholds` must have an entry for each of the 3 labels"):
        HierarchicalRobertaConfig(num_labels=3, problem_type=MULTI, thresholds=[0.5])
    with pytest.raises(ValueError, match="problem_type"):
        HierarchicalRobertaConfig(problem_type="several")


# ---- runs ----


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"severity_weights": "1,1,1"}, "severity_weights.*one label a document"),
        ({"decision_metric": "severity_f1"}, "Invalid `decision_metric`.*f1_micro"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model.*subset_accuracy"),
        ({"class_weights": "drugs=1"}, "class_weights.*language=1.0"),
    ],
)
def test_options_of_one_label_are_refused(multi_folder, roberta_folder, tmp_path, wrong, said):
    assert_refused(train(multi_folder, roberta_folder, tmp_path / "run", **wrong), said)


def test_a_recall_that_validation_cannot_measure_is_refused(caplog):
    labels = np.array([[1, 0], [1, 0]])
    args = SimpleNamespace(metric_for_best_model="f1_macro", decision_metric="recall_b=0.9")
    with pytest.raises(ValueError, match=r"no validation document is labelled b"):
        MultiLabel(["a", "b"]).check(args, labels)
    for metric, message in (("f1_b", "no validation document is labelled b"), ("support_a", "must be one of")):
        with pytest.raises(ValueError, match=message):
            MultiLabel(["a", "b"]).check(SimpleNamespace(metric_for_best_model=metric, decision_metric=None), labels)
    args.decision_metric = "recall=0.9"
    MultiLabel(["a", "b"]).check(args, labels)
    assert "No validation document has b" in caplog.text


def test_a_diverged_model_has_metrics():
    labels = np.array([[1, 0, 1], [0, 1, 0]])
    values = multi_label_metrics_fn(NAMES)(EvalPrediction(np.full((2, 3), np.nan), labels))
    assert values["f1_macro"] == 0
    assert all(np.isfinite(value) for value in values.values())


def test_a_label_whose_metrics_would_overwrite_others_is_refused():
    with pytest.raises(ValueError, match=r"average_precision_macro, f1_macro, .*rename"):
        MultiLabel(["drugs", "macro"])


def test_a_missing_label_in_a_list_is_a_missing_label(roberta_folder, tmp_path):
    columns = Columns(problem_type=MULTI)
    assert columns.labels_of({"label": ["a", "a"]}) == ["a"]
    assert columns.labels_of({"label": []}) == []
    for missing in ([None], ["a", ""], ["nan"], None):
        assert columns.labels_of({"label": missing}) is None
    rows = [{"id": str(k), "text": f"a text {k}", "label": []} for k in range(9)]
    source = tmp_path / "none.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = {"source": source, "tokenizer": roberta_folder, "output_dir": tmp_path / "p", "problem_type": MULTI}
    assert_refused(run_command("scripts.prepare_dataset", **given), "no label in any document")


def test_a_run_learns_labels_keeps_thresholds_and_does_not_depend_on_processes(multi_folder, roberta_folder, tmp_path):
    given = {"dropout": 0.0, "attention_dropout": 0.0, "num_train_epochs": 2, "per_device_eval_batch_size": 4}
    ways = {"one": (1, 8, 1), "two": (2, 2, 2)}
    for name, (processes, batch, accumulation) in ways.items():
        done = train(
            multi_folder,
            roberta_folder,
            tmp_path / name,
            processes=processes,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            lexical_features=50,
            decision_metric="recall=0.9",
            **given,
        )
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ways)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=0)
    config = HierarchicalRobertaConfig.from_pretrained(tmp_path / "one")
    assert config.is_multi_label
    assert (len(config.thresholds), config.decision_metric, config.temperature) == (3, "recall=0.9", None)
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert min(metrics["validation"][f"recall_{name}"] for name in NAMES) >= 0.9
    with open(tmp_path / "one" / "predictions_validation.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        over = {name for name, t in zip(NAMES, config.thresholds, strict=True) if float(row[name]) >= t - 1e-6}
        assert set(json.loads(row["predicted"])) == over
    labels = [[name in json.loads(row["label"]) for name in NAMES] for row in rows]
    predicted = [[name in json.loads(row["predicted"]) for name in NAMES] for row in rows]
    expected = sklearn_metrics.f1_score(labels, predicted, average="macro", zero_division=0)
    assert metrics["validation"]["f1_macro"] == pytest.approx(expected)
    [events] = (tmp_path / "one" / "runs").iterdir()
    board = EventAccumulator(str(events)).Reload()
    assert board.Tags()["images"] == ["label_metrics"]
    steps = [epoch["step"] for epoch in json.loads((tmp_path / "one" / "training_history.json").read_text())["epochs"]]
    images = board.Images("label_metrics")
    assert [image.step for image in images] == steps
    assert (images[-1].width, images[-1].height) == (1080, 396)


@pytest.mark.slow
def test_a_search_compares_trials_by_a_metric_of_several_labels(multi_folder, roberta_folder, tmp_path):
    from tests.test_search import search, trials_of

    # With the words all is told; without them such a learning rate learns nothing.
    space = {"lexical_features": [0, 20], "learning_rate": {"low": 1e-9, "high": 1e-8, "log": True}}
    given = {"metric_for_best_model": "f1_micro", "num_train_epochs": 1, "seed": 1}  # of which both numbers are drawn
    done = search(multi_folder, roberta_folder, tmp_path / "s", space, num_trials=2, **given)
    assert done.returncode == 0, done.stderr
    trials = trials_of(tmp_path / "s")
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE"]
    without, best = sorted(trials, key=lambda trial: trial.params["lexical_features"])
    assert without.value < 1.0 == best.value
    assert "selected by validation f1_micro 1.0000" in (tmp_path / "s" / "search.md").read_text()
    recipe = yaml.safe_load((tmp_path / "s" / "best.yaml").read_text())
    assert {name: recipe[name] for name in space} == best.params
    assert (recipe["lexical_features"], recipe["metric_for_best_model"]) == (20, "f1_micro")


def test_stories_have_the_descriptors_whose_scenes_happen_in_them():
    documents = descriptor_corpus(60)
    assert {name for document in documents for name in document["label"]} == set(DESCRIPTORS)
    assert any(not document["label"] for document in documents)
    for document in documents:
        assert sorted({span["label"] for span in document["evidence"]}) == document["label"]
        for span in document["evidence"]:
            scene = document["text"][span["start"] : span["end"]]
            parts = [
                [part for part in text.replace("{y}", "{x}").split("{x}") if part]
                for text in DESCRIPTORS[span["label"]]
            ]
            assert any(all(part in scene for part in own) for own in parts)
