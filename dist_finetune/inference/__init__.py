"""What a run is for: its model on data with labels (evaluate), without (predict), and in other tools (export)."""
