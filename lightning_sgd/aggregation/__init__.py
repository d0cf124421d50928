"""Robust aggregation rules and attacks, as small objects that strategies compose."""
