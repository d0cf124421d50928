"""Samplers that decide which example comes next."""
