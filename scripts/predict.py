"""Rate texts: files, folders, tables or standard input, one JSON object a line.

    python -m scripts.predict --model outputs/run --source stories.csv
    cat story.txt | python -m scripts.predict --model ORG/NAME
    accelerate launch --multi_gpu --num_processes 2 -m scripts.predict --model outputs/run --source big.parquet --output rated.jsonl

With --output the documents are shared out over the processes, and a run that was stopped goes on where it was.
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
    parser.add_argument("--model", required=True, help="a run's output_dir, or a model on the hub")
    parser.add_argument(
        "--source", help="CSV, JSONL, Parquet or text file, or folder of text files; else standard input"
    )
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--id_column", default="id", help="where there is none, documents are numbered")
    parser.add_argument("--output", type=Path, help="a file for the results (default: standard output)")
    parser.add_argument("--overwrite", action="store_true", help="replace --output where it is there already")
    parser.add_argument("--evidence", type=int, default=3, help="chunks named as evidence, at the most")
    parser.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default="fp32",
        help="bf16 or fp16: faster on a GPU, scores less exact",
    )
    parser.add_argument("--encoding_errors", choices=("strict", "replace"), default="strict")
    parser.add_argument("--cpu_threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.cpu_threads < 0:
        raise ValueError(f"--cpu_threads must be 0 or more, and is {arguments.cpu_threads}.")
    if arguments.evidence < 0:
        raise ValueError(f"--evidence must be 0 or more, and is {arguments.evidence}.")
    if arguments.source is None and arguments.output is not None:
        raise ValueError("--output wants --source: standard input cannot be gone on with after a stop.")
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
                f"{arguments.source}: row {number} has no column {arguments.text_column!r} (--text_column); there are "
                f"{', '.join(map(str, row))}."
            )
        text = row[arguments.text_column]
        name = to_label(row.get(arguments.id_column)) or str(number)
        if not isinstance(text, str):
            raise ValueError(
                f"{arguments.source}: row {number} (id {name}) holds {type(text).__name__}, expected text."
            )
        # In the characters that were given, where the evidence is to point; the pipeline brings them into normal form.
        text = check_surrogates(text, f"{arguments.source}: row {number} (id {name})", arguments.encoding_errors)
        yield {"id": name, "text": text}


def classified(
    pipeline: HierarchicalClassificationPipeline, documents: Iterator[dict[str, Any]], **options: Any
) -> Iterator[dict[str, Any]]:
    """The results in the documents' order, each with its id. Few documents are in memory at a time."""
    ids: list[str] = []

    def texts() -> Iterator[str]:
        for document in documents:
            ids.append(document["id"])
            yield document["text"]

    for result in pipeline(texts(), **options):
        del result["score"]
        yield {"id": ids.pop(0), **result}


def stamp_of(path: Path) -> str:
    """A hash of the names, sizes and times of a file, or of all in a folder; "" where there is neither (a hub's name)."""
    if not path.exists():
        return ""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    facts = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


# Which options the results depend on.
OPTIONS = ("text_column", "id_column", "encoding_errors", "evidence", "precision")


class ResumableOutput:
    """A folder beside the output: each process's results so far, and what they are results of.

    Raises:
        ValueError: what is there is of another source, another model or another number of processes.
    """

    def __init__(self, output: Path, arguments: argparse.Namespace, state: PartialState):
        self.output, self.state = output, state
        self.folder = output.with_name(f".{output.name}.parts")
        about = {
            "source": [arguments.source, stamp_of(Path(arguments.source))],
            "model": [arguments.model, stamp_of(Path(arguments.model))],
            **{name: getattr(arguments, name) for name in OPTIONS},
            "processes": state.num_processes,
        }
        path = self.folder / "about.json"
        if state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                for leftover in self.folder.iterdir():
                    leftover.unlink()
                write_text(path, json.dumps(about))
        state.wait_for_everyone()
        found = json.loads(path.read_text(encoding="utf-8"))
        if different := [key for key in about if found.get(key) != about[key]]:
            raise ValueError(
                f"{self.folder} holds an unfinished run with another {', '.join(different)}: resume with what it was "
                "given, or delete the folder."
            )
        self.own = self.folder / f"{state.process_index}.jsonl"

    def done(self) -> int:
        """How many documents this process has done; a line that was torn by the stop is cut off."""
        if not self.own.is_file():
            return 0
        whole, lines = 0, 0
        with open(self.own, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    whole, lines = whole + len(line), lines + 1
        with open(self.own, "rb+") as file:
            file.truncate(whole)
        return lines

    def merge(self) -> None:
        """The output from all processes' parts, in the source's order; then the parts go."""
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            with atomic_write(self.output) as out, ExitStack() as stack:
                names = [self.folder / f"{rank}.jsonl" for rank in range(self.state.num_processes)]
                files = [stack.enter_context(open(name, encoding="utf-8")) for name in names]
                while lines := [line for file in files if (line := file.readline())]:
                    out.writelines(lines)
            (self.folder / "about.json").unlink()  # first: without it, what is left is nothing to go on with
            shutil.rmtree(self.folder)
        self.state.wait_for_everyone()


def main() -> None:
    arguments = parse_arguments()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    output: Path | None = arguments.output
    if output is not None and output.exists() and not arguments.overwrite:
        raise ValueError(f"{output} is there already: name another file, or replace it with --overwrite.")
    # Told of the CPU, it joins processes there; else each would take itself for the only one.
    # A process that is done waits for the slowest, however long that takes.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))
    if output is None and state.num_processes > 1:
        raise ValueError("Several processes would write over one another on standard output: give --output FILE.")
    if state.device.type == "cpu":
        set_num_threads(arguments.cpu_threads)
    model, tokenizer = load_classifier(arguments.model)
    pipeline = HierarchicalClassificationPipeline(
        model=model, tokenizer=tokenizer, device=state.device, task="text-classification"
    )
    parts = ResumableOutput(output, arguments, state) if output is not None else None
    done = parts.done() if parts else 0
    mine = islice(documents_of(arguments), state.process_index + done * state.num_processes, None, state.num_processes)
    progress = tqdm(unit=" documents", initial=done, disable=not state.is_main_process, file=sys.stderr)
    out = open(parts.own, "a", encoding="utf-8") if parts else sys.stdout  # noqa: SIM115 (closed below)
    try:
        for result in classified(pipeline, mine, evidence=arguments.evidence, precision=arguments.precision):
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
