"""What differs between encoders and between their attention implementations.

n chunks of an encoder batch, l tokens of its longest, t real tokens of all its chunks, d hidden.
This file travels to the hub with the model and imports only its siblings.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from .pooling import to_device

# Names under which encoder configs keep their dropouts (BERT and its relatives, then DistilBERT, then ModernBERT).
HIDDEN_DROPOUTS = ("hidden_dropout_prob", "dropout", "embedding_dropout", "mlp_dropout")
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")
# Attention implementations that apply no dropout (transformers 5.23 says so of some encoders' only).
WITHOUT_DROPOUT = ("flash_attention_3", "flash_attention_4", "flash-attn3", "flash-attn4", "flex_attention")


def load_encoder(
    name_or_path: str, *, dropout: float | None, attention_dropout: float | None, attn: str | None, revision: str
) -> PreTrainedModel:
    """A pretrained encoder in fp32, with these dropouts; see `from_encoder` of the classifier.

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
    set_dropout(encoder_config, HIDDEN_DROPOUTS, dropout)
    set_dropout(encoder_config, ATTENTION_DROPOUTS, attention_dropout)
    check_attention(encoder_config, attn)
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
    return encoder


def set_dropout(encoder_config: Any, names: tuple[str, ...], value: float | None) -> None:
    """Set those of the named dropouts that the config has (None: leave them).

    Raises:
        ValueError: no probability, or the config has none of them.
    """
    if value is None:
        return
    if not 0 <= value < 1:
        raise ValueError(f"A dropout must be in [0, 1), and is {value}.")
    present = [name for name in names if hasattr(encoder_config, name)]
    if not present and value > 0:
        raise ValueError(f"The encoder ({encoder_config.model_type}) has none of the dropouts {', '.join(names)}.")
    for name in present:
        setattr(encoder_config, name, value)


def check_attention(encoder_config: Any, attn_implementation: str | None) -> None:
    """Raises ValueError where an attention implementation would leave out the encoder's attention dropout."""
    dropout = max(getattr(encoder_config, name, 0.0) for name in ATTENTION_DROPOUTS)
    if dropout > 0 and any(name in (attn_implementation or "") for name in WITHOUT_DROPOUT):
        raise ValueError(
            f"{attn_implementation} applies no dropout, and the encoder's attention dropout is {dropout:g}: set "
            "--attention_dropout 0, or choose flash_attention_2 or sdpa."
        )


@contextmanager
def attention_for(encoder: Any, device: torch.device) -> Iterator[None]:
    """Flash attention reads fp16 and bf16 only: where neither autocast nor the weights give it those, sdpa stands in."""
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
    encoder: Any, input_ids_nl: torch.Tensor, lengths_n: list[int], first_position: int
) -> torch.Tensor:
    """Means over the tokens of each chunk, (n, d), the chunks read as one row of real tokens; flash attention keeps them
    apart by their cumulative lengths.

    As `DataCollatorWithFlattening` in transformers, which does it for whole batches. What says where the tokens stand is
    made on the host, which knows the lengths.
    """
    device, longest = input_ids_nl.device, input_ids_nl.shape[1]
    length_n = torch.tensor(lengths_n)
    place_t = torch.cat([torch.arange(length) for length in lengths_n])
    row_t = torch.arange(len(lengths_n)).repeat_interleave(length_n)
    ends_n = to_device(nn.functional.pad(length_n.cumsum(0), (1, 0)).to(torch.int32), device)
    output = encoder(
        input_ids=input_ids_nl.flatten()[to_device(row_t * longest + place_t, device)][None],
        position_ids=to_device(place_t + first_position, device)[None],
        cu_seq_lens_q=ends_n,
        cu_seq_lens_k=ends_n,
        max_length_q=longest,
        max_length_k=longest,
    )
    token_td = output.last_hidden_state[0].float()
    sum_nd = token_td.new_zeros(len(lengths_n), token_td.shape[1]).index_add(0, to_device(row_t, device), token_td)
    return sum_nd / to_device(length_n, device)[:, None]
