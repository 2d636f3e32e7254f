"""Fine-tune large BERTs and CNNs over many GPUs, with the frozen layers truly frozen."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_spec", "make_plan", "train"]


def __getattr__(name: str) -> Any:
    """The Python entry points, imported on first use so that `import dist_finetune` stays light."""
    if name == "load_spec":
        from dist_finetune.spec_file import load_spec

        return load_spec
    if name == "make_plan":
        from dist_finetune.plan import make_plan

        return make_plan
    if name == "train":
        from dist_finetune.worker import run_task

        return run_task
    raise AttributeError(f"module 'dist_finetune' has no attribute {name!r}")
