"""From files, folders and hub ids to encoded rows: reading, checks, tokenising, image transforms, batches."""
