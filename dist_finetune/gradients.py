"""Proof before training that every trainable parameter takes part in the loss."""

from collections.abc import Collection

from torch import nn

from dist_finetune.data.loading import Batch
from dist_finetune.errors import UserError
from dist_finetune.models.sources import forward_logits
from dist_finetune.tasks.names import TaskName
from dist_finetune.tasks.task import require_fitting_logits, task_of
from dist_finetune.world import gather_objects


def require_gradients(model: nn.Module, batch: Batch, task: TaskName, num_outputs: int, setting: str) -> None:
    """One dry pass of one batch on the unsharded model: every trainable parameter must get a gradient, on every rank.
    Collective.

    In eval mode, so that neither random numbers nor running statistics move. Raises UserError for logits that don't fit
    the task, and one that names the parameters outside the loss, which DDP would answer with "Expected to have finished
    reduction" (pytorch#43259) and says how to freeze them by `setting`, the key of the config.
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
        tied = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
        raise UserError(
            f"{len(unused)} trainable parameters have no part in the loss: {shown}. "
            f"They would never be updated; freeze them: {setting}=[{', '.join(_patterns(unused, tied))}]"
        )


def _patterns(unused: Collection[str], trainable: Collection[str]) -> list[str]:
    """Patterns of `freeze` that take `unused` and no other of the `trainable`, each with all its names: the highest
    modules that are unused as a whole, and else single parameters."""
    used = [name for name in trainable if name not in unused]
    patterns = []
    for name in unused:
        parts = name.split(".")
        modules = [".".join(parts[:end]) for end in range(1, len(parts))]
        whole = next((module for module in modules if not any(n.startswith(f"{module}.") for n in used)), None)
        patterns.append(name if whole is None else f"{whole}.*")
    return list(dict.fromkeys(patterns))
