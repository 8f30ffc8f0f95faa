"""A training run: what is decided when it begins, cached activations, the step, the loop around it."""
