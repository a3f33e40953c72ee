"""Raw text to a rating, with and without this project; and the predict command on top of it."""

import csv
import gc
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import unicodedata

import datasets
import evaluate
import numpy as np
import pytest
import torch
import transformers
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification, pipeline
from transformers.pipelines.pt_utils import KeyDataset
from transformers.pipelines.text_classification import ClassificationFunction

from modeling.hierarchical_roberta.chunk_attribution import leave_one_out_attributions, log_odds
from modeling.hierarchical_roberta.chunking import nfc_with_offsets
from modeling.hierarchical_roberta.pipeline import HierarchicalClassificationPipeline
from modeling.training.metrics import ClassificationMetrics
from scripts.common.cli import USER_ERRORS
from scripts.evaluation.evaluate import load_context
from scripts.predict import main as predict_main
from tests.conftest import LABELS, assert_refused, options, run_command, tiny_rows, train, write_csv
from tests.processes import ROOT, run, start, start_ranks


@pytest.fixture(scope="module")
def trained(prepared_folder, roberta_folder, tmp_path_factory):
    """A trained model; bf16 where the machine has it, as people train."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = train(prepared_folder, roberta_folder, folder, "--bf16", "True")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def rate(trained):
    return pipeline("text-classification", model=str(trained), trust_remote_code=True)


def test_pipeline_of_the_saved_folder_needs_no_other_code(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "elsewhere" / "model")
    code = (
        "import json, sys\n"
        "from transformers import pipeline\n"
        "rate = pipeline('text-classification', model=sys.argv[1], trust_remote_code=True)\n"
        "assert 'modeling' not in sys.modules\n"
        "print(json.dumps(rate(json.loads(sys.argv[2]))))\n"
        "rate.save_pretrained(sys.argv[3])\n"
        "again = pipeline('text-classification', model=sys.argv[3], trust_remote_code=True)\n"
        "print(json.dumps(again(json.loads(sys.argv[2]))))\n"
    )
    texts = [row["text"] for row in tiny_rows()[:3]]
    command = [sys.executable, "-c", code, str(folder), json.dumps(texts), str(tmp_path / "saved")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    done = run(command, cwd=tmp_path, env=environment, cold=True)
    assert done.returncode == 0, done.stderr
    first, again = map(json.loads, done.stdout.splitlines())
    assert first == again
    assert [result["label"] in LABELS for result in first] == [True] * 3


def test_training_pipeline_and_predict_give_the_same_scores(trained, rate, csv_file, splits, tmp_path):
    with open(trained / "predictions_test.csv", encoding="utf-8") as file:
        scores_of = {row["id"]: [float(row[label]) for label in LABELS] for row in csv.DictReader(file)}
    texts = dict(zip(splits["test"]["id"], splits["test"]["text"], strict=True))
    piped = dict(zip(texts, rate(list(texts.values())), strict=True))
    done = run_command("scripts.predict", model=trained, source=csv_file)
    assert done.returncode == 0, done.stderr
    predicted = {row["id"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert len(predicted) == 60
    for id_, scores in scores_of.items():
        for found in (piped[id_], predicted[id_]):
            assert [found["scores"][label] for label in LABELS] == pytest.approx(scores, abs=1e-5)
        assert rate(texts[id_])[0]["scores"] == pytest.approx(piped[id_]["scores"], abs=1e-5)


def test_prefix_and_token_pooling_travel_with_the_model(prepared_folder, roberta_folder, splits, tmp_path):
    """With cached embeddings and lexical features, from train_hf.py to the pipeline of the saved code."""
    given = {"chunk_prefix": "The murder: ", "token_pooling": "last", "chunk_length": 24, "lexical_features": 30}
    done = train(prepared_folder, roberta_folder, tmp_path / "run", freeze_encoder=True, **given)
    assert done.returncode == 0, done.stderr
    classify = pipeline("text-classification", model=str(tmp_path / "run"), trust_remote_code=True)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {name: saved[name] for name in given} == given
    prefix = classify.tokenizer("The murder:")["input_ids"][:-1]
    assert saved["num_prefix_tokens"] == len(prefix)
    with open(tmp_path / "run" / "predictions_test.csv", encoding="utf-8") as file:
        scores_of = {row["id"]: [float(row[label]) for label in LABELS] for row in csv.DictReader(file)}
    texts = dict(zip(splits["test"]["id"], splits["test"]["text"], strict=True))
    for id_, scores in scores_of.items():
        document = classify.preprocess(texts[id_])
        assert all(chunk[: len(prefix)].tolist() == prefix for chunk in document["input_ids"])
        [result] = classify(texts[id_])
        assert [result["scores"][label] for label in LABELS] == pytest.approx(scores, abs=1e-5)
        for found in result["evidence"]:
            assert texts[id_][found["start"] : found["end"]] == found["text"]
    context = load_context(str(tmp_path / "run"), str(prepared_folder), "test")
    for id_, result in zip(texts, context.predict(context.chunked("test")), strict=True):
        scores = (result.logits_K / saved["temperature"]).softmax(dim=0)
        assert scores.tolist() == pytest.approx(scores_of[id_], abs=1e-5)
    assert "each after `The murder: `, last token of each" in (tmp_path / "run" / "README.md").read_text()


def test_pipeline_divides_by_the_saved_temperature(trained, rate):
    config = json.loads((trained / "config.json").read_text())
    assert config["temperature"] > 0
    text = tiny_rows()[0]["text"]
    warm = rate(text)[0]["scores"]
    temperature, rate.model.config.temperature = rate.model.config.temperature, 1.0
    try:
        cold = rate(text)[0]["scores"]
    finally:
        rate.model.config.temperature = temperature
    logit = {label: np.log(cold[label] / cold["General"]) / temperature for label in LABELS}
    total = sum(np.exp(value) for value in logit.values())
    assert warm == pytest.approx({label: np.exp(value) / total for label, value in logit.items()}, abs=1e-5)


def test_evidence_score_is_the_log_odds_lost_without_the_chunk(rate):
    text = " ".join(row["text"] for row in tiny_rows()[:2])
    document = rate.preprocess(text)
    [result] = rate(text, evidence=10)
    [whole] = rate._forward([document])
    label = LABELS.index(result["label"])
    for found in result["evidence"]:
        assert text[found["start"] : found["end"]] == found["text"] == found["text"].strip()
        [place] = [i for i, span in enumerate(document["spans"]) if span[0] <= found["start"] < span[1]]
        rest = {**document, "input_ids": [ids for i, ids in enumerate(document["input_ids"]) if i != place]}
        [without] = rate._forward([rest])
        lost = log_odds(whole["logits_K"][None], label) - log_odds(without["logits_K"][None], label)
        assert found["score"] == pytest.approx(lost.item(), abs=1e-4)
    scores = [found["score"] for found in result["evidence"]]
    assert scores == sorted(scores, reverse=True)
    assert len(rate(text, evidence=1)[0]["evidence"]) == 1


def test_chunks_are_all_that_was_encoded_in_order(rate):
    text = " ".join(row["text"] for row in tiny_rows()[:2])
    [result] = rate(text, evidence=99, chunks=True)
    assert "chunks" not in rate(text)[0]
    assert [(chunk["start"], chunk["end"]) for chunk in result["chunks"]] == rate.preprocess(text)["spans"]
    strongest = sorted(result["chunks"], key=lambda chunk: -chunk["score"])
    for found, chunk in zip(result["evidence"], strongest, strict=False):
        assert chunk["start"] <= found["start"] < found["end"] <= chunk["end"]
        assert chunk["score"] == found["score"]
    assert [chunk["score"] <= 0 for chunk in strongest[len(result["evidence"]) :]] == [True] * (
        result["num_encoded_chunks"] - len(result["evidence"])
    )


def test_attributions_of_many_chunks_are_those_of_a_few_at_a_time(roberta_model, monkeypatch):
    roberta_model.eval()
    chunk_CD = torch.randn(9, 32)
    expected = leave_one_out_attributions(roberta_model, chunk_CD, 2)
    monkeypatch.setattr("modeling.hierarchical_roberta.chunk_attribution.ROWS_AT_ONCE", 20)
    torch.testing.assert_close(leave_one_out_attributions(roberta_model, chunk_CD, 2), expected)
    assert leave_one_out_attributions(roberta_model, chunk_CD[:1], 1).shape == (1,)


def test_pipeline_takes_a_text_a_list_and_a_generator(rate):
    texts = [row["text"] for row in tiny_rows()[:5]]
    listed = rate(texts)
    assert [rate(text)[0]["label"] for text in texts] == [result["label"] for result in listed]
    read = []

    def endless():
        while True:
            read.append(1)
            yield texts[len(read) % 5]

    results = rate(endless())
    assert next(results)["scores"] == pytest.approx(listed[1]["scores"], abs=1e-5)
    assert len(read) <= 128  # a batch, and the one that is prepared meanwhile
    assert rate([]) == []


@pytest.mark.parametrize(
    "text",
    ["", " \n", "\x00\x00 null", "😀" * 300, "שלום עולם " * 50, "x" * 5000, "ab " * 100_000, "e\u0301" * 500],
    ids=["empty", "blank", "null", "emoji", "rtl", "no spaces", "long", "decomposed"],
)
def test_pipeline_answers_any_text(rate, text):
    [result] = rate(text)
    assert sum(result["scores"].values()) == pytest.approx(1)
    assert result["truncated"] == (result["num_chunks"] == 4 and len(text) > 200)
    for found in result["evidence"]:
        assert found["text"] == text[found["start"] : found["end"]]


@pytest.mark.parametrize(
    "wrong",
    [None, 3, b"bytes", ["text", 3], "half \ud800 pair", {"body": "a"}, {"text": "a", "text_pair": "b"}, [["a", "b"]]],
)
def test_pipeline_refuses_what_is_no_text(rate, wrong):
    with pytest.raises(ValueError, match=r"\btext\b|surrogate|text_pair"):
        rate(wrong)


@pytest.mark.parametrize(
    "option", [{"top_k": 0}, {"top_k": "all"}, {"function_to_apply": "tanh"}, {"evidence": -1}, {"topk": 3}]
)
def test_pipeline_names_an_option_that_is_wrong(rate, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}.*(must|expected)"):
        rate("text", **option)


# ---- as the text classification of transformers ----

TEXTS = ["A calm day.", "The blood and the knife. " * 30, ""]
FURTHER_KEYS = ["scores", "num_chunks", "num_encoded_chunks", "truncated", "evidence"]


@pytest.fixture(scope="module")
def standard(roberta_folder):
    config = RobertaConfig.from_pretrained(roberta_folder, num_labels=3, max_position_embeddings=2000)
    tokenizer = AutoTokenizer.from_pretrained(roberta_folder)
    model = RobertaForSequenceClassification(config)
    return pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")


def shape_of(results, further=()):
    """Keys in place of dicts, without the `further` ones of the first dict of a list or of one alone."""
    if isinstance(results, dict):
        assert list(results)[2:] == list(further)
        return list(results)[:2]
    if isinstance(results, list) and isinstance(results[0], dict) and "scores" not in results[-1]:
        return [shape_of(results[0], further), *map(shape_of, results[1:])]
    return [shape_of(result, further) for result in results]


class Repeating(torch.utils.data.Dataset):
    """Its length is its only end."""

    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, index: int) -> str:
        return TEXTS[index % len(TEXTS)]


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 1}, {"top_k": 2}, {"top_k": None}, {"top_k": 9}, {"function_to_apply": "NONE", "batch_size": 2},
     {"truncation": True, "max_length": 512, "padding": True}],
    ids=str,
)  # fmt: skip
def test_results_have_the_shape_of_the_standard_pipeline(rate, standard, options):
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    for inputs in (TEXTS[0], TEXTS, TEXTS[:1], {"text": TEXTS[0]}, [{"text": text} for text in TEXTS]):
        expected = shape_of(standard(inputs, **options))
        assert shape_of(rate(inputs, **options), FURTHER_KEYS) == expected
    expected = shape_of(standard(KeyDataset(dataset, "text"), **options))
    results = rate(KeyDataset(dataset, "text"), **options)
    assert len(results) == len(TEXTS)
    for _ in range(2):
        assert shape_of(results, FURTHER_KEYS) == expected
    for inputs in (dataset, dataset["text"], Repeating(), (text for text in TEXTS), ({"text": text} for text in TEXTS)):
        assert shape_of(rate(inputs, **options), FURTHER_KEYS) == expected
    # Options can be given in advance, too.
    init = {"tokenizer": rate.tokenizer, "device": "cpu", **options}
    for inputs in (TEXTS[0], TEXTS, {"text": TEXTS[0]}):
        expected = shape_of(pipeline("text-classification", model=standard.model, **init)(inputs))
        assert shape_of(HierarchicalClassificationPipeline(rate.model, **init)(inputs), FURTHER_KEYS) == expected


def test_scores_are_of_the_function_that_is_asked_for(rate):
    text, temperature = TEXTS[1], rate.model.config.temperature
    assert temperature != 1
    document = rate.preprocess(text)
    logits = rate._forward([document])[0]["logits_K"].numpy()
    for function, expected in (
        (None, np.exp(logits / temperature) / np.exp(logits / temperature).sum()),
        ("softmax", np.exp(logits / temperature) / np.exp(logits / temperature).sum()),
        ("sigmoid", 1 / (1 + np.exp(-logits / temperature))),
        (ClassificationFunction.NONE, logits),
    ):
        first, *others = rate(text, top_k=None, function_to_apply=function)
        assert list(first["scores"].values()) == pytest.approx(expected.tolist(), abs=1e-6)
        assert all(found["score"] == first["scores"][found["label"]] for found in (first, *others))
        assert [found["score"] for found in (first, *others)] == sorted(first["scores"].values(), reverse=True)
        assert [found["label"] for found in (first, *others)] == sorted(LABELS, key=lambda k: -first["scores"][k])


def test_arguments_of_a_tokenizer_are_accepted_with_one_warning(rate, caplog):
    logging.Logger.warning_once.cache_clear()
    expected = rate(TEXTS)
    for _ in range(3):
        assert rate(TEXTS, truncation=True, max_length=8, padding=True) == expected
    [warning] = caplog.messages
    assert "max_length, padding, truncation" in warning


def test_evidence_that_is_not_asked_for_is_not_computed(rate, monkeypatch):
    expected = rate(TEXTS[1])[0]
    assert rate(TEXTS[1], evidence=True)[0] == expected
    monkeypatch.delattr(sys.modules[type(rate).__module__], "attributions_of_labels")
    for none in (False, 0):
        assert rate(TEXTS[1], evidence=none) == [{**expected, "evidence": []}]


def test_batches_have_at_most_batch_size_documents(rate, monkeypatch):
    sizes, forward = [], rate._forward
    monkeypatch.setattr(
        rate, "_forward", lambda batch, **options: sizes.append(len(batch)) or forward(batch, **options)
    )
    for found, expected in zip(rate(TEXTS, batch_size=2), rate(TEXTS), strict=True):
        assert found["scores"] == pytest.approx(expected["scores"], abs=1e-5)
    assert sizes == [2, 1, 3]


@pytest.mark.parametrize(
    "options, precision",
    [({"device_map": "auto"}, "fp32"), ({"dtype": torch.bfloat16}, "bf16"), ({"torch_dtype": "float16"}, "fp16"),
     ({"dtype": torch.float32, "device": -1}, "fp32"), ({"batch_size": 2, "num_workers": 1, "top_k": 1}, "fp32"),
     ({"dtype": torch.bfloat16, "precision": "fp32"}, "fp32")],
    ids=str,
)  # fmt: skip
def test_pipeline_is_made_with_the_arguments_of_transformers(trained, rate, options, precision):
    made = pipeline("text-classification", model=str(trained), trust_remote_code=True, **options)
    assert made._forward_params.get("precision", "fp32") == precision
    [result], [expected] = made(TEXTS[:1], top_k=1)[0], rate(TEXTS[:1], precision=precision)
    assert result["scores"] == pytest.approx(expected["scores"], abs=1e-5 if "device" in str(options) else 0.01)


def test_pipeline_serves_evaluator_and_map(rate, splits, monkeypatch, tmp_path, caplog):
    # evaluate 0.4.6 asks for this class, which transformers 5 has not, whatever the pipeline.
    monkeypatch.setattr(transformers, "TFPreTrainedModel", transformers.PreTrainedModel, raising=False)
    test = splits["test"].select_columns(["text", "label"])
    label_ids = {label: i for i, label in enumerate(LABELS)}
    found = evaluate.evaluator("text-classification").compute(
        rate, test, metric=ClassificationMetrics(LABELS, cache_dir=str(tmp_path)), label_mapping=label_ids
    )
    caplog.clear()
    expected = [result["label"] for result in rate(list(test["text"]))]
    right = [label_ids[label] == id_ for label, id_ in zip(expected, test["label"], strict=True)]
    assert found["accuracy"] == pytest.approx(np.mean(right))
    by_row = test.map(lambda row: {"result": rate(row["text"])[0]})
    by_batch = test.map(lambda rows: {"result": rate(rows["text"])}, batched=True, batch_size=4)
    for found in (by_row, by_batch):
        assert [result["label"] for result in found["result"]] == expected
    assert not caplog.records  # such as a warning that the function cannot be hashed
    assert by_batch[0]["result"]["evidence"] == rate(test[0]["text"])[0]["evidence"]


@pytest.mark.parametrize("name", ["run-v1.0", "my run", "1st", "class", "é.run"])
def test_pipeline_loads_from_a_folder_of_any_name(trained, rate, name, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / name
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    (folder / "sub").mkdir()
    expected = rate(TEXTS[1])
    for place, path in ((tmp_path, f"runs/{name}"), (folder, "."), (folder, f"../{name}/"), (folder / "sub", "..")):
        monkeypatch.chdir(place)
        assert pipeline("text-classification", model=path, trust_remote_code=True)(TEXTS[1]) == expected


# ---- Inference Endpoints, and the model card's examples ----

# As an endpoint does: its own process, with the model's folder first in sys.path, and the answers as JSON.
ENDPOINT = """
import importlib.util, json, sys
folder = sys.argv[1]
sys.path.insert(0, folder)
spec = importlib.util.spec_from_file_location("handler.EndpointHandler", f"{folder}/handler.py")
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
handler = module.EndpointHandler(folder)
assert "modeling" not in sys.modules
for line in sys.stdin:
    try:
        print(json.dumps(handler(json.loads(line)), allow_nan=False))
    except Exception as error:
        print(json.dumps({"error": str(error)}))
"""
BAD_REQUESTS = [
    ({}, "`inputs` must be a text"),
    ({"inputs": 3}, "got int"),
    ({"inputs": {"body": "a"}}, "'body'"),
    ({"inputs": ["a", None]}, "Expected a text, got NoneType"),
    ({"inputs": {"text": "a", "text_pair": "b"}}, "text_pair"),
    ({"inputs": "half \ud800"}, "surrogate"),
    ({"inputs": "a", "parameters": [3]}, "`parameters` must be"),
    ({"inputs": "a", "parameters": {"top": 3}}, "no option top"),
    ({"inputs": "a", "parameters": {"top_k": -1}}, "`top_k` must be"),
]


def test_endpoint_answers_requests_without_this_project(trained, rate, tmp_path):
    folder = tmp_path / "repository"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    (tmp_path / "file").touch()
    card = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert card["pipeline_tag"] == "text-classification"
    requests = [({"inputs": example["text"]}, {}) for example in card["widget"]]
    requests += [
        ({"inputs": TEXTS}, {}),
        ({"inputs": [{"text": text} for text in TEXTS], "parameters": None}, {}),
        ({"inputs": {"text": TEXTS[1]}, "parameters": {"evidence": False}}, {"evidence": False}),
        ({"inputs": TEXTS[1], "parameters": {"top_k": None, "truncation": True}}, {"top_k": None}),
    ]
    asked = [request for request, _ in requests + BAD_REQUESTS]
    # Where HF_HOME cannot be written, HF_MODULES_CACHE can name a folder.
    environment = {**os.environ, "HF_HOME": str(tmp_path / "file" / "home"), "PYTHONPATH": ""}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    done = run(
        [sys.executable, "-c", ENDPOINT, str(folder)], cwd=tmp_path, env=environment, cold=True,
        input="".join(json.dumps(request) + "\n" for request in asked),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for answer, (request, passed) in zip(answers, requests, strict=False):
        assert answer == json.loads(json.dumps(rate(request["inputs"], **passed)))
    for answer, (_, message) in zip(answers[len(requests) :], BAD_REQUESTS, strict=True):
        assert message in answer["error"]


def test_model_card_shows_what_the_pipeline_returns(trained, monkeypatch):
    [example] = re.findall(r"```python\n(.*?)```", (trained / "README.md").read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(trained.parent)
    found: dict = {}
    exec(example, found)
    assert found["result"]["label"] in LABELS


@given(st.text(alphabet=st.sampled_from("ae\u0301\u0300\u1112\u1161\u11ab각\u0958\u09c7\u09be z\u212b😀"), max_size=12))
def test_nfc_with_offsets_maps_back_to_the_text(text):
    clean, begins, ends = nfc_with_offsets(text)
    assert clean == unicodedata.normalize("NFC", text)
    assert len(begins) == len(ends) == len(clean)
    for first, last in zip(begins, ends, strict=True):
        assert 0 <= first < last <= len(text)
    assert all(begins[1:] >= begins[:-1])


def test_pipeline_scores_do_not_depend_on_the_batch(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    from modeling.hierarchical_roberta.modeling_hierarchical_roberta import (
        HierarchicalRobertaForSequenceClassification as Model,
    )

    rate = HierarchicalClassificationPipeline(model=Model.from_pretrained(trained), tokenizer=tokenizer, device="cpu")
    texts = ["", *(row["text"] for row in tiny_rows()[:9])]
    alone = [rate(text)[0]["scores"] for text in texts]
    for budget in (16, 64, 4096):
        rate.model.token_budget = budget
        for one, other in zip(alone, rate(texts), strict=True):
            assert other["scores"] == pytest.approx(one, abs=1e-5)


# ---- scripts.predict ----


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_predict_takes_files_folders_and_standard_input(trained, csv_file, tmp_path):
    rows = tiny_rows()[:4]
    (tmp_path / "texts").mkdir()
    for row in rows:
        (tmp_path / "texts" / f"{row['id']}.txt").write_text(row["text"], encoding="utf-8")
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text("".join(json.dumps({"story": row["text"]}) + "\n" for row in rows), encoding="utf-8")
    expected = {row["id"]: row for row in map(json.loads, predict(trained, csv_file).splitlines())}
    folder = [json.loads(line) for line in predict(trained, tmp_path / "texts").splitlines()]
    table = [json.loads(line) for line in predict(trained, jsonl, "--text_column", "story").splitlines()]
    assert sorted(row["id"] for row in folder) == sorted(row["id"] for row in rows)
    assert [row["id"] for row in table] == ["1", "2", "3", "4"]
    for row in folder:
        assert row["scores"] == pytest.approx(expected[row["id"]]["scores"], abs=1e-5)
    command = [sys.executable, "-m", "scripts.predict", "--model", str(trained)]
    done = run(command, cwd=ROOT, input=rows[0]["text"])
    [piped] = map(json.loads, done.stdout.splitlines())
    assert piped["scores"] == pytest.approx(expected[rows[0]["id"]]["scores"], abs=1e-5)
    assert set(piped) == {"id", "label", "scores", "num_chunks", "num_encoded_chunks", "truncated", "evidence"}
    # Letters with their accents apart, as some systems write them: evidence stands in the characters that were given.
    apart = unicodedata.normalize("NFD", "Élève très fatigué. " * 40)
    (tmp_path / "apart.txt").write_text(apart, encoding="utf-8")
    [row] = map(json.loads, predict(trained, tmp_path / "apart.txt").splitlines())
    assert all(piece["text"] == apart[piece["start"] : piece["end"]] for piece in row["evidence"])


def predict(trained, source, *extra):
    done = run_command("scripts.predict", *extra, model=trained, source=source)
    assert done.returncode == 0, done.stderr
    return done.stdout


def throughput(said: str) -> tuple[int, int]:
    """Documents and tokens in the only line about the throughput, whose rates are in proportion."""
    number = r"([\d,.]+)"
    line = rf"Classified {number} documents with {number} tokens in .*: {number} documents/s, {number} tokens/s\."
    [numbers] = re.findall(line, said)
    documents, tokens, *rates = (float(each.replace(",", "")) for each in numbers)
    assert rates[1] / rates[0] == pytest.approx(tokens / documents, rel=0.1)
    return int(documents), int(tokens)


def tokens_read(pipe, texts: list[str]) -> int:
    """The tokens that the pipeline's encoder is given."""
    counts = []
    hook = pipe.model.encoder.register_forward_pre_hook(
        lambda _, positional, given: counts.append(int(given["attention_mask"].sum())), with_kwargs=True
    )
    pipe(texts)
    hook.remove()
    return sum(counts)


def test_the_throughput_is_of_what_was_classified_and_encoded(trained, rate, tmp_path):
    rows = tiny_rows()[:12]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "none", "text": None}]))
    for extra in ((), ("--output", str(tmp_path / "out.jsonl"))):
        done = run_command("scripts.predict", *extra, model=trained, source=source)
        assert throughput(done.stderr) == (12, tokens_read(rate, [row["text"] for row in rows]))
        assert "documents/s" not in done.stdout


def peak_of(function) -> int:
    """Bytes of Python and numpy at the most while it runs."""
    gc.collect()
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_number_of_documents(trained, tmp_path, call_command):
    text = " ".join(row["text"] for row in tiny_rows())[:500]

    def predict_many(number: int) -> None:
        source, output = (tmp_path / f"{name} {number}.jsonl" for name in ("rows", "out"))
        line = json.dumps({"text": text}) + "\n"
        with open(source, "w", encoding="utf-8") as file:
            file.writelines(line for _ in range(number))
        call_command(predict_main, model=trained, source=source, output=output, evidence=0)
        assert output.read_bytes().count(b"\n") == number

    predict_many(1)  # what is imported and cached once
    # The first 100 rows are kept; 64 documents are in a batch, and 32 are tokenized ahead.
    few, many = (peak_of(lambda number=number: predict_many(number)) for number in (200, 800))
    assert many < 1.4 * few


def test_a_row_that_cannot_be_classified_becomes_a_line_with_its_error(trained, tmp_path):
    source = tmp_path / "rows.jsonl"
    rows = [{"id": "a"}, {"id": "b", "text": None}, {"id": "c", "text": "A calm day."}, {"id": "d", "text": " "},
            {"id": "e", "text": [5]}, {"id": "f", "text": "Another."}, {"id": "\ud800", "text": "A name."}]  # fmt: skip
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"id": \n', encoding="utf-8")
    output = tmp_path / "out.jsonl"
    done = run_command("scripts.predict", model=trained, source=source, output=output)
    assert (done.returncode, "6 documents could not be classified" in done.stderr) == (0, True)
    results = lines_of(output)
    assert [row["id"] for row in results] == ["a", "b", "c", "d", "e", "f", "7", "8"]
    errors = [row.get("error") for row in results]
    assert errors[0] == errors[1].replace("row 2", "row 1") == "row 1: no text"
    assert errors[2] is errors[5] is None
    assert "empty" in errors[3]
    assert "list" in errors[4]
    assert "surrogate" in errors[6]
    assert "row 8: not JSON" in errors[7]
    assert all(set(row) == {"id", "error"} for row in results if "error" in row)
    done = run_command("scripts.predict", "--fail_on_error", model=trained, source=source)
    assert done.returncode == 1
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [row["id"] for row in results]


@pytest.mark.parametrize(
    "given, message",
    [
        (b"", '"error": "standard input: the text is empty"'),
        (
            "Café".encode("cp1252"),
            "standard input: not utf-8, or no text: pass its --encoding, or a document as --source",
        ),
    ],
)
def test_standard_input_that_cannot_be_classified(trained, call_command, monkeypatch, capsys, given, message):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    try:
        call_command(predict_main, model=trained)
    except ValueError as error:
        assert message in str(error)
    else:
        assert message in capsys.readouterr().out


def test_a_source_without_documents_is_an_error(trained, tmp_path, call_command):
    source = tmp_path / "empty.csv"
    source.write_text("id,text\n")
    with pytest.raises(ValueError, match=r"empty\.csv: no documents"):
        call_command(predict_main, model=trained, source=source)


def test_evidence_names_its_column_and_kept_columns_come_along(trained, tmp_path):
    source = tmp_path / "rows.jsonl"
    row = {"title": "A calm day.", "body": "The blood and the knife. " * 20, "url": "http://a", "year": 1999}
    source.write_text(json.dumps(row), encoding="utf-8")
    [result] = map(
        json.loads, predict(trained, source, "--text_column", "title,body", "--keep_columns", "url,year").splitlines()
    )
    text = f"{row['title']}\n\n{row['body']}"
    assert result["metadata"] == {"url": "http://a", "year": 1999}
    for evidence in result["evidence"]:
        assert evidence["text"] == text[evidence["start"] : evidence["end"]]
        assert evidence["section"] == ("title" if evidence["start"] < len(row["title"]) + 2 else "body")


def test_evidence_in_subtitles_has_a_time_code_and_unreadable_documents_an_error(trained, tmp_path):
    folder = tmp_path / "season 1"
    folder.mkdir()
    lines = [f"The knife is red with blood, number {i}." for i in range(40)]
    cues = [f"{i}\n00:{i:02}:00,000 --> 00:{i:02}:02,000\n{line}\n" for i, line in enumerate(lines)]
    (folder / "episode 1.srt").write_text("\n".join(cues), encoding="utf-8")
    (folder / "episode 2.pdf").write_bytes(b"%PDF-1.4 and no more")
    (folder / "cover.jpg").write_bytes(b"\xff\xd8")
    done = run_command("scripts.predict", model=trained, source=folder)
    assert done.returncode == 0, done.stderr
    assert "Not read (1): season 1/cover.jpg" in done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["id"], second["id"]) == ("episode 1", "episode 2")
    assert "damaged" in second["error"]
    for evidence in first["evidence"]:
        number = "\n\n".join(lines)[: evidence["start"]].count("\n\n")
        assert evidence["section"] == f"00:{number:02}:00"
        assert evidence["text"] in "\n\n".join(lines)


@pytest.mark.slow
@pytest.mark.distributed
def test_predict_resumes_after_a_kill_and_two_processes_share_the_documents(trained, tmp_path):
    source = write_csv(
        tmp_path / "many.csv", [{**row, "id": f"{n}-{row['id']}"} for n in range(6) for row in tiny_rows()]
    )
    together = run_command("scripts.predict", model=trained, source=source)
    assert together.returncode == 0, together.stderr
    expected = [json.loads(line) for line in together.stdout.splitlines()]
    output = tmp_path / "rated.jsonl"
    command = [sys.executable, "-m", "scripts.predict", *options(model=trained, source=source)]
    killed = start([*command, "--output", output], cwd=ROOT, stderr=subprocess.DEVNULL)
    part = tmp_path / ".rated.jsonl.parts" / "0.jsonl"
    while killed.poll() is None and not (part.is_file() and part.stat().st_size > 20_000):
        pass
    killed.kill()
    killed.wait()
    assert not output.exists()
    num_done = part.read_bytes().count(b"\n")
    with open(part, "ab") as file:
        file.write(b'{"id": "torn')
    done = run_command("scripts.predict", model=trained, source=source, output=output, evidence=1)
    assert_refused(done, "evidence")
    done = run_command("scripts.predict", model=trained, source=source, output=output)
    assert done.returncode == 0, done.stderr
    assert throughput(done.stderr)[0] == len(expected) - num_done
    shared = [*command, "--output", tmp_path / "shared.jsonl"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    ranks = start_ranks([shared] * 2, environment, cwd=ROOT, stderr=subprocess.PIPE)
    ends = [(rank.communicate(timeout=300)[1], rank.returncode) for rank in ranks]
    assert [status for _, status in ends] == [0, 0], ends
    assert throughput(ends[0][0]) == throughput(together.stderr)
    assert "documents/s" not in ends[1][0]
    for rated in (lines_of(output), lines_of(tmp_path / "shared.jsonl")):
        assert [row["id"] for row in rated] == [row["id"] for row in expected]
        for row, wanted in zip(rated, expected, strict=True):
            assert row["scores"] == pytest.approx(wanted["scores"], abs=1e-5)
    assert not part.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "no/such"}, "no/such"),
        ({"source": "nowhere.csv"}, "nowhere.csv"),
        ({"text_column": "body"}, "body"),
        ({"evidence": -1}, "--evidence"),
    ],
)
def test_mistaken_option_of_predict_is_named(arguments, message, trained, csv_file, call_command):
    with pytest.raises(USER_ERRORS) as error:
        call_command(predict_main, **{"model": trained, "source": csv_file, **arguments})
    assert message in str(error.value)


def test_mistake_ends_predict_with_a_paragraph_and_status_1(trained):
    command = [sys.executable, "-m", "scripts.predict", *options(model=trained, source="nowhere.csv")]
    assert_refused(run(command, cwd=ROOT, cold=True), "nowhere.csv")
