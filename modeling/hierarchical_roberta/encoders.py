"""Loading encoders, and the differences between their dropouts and attention implementations.

n chunks of an encoder batch, l tokens of its longest chunk, t real tokens in total, d hidden.
Pushed to the hub with the model; imports only its siblings.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .configuration_hierarchical_roberta import HierarchicalRobertaConfig
from .pooling import to_device

logger = logging.get_logger(__name__)

# Dropout fields of an encoder's config that are none of the encoder's: of heads, and of whole layers.
NO_DROPOUTS = ("classifier", "summary", "layerdrop")
# Attention implementations without dropout (transformers 5.23 warns for some encoders only).
WITHOUT_DROPOUT = ("flash_attention_3", "flash_attention_4", "flash-attn3", "flash-attn4", "flex_attention")

# Families whose code passes cumulative lengths on to attention and takes positions, so that chunks can be encoded as one
# unpadded row; tests/test_encoder_families.py tries each.
UNPADDED = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


def trained_config(name_or_path: str, revision: str = "main") -> HierarchicalRobertaConfig | None:
    """The config of a trained classifier, None for an encoder. Read from config.json: code saved with a model never runs.

    Raises:
        OSError: neither exists, or it cannot be downloaded.
    """
    content, _ = PreTrainedConfig.get_config_dict(name_or_path, revision=revision)
    is_trained = content.get("model_type") == HierarchicalRobertaConfig.model_type
    return HierarchicalRobertaConfig.from_dict(content) if is_trained else None


def load_encoder(
    name_or_path: str,
    *,
    dropout: float | None,
    attention_dropout: float | None,
    attn: str | None,
    revision: str,
    classifier: type[PreTrainedModel],
) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
    """Config and weights in fp32 of a pretrained encoder, or of that of a trained `classifier`; see `from_encoder`.

    Raises:
        ValueError: unsupported encoder, or its checkpoint lacks weights.
        OSError: the encoder does not exist or cannot be downloaded.
    """
    trained: Any = trained_config(name_or_path, revision)
    if trained is None:
        encoder_config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    else:
        encoder_config = trained.encoder_config
    if not hasattr(encoder_config, "hidden_size"):
        raise ValueError(
            f"{name_or_path} is a {encoder_config.model_type!r} model; expected an encoder such as "
            "FacebookAI/roberta-base, with a hidden_size."
        )
    set_dropouts(encoder_config, dropout, attention_dropout)
    check_attention(encoder_config, attn)
    if getattr(encoder_config, "attention_type", None) == "block_sparse":
        # BigBird's attention gives way to full attention for good at the first short chunk.
        encoder_config.attention_type = "original_full"
    # Master weights are fp32 whatever the checkpoint's dtype; autocast lowers the precision of the arithmetic only.
    model, loading = (AutoModel if trained is None else classifier).from_pretrained(
        name_or_path,
        config=trained or encoder_config,
        revision=revision,
        dtype=torch.float32,
        output_loading_info=True,
        trust_remote_code=False,
    )
    encoder = text_encoder(model) if trained is None else model.encoder
    ours = "" if encoder is model else "encoder."
    missing = sorted({f"{ours}{name}" for name in encoder.state_dict()} & set(loading["missing_keys"]))
    if missing:
        raise ValueError(
            f"{name_or_path} lacks {len(missing)} of the encoder's weights ({', '.join(missing[:3])}, …), which would "
            "stay randomly initialized. Is it a checkpoint of another architecture?"
        )
    return encoder_config, encoder.state_dict()


def text_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that reads: the encoder of an encoder-decoder, without its pooler."""
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    if not isinstance(encoder, PreTrainedModel):
        raise ValueError(f"The encoder ({model.config.model_type}) cannot be used without its decoder: choose another.")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = nn.Identity()  # some encoders call it in any case
    encoder.config.use_cache = False  # of decoders, for generation
    return encoder


def set_dropouts(encoder_config: Any, dropout: float | None, attention_dropout: float | None) -> None:
    """Set every dropout of an encoder but those of attention to `dropout`, and those to `attention_dropout` (None: leave
    unchanged). A `dropout` of 0 switches off the noise of experts' routers, too. Layer drop is always off: the weights of
    a dropped layer get no gradients, which DDP refuses.

    Raises:
        ValueError: not a probability, or the config has no such dropout.
    """
    for value, of_attention in ((dropout, False), (attention_dropout, True)):
        if value is None:
            continue
        if not 0 <= value < 1:
            raise ValueError(f"Dropout must be in [0, 1), got {value}.")
        dropouts = list(dropout_fields(encoder_config))
        fields = [field for field in dropouts if ("att" in field[1]) == of_attention]
        # Where one dropout is that of attention too (T5), attention cannot have another.
        if not fields and (value > 0 or any(getattr(*field) > 0 for field in dropouts)):
            kind, option = (
                ("attention dropout of its own", "attention_dropout") if of_attention else ("dropout", "dropout")
            )
            raise ValueError(
                f"The encoder ({encoder_config.model_type}) has no {kind} in its config: leave --{option} out."
            )
        for part, name in fields:
            try:
                setattr(part, name, type(getattr(part, name))(value) if value == 0 else value)
            except Exception as error:  # MPT declares one to be an integer
                raise ValueError(
                    f"The encoder ({encoder_config.model_type}) refuses `{name}` {value}: {str(error).splitlines()[-1].strip()}"
                ) from error
    for name in vars(encoder_config):
        if name.endswith("layerdrop") or (dropout == 0 and "jitter" in name):
            setattr(encoder_config, name, 0.0)


def dropout_fields(config: Any) -> Iterator[tuple[Any, str]]:
    """The dropouts of an encoder's config, as its (sub-)config and their name there: `resid_pdrop`, `dropout_rate`, …"""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from dropout_fields(value)
        elif "drop" in name and type(value) in (int, float) and not any(part in name for part in NO_DROPOUTS):
            yield config, name


def check_attention(encoder_config: Any, attn_implementation: str | None) -> None:
    """Raise ValueError if the attention implementation would ignore the encoder's attention dropout."""
    dropout = max((getattr(part, name) for part, name in dropout_fields(encoder_config) if "att" in name), default=0)
    if dropout > 0 and any(name in (attn_implementation or "") for name in WITHOUT_DROPOUT):
        raise ValueError(
            f"{attn_implementation} applies no dropout, but the encoder's attention dropout is {dropout:g}: set "
            "--attention_dropout 0 or use flash_attention_2 or sdpa."
        )


@contextmanager
def attention_for(encoder: Any, device: torch.device) -> Iterator[None]:
    """Fall back from flash attention, which needs fp16 or bf16, to sdpa in fp32."""
    chosen = encoder.config._attn_implementation
    half = (torch.float16, torch.bfloat16)
    if "flash" not in chosen or torch.is_autocast_enabled(device.type) or encoder.dtype in half:
        yield
        return
    encoder.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        encoder.config._attn_implementation = chosen


def encode_unpadded(
    encoder: Any, input_ids_nl: torch.Tensor, lengths_n: list[int], first_position: int, kind: str
) -> torch.Tensor:
    """Chunk vectors, (n, d), as of `pool_tokens`, encoding the chunks as one unpadded row separated by cumulative lengths.

    Like `DataCollatorWithFlattening` in transformers, but per encoder batch. Indices are computed on the host, which
    knows the lengths.
    """
    device, longest = input_ids_nl.device, input_ids_nl.shape[1]
    length_n = torch.tensor(lengths_n)
    position_t = torch.cat([torch.arange(length) for length in lengths_n])
    row_t = torch.arange(len(lengths_n)).repeat_interleave(length_n)
    ends_n = to_device(nn.functional.pad(length_n.cumsum(0), (1, 0)).to(torch.int32), device)
    output = encoder(
        input_ids=input_ids_nl.flatten()[to_device(row_t * longest + position_t, device)][None],
        position_ids=to_device(position_t + first_position, device)[None],
        cu_seq_lens_q=ends_n,
        cu_seq_lens_k=ends_n,
        max_length_q=longest,
        max_length_k=longest,
    )
    token_td = output.last_hidden_state[0].float()
    if kind != "mean":
        last_n = length_n.cumsum(0) - 1
        return token_td[to_device(last_n if kind == "last" else last_n + 1 - length_n, device)]
    sum_nd = token_td.new_zeros(len(lengths_n), token_td.shape[1]).index_add(0, to_device(row_t, device), token_td)
    return sum_nd / to_device(length_n, device)[:, None]
