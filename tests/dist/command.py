"""The `dist-finetune` command as a script, for `harness.command`."""

from dist_finetune.cli import main

main()
