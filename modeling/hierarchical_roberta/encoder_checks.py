"""What an encoder does with chunks, found out by running it on a few tokens.

N chunks, L tokens. Pushed to the hub with the model; imports nothing else from the project.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# Relative difference of token vectors beyond rounding in fp32; see docs/log.md for what encoders show.
TOLERANCE = 1e-5


def depends_on_padding(encoder: PreTrainedModel, max_length: int = 24) -> bool:
    """Whether the vectors of a chunk's tokens change with padding behind it, which the encoder's mask should hide.

    Args:
        max_length: number of tokens in the longest chunk to try, at least 3.

    Raises:
        ValueError: the encoder cannot read tokens alone, or a chunk's vectors change with the other chunks beside it, or
            from call to call.
    """
    long_2L = _random_chunks(encoder, max_length)
    short_1S = long_2L[1:, : max_length // 3 + 1]
    padded_2L, mask_2L = long_2L.clone(), torch.ones_like(long_2L)
    padded_2L[1, short_1S.shape[1] :] = getattr(encoder.config, "pad_token_id", None) or 0
    mask_2L[1, short_1S.shape[1] :] = 0
    with torch.no_grad():
        long, again, short = (_token_vectors(encoder, ids) for ids in (long_2L[:1], long_2L[:1], short_1S))
        beside = _token_vectors(encoder, long_2L)[:1]
        padded = _token_vectors(encoder, padded_2L, mask_2L)
        changed = _token_vectors(encoder, torch.cat([long_2L[:1, :-2], long_2L[1:, -2:-1], long_2L[:1, -1:]], dim=1))
        _token_vectors(encoder, long_2L[:1, :2])  # an empty text has special tokens only
    if long.shape != (1, max_length, encoder.config.hidden_size):
        raise ValueError(
            f"The encoder ({encoder.config.model_type}) does not make a vector of its hidden_size for each token: expected the "
            f"shape {(1, max_length, encoder.config.hidden_size)}, got {tuple(long.shape)}. Choose another encoder."
        )
    if not long.isfinite().all():
        raise ValueError(
            f"The encoder ({encoder.config.model_type}) gives non-finite vectors in fp32: its checkpoint is damaged. Choose "
            "another encoder."
        )
    if _differ(long, again) or _differ(long, beside):
        raise ValueError(
            f"The encoder ({encoder.config.model_type}) gives a chunk other vectors beside other chunks, or each time it is "
            "called, even without dropout: a document's scores would depend on chance. Choose another encoder."
        )
    if torch.equal(long[:, -1], changed[:, -1]):
        raise ValueError(
            f"The encoder ({encoder.config.model_type}) gives a token the same vector whatever the other tokens are: its "
            "attention does not work on this machine. Choose another encoder."
        )
    return _differ(long, padded[:1]) or _differ(short, padded[1:, : short.shape[1]])


def depends_on_longest_chunk(encoder: PreTrainedModel, max_length: int) -> bool:
    """Whether the vectors of a chunk's tokens change beside one of up to `max_length` tokens: with LongRoPE (Phi-3) a chunk
    longer than those of pretraining changes the rotary frequencies of all chunks in the batch.

    Read from the config, since such chunks are long.
    """
    ropes = getattr(encoder.config, "rope_parameters", None) or {}
    return any(
        rope.get("rope_type") == "longrope" and rope["original_max_position_embeddings"] < max_length
        for rope in (ropes, *ropes.values())  # one for all layers, or one for each kind
        if isinstance(rope, dict)
    )


def depends_on_chance(encoder: PreTrainedModel) -> bool:
    """Whether an encoder gives other vectors each time it is called in training mode, as with dropout."""
    chunk_2L = _random_chunks(encoder, 8)
    with torch.no_grad():
        return not torch.equal(*(_token_vectors(encoder, chunk_2L, training=True) for _ in range(2)))


@torch.enable_grad()  # the caller may have switched it off
def unused_parameters(encoder: PreTrainedModel) -> list[str]:
    """Names of the parameters that a chunk's vectors do not depend on, so that they would get no gradients."""
    if any("expert" in name and isinstance(value, int) for name, value in vars(encoder.config).items()):
        return []  # a few tokens do not reach all experts
    used = set(_parameters_behind([_token_vectors(encoder, _random_chunks(encoder, 8))]))
    return [name for name, weight in encoder.named_parameters() if weight.requires_grad and weight not in used]


@torch.enable_grad()
def parameters_before(encoder: PreTrainedModel, layer: nn.Module) -> set[nn.Parameter]:
    """The parameters that the inputs of a layer depend on: those of earlier layers, of embeddings, of positions."""
    inputs: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs.extend([*args, *kwargs.values()])
        return type(layer).forward(layer, *args, **kwargs)

    layer.forward = forward  # no hook: some encoders call it by name
    try:
        _token_vectors(encoder, _random_chunks(encoder, 8))
    finally:
        del layer.forward
    return set(_parameters_behind([value for value in inputs if isinstance(value, torch.Tensor)]))


def _random_chunks(encoder: PreTrainedModel, num_tokens: int) -> torch.Tensor:
    """Ids of two chunks of ordinary tokens, (2, L), the same for each call."""
    config = encoder.config.to_dict()
    special = [value for name, value in config.items() if name.endswith("token_id") and value is not None]
    ids = [id_ for id_ in range(min(config.get("vocab_size") or 1000, 1000)) if id_ not in special]
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(ids)[torch.randint(len(ids), (2, num_tokens), generator=generator)].to(encoder.device)


def _token_vectors(
    encoder: PreTrainedModel, ids_NL: torch.Tensor, mask_NL: torch.Tensor | None = None, training: bool = False
) -> torch.Tensor:
    """Token vectors (N, L, D). The modes of the encoder's parts stay as they are."""
    was_training = {part: part.training for part in encoder.modules()}
    try:
        return encoder.train(training)(input_ids=ids_NL, attention_mask=mask_NL).last_hidden_state
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(
            f"The encoder ({encoder.config.model_type}) cannot read a chunk of {ids_NL.shape[1]} tokens without other "
            f"input ({type(error).__name__}: {reason}). Choose one that reads text alone, of any length."
        ) from error
    finally:
        for part, mode in was_training.items():
            part.training = mode


def _differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool((first - second).norm() > TOLERANCE * first.norm())


def _parameters_behind(outputs: list[torch.Tensor]) -> Iterator[nn.Parameter]:
    """The leaves of the outputs' graph."""
    nodes = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
