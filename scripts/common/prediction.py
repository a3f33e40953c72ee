"""Classification of a source of texts, streamed and resumable. Used by scripts/predict.py."""

import argparse
import dataclasses
import glob
import hashlib
import json
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from data.documents import Columns, check_surrogates, joined_text, metadata_of, require_columns, section_at, to_name
from data.readers import ReadOptions, Row, Source
from data.source_files import describe_unread
from modeling.file_utils import atomic_write, write_text
from modeling.hierarchical_roberta.pipeline import HierarchicalClassificationPipeline
from modeling.training.runtime import format_duration, set_num_threads
from scripts.common.cli import comma_list
from scripts.common.loading import load_classifier
from scripts.common.preparation_options import reading_options
from scripts.onnx import is_export


def documents_of(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """`{"id", "text", "sections", "metadata"}` of each document, or `{"id", "error"}` where it cannot be classified."""
    options = dataclasses.replace(reading_options(arguments), by_folder=False)
    columns, kept = Columns(arguments.text_column), comma_list(arguments.keep_columns)
    source = Source(arguments.source or (), options)
    if arguments.source is None:
        columns, kept = Columns(), []
        rows = iter([Row("standard input", {arguments.id_column: "stdin", "text": _read_standard_input(options)})])
    else:
        rows = iter(source)
    head = list(islice(rows, 100))
    if not head:
        raise ValueError(f"{source}: no documents.")
    if readable := [row for row in head if not row.error]:  # of JSON, single rows may lack a column
        names = [("--text_column", name) for name in columns.texts] + [("--keep_columns", name) for name in kept]
        require_columns(Row("", dict.fromkeys(name for row in readable for name in row.values)), names, str(source))
    for number, row in enumerate(chain(head, rows), 1):
        document: dict[str, Any] = {"id": str(number)}
        try:
            document["id"] = to_name(row.values.get(arguments.id_column)) or str(number)
            if row.error:
                raise ValueError(row.error)
            text, sections = joined_text(row, columns)
            if not text or not text.strip():
                raise ValueError("no text" if text is None else "the text is empty")
            # Not normalized here: evidence offsets refer to the original characters. The pipeline normalizes.
            document |= {"text": check_surrogates(text, options.encoding_errors), "sections": sections}
            document["metadata"] = json.loads(metadata_of(row.values, kept) or "{}")
        except ValueError as error:
            document["error"] = check_surrogates(f"{row.location}: {error}", "replace")
        yield document
    if source.found.unread and PartialState().is_main_process:
        tqdm.write(describe_unread(list(source.found.unread)), file=sys.stderr)


def _read_standard_input(options: ReadOptions) -> str:
    try:
        return sys.stdin.buffer.read().decode(options.encoding or "utf-8-sig", options.encoding_errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"standard input: not {error.encoding}, or no text: pass its --encoding, or a document as --source."
        ) from error


def load(arguments: argparse.Namespace, device: torch.device) -> Callable[..., Any]:
    """The pipeline of `--model`, or of an export the classifier that is called in the same way.

    Raises:
        ValueError: the model or export cannot be loaded.
    """
    num_threads = set_num_threads(arguments.cpu_threads) if device.type == "cpu" else 0
    if not is_export(arguments.model):
        model, tokenizer = load_classifier(arguments.model)
        given: dict[str, Any] = {"device": device, "precision": arguments.precision, "task": "text-classification"}
        return HierarchicalClassificationPipeline(model=model, tokenizer=tokenizer, **given)
    try:
        from scripts.onnx.predict_onnx import OnnxClassifier  # onnxruntime comes with an extra

        return OnnxClassifier(arguments.model, num_threads)
    except Exception as error:
        raise ValueError(
            f"No export could be loaded from {arguments.model} ({(str(error).splitlines() or [''])[0]}). Expected a folder "
            "written by python -m scripts.export_onnx."
        ) from error


class Throughput:
    """What a classifier does from now on: documents, tokens that its encoder reads (special ones included), and seconds."""

    def __init__(self, classifier: Any):
        self.documents, self.tokens, self.start = 0, 0, time.perf_counter()
        self.preprocess, classifier.preprocess = classifier.preprocess, self.count

    def count(self, text: str) -> dict[str, Any]:
        document = self.preprocess(text)
        self.documents += 1
        self.tokens += sum(map(len, document["input_ids"]))
        return document

    def summary(self) -> str:
        """One line about all processes, each of which has to call this; the seconds are those of the slowest."""
        own = (self.documents, self.tokens, time.perf_counter() - self.start)
        documents, tokens, seconds = zip(*gather_object([own]), strict=True)
        rates = [sum(counts) / max(seconds) for counts in (documents, tokens)]
        return (
            f"Classified {sum(documents):,} documents with {sum(tokens):,} tokens in {format_duration(max(seconds))}: "
            f"{rates[0]:,.1f} documents/s, {rates[1]:,.0f} tokens/s."
        )


def classified(
    classifier: Callable[..., Any], documents: Iterator[dict[str, Any]], evidence: int
) -> Iterator[dict[str, Any]]:
    """Results in the order of the documents, each with its id; of one with an error, the error. Documents are streamed."""
    pending: deque[dict[str, Any]] = deque()

    def texts() -> Iterator[str]:
        for document in documents:
            pending.append(document)
            if "error" not in document:
                yield document.pop("text")

    def errors() -> Iterator[dict[str, Any]]:
        while pending and "error" in pending[0]:
            yield pending.popleft()

    for result in classifier(texts(), evidence=evidence):
        yield from errors()
        document = pending.popleft()
        del result["score"]
        for found in result["evidence"] if document["sections"] else ():
            found["section"] = section_at(document["sections"], found["start"])
        kept = {"metadata": document["metadata"]} if document["metadata"] else {}
        yield {"id": document["id"], **result, **kept}
    yield from errors()


def fingerprint_of(path: Path) -> str:
    """Hash of the names, sizes and modification times of a file or of all files in a directory; those of the files of a pattern."""
    if not path.exists():
        return json.dumps([fingerprint_of(Path(name)) for name in sorted(glob.glob(str(path), recursive=True))])
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    facts = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


# Options that the results depend on.
OPTIONS = (
    *("text_column", "id_column", "path_column", "keep_columns", "encoding", "encoding_errors", "delimiter"),
    *("dataset_config_name", "dataset_revision", "evidence", "precision"),
)


class ResumableOutput:
    """A directory next to the output with the results of each rank so far and the settings that they depend on.

    Raises:
        ValueError: it has results of another source, model, option or number of processes.
    """

    def __init__(self, output: Path, arguments: argparse.Namespace, state: PartialState):
        self.output, self.state = output, state
        self.folder = output.with_name(f".{output.name}.parts")
        settings = {
            "source": [[name, fingerprint_of(Path(name))] for name in arguments.source],
            "model": [arguments.model, fingerprint_of(Path(arguments.model))],
            **{name: getattr(arguments, name) for name in OPTIONS},
            "processes": state.num_processes,
        }
        path = self.folder / "about.json"
        if state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                for leftover in self.folder.iterdir():
                    leftover.unlink()
                write_text(path, json.dumps(settings))
        state.wait_for_everyone()
        saved = json.loads(path.read_text(encoding="utf-8"))
        if different := [key for key in settings if saved.get(key) != settings[key]]:
            raise ValueError(
                f"{self.folder} belongs to an unfinished run with another {', '.join(different)}: resume with the same "
                "options, or delete the directory."
            )
        self.own = self.folder / f"{state.process_index}.jsonl"

    def done(self) -> int:
        """Number of documents that this rank has finished. Truncates an incomplete last line."""
        if not self.own.is_file():
            return 0
        size, lines = 0, 0
        with open(self.own, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    size, lines = size + len(line), lines + 1
        with open(self.own, "rb+") as file:
            file.truncate(size)
        return lines

    def merge(self) -> int:
        """Merge the results of all ranks into the output, in the order of the source, and delete the directory.

        Returns the number of documents with an error (in the main process).
        """
        num_errors = 0
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            with atomic_write(self.output) as out, ExitStack() as stack:
                names = [self.folder / f"{rank}.jsonl" for rank in range(self.state.num_processes)]
                files = [stack.enter_context(open(name, encoding="utf-8")) for name in names]
                while lines := [line for file in files if (line := file.readline())]:
                    out.writelines(lines)
                    num_errors += sum('"error"' in line and "error" in json.loads(line) for line in lines)
            (self.folder / "about.json").unlink()  # first: without it, a partly deleted directory is not resumed
            shutil.rmtree(self.folder)
        self.state.wait_for_everyone()
        return num_errors


def predict(arguments: argparse.Namespace) -> int:
    """Classify the documents of `--source`, or of standard input; return the exit status."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    output: Path | None = arguments.output
    if output is not None and output.exists() and not arguments.overwrite:
        raise ValueError(f"--output {output} already exists: choose another file or pass --overwrite.")
    # On CPU, `cpu=True` is required to join the other processes.
    # The timeout lets a rank that has finished wait for the slowest.
    is_on_cpu = is_export(arguments.model) or not torch.accelerator.is_available()
    state = PartialState(cpu=is_on_cpu, timeout=timedelta(days=30))
    if output is None and state.num_processes > 1:
        raise ValueError("Several processes cannot share standard output: pass --output FILE.")
    classifier = load(arguments, state.device)
    throughput = Throughput(classifier)
    parts = ResumableOutput(output, arguments, state) if output is not None else None
    done = parts.done() if parts else 0
    shard = islice(documents_of(arguments), state.process_index + done * state.num_processes, None, state.num_processes)
    progress = tqdm(unit=" documents", initial=done, disable=not state.is_main_process, file=sys.stderr)
    out = open(parts.own, "a", encoding="utf-8") if parts else sys.stdout  # noqa: SIM115 (closed below)
    num_errors = 0
    try:
        for result in classified(classifier, shard, arguments.evidence):
            out.write(json.dumps(result, ensure_ascii=False) + "\n")
            out.flush()
            progress.update()
            num_errors += "error" in result
    finally:
        progress.close()
        if parts:
            out.close()
    summary = throughput.summary()
    if parts:
        num_errors = parts.merge()
    if num_errors and state.is_main_process:
        print(f"{num_errors} documents could not be classified: their lines have an `error`.", file=sys.stderr)
    if state.is_main_process:
        print(summary, file=sys.stderr)
    return 1 if num_errors and arguments.fail_on_error else 0
