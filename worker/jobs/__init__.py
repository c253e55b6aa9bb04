"""One job on this worker: building its fragments, computing, snapshots, checks of others."""
