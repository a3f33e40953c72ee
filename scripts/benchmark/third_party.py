"""Benchmark two third-party libraries on the same documents and weights, in a separate environment (see `make bench`).

    PYTHON -m scripts.benchmark.third_party '{"system": "BELT", …}'

BELT (belt-nlp on PyPI) pads every chunk to full length and averages the logits of the chunks; Simple Transformers
(simpletransformers on PyPI) treats each chunk as an example. Both without overlap, otherwise with their defaults.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from scripts.benchmark.meter import Meter


def belt(spec: dict[str, Any], texts: list[str], labels: list[int]) -> Meter:
    from belt_nlp.bert import BertNN
    from belt_nlp.bert_classifier_with_pooling import BertClassifierWithPooling
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(spec["encoder"])
    network = BertNN(encoder, 3)
    network.linear = torch.nn.Linear(encoder.config.hidden_size, 3)  # BELT hardcodes 768
    model = BertClassifierWithPooling(
        num_labels=3,
        batch_size=spec["batch"],
        accumulation_steps=2,
        learning_rate=2e-5,
        epochs=1,
        chunk_size=spec["chunk_length"] - 2,
        stride=spec["chunk_length"] - 2,
        minimal_chunk_length=1,
        pretrained_model_name_or_path=spec["encoder"],
        neural_network=network,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    meter = Meter(torch.device(model.device))
    model.fit(texts[: spec["batch"]], labels[: spec["batch"]])
    meter.start()
    model.fit(texts, labels)
    meter.stop()
    return meter


def simple_transformers(spec: dict[str, Any], texts: list[str], labels: list[int]) -> Meter:
    import pandas as pd
    from simpletransformers.classification import ClassificationModel

    folder = tempfile.mkdtemp()
    model = ClassificationModel(
        "bert",
        spec["encoder"],
        num_labels=3,
        use_cuda=torch.cuda.is_available(),
        args={
            "sliding_window": True,
            "stride": spec["chunk_length"] - 2,
            "max_seq_length": spec["chunk_length"],
            "train_batch_size": 8,
            "num_train_epochs": 1,
            "output_dir": folder,
            "cache_dir": folder,
            "tensorboard_dir": folder,
            "overwrite_output_dir": True,
            "no_save": True,
            "no_cache": True,
            "use_multiprocessing": False,
            "use_multiprocessing_for_evaluation": False,
            "silent": True,
        },
    )
    meter = Meter(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    table = pd.DataFrame({"text": texts, "labels": labels})
    model.train_model(table[: spec["batch"]])
    meter.start()
    model.train_model(table)
    meter.stop()
    return meter


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["num_threads"])
    texts = json.loads(Path(spec["documents"]).read_text(encoding="utf-8"))
    system = {"BELT": belt, "Simple Transformers": simple_transformers}[spec["system"]]
    meter = system(spec, texts, [i % 3 for i in range(len(texts))])
    print(json.dumps(meter.result()))


if __name__ == "__main__":
    main()
