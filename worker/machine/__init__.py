"""The machine that this worker runs on: cores, memory, speed, and its owner's wishes."""
