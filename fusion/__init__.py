"""Fusion trains one PyTorch model over many machines that are far apart, differ in speed, and come and go."""

__version__ = "0.1.0"
