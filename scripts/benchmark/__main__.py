"""Speed and memory of this project, of its levers, of the design that it replaces and of its neighbours, side by side.

    python -m scripts.benchmark --encoder outputs/minilm --output_dir outputs/bench

Same documents, weights and threads; each system in a fresh process, round after round in turn, medians. Writes
benchmark.json, benchmark.md and benchmark.png. On an otherwise idle machine; two cores take about 40 minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from scripts.benchmark.synthetic_documents import MIX, cut, documents_of, evenness, texts_of_source
from scripts.benchmark.table import draw, markdown
from scripts.benchmark.worker import SYSTEMS
from scripts.common.cli import UserParser, run_main

PADDED = ("padded loop, gradient checkpointing", "padded loop")
THIRD_PARTY = ("BELT", "Simple Transformers")
SCENARIOS = ("mix", "whole", "roofline", "growth", "frozen", "ranks")
GROWTH = (1, 2, 5, 10, 20, 50, 100, 200)


def parse_arguments() -> argparse.Namespace:
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="name on the hub or folder")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--source", help="long texts of your own (CSV, JSONL, Parquet) for `whole` and `ranks`")
    parser.add_argument("--neighbours", help="the Python of an environment with belt-nlp and simpletransformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scenarios", default=",".join(SCENARIOS), help=f"of {', '.join(SCENARIOS)}")
    parser.add_argument("--most_chunks", type=int, default=2000, help="of the longest document, in `growth`")
    arguments = parser.parse_args()
    arguments.scenarios = arguments.scenarios.split(",")
    if unknown := set(arguments.scenarios) - set(SCENARIOS):
        raise ValueError(f"--scenarios takes {', '.join(SCENARIOS)}; got {', '.join(sorted(unknown))}.")
    if arguments.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, and is {arguments.rounds}.")
    return arguments


class Bench:
    """Runs systems and keeps what they took, `results[scenario][system]`."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.results: dict[str, dict[str, Any]] = {}

    def documents(self, name: str, texts: Sequence[str]) -> Path:
        path = self.arguments.output_dir / f"{name}.json"
        path.write_text(json.dumps(list(texts)), encoding="utf-8")
        return path

    def run(self, scenario: str, systems: Sequence[str], rounds: int, **spec: Any) -> dict[str, Any]:
        """Each system in turn, `rounds` times; medians of each figure."""
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
        for number in range(rounds):
            for name in systems:
                if (result := self._once({"system": name, "seed": number, **spec})) is not None:
                    taken[name].append(result)
                    print(f"{scenario}, {name}: {result['seconds']:.2f} s, {result['peak_mib']:.0f} MiB", flush=True)
        found = self.results.setdefault(scenario, {})
        for name, results in taken.items():
            if results:
                found[name] = {key: statistics.median(result[key] for result in results) for key in results[0]}
                found[name]["all_seconds"] = [result["seconds"] for result in results]
        (self.arguments.output_dir / "benchmark.json").write_text(json.dumps(self.results, indent=1), encoding="utf-8")
        return found

    def _once(self, spec: dict[str, Any]) -> dict[str, float] | None:
        neighbour = spec["system"] in THIRD_PARTY
        module = "neighbours" if neighbour else "worker"
        python = self.arguments.neighbours if neighbour else sys.executable
        command = [python, "-m", f"scripts.benchmark.{module}", json.dumps(spec)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            print(f"{spec['system']} failed: {last[0]}", flush=True)
            return None
        return json.loads(done.stdout.strip().splitlines()[-1])


def measure(bench: Bench, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every scenario that was asked for."""
    given = bench.arguments
    base = {"encoder": given.encoder, "max_chunks": 20, "batch": 2}
    neighbours = THIRD_PARTY if given.neighbours else ()
    if "roofline" in given.scenarios:
        for length in (256, 512):
            path = bench.documents(f"mix_{length}", documents_of(MIX, length, tokenizer))
            spec = {**base, "batch": 4, "documents": str(path), "chunk_length": length}
            bench.run(f"roofline {length}", ("ours", "bare encoder"), 4 * given.rounds, **spec)
    if "mix" in given.scenarios:
        path = bench.documents("mix_512", documents_of(MIX, 512, tokenizer))
        levers = [name for name in SYSTEMS if name != "bare encoder"]
        bench.run("mix", (*levers, *neighbours), given.rounds, **base, documents=str(path), chunk_length=512)
    if "whole" in given.scenarios:
        if given.source:
            texts = [text for text in texts_of_source(given.source) if len(text) > 60_000][:2]
            texts = [cut(text, 20 * 510, tokenizer) for text in texts]
        else:
            texts = documents_of((20, 20), 512, tokenizer)
        path = bench.documents("whole", texts)
        bench.run("whole", ("ours", *PADDED), given.rounds, **base, documents=str(path), chunk_length=512)
    if "growth" in given.scenarios:
        for chunks in sorted({*(number for number in GROWTH if number <= given.most_chunks), given.most_chunks}):
            path = bench.documents(f"chunks_{chunks}", documents_of((chunks,), 256, tokenizer))
            systems = ["ours, 16 live chunks"] + (["ours"] if chunks <= 200 else [])
            systems += list(PADDED) if chunks <= 20 else []
            spec = {**base, "max_chunks": chunks, "batch": 1, "documents": str(path), "chunk_length": 256}
            bench.run(f"growth {chunks}", systems, given.rounds if chunks <= 200 else 1, **spec)
    if "frozen" in given.scenarios:
        path = bench.documents("frozen", documents_of(MIX * 12, 256, tokenizer))
        bench.run("frozen", ("frozen encoder",), given.rounds, **base, documents=str(path), chunk_length=256)
    if "ranks" in given.scenarios:
        texts = texts_of_source(given.source) if given.source else documents_of(MIX * 12, 256, tokenizer)
        lengths = np.array([len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]])
        bench.results["ranks"] = {str(ranks): evenness(lengths, ranks) for ranks in (2, 8, 64, 1024)}


def main() -> None:
    arguments = parse_arguments()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.encoder)
    bench = Bench(arguments)
    measure(bench, tokenizer)
    folder = arguments.output_dir
    (folder / "benchmark.json").write_text(json.dumps(bench.results, indent=1), encoding="utf-8")
    text = markdown(bench.results)
    (folder / "benchmark.md").write_text(text, encoding="utf-8")
    draw(bench.results, folder / "benchmark.png")
    print(text)


if __name__ == "__main__":
    sys.exit(run_main(main))
