"""Raw text of any length → label, calibrated scores, and where the evidence stands.

    rate = pipeline("text-classification", model="ORG/NAME", trust_remote_code=True)
    rate("Once upon a time …")

C chunks of a document, D hidden, K labels.
This file travels to the hub with the model; it imports nothing of the project but its travelling siblings.
"""

import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import Pipeline

from .chunk_attribution import leave_one_out_attributions
from .chunking import Chunker, select_chunks, tokenize_batch
from .precision import full_precision
from .prefetch import prefetched

DOCUMENTS_AT_ONCE = 64
PREFETCHED = 32  # documents that are tokenized while the device reads others
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def batches_by_tokens(documents: Iterable[dict[str, Any]], num_tokens: int) -> Iterator[list[dict[str, Any]]]:
    """Documents in their order, as many at a time as have so many tokens in their `input_ids`, and one at least."""
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
    """The text in Unicode normal form C, as the model was trained on, and for each of its characters where in the
    given text it begins and ends.

    >>> normalized("e\\u0301t")[1:]
    (array([0, 2]), array([2, 3]))
    """
    if unicodedata.is_normalized("NFC", text):
        places = np.arange(len(text) + 1)
        return text, places[:-1], places[1:]
    pieces: list[str] = []
    begins: list[int] = []
    ends: list[int] = []

    def add(start: int, end: int) -> None:
        piece = unicodedata.normalize("NFC", text[start:end])
        pieces.append(piece)
        begins.extend([start] * len(piece))
        ends.extend([end] * len(piece))

    start = 0
    for place in range(1, len(text)):
        character = text[place]
        if unicodedata.combining(character):
            continue
        if character >= "\u0300":
            # A character that would melt into what stands before it (Hangul, some Indic vowels) belongs with it.
            apart = [unicodedata.normalize("NFC", part) for part in (text[start:place], character)]
            if unicodedata.normalize("NFC", text[start : place + 1]) != "".join(apart):
                continue
        add(start, place)
        start = place
    add(start, len(text))
    return "".join(pieces), np.array(begins), np.array(ends)


class HierarchicalClassificationPipeline(Pipeline):
    """Rates documents of any length: one text, a list, or a generator (rated as it is read, at constant memory).

    A result is `{"label", "score", "scores": {label: p}, "num_chunks", "truncated", "evidence": [{"start", "end",
    "score", "text"}]}`. `num_chunks` were read, and `truncated` says whether there were more. Evidence is the chunks that
    speak most for the label, strongest first: characters into the given text, and the log-odds that the label loses
    without the chunk.

    The next documents are tokenized in a thread while the device reads these.

    Args:
        evidence: how many chunks are named at the most.
        precision: of the encoder's arithmetic: fp32 (the default: scores are then the same wherever the model is used),
            bf16 or fp16, which GPUs are faster in.

    Raises:
        ValueError: what was given is no text, or holds half a surrogate pair.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, model: Any, *args: Any, device: Any = None, **kwargs: Any):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # transformers 5.23 then leaves the model where it is, and takes that for the device that was asked for.
            if device is None and torch.accelerator.is_available():
                device = torch.accelerator.current_device_index()
            model = model.to(torch.device("cpu" if device in (None, -1) else device))
        super().__init__(model, *args, device=device, **kwargs)
        # In fp32, whatever the file or a `dtype` says: scores are then the same wherever the model is used.
        self.model.float().eval()
        config = self.model.config
        # `transformers.pipeline` puts classes into this dict, which cannot be saved: once more as it was.
        config.custom_pipelines = type(config)().custom_pipelines
        self.chunker = Chunker(self.tokenizer, config.chunk_length, config.chunk_overlap)

    def _sanitize_parameters(
        self, evidence: int | None = None, precision: str | None = None, **unknown: Any
    ) -> tuple[dict, dict, dict]:
        if unknown:
            raise ValueError(
                f"There is no option {', '.join(unknown)}; the pipeline takes evidence (a number) and precision, and "
                "makes up its batches by the model's token_budget."
            )
        if evidence is not None and (not isinstance(evidence, int) or evidence < 0):
            raise ValueError(f"evidence must be a number of chunks, 0 or more, and is {evidence!r}.")
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"precision must be {', '.join(PRECISIONS)}, and is {precision!r}.")
        return (
            {},
            {} if precision is None else {"precision": precision},
            {} if evidence is None else {"evidence": evidence},
        )

    def __call__(self, inputs: Any, **options: Any) -> Any:  # type: ignore[override]
        """One result for a text, a list for a list, a generator for anything else that can be gone through."""
        _, forward, post = self._sanitize_parameters(**options)
        if not isinstance(inputs, Iterable) or isinstance(inputs, bytes | dict):
            raise ValueError(f"Expected a text, or texts one after the other, and got {type(inputs).__name__}.")
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
        """Text → its chunks that are read: `input_ids`, and `spans` of characters in the given text."""
        if not isinstance(text, str):
            raise ValueError(f"Expected a text, and got {type(text).__name__}.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text holds half a surrogate pair ({text[error.start]!a} at character {error.start}), which is no "
                "character: decode the file that it comes from with errors='replace'."
            ) from error
        clean, begins, ends = nfc_with_offsets(text)
        [tokens], [first], [last], [breaks] = tokenize_batch([clean], self.tokenizer).values()
        bounds = self.chunker.spans(len(tokens), breaks)
        # The policy `random` reads as `uniform` does when nothing is trained.
        read = select_chunks(len(bounds), self.model.config.max_chunks, self.model.config.chunk_policy)
        spans = [(0, 0)]
        if len(tokens):
            spans = [(int(begins[first[a]]), int(ends[max(last[b - 1], 1) - 1])) for a, b in (bounds[i] for i in read)]
        return {
            "text": text,
            "input_ids": [self.chunker.with_special_tokens(tokens[slice(*bounds[i])]) for i in read],
            "spans": spans,
            "truncated": len(read) < len(bounds),
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
        half = torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")
        with full_precision(device) if precision == "fp32" else half:
            output = self.model(
                input_ids=ids_NL.to(device),
                attention_mask=mask_NL.to(device),
                num_chunks=torch.tensor(num_chunks),
                chunk_lengths=chunk_lengths,
            )
        vectors = output.chunk_features.split(num_chunks)
        return [{"logits_K": row, "chunk_CD": part} for row, part in zip(output.logits, vectors, strict=True)]

    def postprocess(self, document: dict[str, Any], evidence: int = 3) -> dict[str, Any]:  # type: ignore[override]
        """What the model said of a document, in its own label names and the text's own characters."""
        config = self.model.config
        # By numpy: not every device has float64.
        logits = document["logits_K"].float().cpu().numpy().astype(np.float64) / (config.temperature or 1.0)
        odds = np.exp(logits - logits.max())
        scores = (odds / odds.sum()).tolist()
        label = int(np.argmax(scores))
        strength = leave_one_out_attributions(self.model, document["chunk_CD"], label).tolist()
        order = sorted(range(len(strength)), key=lambda i: -strength[i])
        named = [i for rank, i in enumerate(order[:evidence]) if rank == 0 or strength[i] > 0]
        spans = [(*_trimmed(document["text"], *document["spans"][i]), strength[i]) for i in named]
        return {
            "label": config.id2label[label],
            "score": scores[label],
            "scores": {config.id2label[k]: score for k, score in enumerate(scores)},
            "num_chunks": len(strength),
            "truncated": document["truncated"],
            "evidence": [
                {"start": start, "end": end, "score": score, "text": document["text"][start:end]}
                for start, end, score in spans
                if start < end
            ],
        }


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without the white space at its ends."""
    body = text[start:end]
    start += len(body) - len(body.lstrip())
    return start, start + len(body.strip())


__all__ = ["HierarchicalClassificationPipeline"]
