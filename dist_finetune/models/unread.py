"""The last block of a text classifier whose head reads the first token alone: it computes no other token.

Attention needs keys and values of every token there, but one query; the output layer, the norms and the feed-forward
network need one position. That leaves a sixth of the block's multiplications, forward and backward, at the same logits
and gradients up to rounding. Where all but the last block is frozen and cached, a step computes little else.

It is cross attention, of the first token to the text: transformers has it beside the self attention of these models,
over layers of the same names.
"""

import copy
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dist_finetune.models.weights import seeded

FAMILIES = (
    "Bert", "Camembert", "Data2VecText", "Electra", "Ernie", "RoCBert", "Roberta", "RobertaPreLayerNorm", "XLMRoberta",
    "XLMRobertaXL",
)  # fmt: skip
"""Those of transformers whose head, or the pooler before it, takes position 0 of the last block."""
PROBE_TOKENS, PROBE_WIDTH = 3, 8
AGREEMENT = 1e-4
"""Relative; kernels may round differently for another number of queries."""


def can_skip_unread(model: nn.Module) -> bool:
    """True where the head of a whole model, which may lie on the meta device, is known to read the first token alone,
    and a block as its last one, but narrow, gives the same for it when it computes no other."""
    block = _last_block(model)
    if block is None:
        return False
    config: Any = copy.deepcopy(model.config)
    config.hidden_size, config.intermediate_size = 2 * config.num_attention_heads, PROBE_WIDTH
    with seeded(0), torch.device("cpu"), torch.no_grad():
        try:
            probe = type(block)(config).eval()
            tokens = torch.randn(1, PROBE_TOKENS, config.hidden_size)
            whole = _output(probe(tokens))
            _skip_unread(probe)
            first = _output(probe(tokens))
        except (AttributeError, RuntimeError, TypeError, ValueError):  # of another version of transformers
            return False
    expected = whole[:, :1]
    return first.shape == expected.shape and bool((first - expected).abs().max() <= AGREEMENT * expected.abs().max())


def skip_unread(model: nn.Module) -> None:
    """Has the last block of a whole model that `can_skip_unread` compute the first token alone, in place."""
    block = _last_block(model)
    assert block is not None
    _skip_unread(block)


def _last_block(model: nn.Module) -> nn.Module | None:
    """The last block; None of other models, and of decoders, whose attention is causal."""
    kind: Any = type(model)
    classifiers = {f"{family}ForSequenceClassification" for family in FAMILIES}
    if not kind.__module__.startswith("transformers.") or kind.__name__ not in classifiers:
        return None
    blocks: Any = dict(model.named_modules()).get(f"{kind.base_model_prefix}.encoder.layer")
    if not blocks or getattr(model.config, "is_decoder", False):
        return None
    block: nn.Module = blocks[-1]
    return block


def _skip_unread(block: nn.Module) -> None:
    inner = block.get_submodule("attention.self")
    name = type(inner).__name__.replace("SelfAttention", "CrossAttention")
    cross_attention = getattr(sys.modules[type(inner).__module__], name)
    inner.forward = partial(_attend_from_first, cross_attention, inner)
    block.get_submodule("attention.output").register_forward_pre_hook(_first_residual)


def _attend_from_first(
    cross_attention: Any, inner: nn.Module, hidden: Tensor, attention_mask: Tensor | None = None, **unused: Any
) -> Any:
    """What a self attention `inner` gives of hidden states (B, T, H) for the first token, (B, 1, H), and its weights.
    The mask is (B, 1, T, T) or (B, 1, 1, T)."""
    mask = None if attention_mask is None else attention_mask[:, :, :1]
    return cross_attention.forward(inner, hidden[:, :1], hidden, mask)


def _first_residual(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """For what adds the block's input (B, T, H) to what attention gave (B, 1, H)."""
    attended, hidden = args
    return attended, hidden[:, :1]


def _output(output: Any) -> Tensor:
    """What a block returns, alone or first in a tuple."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
