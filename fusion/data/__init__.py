"""Turns the data that a job spec names into plain arrays: one safetensors blob and a manifest of how to read it."""

from fusion.data.prepared import PreparedData
from fusion.data.sources import prepare, prepare_object

__all__ = ["PreparedData", "prepare", "prepare_object"]
