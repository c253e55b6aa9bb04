"""The OP-DAG: capture from torch, operators and their allow-list, graph, serialisation, workload, cutting."""
