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
    from modeling.training.metrics import classification_metrics
    from modeling.training.training_args import parse_severity_weights
    from scripts.evaluation.baselines import majority_predictions, tfidf_scores

    splits, _ = load_prepared(arguments.dataset_dir)
    names = splits["train"].features["label"].names
    weights = parse_severity_weights(None, len(names))
    for split in [name for name in ("validation", "test") if name in splits]:
        for name, predicted in (
            ("tfidf", tfidf_scores(splits["train"], splits[split]).argmax(axis=1)),
            ("majority", majority_predictions(splits["train"], splits[split])),
        ):
            metrics = classification_metrics(predicted.tolist(), list(splits[split]["label"]), names, weights)
            print(f"{split}: {name}: macro-F1 {metrics['f1_macro']:.4f}, accuracy {metrics['accuracy']:.4f}")


if __name__ == "__main__":
    sys.exit(run_main(main))
