"""The honest neighbours of a hierarchical model: what simpler ways reach on the same split.

python -m scripts.baselines --dataset_dir outputs/stories
"""

import argparse
import sys
from collections.abc import Sequence

import datasets
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from data.prepared import load_prepared
from modeling.metrics import classification_metrics
from modeling.training_args import parse_severity_weights
from scripts.command_line import UserParser, run_main


def tfidf_baseline(
    train: datasets.Dataset, test: datasets.Dataset, severity_weights: Sequence[float]
) -> dict[str, float]:
    """TF-IDF of single words over the whole text, class-balanced logistic regression: the metrics on `test`."""
    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True), LogisticRegression(class_weight="balanced", max_iter=2000, C=10.0)
    )
    model.fit(train["text"], np.asarray(train["label"]))
    predicted = model.predict(test["text"])
    return classification_metrics(
        predicted.tolist(), list(test["label"]), train.features["label"].names, severity_weights
    )


def majority_baseline(
    train: datasets.Dataset, test: datasets.Dataset, severity_weights: Sequence[float]
) -> dict[str, float]:
    """Always the most frequent training label: the metrics on `test`."""
    most = int(np.bincount(np.asarray(train["label"])).argmax())
    return classification_metrics(
        [most] * len(test), list(test["label"]), train.features["label"].names, severity_weights
    )


def main() -> None:
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", required=True)
    splits, _ = load_prepared(parser.parse_args().dataset_dir)
    weights = parse_severity_weights(None, splits["train"].features["label"].num_classes)
    for split in [name for name in ("validation", "test") if name in splits]:
        for name, baseline in (("tfidf", tfidf_baseline), ("majority", majority_baseline)):
            metrics = baseline(splits["train"], splits[split], weights)
            print(f"{split}: {name}: macro-F1 {metrics['f1_macro']:.4f}, accuracy {metrics['accuracy']:.4f}")


if __name__ == "__main__":
    sys.exit(run_main(main))
