"""The command line. Heavy imports stay inside the commands, so that `--help` and a wrong config answer at once."""

from dist_finetune.cli.entry import app, leave_at_once, main

__all__ = ["app", "leave_at_once", "main"]
