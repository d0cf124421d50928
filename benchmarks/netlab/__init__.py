"""Strategies side by side on hosts with slow links, all of them on one Linux machine."""
