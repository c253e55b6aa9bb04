"""Pool, jobs and recovery as one state machine: events in, instructions out. No sockets, clocks, threads or files."""
