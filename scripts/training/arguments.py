"""Options in addition to `HierarchicalTrainingArguments`: model, data, search."""

from dataclasses import dataclass, field

# Options that change the chunk vectors, and those that change what is built on them.
CHUNK_OPTIONS = ("chunk_prefix", "token_pooling")
MODEL_OPTIONS = ("pooling", "pooling_size", "chunk_transformer_layers", "lexical_features")


@dataclass
class ModelArguments:
    """The encoder and what is built on it."""

    encoder: str = field(
        metadata={"help": "Encoder, or a trained model whose encoder is used: name on the hub or folder."}
    )
    encoder_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the encoder on the hub."})
    chunk_length: int = field(default=512, metadata={"help": "Tokens in a chunk, special tokens included."})
    chunk_overlap: int = field(default=0, metadata={"help": "Tokens that a chunk shares with the one before it."})
    max_chunks: int = field(default=20, metadata={"help": "Maximum number of chunks read per document."})
    chunk_policy: str = field(
        default="uniform", metadata={"help": "Past max_chunks: head, head_tail, uniform, random, lexical."}
    )
    chunk_prefix: str | None = field(
        default=None,
        metadata={
            "help": 'Text at the start of each chunk, such as "query: ". Default: what the encoder was pretrained with.'
        },
    )
    token_pooling: str | None = field(
        default=None,
        metadata={
            "help": "Tokens to chunk vector: mean, cls (the first token) or last (for decoders). Default: what the encoder was "
            "pretrained with."
        },
    )
    pooling: str = field(default="attention", metadata={"help": "attention, mean or max."})
    pooling_size: int | None = field(default=None, metadata={"help": "Width of the attention's hidden layer."})
    chunk_transformer_layers: int = field(default=0, metadata={"help": "Transformer layers over the chunk vectors."})
    lexical_features: int = field(
        default=0,
        metadata={"help": "Number of token-count features used in addition to the encoder. 0: none."},
    )
    lexical_weighting: str = field(
        default="auto",
        metadata={"help": "log, tfidf, or auto: the better of both on inner folds."},
    )
    dropout: float | None = field(
        default=None, metadata={"help": "All dropouts except attention dropout, encoder and head."}
    )
    attention_dropout: float | None = field(default=None, metadata={"help": "The encoder's attention dropout."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "The encoder's attention: sdpa (the default), flash_attention_2, eager."}
    )


@dataclass
class DataArguments:
    """The documents."""

    dataset_dir: str = field(metadata={"help": "A folder made by scripts.prepare_dataset."})
    train_source: str | None = field(
        default=None,
        metadata={
            "help": "With --streaming: CSV, JSONL, Parquet or the like with the columns of the source that was prepared, read "
            "in place of the prepared training split (which then tells labels, class weights and lengths). Default: that "
            "split."
        },
    )


@dataclass
class SearchArguments:
    """The search."""

    space: str = field(metadata={"help": "YAML file: option → list of choices, or {low, high[, log, step]}."})
    num_trials: int = field(default=30, metadata={"help": "Number of trials, those of earlier starts included."})
