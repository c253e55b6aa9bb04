"""What a worker may do when, and what it keeps for others: the rules of a job, without sockets, clocks, threads or torch."""
