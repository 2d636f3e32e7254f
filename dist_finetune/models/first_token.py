"""The last block of a text classifier whose head reads the first token alone: it computes no other.

Attention needs keys and values of every token there, but one query; the output layer, the norms and the feed-forward
network need one position. That leaves a sixth of the block's multiplications, forward and backward, at the same logits
and gradients up to rounding. Where all but the last block is frozen and cached, a step computes little else.

It is cross attention, of the first token to the text: transformers has it beside the self attention of these models,
over layers of the same names.
"""

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = (
    "Bert", "Camembert", "Data2VecText", "Electra", "Ernie", "RoCBert", "Roberta", "RobertaPreLayerNorm", "XLMRoberta",
    "XLMRobertaXL",
)  # fmt: skip
"""Those of transformers whose head, or the pooler before it, takes position 0 of the last block."""
PROBE_TOKENS = 3
AGREEMENT = 1e-4
"""Relative; kernels may round differently for another number of queries."""


def compute_first_token_only(model: nn.Module) -> bool:
    """Has the last block of `model`, which may be the part above a cut, compute the first token alone, in place.

    False, with the model as it was, where the head is not known to read just that, or where this version's attention
    does not give the same for one query, as a few tokens show.
    """
    attention = _last_attention(model)
    if attention is None:
        return False
    inner, output = attention.get_submodule("self"), attention.get_submodule("output")
    name = type(inner).__name__.replace("SelfAttention", "CrossAttention")
    cross_attention = getattr(sys.modules[type(inner).__module__], name, None)
    modes = {module: module.training for module in attention.modules()}
    attention.eval()
    whole = _attend(attention)
    inner.forward = partial(_from_first_token, cross_attention, inner)
    residual = output.register_forward_pre_hook(_first_residual)
    agrees = _agree(whole, _attend(attention))
    for module, is_training in modes.items():
        module.training = is_training
    if not agrees:
        residual.remove()
        del inner.forward
    return agrees


def _last_attention(model: nn.Module) -> nn.Module | None:
    """The attention of the last block; None of other models, of decoders, and where a cut has taken it."""
    kind: Any = type(model)
    classifiers = {f"{family}ForSequenceClassification" for family in FAMILIES}
    if not kind.__module__.startswith("transformers.") or kind.__name__ not in classifiers:
        return None
    if getattr(model.config, "is_decoder", False):  # whose attention is causal
        return None
    layers = model.get_submodule(f"{kind.base_model_prefix}.encoder.layer")
    attention = getattr(layers[-1], "attention", None)  # type: ignore[index]
    parts = dict(attention.named_children()) if isinstance(attention, nn.Module) else {}
    is_whole = "output" in parts and type(parts.get("self")).__name__.endswith("SelfAttention")
    return attention if is_whole else None


def _from_first_token(
    cross_attention: Any, inner: nn.Module, hidden: Tensor, attention_mask: Tensor | None = None, **unused: Any
) -> Any:
    """What a self attention `inner` gives of hidden states (B, T, H) for the first token: (B, 1, H), and its weights.

    A mask is (B, 1, T or 1, T), or (B, T) where it says for every query which tokens there are."""
    if attention_mask is not None and attention_mask.dim() == 4:
        attention_mask = attention_mask[:, :, :1]
    return cross_attention.forward(inner, hidden[:, :1], hidden, attention_mask)


def _first_residual(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """For what adds the block's input (B, T, H) to the output of attention."""
    attended, hidden = args
    return attended, hidden[:, :1]


def _attend(attention: nn.Module) -> Tensor | None:
    """What an attention gives for a few tokens, (1, T, H), or (1, 1, H) for the first alone; None where it can't."""
    weight: Tensor = attention.get_submodule("self.query").weight  # type: ignore[assignment]
    tokens = torch.arange(PROBE_TOKENS * weight.shape[1], dtype=weight.dtype, device=weight.device).sin()
    try:
        with torch.no_grad():
            attended: Tensor = attention(tokens.view(1, PROBE_TOKENS, -1))[0]
    except (AttributeError, RuntimeError, TypeError, ValueError):  # of another version: other arguments, or it is gone
        return None
    return attended


def _agree(whole: Tensor | None, found: Tensor | None) -> bool:
    """Whether `found` (1, 1, H) is the first token of `whole` (1, T, H). On the meta device only shapes can tell."""
    if whole is None or found is None or found.shape != whole[:, :1].shape:
        return False
    expected = whole[:, :1]
    return whole.is_meta or torch.allclose(found, expected, rtol=0, atol=AGREEMENT * expected.abs().max().item())
