"""Asks the scheduler for plans: what it is told of the workers, and what it answers."""
