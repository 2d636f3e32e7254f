"""Where models come from, and how they are built: sources, structure map, export."""
