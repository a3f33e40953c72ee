"""Evaluate the baselines on the validation and test splits of a prepared dataset.

python -m scripts.baselines --dataset_dir outputs/stories
"""

import argparse
import sys

from scripts.common.cli import UserParser, run_main


def main() -> None:
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", required=True, help="directory written by scripts.prepare_dataset")
    arguments = parser.parse_args()
    # Imported here, so that --help is answered at once.
    from data.prepared_dataset import load_prepared
    from modeling.training.metrics import absent_labels_note
    from scripts.evaluation.kinds import baseline_metrics, kind_of

    splits, _ = load_prepared(arguments.dataset_dir)
    printed = kind_of(splits["train"]).printed
    measured, chosen = baseline_metrics(splits, [name for name in ("validation", "test") if name in splits])
    for split, baselines in measured.items():
        for name, metrics in baselines.items():
            values = ", ".join(f"{title} {metrics[key]:.4f}" for title, key in printed.items())
            print(f"{split}: {name}: {values}")
        if note := absent_labels_note(baselines["majority"]):
            print(f"{split}: macro-F1: {note}")
    print(f"tfidf_tuned: {chosen}")


if __name__ == "__main__":
    sys.exit(run_main(main))
