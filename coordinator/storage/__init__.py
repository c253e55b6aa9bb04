"""What outlives the process: the store, blobs and checkpoints."""
