"""Flat buffers, averages and gossip over ranks, and counts of traffic."""
