"""Evaluate a model and explain its predictions: metrics, baselines, subgroups, calibration, evidence, a report.

    python -m scripts.evaluate_and_explain --model outputs/run --dataset_dir outputs/stories --output_dir outputs/report

Writes report.html, metrics.json, predictions.csv, evidence.jsonl and the figures. Thresholds are chosen on the
validation split; the temperature is fitted there too if the model's config has none.
"""

import argparse
import sys
from pathlib import Path

from scripts.common.cli import UserParser, run_main


def parse_arguments() -> argparse.Namespace:
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="output_dir of a run, or a model id on the Hub")
    parser.add_argument("--dataset_dir", required=True, help="directory written by scripts.prepare_dataset")
    parser.add_argument("--split", default="test", help="split to evaluate")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument(
        "--severity_weights", help="label weights of severity_f1, e.g. 0.3,0.3,0.4 (the default for three labels)"
    )
    parser.add_argument(
        "--no_sentences", action="store_true", help="explain chunks only, without token attributions: much faster"
    )
    parser.add_argument("--cpu_threads", type=int, default=0, help="number of CPU threads; 0 uses all cores")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from scripts.evaluation.evaluate import (
        evaluate_and_explain,  # the libraries are imported once the options are right
    )

    evaluate_and_explain(arguments)


if __name__ == "__main__":
    sys.exit(run_main(main))
