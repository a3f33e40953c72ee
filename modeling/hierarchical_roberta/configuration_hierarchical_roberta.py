"""Configuration of a hierarchical classifier: the encoder's own config, the chunk geometry, the pooling.

The geometry is saved with the weights, so training, evaluation and prediction always agree on it.
Pushed to the hub with the model; imports nothing else from the project.
"""

from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

CHUNK_POLICIES = ("head", "head_tail", "uniform", "random", "lexical")
TOKEN_POOLINGS = ("mean", "cls", "last")
POOLINGS = ("attention", "mean", "max")
LEXICAL_WEIGHTINGS = ("log", "tfidf")
PROBLEM_TYPES = (None, "single_label_classification", "multi_label_classification")
NOT_NEGATIVE = (("chunk_transformer_layers", 0), ("lexical_features", 0))


class HierarchicalRobertaConfig(PreTrainedConfig):
    """Configuration of a hierarchical classifier.

    Args:
        encoder_config: config of the chunk encoder, from `AutoConfig`, or its dict. Defaults to RoBERTa.
        chunk_length: tokens in a chunk, special tokens included.
        chunk_overlap: tokens that a chunk shares with the previous one.
        max_chunks: maximum number of chunks read per document.
        chunk_policy: which chunks to encode when a document has more than `max_chunks`: the first (`head`), half from
            each end (`head_tail`), evenly spaced (`uniform`), a new random sample each epoch in training and evenly
            spaced in evaluation (`random`), or the most telling ones by their lexical features (`lexical`, see
            `LexicalFeatures.select`), which are then counted in all chunks, encoded or not.
        chunk_prefix: text put at the start of each chunk, as the encoder was pretrained with ("query: " for E5). Its
            tokens count toward `chunk_length`. `from_encoder` knows that of many encoders, and their `token_pooling`.
        num_prefix_tokens: tokens of each chunk before its text, special tokens included, which lexical features do not
            count. Set in training, from the tokenizer.
        token_pooling: token vectors → chunk vector: the `mean` over all real tokens, the first token's (`cls`), or the
            last real token's (`last`, for decoders). Take the one that the encoder was pretrained with.
        equal_lengths: encode only chunks of equal length together, since the encoder's vectors depend on padding. Found out
            by `from_encoder`.
        pooling: chunk vectors → document vector: learned `attention` (Yang et al. 2016), `mean` or `max`.
        pooling_size: width of the attention's hidden layer (None: the encoder's hidden size).
        chunk_transformer_layers: layers of a transformer over the chunk vectors, before pooling (0: none).
        lexical_features: maximum number of tokens and pairs of tokens whose counts over the chunks read are used as
            additional features (see lexical_features.py; 0: none).
        lexical_weighting: `log` or `tfidf`, see `LexicalFeatures`.
        encoder_weight, lexical_weight: weights of the encoder's logits and of those of the lexical features in their sum,
            fitted on the validation documents.
        classifier_dropout: dropout before the classifier and in the chunk transformer.
        temperature: divisor of the logits before the softmax, fitted on the validation documents (None: not fitted).
        class_biases: biases of the classes, in the order of the labels, that are added to the log scores to decide for a
            label, fitted on the validation documents (None: the label with the highest score).
        decision_metric: what `class_biases` or `thresholds` were fitted for, e.g. `f1_macro` or `recall_Mature=0.95`.
        problem_type: `multi_label_classification` if a document may have several labels, otherwise one.
        label_calibration: with several labels, slope and intercept of each label's calibrated logit (see `MultiLabelDecision`),
            fitted on the validation documents (None: not fitted).
        thresholds: with several labels, the score from which a document has each label, fitted on the validation documents
            (None: 0.5).

    Raises:
        ValueError: an invalid geometry, name or value.
    """

    model_type = "hierarchical_roberta"
    sub_configs = {"encoder_config": AutoConfig}

    # Declared, since newer releases of transformers refuse to save a config with a parameter of generation that is no field.
    temperature: float | None = None

    # Written out, though newer releases of transformers would generate it from fields: the older ones would not.
    def __init__(
        self,
        *,
        encoder_config: dict[str, Any] | PreTrainedConfig | None = None,
        chunk_length: int = 512,
        chunk_overlap: int = 0,
        max_chunks: int = 20,
        chunk_policy: Literal["head", "head_tail", "uniform", "random", "lexical"] = "uniform",
        chunk_prefix: str = "",
        num_prefix_tokens: int = 0,
        token_pooling: Literal["mean", "cls", "last"] = "mean",  # noqa: S107 (tokens of a text, no password)
        equal_lengths: bool = False,
        pooling: Literal["attention", "mean", "max"] = "attention",
        pooling_size: int | None = None,
        chunk_transformer_layers: int = 0,
        lexical_features: int = 0,
        lexical_weighting: Literal["log", "tfidf"] = "log",
        encoder_weight: float = 1.0,
        lexical_weight: float = 1.0,
        classifier_dropout: float = 0.1,
        initializer_range: float = 0.02,
        temperature: float | None = None,
        class_biases: list[float] | None = None,
        decision_metric: str | None = None,
        label_calibration: list[list[float]] | None = None,
        thresholds: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(encoder_config, PreTrainedConfig):
            encoder_config = AutoConfig.for_model(**{"model_type": "roberta", **(encoder_config or {})})
        self.encoder_config: PreTrainedConfig = encoder_config
        self.chunk_length = chunk_length
        self.chunk_overlap = chunk_overlap
        self.max_chunks = max_chunks
        self.chunk_policy = chunk_policy
        self.chunk_prefix = chunk_prefix
        self.num_prefix_tokens = num_prefix_tokens
        self.token_pooling = token_pooling
        self.equal_lengths = equal_lengths
        self.pooling = pooling
        self.pooling_size = pooling_size
        self.chunk_transformer_layers = chunk_transformer_layers
        self.lexical_features = lexical_features
        self.lexical_weighting = lexical_weighting
        self.encoder_weight, self.lexical_weight = encoder_weight, lexical_weight
        self.classifier_dropout = classifier_dropout
        self.initializer_range = initializer_range
        self.temperature = temperature
        self.class_biases, self.decision_metric = class_biases, decision_metric
        self.label_calibration, self.thresholds = label_calibration, thresholds
        super().__init__(**kwargs)  # last: it passes the attention implementation on to the encoder's config
        # The class that `transformers.pipeline("text-classification")` loads for this model.
        impl = "pipeline.HierarchicalClassificationPipeline"
        self.custom_pipelines = {
            "text-classification": {"impl": impl, "pt": ["AutoModelForSequenceClassification"], "type": "text"}
        }
        for name, choices in (
            ("chunk_policy", CHUNK_POLICIES),
            ("token_pooling", TOKEN_POOLINGS),
            ("pooling", POOLINGS),
            ("lexical_weighting", LEXICAL_WEIGHTINGS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name, minimum in (("chunk_length", 3), ("chunk_overlap", 0), ("max_chunks", 1), *NOT_NEGATIVE):
            if getattr(self, name) < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {getattr(self, name)}.")
        if self.chunk_policy == "lexical" and not self.lexical_features:
            raise ValueError(
                "`chunk_policy` lexical needs `lexical_features`: set, for example, --lexical_features 1000."
            )
        if self.pooling_size is not None and self.pooling_size < 1:
            raise ValueError(f"`pooling_size` must be at least 1, got {self.pooling_size}.")
        if self.chunk_overlap >= self.chunk_length - 2:
            raise ValueError(
                f"`chunk_overlap` ({self.chunk_overlap}) must be below `chunk_length` - 2 ({self.chunk_length - 2}): "
                "lower it or raise `chunk_length`."
            )
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}.")
        if self.problem_type not in PROBLEM_TYPES:
            raise ValueError(f"`problem_type` must be one of {PROBLEM_TYPES[1:]}, got {self.problem_type!r}.")
        for name in ("class_biases", "label_calibration", "thresholds"):
            if (values := getattr(self, name)) is not None and len(values) != self.num_labels:
                raise ValueError(
                    f"`{name}` must have an entry for each of the {self.num_labels} labels, got {str(values)[:200]}."
                )
        if not 0 <= self.classifier_dropout < 1:
            raise ValueError(f"`classifier_dropout` must be in [0, 1), got {self.classifier_dropout}.")

    @property
    def is_multi_label(self) -> bool:
        """Whether a document may have several labels."""
        return self.problem_type == PROBLEM_TYPES[-1]

    @property
    def hidden_size(self) -> int:
        """Width D of chunk and document vectors: the encoder's."""
        return self.encoder_config.hidden_size


__all__ = ["HierarchicalRobertaConfig"]
