"""The `fusion` command."""

from fusion.cli.app import app, main

__all__ = ["app", "main"]
