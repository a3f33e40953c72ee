"""Pipeline: raw text of any length → label, calibrated scores, and evidence spans.

    classify = pipeline("text-classification", model="ORG/NAME", trust_remote_code=True)
    classify("Once upon a time …")

C chunks of a document, D hidden, K labels.
Pushed to the hub with the model; imports only its siblings.
"""

import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import Pipeline

from .chunk_attribution import leave_one_out_attributions
from .chunking import Chunker, select_chunks, tokenize_batch
from .decision import decide
from .pooling import to_device  # noqa: F401 (pushed, see modeling_hierarchical_roberta.py)
from .precision import full_precision
from .prefetch import prefetched

DOCUMENTS_AT_ONCE = 64
PREFETCHED = 32  # documents tokenized ahead
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def batches_by_tokens(documents: Iterable[dict[str, Any]], num_tokens: int) -> Iterator[list[dict[str, Any]]]:
    """Batch documents in order until a batch has `num_tokens` tokens or `DOCUMENTS_AT_ONCE` documents."""
    batch: list[dict[str, Any]] = []
    total = 0
    for document in documents:
        batch.append(document)
        total += sum(map(len, document["input_ids"]))
        if total >= num_tokens or len(batch) == DOCUMENTS_AT_ONCE:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def nfc_with_offsets(text: str) -> tuple[str, np.ndarray, np.ndarray]:
    """Text in Unicode NFC, as in training, with the start and end of each character in the original text.

    >>> nfc_with_offsets("e\\u0301t")[1:]
    (array([0, 2]), array([2, 3]))
    """
    if unicodedata.is_normalized("NFC", text):
        offsets = np.arange(len(text) + 1)
        return text, offsets[:-1], offsets[1:]
    pieces: list[str] = []
    starts: list[int] = []
    ends: list[int] = []

    def add(start: int, end: int) -> None:
        piece = unicodedata.normalize("NFC", text[start:end])
        pieces.append(piece)
        starts.extend([start] * len(piece))
        ends.extend([end] * len(piece))

    start = 0
    for index in range(1, len(text)):
        character = text[index]
        if unicodedata.combining(character):
            continue
        if character >= "\u0300":
            # Keep a character that composes with the preceding ones (Hangul, some Indic vowels) in the same piece.
            separate = [unicodedata.normalize("NFC", part) for part in (text[start:index], character)]
            if unicodedata.normalize("NFC", text[start : index + 1]) != "".join(separate):
                continue
        add(start, index)
        start = index
    add(start, len(text))
    return "".join(pieces), np.array(starts), np.array(ends)


class HierarchicalClassificationPipeline(Pipeline):
    """Classify documents of any length: a text, a list, or a generator (processed lazily, in constant memory).

    A result is `{"label", "score", "scores": {label: p}, "num_chunks", "num_encoded_chunks", "truncated", "evidence":
    [{"start", "end", "score", "text"}]}`: `num_chunks` chunks were read, `num_encoded_chunks` of them by the encoder (fewer
    only with the policy `lexical`: the lexical features read the others), and `truncated` is True if the document has more.
    `label` has the highest score, unless the model's config has `class_biases` (see `--decision_metric` of training): they are
    added to the log scores before the highest is taken, so that `label` need not be the most probable one. `scores` are
    probabilities without the biases, and `score` is that of `label`.
    `evidence` lists the encoded chunks with the highest leave-one-out attribution to the label (the drop in its log-odds
    without the chunk), highest first, with character offsets into the input text.

    The next documents are tokenized in a thread while the device encodes the current ones.

    Args:
        evidence: maximum number of evidence chunks.
        precision: precision of the encoder: fp32 (the default, with the same scores on all devices), bf16 or fp16
            (faster on GPUs).

    Raises:
        ValueError: an input is not text, or contains an unpaired surrogate.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, model: Any, *args: Any, device: Any = None, **kwargs: Any):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # transformers 5.23 then ignores `device` and uses the model's current device.
            if device is None and torch.accelerator.is_available():
                device = torch.accelerator.current_device_index()
            model = model.to(torch.device("cpu" if device in (None, -1) else device))
        super().__init__(model, *args, device=device, **kwargs)
        # fp32 weights, whatever the checkpoint or `dtype` says, so that scores are the same on all devices.
        self.model.float().eval()
        config = self.model.config
        # `transformers.pipeline` puts classes into this dict, which are not serializable: reset it.
        config.custom_pipelines = type(config)().custom_pipelines
        self.chunker = Chunker(self.tokenizer, config.chunk_length, config.chunk_overlap, config.chunk_prefix)
        config.num_prefix_tokens = len(self.chunker.prefix)
        # Selects chunks on the host.
        self.lexical = self.model.lexical_features_on_host() if config.chunk_policy == "lexical" else None

    def _sanitize_parameters(
        self, evidence: int | None = None, precision: str | None = None, **unknown: Any
    ) -> tuple[dict, dict, dict]:
        if unknown:
            raise ValueError(
                f"The pipeline has no option {', '.join(unknown)}; expected `evidence` (an integer) or `precision`. "
                "Batch sizes follow the model's `token_budget`."
            )
        if evidence is not None and (not isinstance(evidence, int) or evidence < 0):
            raise ValueError(f"`evidence` must be an integer ≥ 0, got {evidence!r}.")
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
        return (
            {},
            {} if precision is None else {"precision": precision},
            {} if evidence is None else {"evidence": evidence},
        )

    def __call__(self, inputs: Any, **options: Any) -> Any:  # type: ignore[override]
        """Return one result for a text, a list for a list or tuple, and a generator for any other iterable."""
        _, forward, post = self._sanitize_parameters(**options)
        if not isinstance(inputs, Iterable) or isinstance(inputs, bytes | dict):
            raise ValueError(f"Expected a text or an iterable of texts, got {type(inputs).__name__}.")
        texts = [inputs] if isinstance(inputs, str) else inputs
        results = self._classify(texts, self._forward_params | forward, self._postprocess_params | post)
        if isinstance(inputs, str):
            return next(results)
        return list(results) if isinstance(inputs, list | tuple) else results

    def _classify(
        self, texts: Iterable[str], forward: dict[str, Any], post: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        documents = prefetched(self.preprocess, texts, PREFETCHED)
        for batch in batches_by_tokens(documents, 8 * self.model.encoder_batch_size()[0]):
            for document, outputs in zip(batch, self._forward(batch, **forward), strict=True):
                yield self.postprocess(document | outputs, **post)

    def preprocess(self, text: str) -> dict[str, Any]:  # type: ignore[override]
        """Text → `input_ids` of the chunks to read, and their character `spans` in the input text."""
        if not isinstance(text, str):
            raise ValueError(f"Expected a text, got {type(text).__name__}.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text contains an unpaired surrogate ({text[error.start]!a} at character {error.start}): decode "
                "its source with errors='replace'."
            ) from error
        clean, starts, ends = nfc_with_offsets(text)
        [tokens], [first], [last], [breaks] = tokenize_batch([clean], self.tokenizer).values()
        bounds = self.chunker.spans(len(tokens), breaks)
        config = self.model.config
        chunks = [tokens[slice(*span)].astype(np.int64) for span in bounds]
        rest = None
        if self.lexical is not None:
            selected, rest = self.lexical.select(chunks, config.max_chunks)
        else:
            # Without an rng, `random` is `uniform`.
            selected = select_chunks(len(chunks), config.max_chunks, config.chunk_policy)
        spans = [(0, 0)]
        if len(tokens):
            selection = [bounds[i] for i in selected]
            # RoBERTa's token of a space at the end of the text begins after it.
            first = np.minimum(first, len(starts) - 1)
            spans = [(int(starts[first[a]]), int(ends[max(last[b - 1], 1) - 1])) for a, b in selection]
        return {
            "text": text,
            "input_ids": [self.chunker.with_special_tokens(chunks[i]) for i in selected],
            "spans": spans,
            "rest_M": None if rest is None else torch.from_numpy(rest),
            "truncated": rest is None and len(selected) < len(chunks),
            "num_chunks": len(selected) if rest is None else len(chunks),
        }

    @torch.no_grad()
    def _forward(  # type: ignore[override]
        self, documents: list[dict[str, Any]], precision: str = "fp32"
    ) -> list[dict[str, torch.Tensor]]:
        """`logits_K` and `chunk_CD` of each document."""
        chunks = [torch.from_numpy(chunk) for document in documents for chunk in document["input_ids"]]
        ids_NL = torch.nn.utils.rnn.pad_sequence(chunks, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(chunk) for chunk in chunks])
        mask_NL = (torch.arange(ids_NL.shape[1]) < lengths[:, None]).long()
        chunk_lengths = [[len(chunk) for chunk in document["input_ids"]] for document in documents]
        num_chunks = [len(lengths) for lengths in chunk_lengths]
        device = self.model.device
        rest = [document["rest_M"] for document in documents]
        half = torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")
        with full_precision(device) if precision == "fp32" else half:
            output = self.model(
                input_ids=ids_NL.to(device),
                attention_mask=mask_NL.to(device),
                num_chunks=torch.tensor(num_chunks),
                chunk_lengths=chunk_lengths,
                rest_counts=None if self.lexical is None else torch.stack(rest).to(device),
            )
        vectors = output.chunk_vectors.split(num_chunks)
        return [{"logits_K": row, "chunk_CD": part} for row, part in zip(output.logits, vectors, strict=True)]

    def postprocess(self, document: dict[str, Any], evidence: int = 3) -> dict[str, Any]:  # type: ignore[override]
        """Label, calibrated scores and evidence of a document."""
        config = self.model.config
        # In numpy, as not every device supports float64.
        logits = document["logits_K"].float().cpu().numpy().astype(np.float64) / (config.temperature or 1.0)
        odds = np.exp(logits - logits.max())
        scores = (odds / odds.sum()).tolist()
        label = int(decide(logits, config.class_biases))
        count_CM = None
        if self.model.lexical is not None:
            count_CM = self.model.lexical.count_chunks(document["input_ids"], config.num_prefix_tokens)
        attribution_C = leave_one_out_attributions(
            self.model, document["chunk_CD"], label, count_CM, document["rest_M"]
        )
        attribution = attribution_C.tolist()
        order = sorted(range(len(attribution)), key=lambda i: -attribution[i])
        shown = [i for rank, i in enumerate(order[:evidence]) if rank == 0 or attribution[i] > 0]
        spans = [(*_trimmed(document["text"], *document["spans"][i]), attribution[i]) for i in shown]
        return {
            "label": config.id2label[label],
            "score": scores[label],
            "scores": {config.id2label[k]: score for k, score in enumerate(scores)},
            "num_chunks": document["num_chunks"],
            "num_encoded_chunks": len(attribution),
            "truncated": document["truncated"],
            "evidence": [
                {"start": start, "end": end, "score": score, "text": document["text"][start:end]}
                for start, end, score in spans
                if start < end
            ],
        }


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without leading and trailing whitespace."""
    body = text[start:end]
    start += len(body) - len(body.lstrip())
    return start, start + len(body.strip())


__all__ = ["HierarchicalClassificationPipeline"]
