"""scikit-learn's fits on the GPU, where RAPIDS' cuML is installed beside it."""

import importlib
import sys
from importlib.util import find_spec


def accelerate_heads(has_gpu: bool) -> bool:
    """Lets `cuml.accel` run what it can of scikit-learn on the GPU; returns whether it will.

    It changes scikit-learn as that is imported, so it has to come before `heads`, which is why that is imported late.
    What cuML can't run falls back to scikit-learn's own code.
    """
    if not has_gpu or "sklearn" in sys.modules or find_spec("cuml") is None:
        return False
    # Not managed memory: the network lies on the same GPU.
    importlib.import_module("cuml.accel").install(disable_uvm=True)
    return True
