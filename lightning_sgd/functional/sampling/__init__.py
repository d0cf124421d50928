"""Probabilities, weights and selection of samples by their losses."""
