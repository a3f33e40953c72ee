"""The hierarchical classifier: an encoder reads each chunk, pooling makes a document of them, a head rates it.

    model = HierarchicalRobertaForSequenceClassification.from_encoder("FacebookAI/roberta-base", num_labels=3)

B documents, N chunks in the batch, L tokens of the batch's longest chunk, D hidden, M features of the lexical view (0
without one), K labels. Only real chunks enter: there are no padding chunks. This file travels to the hub with the model and imports only its siblings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_hierarchical_roberta import HierarchicalRobertaConfig
from .encoder_batches import batches_to_recompute, plan_encoder_batches
from .encoders import attention_for, encode_unpadded, load_encoder
from .lexical_features import LexicalFeatures
from .pipeline import HierarchicalClassificationPipeline  # noqa: F401 (so that it travels with the model)
from .pooling import ChunkPooling, ChunkTransformer, host_counts, mean_of_tokens, to_device
from .precision import full_precision
from .recomputation import recomputed

# Encoder batches whose weights' gradients are added up in half precision, before their sum is added in fp32: with many
# more the sum loses what the terms have (docs/log.md).
BATCHES_PER_CAST = 8


@dataclass
class HierarchicalOutput(ModelOutput):
    """What the model returns.

    Attributes:
        loss: (), unweighted cross entropy; only where `labels` were given.
        logits: (B, K).
        chunk_weights: (N,), how much each chunk weighed in the pooling; a document's sum to 1.
        chunk_features: (N, D + M), what `classify` takes: the encoder's `chunk_vectors` (N, D), followed by the counts of
            the lexical features.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    chunk_weights: torch.Tensor | None = None
    chunk_features: torch.Tensor | None = None


class HierarchicalRobertaForSequenceClassification(PreTrainedModel):
    """Classifies documents given as chunks; see `forward`.

    Attributes that are not saved, and change speed and memory but not the result:
        token_budget, batch_cost: what makes up an encoder batch (see `plan_encoder_batches`). None: what suits the device,
            see `encoder_batch_size`.
        live_chunks: at most so many chunks hold activations for the backward pass (0: no bound); the others are
            recomputed there, with their random state replayed. Unless the bound is below the chunks of an encoder
            batch, which then gets smaller, the gradients are the same: to the bit on a CPU, and on CUDA where
            `torch.use_deterministic_algorithms` is on, since attention adds up in no fixed order there otherwise.
        agree_on_batches: where weights are sharded, this rank's encoder batches (is each recomputed?) → all ranks' (see
            modeling/training/sharding.py). A rank with fewer runs two tokens in place of each that it lacks, which nothing reads.
        token_counts: [real, padding] tokens that the encoder was given so far, for the share of padding.
    """

    config_class = HierarchicalRobertaConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Trainer asks: the loss of `forward` is a plain mean and knows nothing of gradient accumulation.
    accepts_loss_kwargs = False

    def __init__(self, config: HierarchicalRobertaConfig):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config)
        # The pooler reads the first token only and would be dead weight (and unused parameters under DDP).
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None
        # Identity, unless `fit_feature_scaler` says otherwise.
        self.register_buffer("vector_mean", torch.zeros(config.hidden_size))
        self.register_buffer("vector_scale", torch.ones(config.hidden_size))
        self.chunk_transformer = None
        if config.chunk_transformer_layers:
            heads = config.encoder_config.num_attention_heads  # type: ignore[union-attr]
            self.chunk_transformer = ChunkTransformer(
                config.hidden_size, heads, config.chunk_transformer_layers, config.classifier_dropout
            )
        self.pooling = ChunkPooling(config.pooling, config.hidden_size, config.pooling_size or config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.lexical = None
        if config.lexical_features:
            vocab_size = config.encoder_config.vocab_size  # type: ignore[union-attr]
            self.lexical = LexicalFeatures(vocab_size, config.lexical_features, config.num_labels)
        self.token_budget: int | None = None
        self.batch_cost: int | None = None
        self.live_chunks = 0
        self.agree_on_batches: Callable[[list[bool]], list[bool]] | None = None
        self._trained_state: list[Any] | None = None
        self.token_counts = [0, 0]
        self.post_init()
        if self.lexical is not None:
            # Training begins at what the words say: random logits beside them would only disturb.
            nn.init.zeros_(self.classifier.weight)

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
        """A classifier with a pretrained encoder and a new head.

        Args:
            name_or_path: an encoder that `AutoModel` loads, on the hub or in a folder.
            dropout: every dropout but attention's, in encoder and head (None: as the encoder has it, head 0.1).
            attention_dropout: the encoder's attention dropout (None: as the encoder has it).
            attn_implementation: the encoder's attention, in transformers' names (None: its default, sdpa where there is).
            revision: branch, tag or commit of the encoder on the hub.
            config: fields of `HierarchicalRobertaConfig`, `num_labels` or `id2label` among them.

        Raises:
            ValueError: the encoder cannot be used, or its file lacks weights that it needs.
            OSError: there is no such encoder, or it cannot be reached.
        """
        encoder = load_encoder(
            name_or_path,
            dropout=dropout,
            attention_dropout=attention_dropout,
            attn=attn_implementation,
            revision=revision,
        )
        if dropout is not None:
            config.setdefault("classifier_dropout", dropout)
        model = cls(HierarchicalRobertaConfig(encoder_config=encoder.config.to_dict(), **config))
        if attn_implementation is not None:
            model.encoder.set_attn_implementation(attn_implementation)
        weights = {name: value for name, value in encoder.state_dict().items() if not name.startswith("pooler.")}
        model.encoder.load_state_dict(weights)
        model.check_chunk_length()
        return model

    @property
    def first_position(self) -> int:
        """The number of a chunk's first position: RoBERTa's family counts from padding_idx + 1."""
        table = getattr(getattr(self.encoder, "embeddings", None), "position_embeddings", None)
        padding_idx = getattr(table, "padding_idx", None)
        return 0 if padding_idx is None else padding_idx + 1

    @property
    def encoder_positions(self) -> int:
        """The longest chunk that the encoder's positions allow, in tokens."""
        positions = getattr(self.config.encoder_config, "max_position_embeddings", None)
        return (positions or 10**9) - self.first_position

    def check_chunk_length(self) -> None:
        """Raises ValueError if a chunk is longer than the encoder can read."""
        if self.config.chunk_length > self.encoder_positions:
            raise ValueError(
                f"chunk_length ({self.config.chunk_length}) is beyond the encoder's {self.encoder_positions} "
                "positions: lower chunk_length."
            )

    def count_trainable_parameters(self) -> int:
        """How many numbers an optimizer would change."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def freeze_encoder(self) -> None:
        """Train pooling and head only; the encoder's dropout is off from now on."""
        self.encoder.requires_grad_(False)
        self.train(self.training)

    def freeze_layers(self, num_layers: int) -> None:
        """Freeze the embeddings and the encoder's first `num_layers` layers, dropout included (0: nothing).

        Nothing of them is kept for the backward pass, which ends where they begin.

        Raises:
            ValueError: there are not so many layers, or they cannot be told.
        """
        if num_layers == 0:
            return
        layers, embeddings = self.encoder_layers(), getattr(self.encoder, "embeddings", None)
        if not 0 < num_layers <= len(layers) or embeddings is None:
            raise ValueError(
                f"freeze_layers must be from 0 to the encoder's {len(layers)} layers, and is {num_layers}."
            )
        for part in (embeddings, *layers[:num_layers]):
            part.requires_grad_(False)
        self.train(self.training)

    def encoder_layers(self) -> list[nn.Module]:
        """The encoder's stack of layers, first to last; empty where it cannot be told."""
        depth = getattr(self.config.encoder_config, "num_hidden_layers", 0)
        stacks = [part for part in self.encoder.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
        return list(stacks[0]) if stacks else []

    # FSDP2 gives a model that it shards a class of its own, whose code would be saved in place of this file.
    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', as this class, whatever the model's is meanwhile."""
        given, self.__class__ = self.__class__, HierarchicalRobertaForSequenceClassification
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = given

    def encoder_batch_size(self, device: torch.device | None = None) -> tuple[int, int]:
        """The tokens of an encoder batch, and what one costs beside its tokens, in tokens.

        On a GPU a batch costs as much as thousands of tokens (computed from the launches of RoBERTa-base, not measured
        yet: `python -m scripts.benchmark.gpu`), on a CPU as few (docs/log.md). Where live chunks are bounded batches
        stay small, since the one that is recomputed takes its room from those that are kept.

        Args:
            device: None for the model's own.
        """
        on_cpu = (device or self.device).type == "cpu"
        token_budget = self.token_budget or (4096 if on_cpu or self.live_chunks else 16384)
        return token_budget, self.batch_cost or (64 if on_cpu else 2048)

    def compile_layers(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """`torch.compile` for each layer of the encoder, for chunks of any number and length."""
        # Mask or none, one chunk or several, training or not, autocast or not: a graph each. torch gives up at 8.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        for layer in self.encoder_layers():
            layer.compile(dynamic=True, backend=backend)

    @torch.no_grad()
    def fit_feature_scaler(self, document_BD: torch.Tensor) -> None:
        """Shift and scale chunk vectors from now on so that these documents' mean vectors have mean 0 and deviation 1.

        A frozen encoder's features differ in scale by orders of magnitude, and some are constant: a head on them as
        they are learns slowly and then overfits (figures in docs/log.md).
        """
        deviation_D = document_BD.float().std(dim=0)
        self.vector_mean.copy_(document_BD.float().mean(dim=0))
        self.vector_scale.copy_(torch.where(deviation_D > 1e-4, deviation_D, torch.ones_like(deviation_D)))

    @property
    def encoder_is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.encoder.parameters())

    def train(self, mode: bool = True) -> "HierarchicalRobertaForSequenceClassification":
        """As `nn.Module.train`, but the encoder's frozen parts stay in evaluation mode: what they give must not vary.

        Trainer calls it before every micro-batch: where nothing has changed since, it does nothing.
        """
        if mode and self._trained_state == self._training_state():
            return self
        super().train(mode)
        if mode and self.encoder_is_frozen:
            self.encoder.eval()
        elif mode:
            for part in self.encoder.modules():
                weights = list(part.parameters())
                if weights and not any(weight.requires_grad for weight in weights):
                    part.eval()
        self._trained_state = self._training_state() if mode else None
        return self

    def _training_state(self) -> list[Any]:
        """Of every part: its mode, and which of its own weights are trained."""
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
    ) -> HierarchicalOutput:
        """Classify documents.

        Args:
            input_ids: (N, L) token ids of the batch's chunks, documents one after the other, padded on the right.
            attention_mask: (N, L), 1 on real tokens (None: all of them are).
            num_chunks: (B,) chunks of each document; they sum to N.
            chunk_vectors: (N, D) that `encode_chunks` gave before; the encoder does not run. A lexical view still needs
                `input_ids`.
            labels: (B,) class ids, -100 to leave a document out of the loss.
            chunk_lengths: of each document the tokens of each chunk. The tensors say the same; with Python's numbers
                the host need not wait for the device to learn them.
        """
        needs_ids = chunk_vectors is None or self.lexical is not None
        if num_chunks is None or needs_ids != (input_ids is not None):
            raise ValueError(
                "Give num_chunks, and either input_ids or chunk_vectors (with a lexical view, input_ids too)."
            )
        lengths = None if chunk_lengths is None else [length for document in chunk_lengths for length in document]
        counts = host_counts(num_chunks) if chunk_lengths is None else [len(document) for document in chunk_lengths]
        chunk_NX = self.extract_features(input_ids, attention_mask, chunk_vectors, lengths)
        logits_BK, chunk_weights_N = self.classify(chunk_NX, counts)
        loss = None if labels is None else nn.functional.cross_entropy(logits_BK, labels)
        return HierarchicalOutput(loss, logits_BK, chunk_weights_N, chunk_NX)

    def classify(
        self, chunk_NX: torch.Tensor, num_chunks_B: torch.Tensor | Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What was read of each chunk, (N, D + M) → `logits_BK` and `chunk_weights_N`. In fp32 always: it is cheap, and
        scores are read here."""
        hidden_size = self.config.hidden_size
        logits_BK, chunk_weights_N = self.classify_vectors(chunk_NX[:, :hidden_size], num_chunks_B)
        if self.lexical is not None:
            with full_precision(chunk_NX.device):
                logits_BK = logits_BK + self.lexical(chunk_NX[:, hidden_size:].float(), num_chunks_B)
        return logits_BK, chunk_weights_N

    def classify_vectors(
        self, chunk_ND: torch.Tensor, num_chunks_B: torch.Tensor | Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `classify`, by what the encoder made of the chunks alone."""
        num_chunks_B = host_counts(num_chunks_B)
        with full_precision(chunk_ND.device):
            chunk_ND = (chunk_ND.float() - self.vector_mean) / self.vector_scale
            if self.chunk_transformer is not None:
                chunk_ND = self.chunk_transformer(chunk_ND, num_chunks_B)
            document_BD, chunk_weights_N = self.pooling(chunk_ND, num_chunks_B)
            return self.classifier(self.dropout(document_BD)), chunk_weights_N

    def extract_features(
        self,
        input_ids_NL: torch.Tensor | None,
        attention_mask_NL: torch.Tensor | None = None,
        chunk_ND: torch.Tensor | None = None,
        lengths: list[int] | None = None,
    ) -> torch.Tensor:
        """What `classify` needs of each chunk, (N, D + M): its vector, from `encode_chunks` where it is not given, and the
        counts of the lexical view where there is one."""
        if chunk_ND is None:
            assert input_ids_NL is not None
            mask_NL = torch.ones_like(input_ids_NL) if attention_mask_NL is None else attention_mask_NL
            chunk_ND = self.encode_chunks(input_ids_NL, mask_NL, lengths)
        if self.lexical is None or input_ids_NL is None:
            return chunk_ND
        return torch.cat([chunk_ND.float(), self.lexical.count(input_ids_NL)], dim=1)

    def encode_chunks(
        self, input_ids_NL: torch.Tensor, attention_mask_NL: torch.Tensor, lengths: list[int] | None = None
    ) -> torch.Tensor:
        """Chunk vectors (N, D), by encoder batches of chunks of like length, each trimmed to its own longest.

        Chunks of 3, 8, 7 and 2 tokens under a `token_budget` of 16 make two batches: 8 and 7, then 3 and 2 tokens.

        Args:
            lengths: real tokens of each chunk, where the host knows them.
        """
        lengths = attention_mask_NL.sum(dim=1).tolist() if lengths is None else lengths
        plan = plan_encoder_batches(lengths, *self.encoder_batch_size(input_ids_NL.device), self.live_chunks)
        # One permutation there and one back: the batches in between are slices.
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
        place_N = torch.empty(len(order), dtype=torch.long)
        place_N[torch.tensor(order)] = torch.arange(len(order))
        return torch.cat(vectors)[to_device(place_N, order_N.device)]

    def encode_batch(
        self, input_ids_nl: torch.Tensor, attention_mask_nl: torch.Tensor, lengths_n: list[int]
    ) -> torch.Tensor:
        """Chunk vectors (n, D) of one encoder batch, with gradients where they are enabled."""
        is_padded = sum(lengths_n) < input_ids_nl.numel()
        with attention_for(self.encoder, input_ids_nl.device):
            if is_padded and "flash" in self.encoder.config._attn_implementation:
                return encode_unpadded(self.encoder, input_ids_nl, lengths_n, self.first_position)
            # Without a mask attention takes its fastest path, and a batch without padding needs none.
            mask_nl = attention_mask_nl if is_padded else None
            output = self.encoder(input_ids=input_ids_nl, attention_mask=mask_nl)
            # Where ranks recompute together all must begin at the same point of the backward pass: at this mask.
            return mean_of_tokens(output.last_hidden_state, attention_mask_nl if self.agree_on_batches else mask_nl)


HierarchicalRobertaConfig.register_for_auto_class()
HierarchicalRobertaForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["HierarchicalOutput", "HierarchicalRobertaForSequenceClassification"]
