"""The worker daemon."""
