"""Runs fragments: build, forward, backward, update."""
