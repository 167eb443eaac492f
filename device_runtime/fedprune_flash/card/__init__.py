"""Cards and drives: which there are, and writing an image to one. Not here: the image's content (`image`)."""
