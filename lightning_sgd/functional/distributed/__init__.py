"""Flat buffers, averaging and gossip over ranks, counts of traffic."""
