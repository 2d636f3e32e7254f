"""Proof before training that every trainable parameter takes part in the loss."""

from torch import nn

from dist_finetune.data.loading import Batch
from dist_finetune.errors import UserError
from dist_finetune.models.sources import forward_logits
from dist_finetune.tasks.names import TaskName
from dist_finetune.tasks.task import require_fitting_logits, task_of
from dist_finetune.world import gather_objects


def require_gradients(model: nn.Module, batch: Batch, task: TaskName, num_outputs: int) -> None:
    """One dry pass of one batch on the unsharded model: every trainable parameter must get a gradient, on every rank.
    Collective.

    In eval mode, so that neither random numbers nor running statistics move. Raises UserError for logits that don't fit
    the task, and one that names the parameters outside the loss, which DDP would answer with "Expected to have finished
    reduction" (pytorch#43259).
    """
    model.eval()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    reached: set[int] = set()

    def note(parameter: nn.Parameter) -> None:
        reached.add(id(parameter))
        parameter.grad = None  # at once: all of them would take as much memory as the model, on every rank

    handles = [p.register_post_accumulate_grad_hook(note) for p in trainable.values()]
    logits = forward_logits(model, batch["inputs"])
    require_fitting_logits(logits, batch["labels"], task, num_outputs)
    task_of(task).loss(logits.float(), batch["labels"]).backward()
    for handle in handles:
        handle.remove()
    missed = [name for name, p in trainable.items() if id(p) not in reached]
    unused = sorted({name for names in gather_objects(missed) for name in names})
    if unused:
        shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
        raise UserError(
            f"{len(unused)} trainable parameters have no part in the loss: {shown}. "
            f"They would never be updated; freeze them: freeze.patterns=[{', '.join(unused[:5])}]"
        )
