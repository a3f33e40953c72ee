"""Pipeline: raw text of any length → label or labels, calibrated scores, and evidence spans.

    classify = pipeline("text-classification", model="ORG/NAME", trust_remote_code=True)
    classify("Once upon a time …")[0]["label"]

C chunks of a document, D hidden, K labels.
Pushed to the hub with the model; imports only its siblings.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import TextClassificationPipeline
from transformers.utils import logging

from .chunk_attribution import attributions_of_labels
from .chunking import Chunker, chunks_of_text, select_chunks
from .decision import decision_of
from .encoder_batches import DOCUMENTS_AT_ONCE, batches_by_tokens
from .pooling import to_device  # noqa: F401 (pushed, see modeling_hierarchical_roberta.py)
from .precision import full_precision
from .prefetch import prefetched
from .results import explained_labels, result_of, scores_of

logger = logging.get_logger(__name__)

PREFETCHED = 32  # documents tokenized ahead
EVIDENCE = 3  # chunks
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FUNCTIONS = ("softmax", "sigmoid", "none")
# Arguments of transformers' text classification, most of them of its tokenizer, that have no meaning here.
UNUSED = {"truncation", "max_length", "padding", "padding_side", "pad_to_multiple_of", "stride", "add_special_tokens"}
UNUSED |= {"return_attention_mask", "return_token_type_ids", "return_all_scores", "num_workers"}


class LazyResults:
    """Results of a dataset, computed while they are iterated over; as many as it has documents."""

    def __init__(self, classify: Callable[[Iterable[Any]], Iterator[Any]], inputs: Any):
        self.classify, self.inputs = classify, inputs

    def __iter__(self) -> Iterator[Any]:
        return self.classify(islice(self.inputs, len(self)))  # torch's datasets need not end by themselves

    def __len__(self) -> int:
        return len(self.inputs)


class HierarchicalClassificationPipeline(TextClassificationPipeline):
    """Classify documents of any length. A drop-in replacement for transformers' `TextClassificationPipeline`.

    It takes a text, `{"text": text}`, a list of them, a dataset or a generator (both processed lazily, in constant
    memory), and returns what that pipeline does: a list of one dict for a text, otherwise a dict for each document; with
    `top_k`, a list of dicts for each document.

    The dict of a document, with `top_k` its first, is `{"label", "score", "scores": {label: score}, "num_chunks",
    "num_encoded_chunks", "truncated", "evidence": [{"start", "end", "score", "text"}]}`: `num_chunks` chunks were read,
    `num_encoded_chunks` of them by the encoder (fewer only with the policy `lexical`: the lexical features read the others),
    and `truncated` is True if the document has more.
    `label` has the highest score, unless the model's config has `class_biases` (see `--decision_metric` of training): they are
    added to the log scores before the highest is taken, so that `label` need not be the most probable one. `scores` are
    without the biases, and `score` is that of `label`.
    `evidence` lists the encoded chunks with the highest leave-one-out attribution to the label (the drop in its log-odds
    without the chunk), highest first, with character offsets into the input text.

    If a document may have several labels, its dict also has `labels`: the names of those whose score reaches its threshold,
    highest score first; it may be empty. `label` is that with the highest score, whether or not it reaches its threshold.
    Each entry of `evidence` then names its `label`: there are up to `evidence` chunks for each of the labels, in their
    order; for a document without any, for `label`.

    The next documents are tokenized in a thread while the device encodes the current ones.

    Args:
        top_k: number of labels to return for each document (None: all): the label decided for, then the others by score.
        function_to_apply: how scores are computed from logits: softmax or sigmoid of the calibrated logits (`softmax`,
            `sigmoid`), or the logits that the model returns (`none`). The default gives calibrated probabilities: softmax,
            and sigmoid for several labels. Labels and evidence do not depend on it.
        batch_size: maximum number of documents in a batch. Batches are also limited by tokens, and the encoder's follow the
            model's `token_budget`: the default is fast.
        evidence: maximum number of evidence chunks of a label (True: 3, the default). With False or 0, attributions are not
            computed.
        chunks: whether the dict of a document also has `chunks`: `[{"start", "end", "score"}]` of all encoded chunks, in
            document order, with their leave-one-out attributions. For several labels, each also has
            `scores`: {label: attribution} of the labels that have evidence, and `score` is that of the first of them.
        precision: precision of the encoder: fp32 (the default, with the same scores on all devices), bf16 or fp16
            (faster on GPUs). The `dtype` of `transformers.pipeline` sets it too, if it is torch.bfloat16 or torch.float16.
        truncation, max_length, padding: no effect, like other arguments of a tokenizer: documents are read in chunks of the
            model's own length. They are accepted with a warning.

    Raises:
        ValueError: an input is not text, has a `text_pair`, or contains an unpaired surrogate; an unknown or invalid option.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, model: Any, *, device: Any = None, dtype: Any = None, **options: Any):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # transformers 5.23 then ignores `device` and uses the model's current device.
            if device is None and torch.accelerator.is_available():
                device = torch.accelerator.current_device_index()
            model = model.to(torch.device("cpu" if device in (None, -1) else device))
        for precision, half in PRECISIONS.items():
            if dtype == half:
                options.setdefault("precision", precision)
        super().__init__(model=model, device=device, **options)
        # fp32 weights, whatever the checkpoint says, so that scores are the same on all devices.
        self.model.float().eval()
        config = self.model.config
        # `transformers.pipeline` puts classes into this dict, which are not serializable: reset it.
        config.custom_pipelines = type(config)().custom_pipelines
        self.chunker = Chunker(self.tokenizer, config.chunk_length, config.chunk_overlap, config.chunk_prefix)
        config.num_prefix_tokens = len(self.chunker.prefix)
        # transformers loads the model's module without entering it in its package, where dill looks for the model's class.
        # Not finding it, dill would pickle the class itself, and `datasets.map` over the pipeline hash it for seconds.
        package, _, name = type(self.model).__module__.rpartition(".")
        setattr(sys.modules[package], name, sys.modules[type(self.model).__module__])
        # Selects chunks on the host.
        self.lexical = self.model.lexical_features_on_host() if config.chunk_policy == "lexical" else None

    def check_model_type(self, supported_models: Any) -> None:
        """Nothing to check: transformers knows only its own models."""

    def _sanitize_parameters(  # type: ignore[override]
        self,
        top_k: Any = "",  # not passed, as in transformers: None means all labels
        function_to_apply: str | None = None,
        evidence: int | None = None,
        precision: str | None = None,
        chunks: bool | None = None,
        **unused: Any,
    ) -> tuple[dict, dict, dict]:
        if unknown := sorted(unused.keys() - UNUSED):
            raise ValueError(
                f"The pipeline has no option {', '.join(unknown)}; expected top_k, function_to_apply, batch_size, "
                "evidence, chunks or precision."
            )
        if unused:
            logger.warning_once(
                f"Without effect: {', '.join(sorted(unused))}. Documents are read in chunks of the model's own length; "
                "top_k=None returns all labels."
            )
        post: dict[str, Any] = {}
        if top_k != "":
            if top_k is not None and not (isinstance(top_k, int) and top_k > 0):
                raise ValueError(f"`top_k` must be an integer ≥ 1, or None for all labels, got {top_k!r}.")
            post["top_k"] = top_k
        if function_to_apply is not None:
            if not isinstance(function_to_apply, str) or function_to_apply.lower() not in FUNCTIONS:
                raise ValueError(
                    f"`function_to_apply` must be one of {', '.join(FUNCTIONS)}, got {function_to_apply!r}."
                )
            post["function_to_apply"] = function_to_apply.lower()
        if evidence is not None:
            if not isinstance(evidence, int) or evidence < 0:
                raise ValueError(f"`evidence` must be an integer ≥ 0, True or False, got {evidence!r}.")
            post["evidence"] = EVIDENCE if evidence is True else evidence
        if chunks is not None:
            post["chunks"] = bool(chunks)
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
        return {}, {} if precision is None else {"precision": precision}, post

    def __call__(self, inputs: Any, batch_size: int | None = None, **options: Any) -> Any:  # type: ignore[override]
        """Classify a document, or an iterable of documents; see the class."""
        _, forward, post = self._sanitize_parameters(**options)
        classify = partial(
            self._classify,
            forward=self._forward_params | forward,
            post=self._postprocess_params | post,
            batch_size=batch_size or self._batch_size or DOCUMENTS_AT_ONCE,
        )
        if isinstance(inputs, str | Mapping):
            [result] = classify([inputs])
            # As transformers does, which looks at the options of this call only.
            return [result] if isinstance(inputs, str) and "top_k" not in options else result
        is_iterable = isinstance(inputs, Iterable | torch.utils.data.Dataset)
        if isinstance(inputs, bytes) or not is_iterable:
            raise ValueError(f"Expected a text or an iterable of texts, got {type(inputs).__name__}.")
        if isinstance(inputs, list | tuple):
            return list(classify(inputs))
        return LazyResults(classify, inputs) if isinstance(inputs, Sized) else classify(inputs)

    def _classify(
        self, texts: Iterable[Any], forward: dict[str, Any], post: dict[str, Any], batch_size: int
    ) -> Iterator[Any]:
        documents = prefetched(self.preprocess, texts, PREFETCHED)
        for batch in batches_by_tokens(documents, 8 * self.model.encoder_batch_size()[0], batch_size):
            for document, outputs in zip(batch, self._forward(batch, **forward), strict=True):
                yield self.postprocess(document | outputs, **post)

    def preprocess(self, inputs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Text or `{"text": text}` → `input_ids` of the chunks to read, and their character `spans` in the text."""
        text = inputs
        if isinstance(inputs, Mapping):
            if inputs.get("text_pair") is not None:
                raise ValueError("The model classifies single documents: it takes no `text_pair`.")
            if "text" not in inputs:
                raise ValueError(
                    f'Expected a text or {{"text": text}}, got a dict with {", ".join(map(repr, inputs))}.'
                )
            text = inputs["text"]
        chunks, spans = chunks_of_text(text, self.tokenizer, self.chunker)
        config = self.model.config
        rest = None
        if self.lexical is not None:
            selected, rest = self.lexical.select(chunks, config.max_chunks)
        else:
            # Without an rng, `random` is `uniform`.
            selected = select_chunks(len(chunks), config.max_chunks, config.chunk_policy)
        return {
            "text": text,
            "input_ids": [self.chunker.with_special_tokens(chunks[i]) for i in selected],
            "spans": [spans[i] for i in selected],
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

    def postprocess(  # type: ignore[override]
        self,
        document: dict[str, Any],
        top_k: Any = "",
        function_to_apply: str | None = None,
        evidence: int = EVIDENCE,
        chunks: bool = False,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Labels, scores and evidence of a document; with `top_k`, a list with further labels after it."""
        config = self.model.config
        # In numpy, as not every device supports float64.
        logits = document["logits_K"].float().cpu().numpy().astype(np.float64)
        decision = decision_of(config)
        scores = scores_of(decision, logits, function_to_apply or decision.function)
        names = [config.id2label[k] for k in range(len(scores))]
        attributions = []
        if evidence or chunks:
            attributions = self._attributions(document, explained_labels(decision, logits))
        result = result_of(document, decision, names, logits, scores, attributions, evidence, chunks)
        if top_k == "":
            return result
        others = sorted(set(range(len(names))) - {decision.first_label(logits)}, key=lambda k: -scores[k])
        return [result, *({"label": names[k], "score": scores[k]} for k in others)][:top_k]

    def _attributions(self, document: dict[str, Any], labels: list[int]) -> list[list[float]]:
        count_CM = None
        if self.model.lexical is not None:
            count_CM = self.model.lexical.count_chunks(document["input_ids"], self.model.config.num_prefix_tokens)
        return attributions_of_labels(self.model, document["chunk_CD"], labels, count_CM, document["rest_M"]).tolist()


__all__ = ["HierarchicalClassificationPipeline"]
