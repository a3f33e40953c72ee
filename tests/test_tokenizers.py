"""Tokenizers of any encoder: converted from the files of slow ones, with any special tokens, without padding; or refused."""

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    CamembertConfig,
    CanineConfig,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
    XLMRobertaConfig,
    pipeline,
)

from data import tokenization
from data.preparation import preparation_summary, prepare_dataset
from data.tokenization import load_tokenizer, tokenizer_fingerprint
from modeling.hierarchical_roberta.chunking import Chunker, special_token_frame, tokenize_batch
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.hierarchical_roberta.pipeline import HierarchicalClassificationPipeline
from tests.conftest import CUES, LABELS, ROOT, SENTENCES, tiny_rows, train, write_csv

WORDS = [*SENTENCES, *CUES.values()]
TEXT = "Nobody spoke.  — Æther 😀, naïve\n\nThe lamp burned! 文 ab \n"

# ---- folders with a slow tokenizer's files, as model hubs have them ----


def sentencepiece_model(**options) -> bytes:
    trainer = pytest.importorskip("sentencepiece", reason="needs the package sentencepiece").SentencePieceTrainer
    file = BytesIO()
    given = {"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2, **options}
    trainer.train(sentence_iterator=iter(WORDS * 3), model_writer=file, **given)
    return file.getvalue()


def byte_level_files(special: list[str]) -> dict[str, bytes]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
    return {"vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": f"{merges}\n".encode()}


DEBERTA = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "user_defined_symbols": ["[MASK]"]}
DEBERTA |= {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
BPE = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 600}
LLAMA = LlamaConfig(vocab_size=600, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)

# name → config of the model, files, tokenizer_config.json, special tokens before and after a text, padding token
SLOW = {
    "deberta-v3": (DebertaV2Config(), lambda: {"spm.model": sentencepiece_model(**DEBERTA)}, {}, "[CLS] | [SEP]", "[PAD]"),
    "xlm-roberta": (XLMRobertaConfig(), lambda: {"sentencepiece.bpe.model": sentencepiece_model()}, {}, "<s> | </s>", "<pad>"),
    "camembert": (CamembertConfig(), lambda: {"sentencepiece.bpe.model": sentencepiece_model()}, {}, "<s> | </s>", "<pad>"),
    "t5": (T5Config(), lambda: {"spiece.model": sentencepiece_model(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)}, {}, "| </s>", "<pad>"),
    "llama": (LLAMA, lambda: {"tokenizer.model": sentencepiece_model(**BPE)}, {"add_bos_token": True}, "<s> |", "</s>"),
    "llama-plain": (LLAMA, lambda: {"tokenizer.model": sentencepiece_model(**BPE)}, {}, "|", "</s>"),
    "roberta": (RobertaConfig(), lambda: byte_level_files(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]), {}, "<s> | </s>", "<pad>"),
    "gpt2": (GPT2Config(), lambda: byte_level_files(["<|endoftext|>"]), {}, "|", "<|endoftext|>"),
    "bert": (AutoConfig.for_model("bert"), lambda: {"vocab.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nlamp\nnobody\nspoke\n.\n##s\n"}, {}, "[CLS] | [SEP]", "[PAD]"),
}  # fmt: skip


def slow_folder(folder: Path, name: str) -> Path:
    config, files, settings, _, _ = SLOW[name]
    config.save_pretrained(folder)
    for file, content in files().items():
        (folder / file).write_bytes(content)
    if settings:
        settings = {"tokenizer_class": "LlamaTokenizer", **settings}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", SLOW)
def test_files_of_a_slow_tokenizer_are_converted(name, tmp_path):
    tokenizer = load_tokenizer(str(slow_folder(tmp_path / "slow", name)))
    *_, frame, padding = SLOW[name]
    before, after = map(tokenizer.convert_ids_to_tokens, special_token_frame(tokenizer))
    assert " ".join([*before, "|", *after]) == frame
    assert tokenizer.pad_token == padding
    assert "lamp" in tokenizer.decode(tokenizer("a lamp", add_special_tokens=False)["input_ids"])
    check_offsets(tokenizer)
    # As a run saves it: the same tokens, fingerprint and padding.
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(str(tmp_path / "saved"))
    assert tokenizer_fingerprint(saved) == tokenizer_fingerprint(tokenizer)
    assert saved.pad_token_id == tokenizer.pad_token_id
    assert saved(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


# ---- special tokens and offsets ----


def check_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Chunks lead back to the whole text, in order, and each has the special tokens and the prefix once."""
    chunker = Chunker(tokenizer, chunk_length=24, chunk_prefix="lamp: ")
    [ids], [start], [end], [breaks] = tokenize_batch([TEXT], tokenizer).values()
    spans = chunker.spans(len(ids), breaks)
    assert len(spans) > 1 or len(ids) <= chunker.body_length
    covered = sorted(
        {i for a, b in spans for first, last in zip(start[a:b], end[a:b], strict=True) for i in range(first, last)}
    )
    assert "".join("".join(TEXT[i] for i in covered).split()) == "".join(TEXT.split())
    assert (np.diff(end) >= 0).all()
    before, after = special_token_frame(tokenizer)
    assert len(before) + len(after) == tokenizer.num_special_tokens_to_add()
    prefix = before + tokenizer("lamp:", add_special_tokens=False)["input_ids"]
    for a, b in spans:
        assert chunker.with_special_tokens(ids[a:b]).tolist() == [*prefix, *ids[a:b], *after]


def byte_level(prefix_space: bool = False) -> Tokenizer:
    """A byte-level BPE with four special tokens."""
    files = byte_level_files(["<s>", "</s>", "<pad>", "<unk>"])
    merges = [tuple(line.split(" ")) for line in files["merges.txt"].decode().splitlines()[1:]]
    tokenizer = Tokenizer(models.BPE(json.loads(files["vocab.json"]), merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    """A byte-fallback BPE of Llama's kind, whose words begin with ▁: by a normalizer, as in Llama 2, or a pre-tokenizer."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {
        token: i
        for i, token in enumerate(
            ["<s>", "</s>", "<pad>", "<unk>", *bytes_, "▁", *"abcdelmnopsuNobdy.", "la", "mp", "lamp", "▁lamp"]
        )
    }
    merges = [("l", "a"), ("m", "p"), ("la", "mp"), ("▁", "lamp")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


def template(single: str, pair: str = "$A $B") -> processors.TemplateProcessing:
    special = [("<s>", 0), ("</s>", 1), ("<unk>", 3)]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)


@pytest.mark.parametrize(
    ("tokenizer", "processor", "expected"),
    [
        (byte_level(), None, ([], [])),
        (byte_level(), template("<s> $A"), ([0], [])),
        (byte_level(), template("$A </s>"), ([], [1])),
        (byte_level(), template("<s> $A </s>", "<s> $A </s> </s> $B </s>"), ([0], [1])),
        (byte_level(prefix_space=True), template("<s> <s> $A </s>"), ([0, 0], [1])),
        (metaspace("normalizer"), template("<s> $A"), ([0], [])),
        (metaspace("first"), template("<s> $A"), ([0], [])),
        (metaspace("always"), None, ([], [])),
    ],
)
def test_any_frame_of_special_tokens(tokenizer, processor, expected):
    if processor is not None:
        tokenizer.post_processor = processor
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    assert special_token_frame(fast) == expected
    check_offsets(fast)


def test_the_frame_is_known_where_its_token_is_that_of_unknown_words():
    words = Tokenizer(models.WordLevel({"lamp": 0, "<unk>": 3}, "<unk>"))
    words.post_processor = template("<unk> $A")
    assert special_token_frame(PreTrainedTokenizerFast(tokenizer_object=words)) == ([3], [])


# ---- padding ----


@pytest.mark.parametrize(
    ("special", "padding"), [({"eos_token": "</s>", "unk_token": "<unk>"}, 1), ({"unk_token": "<unk>"}, 3)]
)
def test_the_end_of_text_or_unknown_token_pads_where_no_other_does(special, padding, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), **special).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == padding


def test_a_tokenizer_without_any_special_token_is_refused(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=byte_level()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pad_token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.slow
def test_a_decoder_whose_tokenizer_has_no_padding_is_trained_and_predicts(tmp_path):
    LlamaModel(LLAMA).save_pretrained(tmp_path / "decoder")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), **special).save_pretrained(tmp_path / "decoder")
    source = write_csv(tmp_path / "stories.csv", tiny_rows())
    prepare_dataset(str(source), str(tmp_path / "decoder"), tmp_path / "data", labels=LABELS)
    done = train(tmp_path / "data", tmp_path / "decoder", tmp_path / "run", num_train_epochs=1, max_chunks=2)
    assert done.returncode == 0, done.stderr
    classify = pipeline("text-classification", model=str(tmp_path / "run"), trust_remote_code=True)
    assert classify.tokenizer.pad_token_id == 1
    texts = [row["text"] for row in tiny_rows()[:3]] + [""]
    for text, result in zip(texts, classify(texts), strict=True):  # padded together, and alone
        assert result["scores"] == pytest.approx(classify(text)[0]["scores"], abs=1e-5)
        for found in result["evidence"]:
            assert text[found["start"] : found["end"]] == found["text"]


@pytest.mark.parametrize("text", [" ", "a ", "lamp \n ", "  "])
def test_spaces_at_the_end_of_a_text_are_classified(text, roberta_folder, tmp_path):
    tokenizer = load_tokenizer(str(slow_folder(tmp_path, "roberta")))
    model = HierarchicalRobertaForSequenceClassification.from_encoder(str(roberta_folder), chunk_length=3)
    [result] = HierarchicalClassificationPipeline(model, tokenizer=tokenizer)(text)
    assert sum(result["scores"].values()) == pytest.approx(1)


# ---- what cannot be used ----


def test_a_slow_tokenizer_is_refused_before_documents_are_read(tmp_path):
    CanineConfig().save_pretrained(tmp_path / "canine")
    with pytest.raises(ValueError, match=r"slow.*CanineTokenizer.*fast"):
        prepare_dataset("no such source", str(tmp_path / "canine"), tmp_path / "data")


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "t5", "deberta-v2", "xlm-roberta", "modernbert"])
def test_a_folder_without_a_vocabulary_is_refused(name, tmp_path):
    AutoConfig.for_model(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "missing", "expected"),
    [
        (ValueError("`tiktoken` is required to read a `tiktoken` file."), ["sentencepiece"], "pip install sentencepiece"),
        (ValueError("Error parsing line b'\\x0e'"), ["sentencepiece", "protobuf"], "pip install sentencepiece protobuf"),
        (ValueError("`tiktoken` is required to read a `tiktoken` file."), ["tiktoken"], "pip install tiktoken"),
        (ImportError("\nX requires the SentencePiece library"), ["sentencepiece"], "pip install sentencepiece"),
        (ImportError("You need to install sacremoses to use XLMTokenizer."), ["sentencepiece"], "slow.*XLMTokenizer.*fast"),
        (OSError("no/such is not a local folder"), ["sentencepiece"], "No tokenizer.*no/such"),
        (ValueError("Couldn't instantiate the backend: you need sentencepiece or tiktoken"), ["sentencepiece"], "No tokenizer"),
        (Exception("expected value at line 1 column 1"), ["sentencepiece"], "No tokenizer.*line 1"),
        (ValueError("broken"), [], "No tokenizer.*broken"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(error, missing, expected, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(tokenization.AutoTokenizer, "from_pretrained", fail)
    for package in ("sentencepiece", "protobuf", "tiktoken"):
        monkeypatch.setattr(tokenization, f"is_{package}_available", lambda package=package: package not in missing)
    with pytest.raises(ValueError, match=expected):
        load_tokenizer("any")


@pytest.mark.slow
def test_without_sentencepiece_it_is_named(tmp_path):
    """What transformers raises in truth, in a Python that cannot find the package."""
    XLMRobertaConfig().save_pretrained(tmp_path)
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    code = (
        "import sys, importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name.startswith('sentencepiece') else find(name, *rest)\n"
        "from data.tokenization import load_tokenizer\nload_tokenizer(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "ValueError" in done.stderr
    assert "pip install sentencepiece" in done.stderr.splitlines()[-1]


# ---- unknown tokens ----


@pytest.mark.parametrize(
    ("name", "text", "share"),
    [
        ("bert", "lamp nobody spoke. лампа", 0.2),
        ("bert", "lamp nobody spoke. " * 30 + "лампа", 0.008),
        ("roberta", "lamp nobody spoke. лампа", 0.0),
    ],
)
def test_many_unknown_tokens_are_warned_about(name, text, share, tmp_path):
    slow_folder(tmp_path / "tokenizer", name)
    rows = [{"id": f"d{i}", "text": text, "label": "ab"[i % 2], "split": "train"} for i in range(20)]
    rows += [{"id": f"v{i}", "text": text, "label": "ab"[i % 2], "split": "validation"} for i in range(4)]
    source = write_csv(tmp_path / "rows.csv", rows)
    manifest = prepare_dataset(str(source), str(tmp_path / "tokenizer"), tmp_path / "data", keep=["duplicate"])
    assert manifest["unknown_token_share"] == pytest.approx(share, abs=1e-3)
    assert ("unknown to the tokenizer" in preparation_summary(manifest)) == (share > 0.01)
