"""Robust combination of gradients, and the attacks that it must withstand."""
