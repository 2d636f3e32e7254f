"""What is known of a model before any weight is read, and where its weights came from once they are."""

from dataclasses import dataclass
from typing import Literal

from dist_finetune.data.image_input import ImageInput
from dist_finetune.tasks.names import TaskName

Source = Literal["transformers", "timm", "torchvision", "custom"]

TRANSFORMER_LR = 5e-5
CNN_LR = 1e-3


@dataclass(frozen=True)
class ModelCard:
    """Where a model comes from and what it takes, found from its config files alone."""

    source: Source
    name: str
    """As the user wrote it."""
    location: str
    """A folder, a hub id, the name of an architecture, or `module:function`."""
    modality: Literal["text", "image"]
    image: ImageInput | None
    max_length: int | None
    """Tokens that both the positions and the tokenizer allow; None for images."""
    pretrained: bool
    default_lr: float
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    task: TaskName = "classification"
    """What its head is for, see `sources.for_task`."""


@dataclass(frozen=True)
class Provenance:
    """Which weights a model started from."""

    id: str
    revision: str | None
    """Commit of the hub repository, where known."""
    sha256: str
    """Of the weight file; of all names and hashes where there are several; of the tensors where there is no file."""
    files: tuple[str, ...]
    initialized: tuple[str, ...]
    """Tensors that the source did not hold: they start from the seed."""
    head_kept: bool
    """True where the source was already a model of the same task and classes."""
