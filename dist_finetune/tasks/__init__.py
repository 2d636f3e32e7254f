"""What a model is trained to give: the loss, the metrics and the shape of labels of each task."""
