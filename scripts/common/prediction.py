"""Classification of a source of texts, streamed and resumable. Used by scripts/predict.py."""

import argparse
import dataclasses
import glob
import hashlib
import json
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from tqdm.auto import tqdm

from data.documents import Columns, check_surrogates, joined_text, metadata_of, require_columns, section_at, to_name
from data.readers import ReadOptions, Row, Source
from data.source_files import describe_unread
from modeling.file_utils import atomic_write, write_text
from modeling.hierarchical_roberta.pipeline import HierarchicalClassificationPipeline
from modeling.training.runtime import set_num_threads
from scripts.common.cli import comma_list
from scripts.common.loading import load_classifier
from scripts.common.preparation_options import reading_options


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


def classified(
    pipeline: HierarchicalClassificationPipeline, documents: Iterator[dict[str, Any]], **options: Any
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

    for result in pipeline(texts(), **options):
        yield from errors()
        document = pending.popleft()
        del result["score"]
        for evidence in result["evidence"] if document["sections"] else ():
            evidence["section"] = section_at(document["sections"], evidence["start"])
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
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))
    if output is None and state.num_processes > 1:
        raise ValueError("Several processes cannot share standard output: pass --output FILE.")
    if state.device.type == "cpu":
        set_num_threads(arguments.cpu_threads)
    model, tokenizer = load_classifier(arguments.model)
    pipeline = HierarchicalClassificationPipeline(
        model=model, tokenizer=tokenizer, device=state.device, task="text-classification"
    )
    parts = ResumableOutput(output, arguments, state) if output is not None else None
    done = parts.done() if parts else 0
    shard = islice(documents_of(arguments), state.process_index + done * state.num_processes, None, state.num_processes)
    progress = tqdm(unit=" documents", initial=done, disable=not state.is_main_process, file=sys.stderr)
    out = open(parts.own, "a", encoding="utf-8") if parts else sys.stdout  # noqa: SIM115 (closed below)
    num_errors = 0
    try:
        for result in classified(pipeline, shard, evidence=arguments.evidence, precision=arguments.precision):
            out.write(json.dumps(result, ensure_ascii=False) + "\n")
            out.flush()
            progress.update()
            num_errors += "error" in result
    finally:
        progress.close()
        if parts:
            out.close()
    if parts:
        num_errors = parts.merge()
    if num_errors and state.is_main_process:
        print(f"{num_errors} documents could not be classified: their lines have an `error`.", file=sys.stderr)
    return 1 if num_errors and arguments.fail_on_error else 0
