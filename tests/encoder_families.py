"""Tiny random encoders of the families of models in transformers."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

HIDDEN, VOCAB, POSITIONS = 32, 400, 64
# What a family's config calls its sizes; each gets those of these fields that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "dim", "emb_dim", "word_embed_proj_dim", "n_embd", "d_model"], HIDDEN),
    **dict.fromkeys(["intermediate_size", "hidden_dim", "d_inner", "d_ff", "ffn_dim", "decoder_ffn_dim"], 2 * HIDDEN),
    **dict.fromkeys(["encoder_ffn_dim", "n_inner"], 2 * HIDDEN),
    **dict.fromkeys(["num_hidden_layers", "n_layers", "decoder_layers", "num_decoder_layers", "n_layer"], 2),
    **dict.fromkeys(["num_encoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "n_heads"], 4),
    **dict.fromkeys(["num_encoder_attention_heads", "num_decoder_attention_heads", "n_head"], 4),
    **dict.fromkeys(["head_dim", "d_head", "d_kv", "num_local_experts", "num_experts"], 8),
    **dict.fromkeys(["num_key_value_heads", "type_vocab_size", "num_experts_per_tok"], 2),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], POSITIONS),
    "embedding_size": 16,
    "rotary_dim": 4,
    "attention_window": [8, 8],
    "block_size": 4,
    "num_random_blocks": 1,
    "moe_intermediate_size": 16,
    "vocab_size": VOCAB,
}
# What suits some families only.
OTHERS: dict[str, dict[str, Any]] = {
    "canine": {"num_hash_buckets": 16, "num_hash_functions": 2, "local_transformer_stride": 8},
    "deberta": {"relative_attention": True, "pos_att_type": "c2p|p2c", "max_relative_positions": 16},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": "c2p|p2c",
        "position_buckets": 8,
        "position_biased_input": False,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    },
    "esm": {"pad_token_id": 1, "mask_token_id": 4},
    "funnel": {
        "block_sizes": [1, 1],
        "block_repeats": [1, 1],
        "num_decoder_layers": 1,
        "architectures": ["FunnelModel"],
    },
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lilt": {"channel_shrink_ratio": 2, "hidden_size": 48},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 8},
    "markuplm": {
        "max_xpath_tag_unit_embeddings": 20,
        "max_xpath_subs_unit_embeddings": 20,
        "tag_pad_id": 19,
        "subs_pad_id": 19,
        "xpath_unit_hidden_size": 4,
        "max_depth": 5,
    },
    "mobilebert": {"true_hidden_size": 16, "intra_bottleneck_size": 16},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
    "nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 8},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [4, 4],
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 8,
        "feed_forward_size": 64,
        "num_hashes": 1,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 20,
        "shape_vocab_size": 20,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "rwkv": {"attention_hidden_size": HIDDEN, "context_length": POSITIONS},
    "squeezebert": {"embedding_size": HIDDEN},
    "tapas": {"type_vocab_sizes": [3, 8, 8, 4, 4, 4, 4]},
    "xmod": {"default_language": "en_XX"},
}


def tiny_family(family: str) -> PreTrainedConfig:
    """The config of a family with two small layers (`model_type` as in transformers)."""
    config = AutoConfig.for_model(family)
    derived = ("model_type", "attention_layers")
    fields = {
        name: value for name, value in config.to_dict().items() if name not in derived and "layer_types" not in name
    }
    names = {config.attribute_map.get(name, name): value for name, value in SIZES.items()}
    names |= {name: 1 for name, value in fields.items() if name.endswith("token_id") and _is_beyond(value)}
    sizes = {name: value for name, value in names.items() if name in fields}
    return AutoConfig.for_model(family, **fields | sizes | OTHERS.get(family, {}))


def _is_beyond(token_id: Any) -> bool:
    return isinstance(token_id, list) or (token_id or 0) >= VOCAB
