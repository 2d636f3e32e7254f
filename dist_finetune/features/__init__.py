"""A pre-trained network as a feature extractor, with softmax and SVM heads on what it computes at several depths."""
