"""What a run is for: its model on data with labels (evaluate), without (predict), and in other tools (export)."""

from dist_finetune.inference.evaluate import RunEvaluation, evaluate_run
from dist_finetune.inference.export import Exported, export_run
from dist_finetune.inference.predict import Prediction, predict_file
from dist_finetune.inference.saved_run import SavedRun, open_run

__all__ = [
    "Exported",
    "Prediction",
    "RunEvaluation",
    "SavedRun",
    "evaluate_run",
    "export_run",
    "open_run",
    "predict_file",
]
