"""The hierarchical classifier: an encoder reads each chunk, pooling makes a document of them, a head rates it.

    model = HierarchicalRobertaForSequenceClassification.from_encoder("FacebookAI/roberta-base", num_labels=3)

B documents, N chunks in the batch, L tokens of the batch's longest chunk, D hidden, M features of the lexical view (0
without one), K labels. Only real chunks enter: there are no padding chunks. This file travels to the hub with the model and imports only its siblings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_hierarchical_roberta import HierarchicalRobertaConfig
from .lexical import LexicalView
from .micro_batches import plan_micro_batches
from .pipeline import HierarchicalClassificationPipeline  # noqa: F401 (so that it travels with the model)
from .pooling import ChunkPooling, ChunkTransformer

# Names under which encoder configs keep their dropouts (BERT and its relatives, then DistilBERT, then ModernBERT).
HIDDEN_DROPOUTS = ("hidden_dropout_prob", "dropout", "embedding_dropout", "mlp_dropout")
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")


@dataclass
class HierarchicalOutput(ModelOutput):
    """What the model returns.

    Attributes:
        loss: (), unweighted cross entropy; only where `labels` were given.
        logits: (B, K).
        chunk_weights: (N,), how much each chunk weighed in the pooling; a document's sum to 1.
        chunk_vectors: (N, D + M), what was read of each chunk: the encoder's vector, and the lexical view's counts.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    chunk_weights: torch.Tensor | None = None
    chunk_vectors: torch.Tensor | None = None


def mean_of_tokens(token_NLD: torch.Tensor, attention_mask_NL: torch.Tensor) -> torch.Tensor:
    """Mean over each chunk's real tokens in fp32, (N, D): what sentence encoders such as MiniLM were trained for."""
    mask_NL = attention_mask_NL.to(torch.float32)
    return torch.einsum("nld,nl->nd", token_NLD.float(), mask_NL) / mask_NL.sum(dim=1, keepdim=True)


class HierarchicalRobertaForSequenceClassification(PreTrainedModel):
    """Classifies documents given as chunks; see `forward`.

    Attributes that are not saved, and change speed and memory but not the result:
        token_budget: tokens in a micro-batch of the encoder.
        live_chunks: at most so many chunks hold activations for the backward pass (0: no bound); the others are
            encoded again there, with their random state replayed. Gradients are the same to the bit, unless the bound
            is below the chunks of a micro-batch, which then gets smaller.
        encoded_tokens: [real, padding] tokens that the encoder was given so far, for the share of padding.
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
        # Identity, unless `standardize` says otherwise.
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
            self.lexical = LexicalView(vocab_size, config.lexical_features, config.num_labels)
        self.token_budget = 4096
        self.live_chunks = 0
        self.encoded_tokens = [0, 0]
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
        encoder_config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
        if encoder_config.is_encoder_decoder or not hasattr(encoder_config, "hidden_size"):
            raise ValueError(
                f"{name_or_path} is a {encoder_config.model_type!r} model; expected an encoder such as "
                "FacebookAI/roberta-base, with a hidden_size."
            )
        _set_dropout(encoder_config, HIDDEN_DROPOUTS, dropout)
        _set_dropout(encoder_config, ATTENTION_DROPOUTS, attention_dropout)
        # fp32 whatever the file holds: autocast lowers the precision of the arithmetic, never of the weights.
        encoder, loading = AutoModel.from_pretrained(
            name_or_path,
            config=encoder_config,
            revision=revision,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
        missing = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
        if missing:
            raise ValueError(
                f"{name_or_path} lacks {len(missing)} of the encoder's weights ({', '.join(missing[:3])}, …): "
                "they would stay random. Is it a checkpoint of another architecture?"
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

    def compile_layers(self) -> None:
        """`torch.compile` for each layer of the encoder, for chunks of any number and length."""
        for layer in self.encoder_layers():
            layer.compile(dynamic=True)

    @torch.no_grad()
    def standardize(self, document_BD: torch.Tensor) -> None:
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
        """As `nn.Module.train`, but the encoder's frozen parts stay in evaluation mode: what they give must not vary."""
        super().train(mode)
        if mode and self.encoder_is_frozen:
            self.encoder.eval()
        elif mode:
            for part in self.encoder.modules():
                weights = list(part.parameters())
                if weights and not any(weight.requires_grad for weight in weights):
                    part.eval()
        return self

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_chunks: torch.Tensor | None = None,
        chunk_vectors: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> HierarchicalOutput:
        """Rate documents.

        Args:
            input_ids: (N, L) token ids of the batch's chunks, documents one after the other, padded on the right.
            attention_mask: (N, L), 1 on real tokens (None: all of them are).
            num_chunks: (B,) chunks of each document; they sum to N.
            chunk_vectors: (N, D) that `encode_chunks` gave before; the encoder does not run. A lexical view still needs
                `input_ids`.
            labels: (B,) class ids, -100 to leave a document out of the loss.
        """
        needs_ids = chunk_vectors is None or self.lexical is not None
        if num_chunks is None or needs_ids != (input_ids is not None):
            raise ValueError(
                "Give num_chunks, and either input_ids or chunk_vectors (with a lexical view, input_ids too)."
            )
        chunk_NX = self.read_chunks(input_ids, attention_mask, chunk_vectors)
        logits_BK, chunk_weights_N = self.classify(chunk_NX, num_chunks)
        loss = None if labels is None else nn.functional.cross_entropy(logits_BK, labels)
        return HierarchicalOutput(loss, logits_BK, chunk_weights_N, chunk_NX)

    def classify(self, chunk_NX: torch.Tensor, num_chunks_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What was read of each chunk, (N, D + M) → `logits_BK` and `chunk_weights_N`. In fp32 always: it is cheap, and
        scores are read here."""
        hidden_size = self.config.hidden_size
        logits_BK, chunk_weights_N = self.classify_vectors(chunk_NX[:, :hidden_size], num_chunks_B)
        if self.lexical is not None:
            with torch.autocast(chunk_NX.device.type, enabled=False):
                logits_BK = logits_BK + self.lexical(chunk_NX[:, hidden_size:].float(), num_chunks_B)
        return logits_BK, chunk_weights_N

    def classify_vectors(self, chunk_ND: torch.Tensor, num_chunks_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `classify`, by what the encoder made of the chunks alone."""
        with torch.autocast(chunk_ND.device.type, enabled=False):
            chunk_ND = (chunk_ND.float() - self.vector_mean) / self.vector_scale
            if self.chunk_transformer is not None:
                chunk_ND = self.chunk_transformer(chunk_ND, num_chunks_B)
            document_BD, chunk_weights_N = self.pooling(chunk_ND, num_chunks_B)
            return self.classifier(self.dropout(document_BD)), chunk_weights_N

    def read_chunks(
        self,
        input_ids_NL: torch.Tensor | None,
        attention_mask_NL: torch.Tensor | None = None,
        chunk_ND: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `classify` needs of each chunk, (N, D + M): its vector, from `encode_chunks` where it is not given, and the
        counts of the lexical view where there is one."""
        if chunk_ND is None:
            assert input_ids_NL is not None
            mask_NL = torch.ones_like(input_ids_NL) if attention_mask_NL is None else attention_mask_NL
            chunk_ND = self.encode_chunks(input_ids_NL, mask_NL)
        if self.lexical is None or input_ids_NL is None:
            return chunk_ND
        return torch.cat([chunk_ND.float(), self.lexical.count(input_ids_NL)], dim=1)

    def encode_chunks(self, input_ids_NL: torch.Tensor, attention_mask_NL: torch.Tensor) -> torch.Tensor:
        """Chunk vectors (N, D), by micro-batches of chunks of like length, each trimmed to its own longest.

        Chunks of 3, 8, 7 and 2 tokens under a `token_budget` of 16 make two micro-batches: 8 and 7, then 3 and 2 tokens.
        """
        lengths = attention_mask_NL.sum(dim=1).tolist()
        plan = plan_micro_batches(lengths, self.token_budget, self.live_chunks)
        keeps_graph = torch.is_grad_enabled() and not self.encoder_is_frozen
        # The micro-batch that is being recomputed is alive in the backward pass beside those that were kept.
        most, live = max(map(len, plan)), 0
        is_bounded = keeps_graph and 0 < self.live_chunks < len(lengths)
        vectors = []
        with torch.set_grad_enabled(keeps_graph):
            for rows in plan:
                longest = lengths[rows[0]]
                ids_nl, mask_nl = input_ids_NL[rows, :longest], attention_mask_NL[rows, :longest]
                real = sum(lengths[row] for row in rows)
                self.encoded_tokens[0] += real
                self.encoded_tokens[1] += ids_nl.numel() - real
                live += len(rows)
                recompute = is_bounded and live + most > self.live_chunks
                encode = _recomputed(self.encode_micro_batch) if recompute else self.encode_micro_batch
                vectors.append(encode(ids_nl, mask_nl, ids_nl.numel() > real))
        chunk_ND = torch.cat(vectors)
        order = torch.tensor([row for rows in plan for row in rows], device=chunk_ND.device)
        return chunk_ND[torch.argsort(order)]

    def encode_micro_batch(
        self, input_ids_nl: torch.Tensor, attention_mask_nl: torch.Tensor, is_padded: bool
    ) -> torch.Tensor:
        """Chunk vectors (n, D) of one micro-batch, with gradients where they are enabled."""
        if is_padded and "flash" in self.encoder.config._attn_implementation:
            return self._encode_unpadded(input_ids_nl, attention_mask_nl)
        # Without a mask attention takes its fastest path, and a micro-batch without padding needs none.
        output = self.encoder(input_ids=input_ids_nl, attention_mask=attention_mask_nl if is_padded else None)
        return mean_of_tokens(output.last_hidden_state, attention_mask_nl)

    def _encode_unpadded(self, input_ids_nl: torch.Tensor, attention_mask_nl: torch.Tensor) -> torch.Tensor:
        """The chunks as one row of real tokens; flash attention keeps them apart by their cumulative lengths.

        As `DataCollatorWithFlattening` in transformers, which does it for whole batches.
        """
        is_real_nl = attention_mask_nl.bool()
        lengths_n = attention_mask_nl.sum(dim=1)
        ends_n = nn.functional.pad(lengths_n.cumsum(0), (1, 0)).to(torch.int32)
        longest = input_ids_nl.shape[1]
        position_nl = torch.arange(longest, device=input_ids_nl.device).expand_as(input_ids_nl) + self.first_position
        output = self.encoder(
            input_ids=input_ids_nl[is_real_nl][None],
            position_ids=position_nl[is_real_nl][None],
            cu_seq_lens_q=ends_n,
            cu_seq_lens_k=ends_n,
            max_length_q=longest,
            max_length_k=longest,
        )
        row_t = torch.arange(len(lengths_n), device=lengths_n.device).repeat_interleave(lengths_n)
        token_td = output.last_hidden_state[0].float()
        sum_nd = token_td.new_zeros(len(lengths_n), token_td.shape[1]).index_add(0, row_t, token_td)
        return sum_nd / lengths_n[:, None]


def _recomputed(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`function`, keeping no activations: the backward pass runs it again, with the same random numbers."""
    return lambda *args: checkpoint(function, *args, use_reentrant=False, preserve_rng_state=True)


def _set_dropout(encoder_config: Any, names: tuple[str, ...], value: float | None) -> None:
    if value is None:
        return
    if not 0 <= value < 1:
        raise ValueError(f"A dropout must be in [0, 1), and is {value}.")
    present = [name for name in names if hasattr(encoder_config, name)]
    if not present and value > 0:
        raise ValueError(f"The encoder ({encoder_config.model_type}) has none of the dropouts {', '.join(names)}.")
    for name in present:
        setattr(encoder_config, name, value)


HierarchicalRobertaConfig.register_for_auto_class()
HierarchicalRobertaForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["HierarchicalOutput", "HierarchicalRobertaForSequenceClassification"]
