"""Benchmark speed and memory of this project, its options, the padded reference and third-party libraries.

    python -m scripts.benchmark --encoder outputs/minilm --output_dir outputs/bench

All systems use the same documents, weights and threads; each runs in a fresh process, in interleaved rounds, and
medians are reported. Writes benchmark.json, benchmark.md and benchmark.png. Use an idle machine; two cores take about
40 minutes.
"""

import argparse
import sys
from pathlib import Path

from scripts.common.cli import UserParser, run_main

SCENARIOS = ("mix", "whole", "roofline", "growth", "frozen", "ranks")


def parse_arguments() -> argparse.Namespace:
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="model id on the Hub or directory")
    parser.add_argument("--output_dir", required=True, type=Path, help="directory for the results")
    parser.add_argument("--source", help="CSV, JSONL or Parquet file with long texts for the scenarios whole and ranks")
    parser.add_argument(
        "--third_party", help="Python interpreter of an environment with belt-nlp and simpletransformers"
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of runs per system")
    parser.add_argument(
        "--scenarios", default=",".join(SCENARIOS), help=f"comma-separated, from {', '.join(SCENARIOS)}"
    )
    parser.add_argument(
        "--most_chunks", type=int, default=2000, help="chunks of the longest document in the scenario growth"
    )
    arguments = parser.parse_args()
    arguments.scenarios = arguments.scenarios.split(",")
    if unknown := set(arguments.scenarios) - set(SCENARIOS):
        raise ValueError(f"--scenarios takes {', '.join(SCENARIOS)}; got {', '.join(sorted(unknown))}.")
    if arguments.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {arguments.rounds}.")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from scripts.benchmark.scenarios import run_benchmark  # the libraries are imported once the options are right

    run_benchmark(arguments)


if __name__ == "__main__":
    sys.exit(run_main(main))
