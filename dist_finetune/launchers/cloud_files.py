"""What a machine that is rented will not find: files of this machine that nothing takes there."""

from pathlib import Path

from dist_finetune.data.sources import globbed, saved_split
from dist_finetune.errors import UserError
from dist_finetune.home import expand_home
from dist_finetune.launchers.cloud_job import RUNS
from dist_finetune.spec import Spec

PACKAGE_FILES = ("pyproject.toml", "setup.py")


def refuse_what_stays_here(tool: str, spec: Spec, working_folder: Path) -> None:
    """Raises UserError that names what the task of `tool` would miss on its machines.

    SkyPilot and dstack upload the working folder; Kubernetes gets the config alone. A volume is mounted at /runs.
    """
    cloud = spec.launch.cloud
    uploads = tool != "kubernetes"
    has_package = any((working_folder / name).exists() for name in PACKAGE_FILES)
    if uploads and "install" not in cloud.model_fields_set and not has_package:
        raise UserError(
            f"launch.cloud.install is `{cloud.install}`, but {working_folder} has no {' or '.join(PACKAGE_FILES)}: "
            'submit from a copy of this package, or set it, such as launch.cloud.install="pip install dist-finetune"'
        )
    missing = [
        name for name in _local(spec, working_folder) if not _is_there(name, cloud.volume, uploads, working_folder)
    ]
    if missing:
        taken = f"{working_folder} is uploaded" if uploads else "only the config is taken there"
        on_volume = f"{RUNS}/..., where launch.cloud.volume {cloud.volume or '(none is set)'} is mounted"
        raise UserError(
            f"{', '.join(missing)}: a file of this machine that machines of {tool} will not have ({taken}). Put it "
            f"{'into that folder and name it from there, or ' if uploads else ''}at {on_volume}, or use a hub id or URL"
        )


def _local(spec: Spec, working_folder: Path) -> list[str]:
    """What the config names that lies on this machine."""
    weights = None if spec.model.weights in ("pretrained", "none") else spec.model.weights  # words, and no folders
    data = [*spec.data.train, spec.data.validation, spec.data.test, spec.model.name, weights]
    names = [name for entry in data for name in (entry if isinstance(entry, tuple | list) else [entry])]
    return [name for name in names if isinstance(name, str) and _paths(name, working_folder)]


def _paths(name: str, working_folder: Path) -> list[Path]:
    """Where on this machine a name points to: the files of a glob, a file or folder, a saved folder with one of its
    splits. None for what is not here, such as a hub id."""
    found = globbed(name, working_folder)
    if found is not None:
        return [Path(path) for path in found]
    path, saved = expand_home(name), saved_split(name, working_folder)
    if (working_folder / path).exists():
        return [path]
    return [saved[0]] if saved else []


def _is_there(name: str, volume: str | None, uploads: bool, working_folder: Path) -> bool:
    if volume and Path(name).is_relative_to(RUNS):
        return True
    folder = working_folder.resolve()
    # "~" is another folder there, even where it is within the one that is uploaded
    return uploads and all(
        not path.is_absolute() and (working_folder / path).resolve().is_relative_to(folder)
        for path in _paths(name, working_folder)
    )
