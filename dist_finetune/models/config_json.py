"""Config files as transformers and timm both write them, read without either: importing transformers takes a second."""

import json
from pathlib import Path
from typing import Any

from dist_finetune.tasks.names import TaskName

# What transformers calls the tasks whose heads are of one class; words have a class of model of their own.
PROBLEM_TYPES: dict[TaskName, str] = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}


def task_of_problem(problem_type: str | None) -> TaskName:
    """The task that transformers calls so."""
    return next((task for task, problem in PROBLEM_TYPES.items() if problem == problem_type), "classification")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file or it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
