"""What a run needs and sends, before a GPU is taken: state from shapes, activations from a pass without data."""
