"""Update rules of the optimizers, and the kernels that they share."""
