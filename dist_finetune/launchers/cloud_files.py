"""What a machine that is rented will not find: files of this machine that nothing takes there."""

from pathlib import Path

from dist_finetune.errors import UserError
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
    data = [*spec.data.train, spec.data.validation, spec.data.test, spec.model.name, spec.model.weights]
    names = [name for entry in data for name in (entry if isinstance(entry, tuple | list) else [entry])]
    return [name for name in names if isinstance(name, str) and (working_folder / name).exists()]


def _is_there(name: str, volume: str | None, uploads: bool, working_folder: Path) -> bool:
    if volume and Path(name).is_relative_to(RUNS):
        return True
    inside = (working_folder / name).resolve().is_relative_to(working_folder.resolve())
    return uploads and not Path(name).is_absolute() and inside
