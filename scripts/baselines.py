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
    from scripts.evaluation.baselines import baseline_metrics

    splits, _ = load_prepared(arguments.dataset_dir)
    measured, chosen = baseline_metrics(splits, [name for name in ("validation", "test") if name in splits])
    for split, baselines in measured.items():
        for name, metrics in baselines.items():
            print(f"{split}: {name}: macro-F1 {metrics['f1_macro']:.4f}, accuracy {metrics['accuracy']:.4f}")
    print(f"tfidf_tuned: {chosen}")


if __name__ == "__main__":
    sys.exit(run_main(main))
