"""The page of a run that has just finished."""

from pathlib import Path

from dist_finetune.report import Reporter
from dist_finetune.world import World


def write_page(folder: Path, world: World, report: Reporter) -> None:
    """Writes report.html on rank 0 alone and in no collective.

    The run is done and its summary safe: a failure here is a warning.
    """
    if not world.is_first:
        return
    try:
        from dist_finetune.html_report.page import write_report

        write_report(folder)
    except Exception as error:
        report.say(f"warning: report.html was not written ({type(error).__name__}: {error})")
