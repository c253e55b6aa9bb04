"""The OP-DAG: capture from torch, operators and their allow-list, graph, serialisation, workload, cutting."""

from dag.graph import Op, OpDag, Parameter, TensorMeta

__all__ = ["Op", "OpDag", "Parameter", "TensorMeta"]
