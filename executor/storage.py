"""Which values of an OP-DAG may share memory: views, in-place results and what they are made from."""

from __future__ import annotations

from dag.graph import OpDag

_STATISTICS = frozenset({"aten.batch_norm.default"})
"""Calls that write their running statistics without autograd noticing, and never read them again in a backward."""


class StorageGroups:
    """The ops of a DAG in groups that may share storage, closed over `Op.aliases`."""

    def __init__(self, dag: OpDag) -> None:
        self._dag = dag
        self._parent = list(range(len(dag.ops)))
        for op in dag.ops:
            for other in op.aliases:
                self._parent[self._root(op.id)] = self._root(other)
        self._members: dict[int, list[int]] = {}
        for op in dag.ops:
            self._members.setdefault(self._root(op.id), []).append(op.id)
        self._written = {self._root(op) for op in dag.written}
        self._lasting = {self._root(op.id) for op in dag.ops if op.kind in ("parameter", "buffer")}

    def members(self, op: int) -> list[int]:
        """All ops that may share storage with this op's value, itself among them, in order."""
        return self._members[self._root(op)]

    def written(self, op: int) -> bool:
        """Whether some call writes the storage of this op's value in place."""
        return self._root(op) in self._written

    def lasting(self, op: int) -> bool:
        """Whether the value may share storage with a parameter or buffer, which change after the micro-batch."""
        return self._root(op) in self._lasting

    def needed_backward(self, buffer: int) -> bool:
        """Whether autograd may keep the value of a written buffer for the backward.

        Then each micro-batch needs its own copy: under 1F1B the next forward writes before this one's backward.
        """
        ops = self._dag.ops
        users = {user for member in self.members(buffer) for user in self._dag.users[member]}
        return any(ops[user].requires_grad and ops[user].target not in _STATISTICS for user in users)

    def _root(self, op: int) -> int:
        parent = self._parent
        while parent[op] != op:
            parent[op] = parent[parent[op]]
            op = parent[op]
        return op
