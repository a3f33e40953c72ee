"""The scenarios of scripts.benchmark."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from scripts.benchmark.synthetic_documents import MIX, cut, documents_of, evenness, texts_of_source
from scripts.benchmark.table import draw, markdown
from scripts.benchmark.worker import SYSTEMS

PADDED = ("padded loop, gradient checkpointing", "padded loop")
THIRD_PARTY = ("BELT", "Simple Transformers")
GROWTH = (1, 2, 5, 10, 20, 50, 100, 200)


class Bench:
    """Runs systems and collects their measurements in `results[scenario][system]`."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.results: dict[str, dict[str, Any]] = {}

    def documents(self, name: str, texts: Sequence[str]) -> Path:
        path = self.arguments.output_dir / f"{name}.json"
        path.write_text(json.dumps(list(texts)), encoding="utf-8")
        return path

    def run(self, scenario: str, systems: Sequence[str], rounds: int, **spec: Any) -> dict[str, Any]:
        """Run each system in turn, `rounds` times, and take the median of each measurement."""
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
        for number in range(rounds):
            for name in systems:
                if (result := self._once({"system": name, "seed": number, **spec})) is not None:
                    measured[name].append(result)
                    print(f"{scenario}, {name}: {result['seconds']:.2f} s, {result['peak_mib']:.0f} MiB", flush=True)
        medians = self.results.setdefault(scenario, {})
        for name, results in measured.items():
            if results:
                medians[name] = {key: statistics.median(result[key] for result in results) for key in results[0]}
                medians[name]["all_seconds"] = [result["seconds"] for result in results]
        (self.arguments.output_dir / "benchmark.json").write_text(json.dumps(self.results, indent=1), encoding="utf-8")
        return medians

    def _once(self, spec: dict[str, Any]) -> dict[str, float] | None:
        is_third_party = spec["system"] in THIRD_PARTY
        module = "third_party" if is_third_party else "worker"
        python = self.arguments.third_party if is_third_party else sys.executable
        command = [python, "-m", f"scripts.benchmark.{module}", json.dumps({**spec, "num_threads": joblib.cpu_count()})]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            print(f"{spec['system']} failed: {last[0]}", flush=True)
            return None
        return json.loads(done.stdout.strip().splitlines()[-1])


def measure(bench: Bench, tokenizer: PreTrainedTokenizerBase) -> None:
    """Run the selected scenarios."""
    arguments = bench.arguments
    base = {"encoder": arguments.encoder, "max_chunks": 20, "batch": 2}
    third_party = THIRD_PARTY if arguments.third_party else ()
    if "roofline" in arguments.scenarios:
        for length in (256, 512):
            path = bench.documents(f"mix_{length}", documents_of(MIX, length, tokenizer))
            spec = {**base, "batch": 4, "documents": str(path), "chunk_length": length}
            bench.run(f"roofline {length}", ("ours", "bare encoder"), 4 * arguments.rounds, **spec)
    if "mix" in arguments.scenarios:
        path = bench.documents("mix_512", documents_of(MIX, 512, tokenizer))
        variants = [name for name in SYSTEMS if name != "bare encoder"]
        bench.run("mix", (*variants, *third_party), arguments.rounds, **base, documents=str(path), chunk_length=512)
    if "whole" in arguments.scenarios:
        if arguments.source:
            texts = [text for text in texts_of_source(arguments.source) if len(text) > 60_000][:2]
            texts = [cut(text, 20 * 510, tokenizer) for text in texts]
        else:
            texts = documents_of((20, 20), 512, tokenizer)
        path = bench.documents("whole", texts)
        bench.run("whole", ("ours", *PADDED), arguments.rounds, **base, documents=str(path), chunk_length=512)
    if "growth" in arguments.scenarios:
        for chunks in sorted(
            {*(number for number in GROWTH if number <= arguments.most_chunks), arguments.most_chunks}
        ):
            path = bench.documents(f"chunks_{chunks}", documents_of((chunks,), 256, tokenizer))
            systems = ["ours, 16 live chunks"] + (["ours"] if chunks <= 200 else [])
            systems += list(PADDED) if chunks <= 20 else []
            spec = {**base, "max_chunks": chunks, "batch": 1, "documents": str(path), "chunk_length": 256}
            bench.run(f"growth {chunks}", systems, arguments.rounds if chunks <= 200 else 1, **spec)
    if "frozen" in arguments.scenarios:
        path = bench.documents("frozen", documents_of(MIX * 12, 256, tokenizer))
        bench.run("frozen", ("frozen encoder",), arguments.rounds, **base, documents=str(path), chunk_length=256)
    if "ranks" in arguments.scenarios:
        texts = texts_of_source(arguments.source) if arguments.source else documents_of(MIX * 12, 256, tokenizer)
        lengths = np.array([len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]])
        bench.results["ranks"] = {str(ranks): evenness(lengths, ranks) for ranks in (2, 8, 64, 1024)}


def run_benchmark(arguments: argparse.Namespace) -> None:
    """Run the selected scenarios and write benchmark.json, benchmark.md and benchmark.png."""
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
