"""Singular values, norms and ranks of weight matrices."""
