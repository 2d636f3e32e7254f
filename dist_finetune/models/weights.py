"""Weight files: read without running code from them, hashed, and put into a model with nothing missed in silence."""

import hashlib
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_finetune.errors import UserError
from dist_finetune.home import expand_home
from dist_finetune.models.on_meta import on_meta
from dist_finetune.tensor_files import write_tensors

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
NESTED_KEYS = ("state_dict", "model", "model_state_dict")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """CPU random numbers from `seed` inside, and the outer sequence as if nothing had happened after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def check_weights_option(weights: str) -> None:
    """Raises UserError where `model.weights` is neither a word it knows nor an existing weight file."""
    if weights in ("pretrained", "none"):
        return
    path = expand_home(weights)
    if path.suffix not in SUFFIXES:
        raise UserError(f"model.weights {weights}: write pretrained, none, or a file ending in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"model.weights {weights}: no such file")


def weights_file(weights: str) -> Path | None:
    """The file that `model.weights` names; None for its two words."""
    return None if weights in ("pretrained", "none") else expand_home(weights)


def read_weights(path: Path, device: Literal["cpu", "meta"] = "cpu") -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file, by name, on the CPU; no pickled code is run.

    A dict nested under `state_dict` or `model` is taken out, and the `module.` that DDP puts before names is cut. On
    `device` meta no data of a torch file is read.
    """
    try:
        found: Any
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such weight file") from None
    except pickle.UnpicklingError:  # whose own words are about how to run the code all the same
        raise UserError(
            f"{path}: holds more than tensors, or is damaged. Files that could run code are not loaded: save the "
            "model's state_dict() as .safetensors"
        ) from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: not a readable weight file (truncated?): {first_line(error)}") from None
    for key in NESTED_KEYS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise UserError(f"{path}: holds no named tensors; a state_dict() is needed")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors by name as safetensors, bit for bit; those that share memory are written twice."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage().data_ptr()
        shared = storage in seen and tensor.numel() > 0
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        seen.add(storage)
    write_tensors(tensors, path, {"format": "pt"})


def load_body(
    model: nn.Module, state: dict[str, Tensor], head: Collection[str], keep_head: bool, what: str
) -> tuple[str, ...]:
    """Copies `state` into `model`; returns the names of head tensors that stay as they were.

    Everything outside `head` must be there by name and shape: otherwise raises UserError that lists what differs.
    """
    wanted = model.state_dict()
    given = {name: tensor for name, tensor in state.items() if keep_head or name not in head}
    optional = {name for name in wanted if name in head or name.endswith(".num_batches_tracked")}
    shapes = [n for n in given if n in wanted and given[n].shape != wanted[n].shape]
    missing = [n for n in wanted if n not in given and n not in optional]
    unexpected = [n for n in given if n not in wanted]
    raise_differences(what, missing, unexpected, [f"{n} {shape_pair(given[n], wanted[n])}" for n in shapes])
    model.load_state_dict(given, strict=False)
    return tuple(n for n in wanted if n in head and n not in given)


def restart_heads(model: nn.Module, names: Collection[str], seed: int) -> None:
    """Starts a new classifier, that is the tensors `names`, from zeros, as Big Transfer does (Kolesnikov 2020).

    The first loss is then log(classes), and no random direction goes into the body. timm and torchvision start that of
    an EfficientNet from U(-1/sqrt(classes), 1/sqrt(classes)), meant for a thousand: with two the first loss is 2.8, and
    a head that trains alone takes many epochs to come down. A convolution, which SqueezeNet puts before a ReLU, would
    never leave zero: it starts as torch's layers do, from `seed`.
    """
    with seeded(seed):
        for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
            layer = model.get_submodule(path)
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
            elif isinstance(layer, nn.Linear):
                for parameter in layer.parameters():
                    nn.init.zeros_(parameter)


def raise_differences(what: str, missing: list[str], unexpected: list[str], shapes: list[str]) -> None:
    """Raises UserError that names up to five tensors of each kind of difference, if there is any."""
    kinds = (("missing from the file", missing), ("not in the model", unexpected), ("of another shape", shapes))
    lines = [f"  {len(names)} {kind}: {_few(names)}" for kind, names in kinds if names]
    if lines:
        raise UserError(f"{what}: the weights don't fit the model\n" + "\n".join(lines))


def shape_pair(given: Tensor, wanted: Tensor) -> str:
    """Both shapes, for an error."""
    return f"({tuple(given.shape)} in the file, {tuple(wanted.shape)} in the model)"


def head_tensors(build: Callable[[int], nn.Module], num_classes: int) -> tuple[str, ...]:
    """Names of the tensors whose shape follows the number of classes, from two builds on the meta device."""
    with on_meta():
        one, other = build(num_classes).state_dict(), build(num_classes + 1).state_dict()
    return tuple(n for n in one if n not in other or one[n].shape != other[n].shape)


def files_sha256(paths: list[Path]) -> str:
    """sha256 of the one file, as `sha256sum` prints it; of several, of the lines `HASH  NAME`."""
    digests = []
    for path in sorted(paths):
        with path.open("rb") as file:
            digests.append((hashlib.file_digest(file, "sha256").hexdigest(), path.name))
    if len(digests) == 1:
        return digests[0][0]
    return hashlib.sha256("".join(f"{digest}  {name}\n" for digest, name in digests).encode()).hexdigest()


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of `state`."""
    total = hashlib.sha256()
    for name, tensor in state.items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
