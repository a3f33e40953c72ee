"""Classify texts with an exported model: needs numpy, tokenizers and onnxruntime, neither torch nor transformers.

    python predict_onnx.py story.txt other.txt stories.jsonl > predictions.jsonl
    cat story.txt | python predict_onnx.py

    from predict_onnx import OnnxClassifier
    classify = OnnxClassifier()
    classify("Once upon a time …")[0]["label"]

Of a .jsonl or .csv file each row is a document, with its text in the column `text` (and its `id`); any other file is one.
C chunks of a document, S subsets of them, D hidden, M lexical features, K labels; lower case (n, l): an encoder batch.
Written by scripts.export_onnx of hierarchical-roberta.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import tokenizers

from modeling.hierarchical_roberta.chunking import (
    Chunker,
    chunks_of_text,
    select_chunks,
    select_telling_chunks,
    unlimited_backend,
)
from modeling.hierarchical_roberta.decision import decision_of
from modeling.hierarchical_roberta.encoder_batches import batches_by_tokens, plan_encoder_batches
from modeling.hierarchical_roberta.prefetch import prefetched
from modeling.hierarchical_roberta.results import explained_labels, result_of

# As of the pipeline on a CPU.
TOKEN_BUDGET, BATCH_COST = 4096, 64
OLDEST_RUNTIME = (1, 22)  # 1.20.1 gives all chunks of a batch but the first other vectors
PREFETCHED = 32  # documents tokenized ahead
# Chunk vectors, or weights of them, per call of the head, where chunks are left out.
ROWS_AT_ONCE, WEIGHTS_AT_ONCE = 8_192, 1_000_000


class Tokenizer:
    """What `Chunker` needs of a tokenizer of transformers, from tokenizer.json alone."""

    def __init__(self, path: Path, pad_token_id: int):
        self.backend_tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self.pad_token_id = pad_token_id
        unlimited_backend(self)

    def __call__(self, text: str, add_special_tokens: bool = True, **unused: Any) -> dict[str, list[int]]:
        encoding = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return {"input_ids": encoding.ids, "special_tokens_mask": encoding.special_tokens_mask}


class LexicalFeatures:
    """`LexicalFeatures` of lexical_features.py in numpy: logits from the counts of M tokens and pairs of them."""

    def __init__(self, path: Path):
        arrays: dict[str, np.ndarray] = dict(np.load(path))
        self.weight_KM, self.bias_K = arrays["weight"], arrays["bias"]
        self.feature_of_token = arrays["feature_of_token"]
        # Only with the weighting `tfidf`.
        self.pairs, self.feature_of_pair = arrays.get("pairs"), arrays.get("feature_of_pair")
        self.idf_M = arrays.get("idf")

    def features(self, tokens: np.ndarray) -> np.ndarray:
        """The features in a chunk, given without special tokens and prefix; repeated where they occur repeatedly."""
        num_features = len(self.weight_KM[0])
        features = self.feature_of_token[tokens]
        if self.pairs is not None and self.feature_of_pair is not None:
            pair = tokens[:-1] * len(self.feature_of_token) + tokens[1:]
            index = np.searchsorted(self.pairs, pair).clip(max=len(self.pairs) - 1)
            of_pair = np.where(self.pairs[index] == pair, self.feature_of_pair[index], num_features)
            features = np.concatenate([features, of_pair])
        return features[features < num_features]

    def count(self, chunks: list[np.ndarray]) -> np.ndarray:
        """Occurrences of each feature in each chunk, (C, M)."""
        num_features = len(self.weight_KM[0])
        counts = [np.bincount(self.features(chunk), minlength=num_features) for chunk in chunks]
        return np.array(counts, dtype=np.float32).reshape(len(chunks), num_features)

    def logits(self, count_SM: np.ndarray) -> np.ndarray:
        """Logits (S, K) from counts."""
        value_SM = np.log1p(count_SM)
        if self.idf_M is not None:
            value_SM *= self.idf_M
            value_SM /= np.maximum(np.linalg.norm(value_SM, axis=1, keepdims=True), 1e-12)
        return value_SM @ self.weight_KM.T + self.bias_K

    def select(self, chunks: list[np.ndarray], max_chunks: int) -> tuple[np.ndarray, np.ndarray]:
        """Sorted indices of the most telling chunks, and the counts (M,) in all others."""
        selected = np.arange(len(chunks))
        if len(chunks) > max_chunks:
            # A few chunks at a time: the counts of 2,000 chunks are 160 MB with 20,000 features.
            parts = [chunks[start : start + 64] for start in range(0, len(chunks), 64)]
            logits_CK = np.concatenate([self.logits(self.count(part)) for part in parts])
            selected = select_telling_chunks(logits_CK, max_chunks)
        others = np.setdiff1d(np.arange(len(chunks)), selected)
        rest = [self.features(chunks[index]) for index in others]
        rest_M = np.bincount(np.concatenate([np.zeros(0, np.int64), *rest]), minlength=len(self.weight_KM[0]))
        return selected, rest_M.astype(np.float32)


class OnnxClassifier:
    """Classify documents of any length, with the results of the model's pipeline: `{"label", "score", "scores", "num_chunks",
    "num_encoded_chunks", "truncated", "evidence": [{"start", "end", "score", "text"}]}`; if a document may have several labels,
    also `labels`, and of each entry of `evidence` the `label`.

    Args:
        folder: an exported model (default: the folder of this file).
        num_threads: threads of onnxruntime (0: one for each core).

    Raises:
        ImportError: onnxruntime is too old.
    """

    def __init__(self, folder: str | Path | None = None, num_threads: int = 0):
        if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < OLDEST_RUNTIME:
            raise ImportError(
                f"onnxruntime {onnxruntime.__version__} gives other scores where an encoder batch has several chunks: "
                "install 1.22 or newer."
            )
        folder = Path(__file__).parent if folder is None else Path(folder)
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer: Any = Tokenizer(folder / "tokenizer.json", self.config["pad_token_id"])
        names = ("chunk_length", "chunk_overlap", "chunk_prefix")
        self.tokenizer, self.chunker = tokenizer, Chunker(tokenizer, *(self.config[name] for name in names))
        self.lexical = LexicalFeatures(folder / "lexical.npz") if (folder / "lexical.npz").exists() else None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        # Threads that wait would keep a core from the tokenizer.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.encoder, self.head = (
            onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
            for name in ("encoder.onnx", "head.onnx")
        )

    def __call__(self, inputs: str | Iterable[str], evidence: int = 3) -> Any:
        """Return a list of one result for a text, a list for a list or tuple, and a generator for any other iterable.

        Args:
            evidence: maximum number of evidence chunks of a label.

        Raises:
            ValueError: an input is not text, or contains an unpaired surrogate.
        """
        if not isinstance(evidence, int) or evidence < 0:
            raise ValueError(f"`evidence` must be an integer ≥ 0, got {evidence!r}.")
        if not isinstance(inputs, Iterable) or isinstance(inputs, bytes | dict):
            raise ValueError(f"Expected a text or an iterable of texts, got {type(inputs).__name__}.")
        results = self._classify([inputs] if isinstance(inputs, str) else inputs, evidence)
        return list(results) if isinstance(inputs, str | list | tuple) else results

    def _classify(self, texts: Iterable[str], evidence: int) -> Iterator[dict[str, Any]]:
        documents = prefetched(self.preprocess, texts, PREFETCHED)
        for batch in batches_by_tokens(documents, 8 * TOKEN_BUDGET):
            vectors = self.encode([chunk for document in batch for chunk in document["input_ids"]])
            ends = np.cumsum([len(document["input_ids"]) for document in batch])
            for document, chunk_CD in zip(batch, np.split(vectors, ends[:-1]), strict=True):
                yield self.postprocess(document, chunk_CD, evidence)

    def preprocess(self, text: str) -> dict[str, Any]:
        """Text → `input_ids` of the chunks to read, their character `spans` in the input text, and lexical counts."""
        chunks, spans = chunks_of_text(text, self.tokenizer, self.chunker)
        max_chunks, policy = self.config["max_chunks"], self.config["chunk_policy"]
        rest_M = None
        if self.lexical is not None and policy == "lexical":
            selected, rest_M = self.lexical.select(chunks, max_chunks)
        else:
            # Without an rng, `random` is `uniform`.
            selected = select_chunks(len(chunks), max_chunks, policy)
        return {
            "text": text,
            "input_ids": [self.chunker.with_special_tokens(chunks[i]) for i in selected],
            "spans": [spans[i] for i in selected],
            "count_CM": None if self.lexical is None else self.lexical.count([chunks[i] for i in selected]),
            "rest_M": rest_M,
            "truncated": rest_M is None and len(selected) < len(chunks),
            "num_chunks": len(selected) if rest_M is None else len(chunks),
        }

    def encode(self, chunks: list[np.ndarray]) -> np.ndarray:
        """Chunk vectors (N, D), computed in encoder batches of chunks of similar length."""
        lengths = [len(chunk) for chunk in chunks]
        # Where vectors depend on padding, a batch is closed before it needs any.
        batch_cost = 0 if self.config["equal_lengths"] else BATCH_COST
        plan = plan_encoder_batches(lengths, TOKEN_BUDGET, batch_cost)
        vectors = []
        for rows in plan:
            mask_nl = (np.arange(lengths[rows[0]]) < np.array([lengths[row] for row in rows])[:, None]).astype(np.int64)
            ids_nl = np.full_like(mask_nl, self.config["pad_token_id"])
            ids_nl[mask_nl == 1] = np.concatenate([chunks[row] for row in rows])
            vectors.append(self.encoder.run(None, {"input_ids": ids_nl, "attention_mask": mask_nl})[0])
        order = [row for rows in plan for row in rows]
        return np.concatenate(vectors)[np.argsort(order)]

    def logits_of_subsets(self, document: dict[str, Any], chunk_CD: np.ndarray, kept_SC: np.ndarray) -> np.ndarray:
        """Logits (S, K) of a document with some of its chunks, True in `kept_SC`."""
        # Where a chunk's vector is the same in every subset, none is copied.
        copies = self.config["chunk_transformer_layers"] or self.config["pooling"] == "max"
        step = max(1, (ROWS_AT_ONCE if copies else WEIGHTS_AT_ONCE) // len(chunk_CD))
        parts = [kept_SC[start : start + step] for start in range(0, len(kept_SC), step)]
        inputs = [{"chunk_vectors": chunk_CD, "kept": part_sC} for part_sC in parts]
        logits_SK = np.concatenate([self.head.run(None, each)[0] for each in inputs])
        if self.lexical is None:
            return logits_SK
        rest_M = 0 if document["rest_M"] is None else document["rest_M"]
        lexical = [self.lexical.logits(part_sC.astype(np.float32) @ document["count_CM"] + rest_M) for part_sC in parts]
        return self.config["encoder_weight"] * logits_SK + self.config["lexical_weight"] * np.concatenate(lexical)

    def postprocess(self, document: dict[str, Any], chunk_CD: np.ndarray, evidence: int) -> dict[str, Any]:
        """Labels, calibrated scores and evidence of a document."""
        num_chunks, decision = len(chunk_CD), decision_of(SimpleNamespace(**self.config))
        # All chunks, then all but each.
        kept_SC = np.concatenate([np.ones((1, num_chunks), bool), ~np.eye(num_chunks, dtype=bool)])
        logits_SK = self.logits_of_subsets(document, chunk_CD, kept_SC if num_chunks > 1 else kept_SC[:1])
        logits_SK = logits_SK.astype(np.float64)
        attributions = []
        for label in explained_labels(decision, logits_SK[0]):
            whole, *without = decision.log_odds(logits_SK, label).tolist()
            # The only chunk of a document is attributed all of its log-odds.
            attributions.append([whole - each for each in without] or [whole])
        scores = decision.scores(logits_SK[0]).tolist()
        return result_of(document, decision, self.config["labels"], logits_SK[0], scores, attributions, evidence)


def documents_of(files: list[Path]) -> Iterator[tuple[str, str]]:
    """Id and text of each document in the files; of standard input where there are none."""
    if not files:
        yield "stdin", sys.stdin.buffer.read().decode("utf-8-sig")
    for path in files:
        if path.suffix not in (".jsonl", ".csv"):
            yield path.stem, path.read_text(encoding="utf-8-sig")
            continue
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = (
                csv.DictReader(file) if path.suffix == ".csv" else (json.loads(line) for line in file if line.strip())
            )
            for number, row in enumerate(rows, 1):
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise ValueError(f"{path}, row {number}: no column `text`.")
                yield str(row.get("id") or number), row["text"]


def main() -> int:
    description, epilog = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: a text on standard input")
    parser.add_argument("--evidence", type=int, default=3, help="maximum number of chunks returned as evidence")
    parser.add_argument("--threads", type=int, default=0, help="number of threads; 0 uses all cores")
    arguments = parser.parse_args()
    csv.field_size_limit(2**31 - 1)
    ids: list[str] = []

    def texts() -> Iterator[str]:
        for files in [[path] for path in arguments.files] or [[]]:
            try:
                for id_, text in documents_of(files):
                    ids.append(id_)
                    yield text
            except UnicodeDecodeError as error:
                name = files[0] if files else "standard input"
                raise ValueError(f"{name}: not in UTF-8 ({error}); convert it, or use scripts.predict.") from error

    try:
        classify = OnnxClassifier(num_threads=arguments.threads)
        for number, result in enumerate(classify(texts(), evidence=arguments.evidence)):
            del result["score"]
            print(json.dumps({"id": ids[number], **result}, ensure_ascii=False), flush=True)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
