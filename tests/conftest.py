"""What the tests share: tiny encoders built in code, tiny prepared data, and a way to run the commands."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # several processes share the cores

import copy
import csv
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from filelock import FileLock
from selenium import webdriver
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from data.prepared_dataset import load_prepared
from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from tests.processes import ROOT, close_servers, run, start_ranks

torch.set_num_threads(1)  # tiny models are slower on two
# Examples of each property: HYPOTHESIS_PROFILE=nightly tries 10,000.
hypothesis.settings.register_profile("ci", max_examples=300, deadline=None)
hypothesis.settings.register_profile("nightly", max_examples=10_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

LABELS = ["General", "Teen", "Mature"]
# A word that gives the label away: what is tested is the machinery, not the reading.
CUES = {"General": "garden", "Teen": "quarrel", "Mature": "murder"}
SENTENCES = ["The boat came in late.", "Nobody spoke of it.", "A lamp burned in the hall.", "They counted the apples."]


def tiny_text(label: str, num_sentences: int, rng: np.random.Generator) -> str:
    sentences = [SENTENCES[i] for i in rng.integers(len(SENTENCES), size=num_sentences)]
    sentences[rng.integers(num_sentences)] = f"There was talk of a {CUES[label]} again, {rng.integers(10**6)}."
    return " ".join(sentences)


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def tiny_rows(count: int = 60, seed: int = 0) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    labels = [LABELS[i] for i in np.repeat([0, 1, 2], [count // 2, count // 3, count - count // 2 - count // 3])]
    return [
        {"id": f"d{i}", "text": tiny_text(label, int(rng.integers(2, 30)), rng), "label": label}
        for i, label in enumerate(rng.permutation(labels))
    ]


def _save_tokenizer(folder: Path, template: processors.PostProcessor, special: list[str], roles: list[int]) -> None:
    """A byte-level BPE; `roles` says which of the special tokens is first, padding, last, unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*SENTENCES, *CUES.values()], trainer)
    tokenizer.post_processor = template
    first, pad, last, unknown = (special[i] for i in roles)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=first,
        cls_token=first,
        pad_token=pad,
        eos_token=last,
        sep_token=last,
        unk_token=unknown,
    ).save_pretrained(folder)


def make_roberta(folder: Path) -> Path:
    """A RoBERTa encoder of random weights with its tokenizer: 2 layers of 32, chunks of up to 64 tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    RobertaModel(RobertaConfig(vocab_size=400, max_position_embeddings=66, **sizes)).save_pretrained(folder)
    _save_tokenizer(
        folder, processors.RobertaProcessing(("</s>", 2), ("<s>", 0)), ["<s>", "<pad>", "</s>", "<unk>"], [0, 1, 2, 3]
    )
    return folder


@pytest.fixture(scope="session", autouse=True)
def _servers() -> Iterator[None]:
    yield
    close_servers()


def shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """A folder that one of pytest-xdist's workers builds and all of them read."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, built = base / "shared" / name, base / "shared" / f"{name}.built"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{built}.lock"):
        if not built.exists():
            shutil.rmtree(folder, ignore_errors=True)
            build(folder)
            built.touch()
    return folder


@pytest.fixture(scope="session")
def roberta_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_folder(tmp_path_factory, "roberta", make_roberta)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT encoder likewise, whose padding id is 0 and whose special ids are others."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    BertModel(BertConfig(vocab_size=400, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    _save_tokenizer(
        folder,
        processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1)),
        ["[PAD]", "[CLS]", "[SEP]", "[UNK]"],
        [1, 0, 2, 3],
    )
    return folder


@pytest.fixture(scope="session")
def _models(roberta_folder: Path, bert_folder: Path) -> dict[str, HierarchicalRobertaForSequenceClassification]:
    built = {}
    for name, folder in (("roberta", roberta_folder), ("bert", bert_folder)):
        torch.manual_seed(1)
        built[name] = HierarchicalRobertaForSequenceClassification.from_encoder(
            str(folder), num_labels=3, chunk_length=16, max_chunks=4, dropout=0.0, attention_dropout=0.0
        )
    return built


@pytest.fixture(params=["roberta", "bert"])
def model(request, _models) -> HierarchicalRobertaForSequenceClassification:
    """A small classifier without dropout, on each kind of encoder; a copy that a test may change."""
    return copy.deepcopy(_models[request.param])


@pytest.fixture
def roberta_model(_models) -> HierarchicalRobertaForSequenceClassification:
    return copy.deepcopy(_models["roberta"])


def tiny_config(**fields) -> HierarchicalRobertaConfig:
    encoder = RobertaConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        max_position_embeddings=66,
    )
    return HierarchicalRobertaConfig(encoder_config=encoder, **{"num_labels": 3, "chunk_length": 16, **fields})


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory: pytest.TempPathFactory, roberta_folder: Path) -> Path:
    """60 short documents, tokenized and split, by the command itself. To be read only."""

    def build(folder: Path) -> None:
        source = write_csv(folder.parent / "stories.csv", tiny_rows())
        done = run_command(
            "scripts.prepare_dataset",
            source=source,
            tokenizer=roberta_folder,
            output_dir=folder,
            labels=",".join(LABELS),
        )
        assert done.returncode == 0, done.stderr

    return shared_folder(tmp_path_factory, "prepared", build)


@pytest.fixture(scope="session")
def csv_file(prepared_folder: Path) -> Path:
    """Where `prepared_folder` comes from."""
    return prepared_folder.parent / "stories.csv"


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, prepared_folder: Path, roberta_folder: Path) -> Path:
    """A training of three epochs, each with its checkpoint. To be read only."""

    def build(folder: Path) -> None:
        done = train(prepared_folder, roberta_folder, folder, num_train_epochs=3)
        assert done.returncode == 0, done.stderr

    return shared_folder(tmp_path_factory, "run", build)


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """`finished_run` for a test that changes it."""
    return shutil.copytree(finished_run, tmp_path / "copied" / "run")


@pytest.fixture
def splits(prepared_folder: Path):
    return load_prepared(str(prepared_folder))[0]


def options(**arguments) -> list[str]:
    return [part for name, value in arguments.items() for part in (f"--{name}", str(value))]


def run_command(module: str, *extra: str, timeout: int = 300, **arguments) -> subprocess.CompletedProcess:
    """Run `python -m module --name value …` in the project's root."""
    return run([sys.executable, "-m", module, *options(**arguments), *extra], cwd=ROOT, timeout=timeout)


def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """A mistake is told in a paragraph that has these words (regular expressions), without a traceback."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    for each in words:
        assert re.search(each, said), (each, said)


TRAINING = {
    "chunk_length": 16,
    "max_chunks": 4,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "bf16": False,
    "dataloader_num_workers": 0,
    "logging_steps": 1,
    "cpu_threads": 1,
}


@pytest.fixture
def call_command(monkeypatch) -> Iterator[Callable]:
    """Calls a command's function in this process, with a command line, and leaves logging and threads as they were."""
    loggers = [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    before = [(logger, logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]

    def call(function: Callable[[], object], *words: object, **arguments) -> object:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words), *options(**arguments)])
        return function()

    yield call
    logging.captureWarnings(False)
    for logger, level, propagate, handlers in before:
        logger.setLevel(level)
        logger.propagate, logger.handlers[:] = propagate, handlers
    torch.set_num_threads(1)


def training_command(data: Path, encoder: Path, output_dir: Path, /, *extra: str, **arguments) -> list[str]:
    """train_hf.py on a tiny encoder, in fp32; `extra` and `arguments` override."""
    given = {"dataset_dir": data, "encoder": encoder, "output_dir": output_dir, **TRAINING, **arguments}
    return [sys.executable, "train_hf.py", *options(**given), *extra]


def launched(command: list[str], processes: int) -> list[str]:
    """The command in so many processes, by torch's launcher."""
    meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "nproc_per_node": processes}
    return [command[0], "-m", "torch.distributed.run", *options(**meeting), *command[1:]]


def train(
    data: Path,
    encoder: Path,
    output_dir: Path,
    /,
    *extra: str,
    processes: int = 1,
    timeout: float = 300,
    **arguments,
) -> subprocess.CompletedProcess:
    """Run `training_command`; in several processes without a launcher, which would start them cold."""
    command = training_command(data, encoder, output_dir, *extra, **arguments)
    if processes == 1:
        return run(command, cwd=ROOT, timeout=timeout)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    ranks = start_ranks([command] * processes, cwd=ROOT, **pipes)
    out, err = zip(*(rank.communicate(timeout=timeout) for rank in ranks), strict=True)
    status = next((rank.returncode for rank in ranks if rank.returncode), 0)
    return subprocess.CompletedProcess(command, status, "".join(out), "".join(err))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Headless Chromium that keeps its console and asks nothing of any network; one for all tests of a module."""
    driver = start_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


def start_browser(profile: Path) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        "--window-size=1400,1000",
        f"--user-data-dir={profile}",
        "--force-prefers-reduced-motion",  # a page that scrolls smoothly cannot be clicked meanwhile
    ):
        options.add_argument(flag)
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
