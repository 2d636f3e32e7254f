"""Proof before training that every trainable parameter takes part in the loss."""

from torch import nn

from dist_finetune.data.loading import Batch
from dist_finetune.errors import UserError
from dist_finetune.models.sources import forward_logits
from dist_finetune.world import World, gather_objects


def require_gradients(model: nn.Module, batch: Batch, world: World) -> None:
    """One dry pass of one batch on the unsharded model: every trainable parameter must get a gradient, on every rank.

    In eval mode, so that neither random numbers nor running statistics move. Raises UserError that names the parameters
    outside the loss, which DDP would answer with "Expected to have finished reduction" (pytorch#43259).
    """
    model.eval()
    logits = forward_logits(model, batch["inputs"])
    nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="sum").backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad(set_to_none=True)
    unused = sorted({name for names in gather_objects(unused) for name in names})
    if unused:
        shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
        raise UserError(
            f"{len(unused)} trainable parameters have no part in the loss: {shown}. "
            f"They would never be updated; freeze them: freeze.patterns=[{', '.join(unused[:5])}]"
        )
