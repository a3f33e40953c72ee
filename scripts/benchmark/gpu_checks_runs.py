"""GPU checks of complete runs and multiple processes: ranks, prediction, explanation, the demo in each precision.

Run by scripts.benchmark.gpu; the aims are in gpu_table.py. The processes of these checks never use CUDA, their
child processes do. As a command, this module runs scripts.predict and prints the device it used:

    python -m scripts.benchmark.gpu_checks_runs --model DIR --source FILE --output FILE
"""

import csv
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from data.demo_corpus import LABELS, demo_corpus
from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from scripts.benchmark.gpu_runner import Report, Settings, begin, finish, in_fresh_process
from scripts.benchmark.gpu_setup import (
    build_model,
    chunk_length,
    documents_of,
    precisions,
    set_up,
    trainer_for,
    weights_of,
)

ROOT = Path(__file__).parents[2]
HIDDEN_GPU = {"CUDA_VISIBLE_DEVICES": ""}

# ---- several processes -----------------------------------------------------------------------------------------------


def ranks(settings: Settings, report: Report) -> None:
    """Decides whether multiple processes train like one: two on this card over gloo must reach the same weights, and
    FSDP2 in bf16 must train over nccl (with world size 1, which exercises the code path)."""
    report.measure("one process and two", _one_and_two, settings, report)
    report.measure(
        "FSDP2, a world of one", in_fresh_process, settings, _sharded_run, settings, **_rank_environment(0, 1)
    )


def _one_and_two(settings: Settings, report: Report) -> None:
    one = in_fresh_process(settings, _rank_run, settings, 1)
    environment = _rank_environment(0, 2)
    begun = [begin(settings, _rank_run, settings, 2, **(environment | {"RANK": rank})) for rank in ("0", "1")]
    two, _ = [finish(process) for process in begun]
    difference = max(float(np.abs(two[name] - value).max()) for name, value in one.items())
    report.figure("two processes: largest weight difference", difference)


def _rank_environment(rank: int, world: int) -> dict[str, str]:
    """Environment of a single-node launcher, except that every process uses the first card."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    fixed = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return {name: str(value) for name, value in names.items()} | fixed


def _rank_run(settings: Settings, world: int) -> Any:
    """Train three steps of 16 documents; returns the final weights on rank 0."""
    set_up(settings)
    length = min(128, chunk_length(settings))
    model = build_model(settings, dropout=0.0, length=length, layers=4, vocab_size=5000)
    trainer, _ = trainer_for(
        settings,
        model,
        documents_of(settings, [1 + (i * 0.7) % 4 for i in range(48)], length),
        "fp32",
        per_device_train_batch_size=8 // world,
        max_steps=3,
        learning_rate=1e-4,
        adam_epsilon=1e-6,
        ddp_backend="gloo" if world > 1 else None,
    )
    trainer.train()
    if trainer.args.world_size != world:
        raise RuntimeError(f"{trainer.args.world_size} processes, expected {world}")
    is_first = trainer.args.process_index == 0
    return {name: value.numpy() for name, value in weights_of(trainer.model).items()} if is_first else None


def _sharded_run(settings: Settings) -> dict[str, Any]:
    """Train two steps with each encoder layer as an FSDP unit. On a CPU, accelerate is patched to treat it as a GPU."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "RobertaLayer",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    if not settings.is_cuda:
        _treat_cpu_as_gpu()
    set_up(settings)
    length = min(128, chunk_length(settings))
    precision = "bf16" if settings.is_cuda else "fp32"
    model = build_model(settings, length=length, layers=4, vocab_size=5000)
    documents = documents_of(settings, [1 + i % 4 for i in range(16)], length)
    trainer, clock = trainer_for(
        settings, model, documents, precision, max_steps=2, logging_strategy="steps", logging_steps=1
    )
    trainer.train()
    return {
        "precision": precision,
        "backend": str(torch.distributed.get_backend()),
        "sharded": any("DTensor" in type(weight).__name__ for weight in trainer.model_wrapped.parameters()),
        "losses": " ".join(f"{loss:.4f}" for loss in clock.losses),
    }


def _treat_cpu_as_gpu() -> None:
    init = PartialState.__init__

    def patched_init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = patched_init  # type: ignore[method-assign]


# ---- commands --------------------------------------------------------------------------------------------------------


def run_command(module: str, arguments: list[str]) -> float:
    """Run `main` of a command in this process; returns its duration in seconds."""
    sys.argv = [module, *arguments]
    os.chdir(ROOT)
    main = import_module(module).main
    started = time.monotonic()
    main()
    return time.monotonic() - started


def write_corpus(folder: Path, documents: int) -> Path:
    path = folder / "stories.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in demo_corpus(documents))
    return path


def prepare(source: Path, tokenizer: Path, output_dir: Path, fractions: str) -> None:
    arguments = ["--source", source, "--tokenizer", tokenizer, "--output_dir", output_dir, "--labels", ",".join(LABELS)]
    arguments += ["--split_fractions", fractions, "--chunk_length", "64", "--max_chunks", "25"]
    run_command("scripts.prepare_dataset", [str(argument) for argument in arguments])


def save_tokenizer(folder: Path, vocab_size: int = 400) -> None:
    """Train a byte-level BPE with RoBERTa's special tokens on demo stories."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([story["text"] for story in demo_corpus(20)], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    first, pad, last, unknown = special
    names = {"bos_token": first, "cls_token": first, "pad_token": pad, "eos_token": last, "sep_token": last}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, **names).save_pretrained(folder)


def small_encoder(settings: Settings) -> RobertaConfig:
    """An encoder small enough to compute the reference explanations on a CPU."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    if settings.tiny:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    return RobertaConfig(vocab_size=400, max_position_embeddings=66, **sizes)


# ---- prediction and explanation --------------------------------------------------------------------------------------


def predict(settings: Settings, report: Report) -> None:
    """Decides whether predictions on a GPU match those on a CPU: scores, also under torchrun (and which device it
    uses), contributions of chunks, and the word scores of the report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = report.measure("a run's folder", in_fresh_process, settings, _build_run, settings, folder)
        if source is None:
            return
        begun = {
            "torchrun": begin(settings, _torchrun_predict, settings, folder),
            "plain": begin(settings, _plain_predict, settings, folder, "plain"),
            "CPU": begin(settings, _plain_predict, settings, folder, "cpu", **HIDDEN_GPU),
            "report": begin(settings, _explain, settings, folder, "report"),
            "report, CPU": begin(settings, _explain, settings, folder, "report_cpu", **HIDDEN_GPU),
        }
        for row, process in begun.items():
            report.measure(row, finish, process)
        report.measure("the scores", _compare_scores, report, folder)
        report.measure("the explanations", _compare_explanations, report, folder)


def _build_run(settings: Settings, folder: Path) -> str:
    """Write a run with random weights, and its dataset of 60 stories, 12 of them in the test split."""
    set_up(settings)
    run = folder / "run"
    run.mkdir()
    save_tokenizer(run)
    source = write_corpus(folder, 60)
    prepare(source, run, folder / "dataset", "0.6,0.2,0.2")
    config = HierarchicalRobertaConfig(
        encoder_config=small_encoder(settings),
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
        chunk_length=64,
        max_chunks=25,
        temperature=1.0,
    )
    model = HierarchicalRobertaForSequenceClassification(config)
    torch.nn.init.normal_(model.classifier.weight)  # so that scores differ between texts
    model.save_pretrained(run)
    return "built"


def _threads(settings: Settings) -> list[str]:
    """Thread options; the commands run in parallel."""
    return ["--cpu_threads", "1" if settings.tiny else "3"]


def _predict_arguments(settings: Settings, folder: Path, name: str) -> list[str]:
    files = ["--source", str(folder / "stories.jsonl"), "--output", str(folder / f"{name}.jsonl")]
    return ["--model", str(folder / "run"), *files, *_threads(settings)]


def _torchrun_predict(settings: Settings, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--rdzv_backend", "c10d"]
    command += [
        "--rdzv_endpoint",
        "127.0.0.1:0",
        "--local_addr",
        "127.0.0.1",
        "-m",
        "scripts.benchmark.gpu_checks_runs",
    ]
    command += _predict_arguments(settings, folder, "torchrun")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    if done.returncode:
        raise RuntimeError(f"torchrun exited with status {done.returncode}: {done.stderr.strip()[-400:]}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"device"')))


def _plain_predict(settings: Settings, folder: Path, name: str) -> dict[str, Any]:
    return predict_with_device(_predict_arguments(settings, folder, name))


def predict_with_device(arguments: list[str]) -> dict[str, Any]:
    """Run scripts.predict; returns its duration and the device of its pipeline."""
    module = import_module("scripts.common.prediction")
    devices = []
    pipeline_class = module.HierarchicalClassificationPipeline
    init = pipeline_class.__init__

    def patched_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        devices.append(str(self.device))

    pipeline_class.__init__ = patched_init
    seconds = run_command("scripts.predict", arguments)
    return {"device": devices[0], "seconds": round(seconds, 2)}


def _explain(settings: Settings, folder: Path, name: str) -> dict[str, Any]:
    arguments = ["--model", folder / "run", "--dataset_dir", folder / "dataset", "--output_dir", folder / name]
    arguments += _threads(settings)
    return {"seconds": run_command("scripts.evaluate_and_explain", [str(argument) for argument in arguments])}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _compare_scores(report: Report, folder: Path) -> None:
    expected = _rows(folder / "cpu.jsonl")
    for name, row in (("plain", "CPU ↔ device"), ("torchrun", "CPU ↔ torchrun")):
        pairs = zip(expected, _rows(folder / f"{name}.jsonl"), strict=True)
        report.figure(f"scores, {row}", max(abs(a["scores"][k] - b["scores"][k]) for a, b in pairs for k in LABELS))


def _compare_explanations(report: Report, folder: Path) -> None:
    """Compare chunk contributions, and scores of words and sentences in both outputs (some near zero may drop out)."""
    contributions, scores, shared, named = [0.0], [0.0], 0, 0
    ours, theirs = (_rows(folder / name / "evidence.jsonl") for name in ("report", "report_cpu"))
    for own, other in zip(ours, theirs, strict=True):
        for one, two in zip(own["chunks"], other["chunks"], strict=True):
            contributions.append(abs(one["contribution"] - two["contribution"]))
        marked = [
            {(e["start"], e["end"]): e["score"] for s in row["evidence"] for e in (s, *s["words"])}
            for row in (own, other)
        ]
        both = marked[0].keys() & marked[1].keys()
        shared, named = shared + len(both), named + len(marked[1])
        scores += [abs(marked[0][span] - marked[1][span]) for span in both]
    report.figure("contributions, CPU ↔ device", max(contributions))
    report.figure("word and sentence scores, CPU ↔ device", max(scores))
    report.figure("words and sentences that both name", f"{shared} of {named}")


# ---- the demo --------------------------------------------------------------------------------------------------------


def demo(settings: Settings, report: Report) -> None:
    """Decides whether bf16 and fp16 cost quality: the demo's test macro-F1 in each precision must lie in the 95 %
    interval of fp32. The runs train in parallel, so their times are not meaningful."""
    if settings.encoder is None and not settings.tiny:
        report.figure("macro-F1", "not run: requires --encoder with a pretrained encoder such as MiniLM")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoder = settings.encoder.resolve() if settings.encoder is not None else folder / "encoder"
        if report.measure("data", in_fresh_process, settings, _demo_data, settings, folder, encoder) is None:
            return
        begun = {
            precision: begin(settings, _demo_run, settings, folder, encoder, precision)
            for precision in precisions(settings)
        }
        rows = {precision: report.measure(precision, finish, process, 85) for precision, process in begun.items()}
        exact = rows["fp32"]
        for precision, row in rows.items():
            if exact and row:
                inside = exact["from"] <= row["macro-F1"] <= exact["to"]
                report.figure(f"{precision}: within fp32's interval", inside)


# The demo's recipe freezes the encoder; here it is trained, since its precision is what is compared.
TRAINED_ENCODER: tuple[str, ...] = ("--freeze_encoder=false", "--evaluate_kept_vectors=false", "--learning_rate=1e-4")
TRAINED_ENCODER += ("--head_lr_multiplier=5", "--dropout=0.1", "--per_device_train_batch_size=8")


def _demo_data(settings: Settings, folder: Path, encoder: Path) -> str:
    if settings.encoder is None:
        RobertaModel(small_encoder(settings)).save_pretrained(encoder)
        save_tokenizer(encoder)
    source = write_corpus(folder, 60 if settings.tiny else 800)
    prepare(source, encoder, folder / "dataset", "0.7,0.1,0.2")
    return "prepared"


def _demo_run(settings: Settings, folder: Path, encoder: Path, precision: str) -> dict[str, Any]:
    """Train on the demo's stories; returns the test macro-F1 with its 95 % interval."""
    statistics = import_module("scripts.evaluation.statistics")
    output_dir = folder / precision
    arguments = ["--config", "scripts/recipes/demo.yaml", "--encoder", str(encoder), "--output_dir", str(output_dir)]
    arguments += ["--dataset_dir", str(folder / "dataset"), "--log_level", "warning", "--report_to", "none"]
    arguments += ["--bf16", str(precision == "bf16"), "--fp16", str(precision == "fp16")]
    arguments += ["--use_cpu", str(not settings.is_cuda), *TRAINED_ENCODER]
    if settings.tiny:
        arguments += ["--max_steps", "2", "--cpu_threads", "1"]
    os.chdir(ROOT)
    sys.argv = ["train_hf.py", *arguments]
    if status := import_module("train_hf").command():
        raise RuntimeError(f"train_hf.py exited with status {status}")
    with open(output_dir / "predictions_test.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    labels, predicted = (np.array([LABELS.index(row[name]) for row in rows]) for name in ("label", "predicted"))
    f1 = statistics.metrics_with_intervals(labels, predicted, list(LABELS), [0.3, 0.3, 0.4])["f1_macro"]
    return {"macro-F1": f1["value"], "from": f1["low"], "to": f1["high"], "documents": len(rows)}


if __name__ == "__main__":
    print(json.dumps(predict_with_device(sys.argv[1:])))
