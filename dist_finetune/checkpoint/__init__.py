"""Stop anywhere, go on exactly: one checkpoint format for every strategy and world size.

`layout` is the format on disk, `write` saves in the background, `read` finds, proves and loads a checkpoint.
"""
