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

from .configuration_hierarchical_roberta import HierarchicalRobertaConfig
from .pooling import to_device

# Names of dropout fields in encoder configs (BERT family, DistilBERT, ModernBERT).
HIDDEN_DROPOUTS = ("hidden_dropout_prob", "dropout", "embedding_dropout", "mlp_dropout")
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")
# Attention implementations without dropout (transformers 5.23 warns for some encoders only).
WITHOUT_DROPOUT = ("flash_attention_3", "flash_attention_4", "flash-attn3", "flash-attn4", "flex_attention")


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
) -> PreTrainedModel:
    """Load a pretrained encoder, or that of a trained `classifier`, in fp32 with the given dropouts; see `from_encoder`.

    Raises:
        ValueError: unsupported encoder, or its checkpoint lacks weights.
        OSError: the encoder does not exist or cannot be downloaded.
    """
    trained: Any = trained_config(name_or_path, revision)
    if trained is None:
        encoder_config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    else:
        encoder_config = trained.encoder_config
    if encoder_config.is_encoder_decoder or not hasattr(encoder_config, "hidden_size"):
        raise ValueError(
            f"{name_or_path} is a {encoder_config.model_type!r} model; expected an encoder such as "
            "FacebookAI/roberta-base, with a hidden_size."
        )
    set_dropout(encoder_config, HIDDEN_DROPOUTS, dropout)
    set_dropout(encoder_config, ATTENTION_DROPOUTS, attention_dropout)
    check_attention(encoder_config, attn)
    # Master weights are fp32 whatever the checkpoint's dtype; autocast lowers the precision of the arithmetic only.
    model, loading = (AutoModel if trained is None else classifier).from_pretrained(
        name_or_path,
        config=trained or encoder_config,
        revision=revision,
        dtype=torch.float32,
        output_loading_info=True,
        trust_remote_code=False,
    )
    ours = "" if trained is None else "encoder."
    missing = sorted(
        name for name in loading["missing_keys"] if name.startswith(ours) and not name.startswith("pooler.")
    )
    if missing:
        raise ValueError(
            f"{name_or_path} lacks {len(missing)} of the encoder's weights ({', '.join(missing[:3])}, …), which would "
            "stay randomly initialized. Is it a checkpoint of another architecture?"
        )
    return model if trained is None else model.encoder


def set_dropout(encoder_config: Any, names: tuple[str, ...], value: float | None) -> None:
    """Set the dropouts among `names` that the config has (None: leave unchanged).

    Raises:
        ValueError: not a probability, or the config has none of these dropouts.
    """
    if value is None:
        return
    if not 0 <= value < 1:
        raise ValueError(f"Dropout must be in [0, 1), got {value}.")
    present = [name for name in names if hasattr(encoder_config, name)]
    if not present and value > 0:
        raise ValueError(f"The encoder ({encoder_config.model_type}) has none of these dropouts: {', '.join(names)}.")
    for name in present:
        setattr(encoder_config, name, value)


def check_attention(encoder_config: Any, attn_implementation: str | None) -> None:
    """Raise ValueError if the attention implementation would ignore the encoder's attention dropout."""
    dropout = max(getattr(encoder_config, name, 0.0) for name in ATTENTION_DROPOUTS)
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
