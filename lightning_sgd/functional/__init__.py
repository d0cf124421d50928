"""The mathematics: tensors in, tensors out. Knows nothing of Lightning."""
