"""Several labels a document, as they are served: the pipeline, its handler, scripts.predict, ONNX, the page and its endpoint."""

import html
import json
import os
import re
import shutil
import sys
from itertools import pairwise

import datasets
import evaluate
import numpy as np
import pytest
import torch
import transformers
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from transformers import AutoTokenizer, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from modeling.hierarchical_roberta.chunk_attribution import attributions_of_labels, leave_one_out_attributions
from modeling.hierarchical_roberta.lexical_features import LexicalFeatures
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.hierarchical_roberta.pipeline import HierarchicalClassificationPipeline
from scripts.app import render_result, render_scores
from scripts.common.loading import load_classifier
from scripts.hub.space import write_space
from tests.conftest import run_command, shared_folder, tiny_rows
from tests.processes import run

NAMES = ["drugs", "violence", "<i>horror</i>", "grief"]
SLOPES, INTERCEPTS = [0.5, 1.5, 1.0, 2.0], [0.3, -0.2, 0.0, 0.1]
TEXTS = [
    "",
    "A short one.",
    *(row["text"] for row in tiny_rows()[:18]),
    " ".join(row["text"] for row in tiny_rows()[:6]),
]


def sigmoid(logits):
    return 1 / (1 + np.exp(-np.asarray(logits, dtype=float)))


def save_with_thresholds(model, tokenizer, folder):
    """Save a model with thresholds between the scores of two texts, at another rank for each label."""
    classify = HierarchicalClassificationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    score_BK = np.sort([list(result["scores"].values()) for result in classify(TEXTS, evidence=0)], axis=0)
    ranks = [len(TEXTS) * part // 10 for part in (6, 6, 6, 7)]
    model.config.thresholds = [float(score_BK[r - 1 : r + 1, k].mean()) for k, r in enumerate(ranks)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, roberta_folder):
    """A model of four labels, whose texts have none to all of them."""

    def build(folder):
        torch.manual_seed(3)
        model = HierarchicalRobertaForSequenceClassification.from_encoder(
            str(roberta_folder),
            chunk_length=16,
            max_chunks=8,
            problem_type="multi_label_classification",
            id2label=dict(enumerate(NAMES)),
            label2id={name: k for k, name in enumerate(NAMES)},
            label_calibration=[list(pair) for pair in zip(SLOPES, INTERCEPTS, strict=True)],
        )
        with torch.no_grad():
            for part in (model.encoder, model.pooling, model.classifier):
                for weight in part.parameters():
                    weight.mul_(4 if weight.dim() > 1 else 1)
        model.vector_mean.normal_()
        model.vector_scale.uniform_(0.5, 2)
        save_with_thresholds(model, AutoTokenizer.from_pretrained(roberta_folder), folder)

    return shared_folder(tmp_path_factory, "multi-label", build)


@pytest.fixture(scope="module")
def saved_words(tmp_path_factory, saved):
    """The same encoder with lexical features, tokens and pairs, which also select the chunks to encode."""

    def build(folder):
        model, tokenizer = load_classifier(str(saved))
        ids = tokenizer(TEXTS[-1], add_special_tokens=False)["input_ids"]
        vocab_size = model.config.encoder_config.vocab_size
        pairs = [vocab_size + first * vocab_size + second for first, second in pairwise(ids)]
        features = torch.tensor([*dict.fromkeys(ids), *dict.fromkeys(pairs)][::3])
        lexical = LexicalFeatures(vocab_size, len(features), len(NAMES), "tfidf")
        torch.manual_seed(4)
        lexical.set_weights(
            features, torch.randn(len(NAMES), len(features)), torch.zeros(len(NAMES)), torch.rand(len(features)) + 0.5
        )
        model.use_lexical_features(lexical)
        fields = {"lexical_features": len(features), "encoder_weight": 0.7, "lexical_weight": 1.5}
        model.config.update({**fields, "chunk_policy": "lexical"})
        save_with_thresholds(model, tokenizer, folder)

    return shared_folder(tmp_path_factory, "multi-label words", build)


@pytest.fixture(scope="module")
def classify(saved):
    return pipeline("text-classification", model=str(saved), trust_remote_code=True)


@pytest.fixture(scope="module")
def results(classify):
    return classify(TEXTS, chunks=True)


def test_labels_are_those_whose_score_reaches_its_threshold(saved, classify, results):
    config = json.loads((saved / "config.json").read_text())
    for text, result in zip(TEXTS, results, strict=True):
        [outputs] = classify._forward([classify.preprocess(text)])
        scores = sigmoid(np.array(SLOPES) * outputs["logits_K"].numpy() + INTERCEPTS)
        assert list(result["scores"]) == NAMES
        assert list(result["scores"].values()) == pytest.approx(scores.tolist(), abs=1e-5)
        reached = [name for k, name in enumerate(NAMES) if scores[k] >= config["thresholds"][k]]
        assert result["labels"] == sorted(reached, key=lambda name: -result["scores"][name])
        assert result["label"] == max(NAMES, key=result["scores"].__getitem__)
        assert result["score"] == result["scores"][result["label"]]
        assert list(result)[:4] == ["label", "score", "labels", "scores"]
    assert {len(result["labels"]) for result in results} >= {0, 1, 2, 3}
    # The highest score need not reach its threshold, where another does.
    assert any(result["labels"] and result["label"] not in result["labels"] for result in results)


def test_a_score_that_equals_its_threshold_reaches_it(classify, results, monkeypatch):
    monkeypatch.setattr(classify.model.config, "thresholds", list(results[3]["scores"].values()))
    assert sorted(classify(TEXTS)[3]["labels"]) == sorted(NAMES)
    monkeypatch.setattr(classify.model.config, "thresholds", None)
    assert classify(TEXTS[3])[0]["labels"] == [
        name
        for name in sorted(NAMES, key=lambda name: -results[3]["scores"][name])
        if results[3]["scores"][name] >= 0.5
    ]


def test_evidence_of_each_label_is_what_its_logit_loses_without_the_chunk(classify, results):
    lost_of = {}
    for text, result in zip(TEXTS, results, strict=True):
        explained = result["labels"] or [result["label"]]
        assert list(dict.fromkeys(found["label"] for found in result["evidence"])) == (explained if text else [])
        assert [list(chunk["scores"]) for chunk in result["chunks"]] == [explained] * result["num_encoded_chunks"]
        for name in explained:
            found = [entry for entry in result["evidence"] if entry["label"] == name]
            assert len(found) <= 3
            scores = [entry["score"] for entry in found]
            assert scores == sorted(scores, reverse=True)
            best = sorted((chunk["scores"][name] for chunk in result["chunks"]), reverse=True)
            assert scores == best[: len(scores)]
            assert all(entry["text"] == text[entry["start"] : entry["end"]] for entry in found)
            lost_of[name, text] = [chunk["scores"][name] for chunk in result["chunks"]]
        assert all(chunk["score"] == chunk["scores"][explained[0]] for chunk in result["chunks"])
    [[name, text], lost_C] = max(lost_of.items(), key=lambda item: len(item[1]))
    document, k = classify.preprocess(text), NAMES.index(name)
    [whole] = classify._forward([document])
    for i, lost in enumerate(lost_C):
        rest = {**document, "input_ids": [ids for j, ids in enumerate(document["input_ids"]) if j != i]}
        [without] = classify._forward([rest])
        assert lost == pytest.approx((whole["logits_K"][k] - without["logits_K"][k]).item(), abs=1e-4)
    assert len(lost_C) == 8


def test_labels_share_the_logits_of_subsets(saved, monkeypatch):
    model, _ = load_classifier(str(saved))
    chunk_CD, calls = torch.randn(5, 32), []
    one_by_one = [leave_one_out_attributions(model, chunk_CD, k) for k in range(4)]
    classify_subsets = model.classify_subsets
    monkeypatch.setattr(model, "classify_subsets", lambda *given: calls.append(1) or classify_subsets(*given))
    torch.testing.assert_close(attributions_of_labels(model, chunk_CD, range(4)), torch.stack(one_by_one))
    assert len(calls) == 2  # all chunks, and all but each
    assert attributions_of_labels(model, chunk_CD[:1], [1, 2]).shape == (2, 1)


def test_options_of_the_pipeline(classify, results):
    text, expected = TEXTS[-1], results[-1]
    first, *others = classify(text, top_k=None)
    assert list(first) == [name for name in expected if name != "chunks"]
    assert first["labels"] == expected["labels"]
    assert [found["label"] for found in (first, *others)] == sorted(NAMES, key=lambda name: -expected["scores"][name])
    assert [found["score"] for found in (first, *others)] == sorted(first["scores"].values(), reverse=True)
    assert classify(text, top_k=1)[0]["label"] == expected["label"]
    assert classify(text, evidence=0)[0]["evidence"] == []
    [one] = classify(text, evidence=1)
    assert [found["label"] for found in one["evidence"]] == (expected["labels"] or [expected["label"]])
    logits = classify._forward([classify.preprocess(text)])[0]["logits_K"].numpy()
    calibrated = np.array(SLOPES) * logits + INTERCEPTS
    for function, scores in (
        ("sigmoid", sigmoid(calibrated)),
        ("softmax", np.exp(calibrated) / np.exp(calibrated).sum()),
        ("none", logits),
    ):
        [result] = classify(text, function_to_apply=function)
        assert list(result["scores"].values()) == pytest.approx(scores.tolist(), abs=1e-5)
        assert (result["label"], result["labels"]) == (expected["label"], expected["labels"])
        for found, wanted in zip(result["evidence"], expected["evidence"], strict=True):
            assert found == {**wanted, "score": pytest.approx(wanted["score"], abs=1e-4)}


def test_evaluator_and_datasets_take_the_pipeline(classify, results, monkeypatch):
    monkeypatch.setattr(transformers, "TFPreTrainedModel", transformers.PreTrainedModel, raising=False)
    label_ids = {name: k for k, name in enumerate(NAMES)}
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": [label_ids[result["label"]] for result in results]})

    class Accuracy(evaluate.EvaluationModule):
        def _info(self):
            features = datasets.Features(
                {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
            )
            return evaluate.MetricInfo(description="", citation="", features=features)

        def _compute(self, predictions, references):
            return {"accuracy": float(np.mean(np.equal(predictions, references)))}

    found = evaluate.evaluator("text-classification").compute(
        classify, data, metric=Accuracy(), label_mapping=label_ids
    )
    assert found["accuracy"] == 1
    wanted = [result["labels"] for result in results]
    assert [result["labels"] for result in classify(KeyDataset(data, "text"))] == wanted
    mapped = data.map(lambda rows: {"found": [result["labels"] for result in classify(rows["text"])]}, batched=True)
    assert mapped["found"] == wanted


# As an endpoint does: its own process, with the model's folder first in sys.path.
ENDPOINT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from handler import EndpointHandler
answer = EndpointHandler(sys.argv[1])(json.loads(sys.argv[2]))
assert "modeling" not in sys.modules
print(json.dumps(answer, allow_nan=False))
"""


def test_endpoint_answers_without_this_project(saved, classify, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "elsewhere" / "model")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    request = json.dumps({"inputs": TEXTS, "parameters": {"chunks": True}})
    command = [sys.executable, "-c", ENDPOINT, str(folder), request]
    done = run(command, cwd=tmp_path, env=environment, cold=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == classify(TEXTS, chunks=True)


def test_predict_prints_the_labels(saved, results, tmp_path):
    rows = [{"id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_command("scripts.predict", model=saved, source=tmp_path / "texts.jsonl")
    assert done.returncode == 0, done.stderr
    first, *lines = map(json.loads, done.stdout.splitlines())
    assert "error" in first  # the empty text
    assert [line["labels"] for line in lines] == [result["labels"] for result in results[1:]]
    assert [[found["label"] for found in line["evidence"]] for line in lines] == [
        [found["label"] for found in result["evidence"]] for result in results[1:]
    ]


# ---- Prediction without torch ------------------------------------------------------------------------------------------------


def need_onnx():
    for name in ("onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason="needs the extra onnx: pip install -e '.[onnx]'")


@pytest.fixture(scope="module", params=["saved", "saved_words"])
def exported(request, tmp_path_factory):
    """A model and its export."""
    need_onnx()
    from scripts.onnx.export import export_onnx

    model = request.getfixturevalue(request.param)
    name = f"onnx multi-label {request.param}"
    return model, shared_folder(tmp_path_factory, name, lambda folder: export_onnx(str(model), folder))


def evidence_of(result: dict) -> dict[tuple, float]:
    # Of chunks that make no difference, rounding decides which are shown.
    keys = ("label", "start", "end", "text")
    return {tuple(e[key] for key in keys): e["score"] for e in result["evidence"] if abs(e["score"]) > 1e-4}


def test_an_export_gives_the_results_of_the_pipeline(exported):
    from tests.test_onnx import run_alone

    model, folder = exported
    model_config, config = (json.loads((each / "config.json").read_text()) for each in exported)
    for name in ("problem_type", "label_calibration", "thresholds"):
        assert config[name] == model_config[name] is not None
    code = (
        "import json\nfrom predict_onnx import OnnxClassifier\n"
        "print(json.dumps(OnnxClassifier()(json.loads(sys.argv[2]), evidence=9)))"
    )
    found = json.loads(run_alone(folder, code, json.dumps(TEXTS)))
    expected = pipeline("text-classification", model=str(model), trust_remote_code=True)(TEXTS, evidence=9)
    for ours, wanted in zip(found, expected, strict=True):
        assert list(ours) == list(wanted)
        assert ours["scores"] == pytest.approx(wanted["scores"], abs=1e-4)
        for name in ("label", "labels", "num_chunks", "num_encoded_chunks", "truncated"):
            assert ours[name] == wanted[name]
        assert evidence_of(ours) == pytest.approx(evidence_of(wanted), abs=2e-4)


def test_int8_with_lexical_features_is_close_to_the_pipeline(saved_words, tmp_path, call_command):
    need_onnx()
    from scripts import export_onnx
    from scripts.onnx.predict_onnx import OnnxClassifier

    call_command(export_onnx.main, model=saved_words, output_dir=tmp_path / "int8", quantize="int8")
    assert b"MatMulInteger" in (tmp_path / "int8" / "encoder.onnx").read_bytes()
    found = OnnxClassifier(tmp_path / "int8")(TEXTS, evidence=9)
    expected = pipeline("text-classification", model=str(saved_words), trust_remote_code=True)(TEXTS, evidence=9)
    config = json.loads((saved_words / "config.json").read_text())
    score_BK, wanted_BK = (np.array([list(each["scores"].values()) for each in part]) for part in (found, expected))
    close = 3e-3  # measured: 2e-4
    assert 0 < np.abs(score_BK - wanted_BK).max() < close < wanted_BK.std(axis=0).min() / 10
    # A label whose score is that close to its threshold may be decided otherwise.
    is_clear_BK = np.abs(wanted_BK - config["thresholds"]) > close
    assert is_clear_BK.mean() > 0.9
    for ours, wanted, is_clear_K in zip(found, expected, is_clear_BK, strict=True):
        clear = {name for name, is_clear in zip(NAMES, is_clear_K, strict=True) if is_clear}
        sure = clear & {*wanted["labels"]}
        assert clear & {*ours["labels"]} == sure
        for name in ("num_chunks", "num_encoded_chunks", "truncated"):
            assert ours[name] == wanted[name]
        one, other = (
            {key: score for key, score in evidence_of(each).items() if key[0] in sure} for each in (ours, wanted)
        )
        both = one.keys() & other.keys()
        assert len(both) >= 0.8 * len(other)
        assert {key: one[key] for key in both} == pytest.approx({key: other[key] for key in both}, abs=close)
    assert any(result["num_encoded_chunks"] < result["num_chunks"] for result in found)


# ---- The page ----------------------------------------------------------------------------------------------------------------


def text_with(results, number: int) -> int:
    """Index of a text that has so many labels."""
    return next(i for i, result in enumerate(results) if TEXTS[i] and len(result["labels"]) == number)


def test_page_shows_the_labels_thresholds_and_a_choice_of_contributions(classify, results):
    config = classify.model.config
    i = text_with(results, 2)
    page = render_result(results[i], TEXTS[i], [], "name", config, 0.7)
    first, second = map(html.escape, results[i]["labels"])
    assert f"<strong>{first}, {second}</strong></p>" in page
    assert re.findall(r'<input type="radio" name="of" id="of-(\d)"( checked)?>(.*?)</label>', page) == [
        ("0", " checked", first), ("1", "", second)
    ]  # fmt: skip
    rows = re.findall(r"<li><span>(.*?)</span>.*?left: ([\d.]+)%.*?</li>", page)
    thresholds = dict(zip(NAMES, config.thresholds, strict=True))
    by_score = sorted(NAMES, key=lambda name: -results[i]["scores"][name])
    assert [(html.unescape(re.sub("</?strong>", "", label)), at) for label, at in rows] == [
        (name, f"{100 * thresholds[name]:.1f}") for name in by_score
    ]
    assert {html.unescape(label[8:-9]) for label, _ in rows if label.startswith("<strong>")} == set(
        results[i]["labels"]
    )
    assert "<i>horror" not in page
    strips = re.findall(r'<div class="of of-\d"><ol class="strip">(.*?)</ol>', page)
    for strip, name in zip(strips, results[i]["labels"], strict=True):
        shown = [float(score) for score in re.findall(r'aria-label="Chunk \d+, (.*?)"', strip)]
        assert shown == pytest.approx([chunk["scores"][name] for chunk in results[i]["chunks"]], abs=0.006)
    # One label needs no choice; none: the contributions are to the label with the highest score.
    i = text_with(results, 1)
    page = render_result(results[i], TEXTS[i], [], "name", config, 0.7)
    assert "radio" not in page
    assert f"<strong>{html.escape(results[i]['labels'][0])}</strong></p>" in page
    i = text_with(results, 0)
    page = render_result(results[i], TEXTS[i], [], "name", config, 0.7)
    assert "<strong>None of the labels</strong>" in page
    assert f"What each chunk contributes to {html.escape(results[i]['label'])}:" in page


def test_page_of_many_labels_shows_the_highest_scores_and_the_documents_labels(classify):
    names = [f"topic {k}" for k in range(300)]
    result = {"labels": ["topic 250"], "scores": {name: 1 / (k + 2) for k, name in enumerate(names)}}
    shown = render_scores(result, classify.model.config, dict.fromkeys(names, 0.004))
    assert shown.count("class='meter'") == 21
    assert "<strong>topic 250</strong>" in shown
    assert "and 279 more" in shown


def test_advice_names_the_scores_near_their_thresholds(classify, results, monkeypatch):
    i = text_with(results, 1)
    result = results[i] | {"scores": dict(zip(NAMES, (0.39, 0.61, 0.05, 0.95), strict=True)), "truncated": False}

    def page(**options) -> str:
        return html.unescape(render_result(result, TEXTS[i], [], "name", classify.model.config, 0.7, **options))

    monkeypatch.setattr(classify.model.config, "thresholds", [0.5, 0.5, 0.5, 0.5])
    assert "No score is near its threshold: no check by a person is advised." in page()
    wide = page(review_margin=0.23)
    assert "A person should check this." in wide
    assert "Near the threshold: drugs (39.0 %, threshold 50.0 %), violence (61.0 %, threshold 50.0 %)." in wide
    # Of a low threshold the margin is small.
    monkeypatch.setattr(classify.model.config, "thresholds", [0.9, 0.1, 0.07, 0.5])
    assert "No score is near its threshold" in page()
    monkeypatch.setattr(classify.model.config, "thresholds", [0.9, 0.9, 0.06, 0.94])
    assert "Near the threshold: <i>horror</i> (5.0 %, threshold 6.0 %), grief (95.0 %" in page()
    monkeypatch.setattr(classify.model.config, "label_calibration", None)
    assert "; the scores are not calibrated." in page()
    result["truncated"] = True
    assert "longer than the" in page()


@pytest.fixture(scope="module")
def app():
    """Functions that visit a page; without gradio its tests are skipped."""
    from tests import test_app

    return test_app


@pytest.fixture(scope="module")
def address(app, saved, tmp_path_factory):
    """As a Space, with nothing of the project but what is pushed."""
    folder = tmp_path_factory.mktemp("app")
    write_space(folder / "space", "org/model")
    with app.served_space(folder, saved) as page:
        yield page


@pytest.mark.slow
def test_the_endpoint_returns_the_labels(app, address, results):
    client = app.gradio_client.Client(address, verbose=False)
    for text, result in list(zip(TEXTS, results, strict=True))[1:5]:
        found = client.predict(text, api_name="/classify")
        assert list(found) == ["label", "labels", "scores", "num_chunks", "truncated", "evidence"]
        assert (found["label"], found["labels"]) == (result["label"], result["labels"])
        assert found["scores"] == pytest.approx(result["scores"], abs=1e-5)
        assert [(e["label"], e["text"]) for e in found["evidence"]] == [
            (e["label"], e["text"]) for e in result["evidence"]
        ]


class TestInABrowser:
    pytestmark = [
        pytest.mark.slow,
        pytest.mark.browser,
        pytest.mark.skipif(
            not shutil.which("chromium") or not shutil.which("chromedriver"),
            reason="chromium and chromium-driver are not installed",
        ),
    ]

    def test_the_chosen_label_colors_the_chunks(self, browser, app, address, results):
        i = text_with(results, 2)
        result = results[i]
        app.opened(browser, address)
        app.paste(browser, TEXTS[i])
        assert app.result_with(browser, "Show the contributions to").startswith(", ".join(result["labels"]))
        body = "return getComputedStyle(document.querySelector('#chunk-{}  .text')).backgroundColor"
        colors, seen = browser.find_elements(By.CSS_SELECTOR, ".choice label"), []
        for button, name in zip(colors, result["labels"], strict=True):
            button.click()
            [strip] = [each for each in browser.find_elements(By.CSS_SELECTOR, ".strip") if each.is_displayed()]
            assert [link.get_attribute("class") for link in strip.find_elements(By.TAG_NAME, "a")] == [
                "supports" if chunk["scores"][name] > 0 else "opposes" for chunk in result["chunks"]
            ]
            marks = browser.execute_script(
                "return [...document.querySelectorAll('mark')].filter(mark => getComputedStyle(mark).textDecorationLine "
                "=== 'underline' || getComputedStyle(mark).fontWeight !== '400').map(mark => mark.textContent)"
            )
            wanted = [found["text"] for found in result["evidence"] if found["label"] == name]
            assert sorted(marks) == sorted(wanted)
            assert f"contributes to {name}:" in app.result_with(browser, "What each chunk")
            seen.append([browser.execute_script(body.format(k + 1)) for k in range(len(result["chunks"]))])
        assert seen[0] != seen[1]
        browser.find_element(By.CSS_SELECTOR, ".choice input:checked").send_keys(Keys.ARROW_LEFT)  # by keyboard
        assert f"contributes to {result['labels'][0]}:" in app.result_with(browser, "What each chunk")
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []

    def test_none_of_the_labels_and_a_phone(self, browser, app, address, results):
        app.opened(browser, address)
        metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        i = text_with(results, 0)
        app.paste(browser, TEXTS[i])
        assert app.result_with(browser, "No score reaches its threshold").startswith("None of the labels")
        assert browser.find_elements(By.CSS_SELECTOR, ".choice") == []
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        for row in browser.find_elements(By.CSS_SELECTOR, ".scores li"):
            name, meter, score = row.find_elements(By.CSS_SELECTOR, ":scope > span")
            assert name.rect["y"] == pytest.approx(score.rect["y"], abs=2)
            assert meter.rect["y"] > name.rect["y"] + 10
            assert meter.rect["width"] > 300
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
