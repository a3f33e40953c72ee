"""Lexical features: they count what is read, are fitted to the training documents alone, and travel with the model."""

import csv
import json
import re
import shutil
from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from data.chunk_dataset import ChunkedDocuments
from data.collator import DocumentCollator
from modeling.hierarchical_roberta.chunk_attribution import leave_one_out_attributions, log_odds
from modeling.hierarchical_roberta.chunking import Chunker
from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.lexical_features import LexicalFeatures
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import (
    HierarchicalRobertaForSequenceClassification as Model,
)
from modeling.token_attribution import token_attributions
from scripts.training.fit_lexical_features import fit_lexical_features, lexical_logits
from tests.conftest import CUES, run_command, train
from tests.test_model import DOCUMENTS, batch_of

TOKENS = torch.tensor([7, 11, 23, 40])
PAIRS = ((23, 24), (7, 11))


def with_features(model, weighting: str) -> Model:
    """A classifier whose four tokens, and two pairs of tokens but for `log`, weigh in heavily."""
    torch.manual_seed(2)
    config = {**model.config.to_dict(), "lexical_features": 8, "lexical_weighting": weighting}
    viewing = Model(HierarchicalRobertaConfig(**config)).eval()
    vocab_size = config["encoder_config"]["vocab_size"]
    pairs = [vocab_size + first * vocab_size + second for first, second in PAIRS] if weighting != "log" else []
    features = torch.cat([TOKENS, torch.tensor(pairs, dtype=torch.long)])[torch.randperm(4 + len(pairs))]
    idf = torch.rand(len(features)) + 0.5 if weighting == "tfidf" else None
    viewing.lexical.set_weights(features, torch.randn(3, len(features)), torch.randn(3), idf)
    return viewing


@pytest.fixture
def viewing(model) -> Model:
    return with_features(model, "log")


def counted(viewing: Model, chunks: torch.Tensor) -> torch.Tensor:
    """Occurrences of each feature (M,), counted one by one."""
    counts = torch.zeros(viewing.lexical.weight.shape[1])
    for feature, tokens in viewing.lexical.tokens_of_features().items():
        for chunk in chunks.tolist():
            places = range(len(chunk) - len(tokens) + 1)
            counts[feature] += sum(chunk[place : place + len(tokens)] == tokens for place in places)
    return counts


def chunked(splits, folder, name: str, **options) -> ChunkedDocuments:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return ChunkedDocuments(splits[name], tokenizer, **{"chunk_length": 16, "max_chunks": 99, **options})


@pytest.mark.parametrize("weighting", ["log", "tfidf"])
def test_a_document_is_rated_by_what_it_counts_over_all_its_chunks(model, weighting):
    """Counts are taken of tokens and pairs inside chunks, and of what is not encoded."""
    viewing = with_features(model, weighting)
    lexical = viewing.lexical
    batch = batch_of(viewing, DOCUMENTS, seed=5)
    for place, (first, second) in enumerate(PAIRS):
        batch["input_ids"][0, 2 * place + 1 : 2 * place + 3] = torch.tensor([first, second])
    parts = batch["input_ids"].split([len(chunks) for chunks in DOCUMENTS])
    counts = torch.stack([counted(viewing, chunks) for chunks in parts])
    rest = torch.arange(8.0).repeat(len(DOCUMENTS), 1)
    plain = viewing.classify(viewing(**batch).chunk_vectors, batch["num_chunks"])[0]
    viewing.config.encoder_weight, viewing.config.lexical_weight = 0.5, 2.0
    for rest_counts, total in ((None, counts), (rest, counts + rest)):
        values = torch.log1p(total)
        if weighting == "tfidf":
            values = values * lexical.idf
            values = values / values.norm(dim=1, keepdim=True).clamp(min=1e-12)
        expected = 0.5 * plain + 2.0 * (values @ lexical.weight.T + lexical.bias)
        torch.testing.assert_close(viewing(**batch, rest_counts=rest_counts).logits, expected, atol=1e-5, rtol=1e-4)
    assert counts.sum() > 3 + 2 * (weighting != "log")


def test_in_training_the_encoder_learns_alone(viewing):
    """The lexical features know the training documents by heart."""
    batch = batch_of(viewing, DOCUMENTS, seed=5)
    viewing.dropout.p = 0.0
    viewing.encoder.eval()
    plain = viewing.classify(viewing(**batch).chunk_vectors, batch["num_chunks"])[0]
    viewing.requires_grad_(False)
    torch.testing.assert_close(viewing.train()(**batch).logits, plain, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(viewing.eval()(**batch).logits, plain)


def test_logits_do_not_depend_on_neighbours_or_on_where_the_vectors_come_from(viewing):
    batch = batch_of(viewing, DOCUMENTS, seed=5)
    together = viewing(**batch).logits
    alone = torch.cat([viewing(**batch_of(viewing, [document], seed=5)).logits for document in DOCUMENTS])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
    vectors = viewing.encode_chunks(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(viewing(**batch, chunk_vectors=vectors).logits, together, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="input_ids"):
        viewing(chunk_vectors=vectors, num_chunks=batch["num_chunks"])


def test_until_it_is_fitted_the_view_adds_nothing(model):
    torch.manual_seed(2)
    viewing = Model(HierarchicalRobertaConfig(**{**model.config.to_dict(), "lexical_features": 4})).eval()
    plain = Model(model.config).eval()
    plain.load_state_dict(
        {name: value for name, value in viewing.state_dict().items() if not name.startswith("lexical")}
    )
    batch = batch_of(model, DOCUMENTS)
    assert torch.equal(viewing(**batch).logits, plain(**batch).logits)


def test_weights_keep_the_names_of_earlier_exports(viewing):
    names = {name for name in viewing.state_dict() if not name.startswith("encoder.")}
    head = {
        "classifier.weight",
        "classifier.bias",
        "pooling.dense.weight",
        "pooling.dense.bias",
        "pooling.score.weight",
    }
    scaler = {"vector_mean", "vector_scale"}
    assert names == head | scaler | {"lexical.weight", "lexical.bias", "lexical.feature_of_token"}


@pytest.mark.parametrize("weighting", ["log", "tfidf"])
@pytest.mark.parametrize("num_prefix_tokens", [0, 3])
def test_explanations_see_the_lexical_features(model, weighting, num_prefix_tokens):
    """Of a document whose second chunk alone has a feature, outside the prefix, and whose encoder is deaf to it."""
    viewing = with_features(model, weighting)
    ids = torch.randint(50, 99, (3, 12), generator=torch.Generator().manual_seed(0))
    ids[1, 5] = ids[1, 8] = 23
    if num_prefix_tokens:
        ids[:, 1] = 23
    viewing.config.num_prefix_tokens = num_prefix_tokens
    viewing.classifier.weight.data.zero_()
    output = viewing(input_ids=ids, num_chunks=torch.tensor([3]))
    label = int(viewing.lexical.weight[:, viewing.lexical.feature_of_token[23]].argmax())
    count_CM = viewing.lexical.count_chunks(list(ids.numpy()), num_prefix_tokens)
    contributions = leave_one_out_attributions(viewing, output.chunk_vectors, label, count_CM)
    whole = log_odds(output.logits, label)
    without = log_odds(viewing(input_ids=ids[[0, 2]], num_chunks=torch.tensor([2])).logits, label)
    assert (whole - without).abs() > 0.01
    torch.testing.assert_close(contributions[1:2], whole - without, atol=1e-5, rtol=1e-5)
    blank = ids[1].clone().fill_(3)
    viewing.requires_grad_(False)
    words = token_attributions(viewing, ids[1], blank, output.chunk_vectors, 1, label, count_CM.sum(dim=0))
    torch.testing.assert_close(words[5] + words[8], (whole - without)[0], atol=1e-4, rtol=1e-4)
    assert words[torch.tensor([0, 1, 2, 3, 4, 6, 7, 9, 10, 11])].abs().max() < 1e-5


def test_a_pairs_attribution_is_divided_between_its_tokens(model):
    viewing = with_features(model, "tfidf")
    ids = torch.randint(50, 99, (1, 9), generator=torch.Generator().manual_seed(0))
    ids[0, 4:6] = torch.tensor([23, 24])  # 23 is a feature of its own too, 24 is none
    viewing.classifier.weight.data.zero_()
    viewing.requires_grad_(False)
    output, count_CM = (
        viewing(input_ids=ids, num_chunks=torch.tensor([1])),
        viewing.lexical.count_chunks(list(ids.numpy())),
    )
    words = token_attributions(viewing, ids[0], ids[0], output.chunk_vectors, 0, 1, count_CM[0])
    [pair] = [i for i, tokens in viewing.lexical.tokens_of_features().items() if tokens == [23, 24]]
    fewer = count_CM.clone()
    fewer[0, pair] = 0
    lost = log_odds(output.logits, 1) - log_odds(viewing.classify(output.chunk_vectors, [1], fewer)[0], 1)
    assert lost.abs() > 0.01
    torch.testing.assert_close(words[5], lost[0] / 2, atol=1e-5, rtol=1e-4)


def test_tokens_of_the_prefix_are_counted_neither_in_the_fit_nor_by_the_model(splits, roberta_folder, roberta_model):
    """Though the prefix has words of the documents, and rows are padded."""
    plain = chunked(splits, roberta_folder, "train")
    num_prefix_tokens = len(Chunker(plain.tokenizer, 64, chunk_prefix="The murder: ").prefix)
    length = 16 + num_prefix_tokens - 1  # room for the same tokens
    prefixed = chunked(splits, roberta_folder, "train", chunk_length=length, chunk_prefix="The murder: ")
    fitted = fit_lexical_features(prefixed, 3, 10, 400)
    assert_same(fit_lexical_features(plain, 3, 10, 400), fitted)

    fields = {"lexical_features": 10, "num_prefix_tokens": num_prefix_tokens, "chunk_prefix": "The murder: "}
    model = Model(HierarchicalRobertaConfig(**{**roberta_model.config.to_dict(), **fields})).eval()
    model.use_lexical_features(fitted)
    model.classifier.weight.data.zero_()
    assert model.lexical.count(torch.from_numpy(prefixed.chunker.prefix)[None]).sum() > 0
    batch = DocumentCollator(plain.tokenizer.pad_token_id)([prefixed[i] for i in range(len(prefixed))])
    del batch["labels"]
    logits = model(**batch).logits  # the classifier is zero: these are the lexical features' own
    expected = lexical_logits(plain, fitted)
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-4)


def assert_same(one: LexicalFeatures, other: LexicalFeatures) -> None:
    assert one.weighting == other.weighting
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def tokens_of(lexical: LexicalFeatures) -> list[list[int]]:
    """The token, or two tokens, of each feature, in the order of the features."""
    return [tokens for _, tokens in sorted(lexical.tokens_of_features().items())]


def test_the_tokens_are_those_that_the_classes_explain_best(splits, roberta_folder):
    documents = chunked(splits, roberta_folder, "train")
    labels = np.asarray(documents.documents["label"])
    lexical = fit_lexical_features(documents, 3, 10, 400, weighting="log")
    tokens = [token for (token,) in tokens_of(lexical)]
    special = set(documents.tokenizer.all_special_ids)
    counts = np.stack(
        [
            np.bincount([token for token in row["input_ids"] if token not in special], minlength=400)
            for row in documents.documents
        ]
    )
    logs = np.log1p(counts)
    within = sum(((logs[labels == k] - logs[labels == k].mean(axis=0)) ** 2).sum(axis=0) for k in range(3))
    total = ((logs - logs.mean(axis=0)) ** 2).sum(axis=0)
    varies = ((counts > 0).sum(axis=0) >= 2) & (total > 1e-9)
    share = np.where(varies, 1 - within / np.where(varies, total, 1), 0)
    np.testing.assert_allclose(share[tokens], np.sort(share)[::-1][:10], rtol=1e-5)
    words = " ".join(documents.tokenizer.convert_ids_to_tokens(tokens[:3]))
    assert all(cue in words for cue in CUES.values())


def documents_of(splits, folder, texts: list[list[int]], labels: list[int]) -> ChunkedDocuments:
    """Training documents of these tokens."""
    documents = chunked(splits, folder, "train")
    rows = [
        {"input_ids": np.array(text), "token_break": np.zeros(len(text), int), "label": label, "id": str(number)}
        for number, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    documents.documents = Dataset.from_list(rows).with_format("numpy")
    return documents


def test_pairs_are_taken_where_they_tell_more(splits, roberta_folder):
    """Of documents whose classes have the same tokens, in another order."""
    rng = np.random.default_rng(0)
    labels = [number % 2 for number in range(80)]
    texts = []
    for label in labels:
        text = rng.permutation(range(60, 66)).tolist()
        texts.append([*text[:3], 50 + label, 51 - label, *text[3:]])
    documents = documents_of(splits, roberta_folder, texts, labels)
    fitted = fit_lexical_features(documents, 2, 20, 400)
    assert fitted.weighting != "log"
    assert [50, 51] in tokens_of(fitted)
    assert [51, 50] in tokens_of(fitted)
    scores = lexical_logits(documents, fitted)
    assert (scores.argmax(axis=1) == labels).all()
    with pytest.raises(ValueError, match="No token"):
        fit_lexical_features(documents, 2, 20, 400, weighting="log")


def test_the_fit_reads_training_documents_as_evaluation_would(splits, roberta_folder):
    """Without special tokens, within max_chunks, and the same however often it is done; the documents stay in training."""
    documents = chunked(splits, roberta_folder, "train", max_chunks=2, chunk_policy="random", training=True)
    first = fit_lexical_features(documents, 3, 10, 400)
    documents.set_epoch(3)
    assert_same(first, fit_lexical_features(documents, 3, 10, 400))
    assert documents.training
    assert not set(chain.from_iterable(tokens_of(first))) & set(documents.tokenizer.all_special_ids)


def test_a_special_token_in_a_text_is_no_feature(splits, roberta_folder):
    """Every chunk has some of its own, so that counts of it would be others in the model than in the fit."""
    documents = chunked(splits, roberta_folder, "train")
    end = documents.tokenizer.eos_token_id

    def with_token(row):
        ids = [end] * 5 if row["label"] == 0 else [50] * 5
        return row | {
            "input_ids": np.array([*row["input_ids"], *ids]),
            "token_break": np.array([*row["token_break"], *[0] * 5]),
        }

    documents.documents = documents.documents.map(with_token)
    tokens = tokens_of(fit_lexical_features(documents, 3, 999, 400, weighting="tfidf"))
    assert [50] in tokens
    assert [50, 50] in tokens
    assert end not in set(chain.from_iterable(tokens))


def test_class_weights_count_in_the_fit(splits, roberta_folder):
    documents = chunked(splits, roberta_folder, "train")
    view_of = {}
    for name, weights in (("even", None), ("weighted", torch.tensor([0.2, 1.0, 9.0]))):
        view_of[name] = fit_lexical_features(documents, 3, 1, 400, weights).bias
    assert view_of["weighted"][2] - view_of["weighted"][0] > view_of["even"][2] - view_of["even"][0]


def test_documents_without_a_word_that_tells_are_refused(roberta_folder, splits, model):
    documents = chunked(splits, roberta_folder, "train")
    documents.documents = documents.documents.map(
        lambda row: row | {"input_ids": np.array([50, 51]), "token_break": np.array([0, 0])}
    )
    with pytest.raises(ValueError, match="--lexical_features"):
        fit_lexical_features(documents, 3, 4, 400)


def telling(num_labels: int = 3) -> LexicalFeatures:
    """Features 50, 51, …: each tells of one class."""
    lexical = LexicalFeatures(vocab_size=99, num_features=num_labels, num_labels=num_labels)
    lexical.set_weights(torch.arange(50, 50 + num_labels), torch.eye(num_labels), torch.zeros(num_labels))
    return lexical


def test_the_most_telling_chunks_of_each_class_are_selected():
    """Class by class, and a quarter spread over the rest, drawn anew in training."""
    chunks = [np.full(6, 90) for _ in range(40)]
    chunks[17][:3], chunks[30][:2], chunks[4][:2], chunks[21][:1], chunks[22][:4] = 50, 51, 52, 52, 50
    lexical = telling()
    selected, rest = lexical.select(chunks, 4)
    assert {22, 30, 4} < set(selected.tolist())
    assert len(selected) == 4
    assert rest.tolist() == [3.0, 0.0, 1.0]
    assert np.array_equal(lexical.select(chunks, 4)[0], selected)
    drawn = [lexical.select(chunks, 8, np.random.default_rng(seed))[0].tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all({22, 17, 30, 4, 21} < set(one) and len(set(one)) == 8 and one == sorted(one) for one in drawn)
    selected, rest = lexical.select(chunks[:3], 4)
    assert (selected.tolist(), rest.sum()) == ([0, 1, 2], 0)


@pytest.mark.parametrize("weighting", ["log", "tfidf"])
def test_a_chunk_tells_what_it_would_be_rated_alone(model, weighting):
    lexical = with_features(model, weighting).lexical
    chunks = list(torch.randint(5, 45, (30, 20), generator=torch.Generator().manual_seed(1)).numpy())
    logits_CK = lexical(lexical.count_chunks(chunks))
    best = (logits_CK - logits_CK.mean(dim=1, keepdim=True)).argmax(dim=0).tolist()
    assert len(set(best)) > 1
    assert lexical.select(chunks, len(set(best)))[0].tolist() == sorted(set(best))


def test_where_classes_outnumber_chunks_those_that_tell_most_choose():
    chunks = [np.full(6, 90) for _ in range(9)]
    chunks[3][:1], chunks[5][:2], chunks[7][:5] = 50, 51, 52
    assert telling().select(chunks, 2)[0].tolist() == [5, 7]


def test_padding_is_no_part_of_a_pair():
    """Token 0 is text here: shorter chunks are padded with another."""
    lexical = LexicalFeatures(vocab_size=9, num_features=3, num_labels=2, weighting="tfidf")
    lexical.set_weights(torch.tensor([7, 9 + 7 * 9, 9]), torch.ones(2, 3), torch.zeros(2), torch.ones(3))
    counts = lexical.count_chunks([np.array([7]), np.array([3, 3, 3, 3]), np.array([7, 0, 0])])
    assert counts.tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 1]]


def test_all_chunks_are_counted_and_some_are_encoded(splits, roberta_folder):
    documents = chunked(splits, roberta_folder, "train", max_chunks=2, chunk_policy="lexical")
    lexical = documents.lexical = fit_lexical_features(documents, 3, 10, 400)
    everything = chunked(splits, roberta_folder, "train")
    longer = 0
    for index in range(len(documents)):
        item, whole = documents[index], everything[index]
        counts = lexical.count_chunks(item["input_ids"]).sum(dim=0) + torch.from_numpy(item["rest_counts"])
        assert torch.equal(counts, lexical.count_chunks(whole["input_ids"]).sum(dim=0))
        assert len(item["input_ids"]) == min(2, len(whole["input_ids"]))
        assert all(
            np.array_equal(item["input_ids"][i], whole["input_ids"][at]) for i, at in enumerate(item["selected"])
        )
        longer += len(whole["input_ids"]) > 2
    assert longer > 5
    batch = DocumentCollator(documents.tokenizer.pad_token_id)([documents[0], documents[1]])
    assert batch["rest_counts"].shape == (2, 10)
    documents.training = True
    assert "rest_counts" not in documents[0]  # in training they are not counted


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False])
def test_a_run_that_encodes_the_most_telling_chunks(prepared_folder, roberta_folder, tmp_path, frozen):
    """Its predictions are those of the pipeline elsewhere, and of the evaluation; what was read how is said."""
    given = {"lexical_features": 30, "max_chunks": 2, "chunk_policy": "lexical", "freeze_encoder": frozen}
    given |= {"num_train_epochs": 2, "chunk_length": 12}
    done = train(prepared_folder, roberta_folder, tmp_path / "run", **given)
    assert done.returncode == 0, done.stderr
    assert re.search(r"lexical\) leaves to the lexical features [1-9]", done.stderr + done.stdout)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["lexical_weight"] > 0
    classify = pipeline("text-classification", model=str(tmp_path / "run"), trust_remote_code=True)
    encoded = set()
    for split in ("validation", "test"):
        with open(tmp_path / "run" / f"predictions_{split}.csv", newline="") as file:
            predicted = {row["id"]: row for row in csv.DictReader(file)}
        texts = load_from_disk(prepared_folder)[split]
        for row, result in zip(texts, classify(list(texts["text"])), strict=True):
            assert result["truncated"] is False
            assert result["num_encoded_chunks"] == min(2, result["num_chunks"])
            encoded.add(result["num_chunks"])
            for label, score in result["scores"].items():
                assert score == pytest.approx(float(predicted[row["id"]][label]), abs=1e-5)
    assert max(encoded) > 4
    # Resumed from its first checkpoint, it is the same run: the features are those of the checkpoint.
    shutil.copytree(tmp_path / "run", tmp_path / "again", ignore=shutil.ignore_patterns("*.safetensors", "*.csv"))
    first, *later = sorted((tmp_path / "again").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in later:
        shutil.rmtree(path)
    shutil.copy(tmp_path / "run" / first.name / "model.safetensors", first / "model.safetensors")
    other = "log" if config["lexical_weighting"] == "tfidf" else "tfidf"
    refused = train(
        prepared_folder,
        roberta_folder,
        tmp_path / "again",
        **given,
        resume_from_checkpoint="auto",
        lexical_weighting=other,
    )
    assert refused.returncode == 1
    assert "lexical_weighting" in refused.stderr
    done = train(prepared_folder, roberta_folder, tmp_path / "again", **given, resume_from_checkpoint="auto")
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["lexical_weight"] == config["lexical_weight"]
    given = {"model": tmp_path / "run", "dataset_dir": prepared_folder, "output_dir": tmp_path / "report"}
    done = run_command("scripts.evaluate_and_explain", **given)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["f1_macro"]
    assert metrics["model"]["f1_macro"]["value"] == pytest.approx(stored)
    assert "the most telling ones by their words" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"chunk_policy": "lexical"}, "--lexical_features"),
        ({"lexical_features": 9, "lexical_weighting": "bm25"}, "auto or one of log, tfidf, got 'bm25'"),
    ],
)
def test_options_that_do_not_fit_are_refused(prepared_folder, roberta_folder, tmp_path, options, told):
    done = train(prepared_folder, roberta_folder, tmp_path / "run", **options)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_with_a_view_rates_by_its_words_and_travels(prepared_folder, roberta_folder, tmp_path):
    """Also from kept vectors, and again from its checkpoint."""
    given = {"lexical_features": 30, "max_chunks": 99, "freeze_encoder": True, "num_train_epochs": 3}
    done = train(prepared_folder, roberta_folder, tmp_path / "run", **given)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["validation"]["f1_macro"] == metrics["test"]["f1_macro"] == 1.0
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run", trust_remote_code=True)
    assert loaded.lexical.weight.abs().sum() > 0
    assert "lexical.weight" not in dict(loaded.named_parameters())
    plain = train(prepared_folder, roberta_folder, tmp_path / "plain", **{**given, "lexical_features": 0})
    assert plain.returncode == 0, plain.stderr
    assert json.loads((tmp_path / "plain" / "metrics.json").read_text())["test"]["f1_macro"] < 1.0
    history = json.loads((tmp_path / "run" / "training_history.json").read_text())
    assert history["config"]["lexical_features"] == 30
    assert re.search(r"lexical.*\b30\b", (tmp_path / "run" / "README.md").read_text())

    given = {"model": tmp_path / "run", "dataset_dir": prepared_folder, "output_dir": tmp_path / "report"}
    done = run_command("scripts.evaluate_and_explain", **given)
    assert done.returncode == 0, done.stderr
    baselines = json.loads((tmp_path / "report" / "metrics.json").read_text())["baselines"]
    assert baselines["words_alone"]["f1_macro"]["value"] == 1.0
    report = (tmp_path / "report" / "report.html").read_text()
    for label, word in CUES.items():
        [words] = re.findall(rf"<dt>[^<]*\b{label}</dt><dd>([^<]*)</dd>", report)
        assert word in words.split(", ")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_have_the_view_of_one(prepared_folder, roberta_folder, tmp_path):
    exact = {"lexical_features": 30, "dropout": 0.0, "attention_dropout": 0.0, "num_train_epochs": 1}
    for name, processes, batch in (("one", 1, 8), ("two", 2, 4)):
        given = {**exact, "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1}
        done = train(prepared_folder, roberta_folder, tmp_path / name, processes=processes, **given)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert torch.equal(one["lexical.weight"], two["lexical.weight"])
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=1e-4, msg=name)
