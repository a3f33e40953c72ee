"""Hierarchical classifier: chunk encoder → pooling over a document's chunks → classification head.

    model = HierarchicalRobertaForSequenceClassification.from_encoder("FacebookAI/roberta-base", num_labels=3)

B documents, N chunks in the batch, L tokens of the batch's longest chunk, D hidden, M lexical features, K labels; lower case (n, l): an encoder batch. There are no padding chunks.
Pushed to the hub with the model; imports only its siblings.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

# Imports marked "pushed" are not used here: of a local folder, transformers before 5.10 copies only what this file imports.
from .chunk_attribution import leave_one_out_attributions  # noqa: F401 (pushed)
from .chunking import Chunker  # noqa: F401 (pushed)
from .configuration_hierarchical_roberta import HierarchicalRobertaConfig
from .decision import decide  # noqa: F401 (pushed)
from .encoder_batches import batches_to_recompute, plan_encoder_batches
from .encoder_checks import (
    depends_on_chance,
    depends_on_longest_chunk,
    depends_on_padding,
    parameters_before,
    unused_parameters,
)
from .encoder_defaults import with_encoder_defaults
from .encoders import UNPADDED, attention_for, encode_unpadded, load_encoder, text_encoder
from .handler import EndpointHandler  # noqa: F401 (pushed)
from .lexical_features import LexicalFeatures
from .pipeline import HierarchicalClassificationPipeline  # noqa: F401 (pushed)
from .pooling import ChunkPooling, ChunkTransformer, host_counts, pool_tokens, to_device
from .precision import full_precision
from .prefetch import prefetched  # noqa: F401 (pushed)
from .recomputation import recomputed
from .results import result_of  # noqa: F401 (pushed)

logger = logging.getLogger(__name__)

# Encoder batches that share one low-precision copy of the weights, whose gradients accumulate in half precision; with
# many more the sum loses precision (docs/log.md).
BATCHES_PER_CAST = 8


@dataclass
class HierarchicalOutput(ModelOutput):
    """Output of the model.

    Attributes:
        loss: (), unweighted cross entropy, with several labels a document binary cross entropy; only if `labels` were passed.
        logits: (B, K).
        chunk_weights: (N,), pooling weights of the chunks, summing to 1 for each document.
        chunk_vectors: (N, D), from `encode_chunks`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    chunk_weights: torch.Tensor | None = None
    chunk_vectors: torch.Tensor | None = None


class HierarchicalRobertaForSequenceClassification(PreTrainedModel):
    """Document classifier over chunks; see `forward`.

    Attributes that are not saved and affect speed and memory, not the result:
        token_budget, batch_cost: size of encoder batches (see `plan_encoder_batches`). None: chosen for the device, see
            `encoder_batch_size`.
        live_chunks: maximum number of chunks whose activations are kept for the backward pass (0: no limit); the rest
            are recomputed with the same random state. Gradients are unchanged unless the limit is below the size of an
            encoder batch, which then shrinks: bit-exact on a CPU, and on CUDA with
            `torch.use_deterministic_algorithms`, as attention otherwise accumulates in no fixed order.
        agree_on_batches: with sharded weights, maps this rank's recomputation flags of encoder batches to those of all
            ranks (see modeling/training/sharding.py). A rank with fewer batches runs dummy batches of two tokens.
        token_counts: [real, padding] tokens encoded so far.
    """

    config_class = HierarchicalRobertaConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Read by Trainer: the loss of `forward` is a plain mean that ignores gradient accumulation.
    accepts_loss_kwargs = False
    # Adapters in a checkpoint, where the weights include them (modeling/training/lora.py).
    _keys_to_ignore_on_load_unexpected = [r"\.lora_[AB]\."]

    def __init__(self, config: HierarchicalRobertaConfig):
        super().__init__(config)
        self.encoder = text_encoder(AutoModel.from_config(config.encoder_config))
        # Identity until `fit_feature_scaler` is called.
        self.register_buffer("vector_mean", torch.zeros(config.hidden_size))
        self.register_buffer("vector_scale", torch.ones(config.hidden_size))
        self.chunk_transformer = None
        if config.chunk_transformer_layers:
            heads = config.encoder_config.num_attention_heads
            self.chunk_transformer = ChunkTransformer(
                config.hidden_size, heads, config.chunk_transformer_layers, config.classifier_dropout
            )
        self.pooling = ChunkPooling(config.pooling, config.hidden_size, config.pooling_size or config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.lexical = None
        if config.lexical_features:
            vocab_size = config.encoder_config.vocab_size
            self.lexical = LexicalFeatures(
                vocab_size, config.lexical_features, config.num_labels, config.lexical_weighting
            )
        self.token_budget: int | None = None
        self.batch_cost: int | None = None
        self.live_chunks = 0
        self.agree_on_batches: Callable[[list[bool]], list[bool]] | None = None
        self._trained_state: list[Any] | None = None
        self.token_counts = [0, 0]
        # Frozen parts of the encoder whose dropout stays on, since adapters are trained (modeling/training/lora.py).
        self.adapted_parts: set[nn.Module] = set()
        self.post_init()

    @classmethod
    def from_encoder(
        cls,
        name_or_path: str,
        *,
        dropout: float | None = None,
        attention_dropout: float | None = None,
        attn_implementation: str | None = None,
        revision: str = "main",
        **config: Any,
    ) -> "HierarchicalRobertaForSequenceClassification":
        """Build a classifier with a pretrained encoder and a new head.

        Args:
            name_or_path: hub name or folder of an encoder that `AutoModel` can load, or of a model of this class, whose
                encoder is used; pooling and head are new, and the chunk geometry is that of `config`.
            dropout: all dropouts except attention dropout, in encoder and head (None: the encoder's own, head 0.1).
            attention_dropout: the encoder's attention dropout (None: the encoder's own).
            attn_implementation: attention implementation, as named in transformers (None: its default, sdpa if
                supported).
            revision: branch, tag or commit of the encoder on the hub.
            config: fields of `HierarchicalRobertaConfig`, including `num_labels` or `id2label`. Where `token_pooling` or
                `chunk_prefix` is missing or None, the encoder's own is taken (see encoder_defaults.py) and is in the model's
                config, for the `Chunker` of the documents.

        Raises:
            ValueError: unsupported encoder, or its checkpoint lacks weights.
            OSError: the encoder does not exist or cannot be downloaded.
        """
        encoder_config, weights = load_encoder(
            name_or_path,
            dropout=dropout,
            attention_dropout=attention_dropout,
            attn=attn_implementation,
            revision=revision,
            classifier=cls,
        )
        if dropout is not None:
            config.setdefault("classifier_dropout", dropout)
        config = with_encoder_defaults(config, name_or_path, revision, encoder_config)
        fields = encoder_config.to_dict()
        fields.pop("_name_or_path", None)  # may be a folder of this machine, and the config gets pushed
        fields.pop("dtype", None)  # the checkpoint's, and would be that of the model
        model = cls(HierarchicalRobertaConfig(encoder_config=fields, **config))
        model.encoder.load_state_dict(weights)
        model.check_chunk_length()
        with torch.random.fork_rng(devices=[]):
            model.check_encoder(without_dropout=dropout == attention_dropout == 0)
        if attn_implementation is not None:
            model.encoder.set_attn_implementation(attn_implementation)
        return model

    def check_encoder(self, without_dropout: bool = False) -> None:
        """Find out what the encoder needs by running it on a few tokens: whether encoder batches must hold chunks of one
        length (`equal_lengths` in the config). Its unused parameters are frozen.

        Args:
            without_dropout: warn if there is dropout.

        Raises:
            ValueError: the encoder cannot read text alone, or a chunk's vectors depend on other chunks or on chance.
        """
        kind = self.config.encoder_config.model_type
        length = self.config.chunk_length
        self.config.equal_lengths = depends_on_padding(self.encoder, min(length, 24))
        self.config.equal_lengths |= depends_on_longest_chunk(self.encoder, length)
        if self.config.equal_lengths:
            logger.warning(
                f"The vectors of the encoder ({kind}) depend on padding: chunks of different lengths are not encoded "
                "together, which takes longer."
            )
        if without_dropout and depends_on_chance(self.encoder):
            logger.warning(f"The encoder ({kind}) has dropout that its config does not name: it is not switched off.")
        unused = unused_parameters(self.encoder)
        for name in unused:
            self.encoder.get_parameter(name).requires_grad_(False)
        if unused:
            logger.info(f"{len(unused)} parameters of the encoder are not used, nor trained: {', '.join(unused)}.")

    @property
    def first_position(self) -> int:
        """Position id of a chunk's first token: padding_idx + 1 in the RoBERTa family, else 0."""
        table = getattr(getattr(self.encoder, "embeddings", None), "position_embeddings", None)
        padding_idx = getattr(table, "padding_idx", None)
        return 0 if padding_idx is None else padding_idx + 1

    @property
    def encoder_positions(self) -> int:
        """Maximum chunk length that the encoder's positions allow, in tokens."""
        config = self.config.encoder_config
        positions = getattr(
            config, "max_position_embeddings", getattr(config, "max_encoder_position_embeddings", None)
        )  # LED
        return positions - self.first_position if positions and positions > 0 else 10**9  # XLNet: -1 for no limit

    def check_chunk_length(self) -> None:
        """Raise ValueError if `chunk_length` exceeds the encoder's positions."""
        if self.config.chunk_length > self.encoder_positions:
            raise ValueError(
                f"`chunk_length` ({self.config.chunk_length}) exceeds the encoder's {self.encoder_positions} "
                "positions: lower `chunk_length`."
            )

    def count_trainable_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def freeze_encoder(self) -> None:
        """Train pooling and head only; this also disables the encoder's dropout."""
        self.encoder.requires_grad_(False)
        self.train(self.training)

    def freeze_layers(self, num_layers: int) -> None:
        """Freeze the encoder's first `num_layers` layers, and disable their dropout (0: nothing).

        What precedes the layers is frozen too (embeddings, ELECTRA's projection of them), and so is what they share
        (DeBERTa's relative positions); with all layers, the whole encoder. The backward pass stops at the first trainable
        layer; no activations of the frozen ones are kept.

        Raises:
            ValueError: `num_layers` exceeds the encoder's layers, or they cannot be identified.
        """
        if num_layers == 0:
            return
        layers = self.encoder_layers()
        if not 0 < num_layers <= len(layers):
            raise ValueError(
                f"`freeze_layers` must be from 0 to {len(layers)} (the encoder's layers), got {num_layers}."
            )
        everything = set(self.encoder.parameters())  # what follows the last layer, too
        for weight in everything if num_layers == len(layers) else parameters_before(self.encoder, layers[num_layers]):
            weight.requires_grad_(False)
        self.train(self.training)

    # transformers makes the embeddings' output require gradients, for reentrant checkpointing and adapters; the backward
    # pass would not stop at the first trainable layer.
    def enable_input_require_grads(self) -> None:
        """Nothing: gradients are computed where weights are trained. (Reentrant checkpointing is refused.)"""

    def encoder_layers(self) -> list[nn.Module]:
        """The encoder's layers in order; empty if they cannot be identified."""
        depth = getattr(self.config.encoder_config, "num_hidden_layers", 0)
        stacks = [part for part in self.encoder.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
        return list(stacks[0]) if stacks else []

    # FSDP2 replaces the class of a sharded model; its code would be saved instead of this file.
    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save as this class, whatever the model's current class is."""
        current, self.__class__ = self.__class__, HierarchicalRobertaForSequenceClassification
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = current

    def encoder_batch_size(self, device: torch.device | None = None) -> tuple[int, int]:
        """Token budget of an encoder batch, and its fixed cost in tokens.

        The fixed cost is thousands of tokens on a GPU (computed from the kernel launches of RoBERTa-base, not measured;
        see `python -m scripts.benchmark.gpu`) and small on a CPU (docs/log.md). With a limit on live chunks batches
        stay small, since the batch being recomputed counts toward the limit.

        Args:
            device: None for the model's device.
        """
        on_cpu = (device or self.device).type == "cpu"
        token_budget = self.token_budget or (4096 if on_cpu or self.live_chunks else 16384)
        # Without a cost of its own, a batch is closed before it needs padding.
        batch_cost = 0 if self.config.equal_lengths else self.batch_cost or (64 if on_cpu else 2048)
        return token_budget, batch_cost

    def compile_layers(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Apply `torch.compile` to each encoder layer, with dynamic shapes."""
        # One graph each for mask or none, one chunk or several, training or not, autocast or not; torch's limit is 8.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        for layer in self.encoder_layers():
            layer.compile(dynamic=True, backend=backend)

    @torch.no_grad()
    def fit_feature_scaler(self, document_BD: torch.Tensor) -> None:
        """Standardize chunk vectors so that the documents' mean vectors have mean 0 and standard deviation 1.

        A frozen encoder's features differ in scale by orders of magnitude, and some are constant; a head on the raw
        features learns slowly and then overfits (figures in docs/log.md).
        """
        deviation_D = document_BD.float().std(dim=0)
        self.vector_mean.copy_(document_BD.float().mean(dim=0))
        self.vector_scale.copy_(torch.where(deviation_D > 1e-4, deviation_D, torch.ones_like(deviation_D)))

    def use_lexical_features(self, lexical: LexicalFeatures) -> None:
        """Use a copy of fitted lexical features."""
        self.lexical = copy.deepcopy(lexical).to(self.device)
        self.config.lexical_weighting = lexical.weighting

    def lexical_features_on_host(self) -> LexicalFeatures | None:
        """A copy of the lexical features on the CPU, to count and to select chunks on the host; None if there are none."""
        return None if self.lexical is None else copy.deepcopy(self.lexical).cpu()

    @property
    def encoder_is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.encoder.parameters())

    def train(self, mode: bool = True) -> "HierarchicalRobertaForSequenceClassification":
        """Like `nn.Module.train`, but frozen parts of the encoder stay in evaluation mode, without dropout.

        Returns early if nothing changed, since Trainer calls it before every micro-batch.
        """
        if mode and self._trained_state == self._training_state():
            return self
        super().train(mode)
        if mode and self.encoder_is_frozen:
            self.encoder.eval()
        elif mode:
            for part in self.encoder.modules():
                weights = list(part.parameters())
                is_frozen = weights and not any(weight.requires_grad for weight in weights)
                if is_frozen and part not in self.adapted_parts:
                    part.eval()
        self._trained_state = self._training_state() if mode else None
        return self

    def _training_state(self) -> list[Any]:
        """Training mode and `requires_grad` flags of every module."""
        parts = (part.__dict__ for part in self.modules())
        return [
            (part["training"], *(weight.requires_grad for weight in part["_parameters"].values() if weight is not None))
            for part in parts
        ]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_chunks: torch.Tensor | None = None,
        chunk_vectors: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        chunk_lengths: Sequence[Sequence[int]] | None = None,
        rest_counts: torch.Tensor | None = None,
    ) -> HierarchicalOutput:
        """Classify documents.

        Args:
            input_ids: (N, L) token ids of the chunks, documents concatenated, right-padded.
            attention_mask: (N, L), 1 for real tokens (None: all are real).
            num_chunks: (B,) chunks of each document, summing to N.
            chunk_vectors: (N, D) cached output of `encode_chunks`; skips the encoder. Lexical features still need
                `input_ids`.
            labels: (B,) class ids; -100 excludes a document from the loss. With several labels a document, (B, K): 1 for
                each that it has, 0 for the others; -100 excludes a label.
            chunk_lengths: tokens of each chunk, per document, as Python ints. Redundant, but avoids a device sync.
            rest_counts: (B, M) counts of the lexical features in the rest of each document, which is not encoded (the
                policy `lexical`; None: nothing else is counted).
        """
        counts_words = self.lexical is not None and not self.training
        if num_chunks is None or (input_ids is None and (chunk_vectors is None or counts_words)):
            raise ValueError(
                "Pass `num_chunks` and either `input_ids` or `chunk_vectors`; in evaluation lexical features need "
                "`input_ids`."
            )
        lengths = None if chunk_lengths is None else [length for document in chunk_lengths for length in document]
        counts = host_counts(num_chunks) if chunk_lengths is None else [len(document) for document in chunk_lengths]
        chunk_ND = chunk_vectors
        if chunk_ND is None:
            assert input_ids is not None
            chunk_ND = self.encode_chunks(input_ids, attention_mask, lengths)
        logits_BK, chunk_weights_N = self.classify(
            chunk_ND, counts, self.lexical_counts(input_ids, counts, rest_counts)
        )
        loss = None if labels is None else self.loss(logits_BK, labels)
        return HierarchicalOutput(loss, logits_BK, chunk_weights_N, chunk_ND)

    def loss(self, logits_BK: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Unweighted loss, (); see `forward` for the labels."""
        if not self.config.is_multi_label:
            return nn.functional.cross_entropy(logits_BK, labels)
        known_BK = labels != -100
        loss_BK = nn.functional.binary_cross_entropy_with_logits(
            logits_BK, labels.to(logits_BK.dtype), known_BK.to(logits_BK.dtype), reduction="sum"
        )
        return loss_BK / known_BK.sum().clamp(min=1)

    def classify(
        self,
        chunk_ND: torch.Tensor,
        num_chunks_B: torch.Tensor | Sequence[int],
        count_BM: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chunk vectors from `encode_chunks` → `logits_BK` and `chunk_weights_N`, always in fp32.

        Args:
            count_BM: counts of the lexical features in the documents; their logits are added (see `combine`).
        """
        num_chunks_B = host_counts(num_chunks_B)
        with full_precision(chunk_ND.device):
            chunk_ND = (chunk_ND.float() - self.vector_mean) / self.vector_scale
            if self.chunk_transformer is not None:
                chunk_ND = self.chunk_transformer(chunk_ND, num_chunks_B)
            document_BD, chunk_weights_N = self.pooling(chunk_ND, num_chunks_B)
            logits_BK = self.classifier(self.dropout(document_BD))
            return self.combine(logits_BK, count_BM), chunk_weights_N

    def classify_subsets(self, chunk_CD: torch.Tensor, kept_SC: torch.Tensor) -> torch.Tensor:
        """`classify` of subsets of one document's chunks: the encoder's logits (S, K), without lexical features.

        Args:
            kept_SC: True where a subset contains a chunk; each contains at least one.
        """
        chunk_CD = (chunk_CD.float() - self.vector_mean) / self.vector_scale
        chunk_XCD = (
            chunk_CD[None] if self.chunk_transformer is None else self.chunk_transformer.of_subsets(chunk_CD, kept_SC)
        )
        return self.classifier(self.pooling.pool_subsets(chunk_XCD, kept_SC))

    def combine(self, encoder_BK: torch.Tensor, count_BM: torch.Tensor | None) -> torch.Tensor:
        """The sum of the encoder's logits and those of the lexical features, (B, K), each times its weight in the config."""
        if self.lexical is None or count_BM is None:
            return encoder_BK
        return self.config.encoder_weight * encoder_BK + self.config.lexical_weight * self.lexical(count_BM)

    def lexical_counts(
        self,
        input_ids_NL: torch.Tensor | None,
        num_chunks_B: Sequence[int],
        rest_BM: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Counts of the lexical features in the documents, (B, M); None without any, and in training: they know the training
        documents by heart, and would leave the encoder nothing to learn."""
        if self.lexical is None or self.training or input_ids_NL is None:
            return None
        count_BM = self.lexical.count(input_ids_NL, num_chunks_B, self.config.num_prefix_tokens)
        return count_BM if rest_BM is None else count_BM + rest_BM.to(count_BM)

    def encode_chunks(
        self,
        input_ids_NL: torch.Tensor,
        attention_mask_NL: torch.Tensor | None = None,
        lengths: list[int] | None = None,
    ) -> torch.Tensor:
        """Chunk vectors (N, D), computed in encoder batches of chunks of similar length, each trimmed to its longest.

        Chunks of 3, 8, 7 and 2 tokens with a `token_budget` of 16 make two batches: 8 and 7, then 3 and 2 tokens.

        Args:
            attention_mask_NL: 1 for real tokens (None: all are real).
            lengths: real tokens of each chunk, if known on the host.
        """
        if attention_mask_NL is None:
            attention_mask_NL = torch.ones_like(input_ids_NL)
        lengths = attention_mask_NL.sum(dim=1).tolist() if lengths is None else lengths
        plan = plan_encoder_batches(lengths, *self.encoder_batch_size(input_ids_NL.device), self.live_chunks)
        # Permute once and back again, so that batches are slices.
        order = [row for rows in plan for row in rows]
        order_N = to_device(torch.tensor(order), input_ids_NL.device)
        ids_NL, mask_NL = input_ids_NL[order_N], attention_mask_NL[order_N]
        keeps_graph = torch.is_grad_enabled() and not self.encoder_is_frozen
        recomputes = batches_to_recompute(plan, self.live_chunks if keeps_graph else 0)
        if self.agree_on_batches is not None:
            recomputes = self.agree_on_batches(recomputes)
        vectors: list[torch.Tensor] = []
        begin = 0
        with torch.set_grad_enabled(keeps_graph):
            for rows, recompute in zip(plan + [[]] * (len(recomputes) - len(plan)), recomputes, strict=True):
                ids_nl, mask_nl, lengths_n = ids_NL[:1, :2], mask_NL[:1, :2], [2]
                if rows:
                    batch, lengths_n = slice(begin, begin + len(rows)), [lengths[row] for row in rows]
                    ids_nl, mask_nl = ids_NL[batch, : lengths_n[0]], mask_NL[batch, : lengths_n[0]]
                    self.token_counts[0] += sum(lengths_n)
                    self.token_counts[1] += ids_nl.numel() - sum(lengths_n)
                    begin += len(rows)
                encode = recomputed(self.encode_batch, ids_nl.device) if recompute else self.encode_batch
                if keeps_graph and vectors and len(vectors) % BATCHES_PER_CAST == 0:
                    torch.clear_autocast_cache()
                vectors.append(encode(ids_nl, mask_nl, lengths_n))
        position_N = torch.empty(len(order), dtype=torch.long)
        position_N[torch.tensor(order)] = torch.arange(len(order))
        return torch.cat(vectors)[to_device(position_N, order_N.device)]

    def encode_batch(
        self, input_ids_nl: torch.Tensor, attention_mask_nl: torch.Tensor, lengths_n: list[int]
    ) -> torch.Tensor:
        """Chunk vectors (n, D) of one encoder batch, with gradients if enabled."""
        is_padded = sum(lengths_n) < input_ids_nl.numel()
        with attention_for(self.encoder, input_ids_nl.device):
            is_flash = "flash" in self.encoder.config._attn_implementation
            if is_padded and is_flash and self.config.encoder_config.model_type in UNPADDED:
                return encode_unpadded(
                    self.encoder, input_ids_nl, lengths_n, self.first_position, self.config.token_pooling
                )
            # A batch without padding needs no mask; without one attention uses its fastest kernel.
            mask_nl = attention_mask_nl if is_padded else None
            output = self.encoder(input_ids=input_ids_nl, attention_mask=mask_nl)
            # With sharded weights all ranks must start recomputing at the same point of the backward pass: this mask.
            mask_nl = attention_mask_nl if self.agree_on_batches else mask_nl
            return pool_tokens(output.last_hidden_state, self.config.token_pooling, mask_nl)


HierarchicalRobertaConfig.register_for_auto_class()
HierarchicalRobertaForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["HierarchicalOutput", "HierarchicalRobertaForSequenceClassification"]
