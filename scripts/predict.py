"""Classify texts from files, directories, tables or standard input; writes JSON Lines.

    python -m scripts.predict --model outputs/run --source stories.csv
    cat story.txt | python -m scripts.predict --model ORG/NAME
    accelerate launch --multi_gpu --num_processes 2 -m scripts.predict --model outputs/run --source big.parquet --output out.jsonl

With --output, documents are distributed over the processes, and an interrupted run resumes where it stopped.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from tqdm.auto import tqdm

from data.documents import check_surrogates, to_label
from data.readers import read_rows
from modeling.file_utils import atomic_write, write_text
from modeling.hierarchical_roberta.pipeline import PRECISIONS, HierarchicalClassificationPipeline
from modeling.training.runtime import set_num_threads
from scripts.common.cli import UserParser, run_and_exit
from scripts.common.loading import load_classifier


def parse_arguments() -> argparse.Namespace:
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="output_dir of a run, or a model id on the Hub")
    parser.add_argument(
        "--source", help="CSV, JSONL, Parquet or text file, or directory of text files (default: standard input)"
    )
    parser.add_argument("--text_column", default="text", help="name of the text column")
    parser.add_argument("--id_column", default="id", help="name of the id column; without one, documents are numbered")
    parser.add_argument("--output", type=Path, help="output file (default: standard output)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    parser.add_argument("--evidence", type=int, default=3, help="maximum number of chunks returned as evidence")
    parser.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default="fp32",
        help="bf16 and fp16 are faster on a GPU; scores are less exact",
    )
    parser.add_argument(
        "--encoding_errors",
        choices=("strict", "replace"),
        default="strict",
        help="on bytes that are not UTF-8: raise an error, or replace them by U+FFFD",
    )
    parser.add_argument("--cpu_threads", type=int, default=0, help="number of CPU threads; 0 uses all cores")
    arguments = parser.parse_args()
    if arguments.cpu_threads < 0:
        raise ValueError(f"--cpu_threads must be 0 or more, got {arguments.cpu_threads}.")
    if arguments.evidence < 0:
        raise ValueError(f"--evidence must be 0 or more, got {arguments.evidence}.")
    if arguments.source is None and arguments.output is not None:
        raise ValueError("--output requires --source: a run on standard input cannot be resumed.")
    return arguments


def documents_of(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """`{"id", "text"}` of each document."""
    if arguments.source is None:
        text = sys.stdin.buffer.read().decode("utf-8-sig", errors=arguments.encoding_errors)
        yield {"id": "stdin", "text": text}
        return
    for number, row in enumerate(read_rows(arguments.source, arguments.encoding_errors), 1):
        if arguments.text_column not in row:
            raise ValueError(
                f"{arguments.source}: row {number} has no column {arguments.text_column!r} (--text_column); columns: "
                f"{', '.join(map(str, row))}."
            )
        text = row[arguments.text_column]
        name = to_label(row.get(arguments.id_column)) or str(number)
        if not isinstance(text, str):
            raise ValueError(f"{arguments.source}: row {number} (id {name}): expected text, got {type(text).__name__}.")
        # Not normalized here: evidence offsets refer to the original characters. The pipeline normalizes.
        text = check_surrogates(text, f"{arguments.source}: row {number} (id {name})", arguments.encoding_errors)
        yield {"id": name, "text": text}


def classified(
    pipeline: HierarchicalClassificationPipeline, documents: Iterator[dict[str, Any]], **options: Any
) -> Iterator[dict[str, Any]]:
    """Results in the order of the documents, each with its id. Documents are streamed."""
    ids: list[str] = []

    def texts() -> Iterator[str]:
        for document in documents:
            ids.append(document["id"])
            yield document["text"]

    for result in pipeline(texts(), **options):
        del result["score"]
        yield {"id": ids.pop(0), **result}


def fingerprint_of(path: Path) -> str:
    """Hash of the names, sizes and modification times of a file or of all files in a directory; "" for a Hub id."""
    if not path.exists():
        return ""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    facts = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


# Options that the results depend on.
OPTIONS = ("text_column", "id_column", "encoding_errors", "evidence", "precision")


class ResumableOutput:
    """A directory next to the output with the results of each rank so far and the settings that they depend on.

    Raises:
        ValueError: it has results of another source, model, option or number of processes.
    """

    def __init__(self, output: Path, arguments: argparse.Namespace, state: PartialState):
        self.output, self.state = output, state
        self.folder = output.with_name(f".{output.name}.parts")
        settings = {
            "source": [arguments.source, fingerprint_of(Path(arguments.source))],
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

    def merge(self) -> None:
        """Merge the results of all ranks into the output, in the order of the source, and delete the directory."""
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            with atomic_write(self.output) as out, ExitStack() as stack:
                names = [self.folder / f"{rank}.jsonl" for rank in range(self.state.num_processes)]
                files = [stack.enter_context(open(name, encoding="utf-8")) for name in names]
                while lines := [line for file in files if (line := file.readline())]:
                    out.writelines(lines)
            (self.folder / "about.json").unlink()  # first: without it, a partly deleted directory is not resumed
            shutil.rmtree(self.folder)
        self.state.wait_for_everyone()


def main() -> None:
    arguments = parse_arguments()
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
    try:
        for result in classified(pipeline, shard, evidence=arguments.evidence, precision=arguments.precision):
            out.write(json.dumps(result, ensure_ascii=False) + "\n")
            out.flush()
            progress.update()
    finally:
        progress.close()
        if parts:
            out.close()
    if parts:
        parts.merge()


if __name__ == "__main__":
    run_and_exit(main)
