"""`python -m dist_finetune` is the `dist-finetune` command."""

from dist_finetune.cli import main

if __name__ == "__main__":
    main()
