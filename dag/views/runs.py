"""Groups the calls of an OP-DAG by the module call they ran in, and lays each group out in rows.

Calls stand in the order in which they ran, so a module's calls form runs. Each run is one group: a module that is called
twice gives two groups. Every group is thus an interval of the run order, and edges between the members of a group can't
form a circle.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from dag.graph import OpDag


@dataclass(slots=True, eq=False)
class Group:
    """One call of a module; `items` are op ids and groups in run order."""

    id: int
    path: str
    name: str
    """The part of the path below the parent group."""
    call: int = 1
    """1 for the module's first call."""
    items: list[int | Group] = field(default_factory=list)
    rows: list[list[int | Group]] = field(default_factory=list)
    """`items` in layers: every edge between two of them points to a later row."""

    @property
    def title(self) -> str:
        return f"{self.name} (call {self.call})" if self.call > 1 else self.name

    def groups(self) -> list[Group]:
        return [item for item in self.items if isinstance(item, Group)]


def group_by_module(dag: OpDag) -> Group:
    """The tree of groups; the root stands for the whole model and has the placeholders first."""
    root = Group(0, "", dag.name)
    open_groups = [root]
    calls: Counter[str] = Counter()
    count = 0
    for op in dag.ops:
        if op.kind == "placeholder":
            root.items.append(op.id)
    for op in dag.ops:
        if op.kind not in ("call", "loss"):
            continue
        paths = _prefixes(op.module)
        common = 0
        while common < min(len(paths), len(open_groups) - 1) and open_groups[common + 1].path == paths[common]:
            common += 1
        del open_groups[common + 1 :]
        for path in paths[common:]:
            count += 1
            calls[path] += 1
            group = Group(count, path, path.rpartition(".")[2], calls[path])
            open_groups[-1].items.append(group)
            open_groups.append(group)
        open_groups[-1].items.append(op.id)
    _simplify(root)
    _lay_out(dag, root)
    return root


def _prefixes(module: str) -> list[str]:
    parts = [part for part in module.split(".") if part]
    return [".".join(parts[: length + 1]) for length in range(len(parts))]


def _simplify(root: Group) -> None:
    """A group whose only member is a group becomes one with it (`transformer` around `h` is `transformer.h`); one whose
    only member is an op gives way to the op."""
    pending = [root]
    while pending:
        group = pending.pop()
        for child in group.groups():
            while len(child.items) == 1 and isinstance(only := child.items[0], Group):
                child.name, child.path, child.call = f"{child.name}.{only.name}", only.path, max(child.call, only.call)
                child.items = only.items
            pending.append(child)
        group.items = [
            item.items[0] if isinstance(item, Group) and len(item.items) == 1 else item for item in group.items
        ]


def _lay_out(dag: OpDag, root: Group) -> None:
    """Fills `rows` of every group."""
    groups = {0: root}
    above: dict[int, list[tuple[int, int | Group]]] = {}
    pending: list[tuple[Group, list[tuple[int, int | Group]]]] = [(root, [])]
    while pending:  # the chain of (group id, member) that leads to each op, outermost first
        group, chain = pending.pop()
        for item in group.items:
            here: list[tuple[int, int | Group]] = [*chain, (group.id, item)]
            if isinstance(item, Group):
                groups[item.id] = item
                pending.append((item, here))
            else:
                above[item] = here
    links: dict[int, list[tuple[int | Group, int | Group]]] = {}
    for target, target_chain in above.items():
        for source in dag.ops[target].inputs():
            for (group_id, left), (_, right) in zip(above.get(source, ()), target_chain, strict=False):
                if _key(left) != _key(right):
                    links.setdefault(group_id, []).append((left, right))
                    break
    for group in groups.values():
        group.rows = _rows(group.items, links.get(group.id, []))


def _rows(items: list[int | Group], links: list[tuple[int | Group, int | Group]]) -> list[list[int | Group]]:
    """Longest-path layers; what has room comes down to just above its first reader; rows are ordered so that edges cross
    little (barycenter sweeps)."""
    position = {_key(item): index for index, item in enumerate(items)}
    before: list[list[int]] = [[] for _ in items]
    after: list[list[int]] = [[] for _ in items]
    for left, right in links:
        source, target = position[_key(left)], position[_key(right)]
        if source not in before[target]:
            before[target].append(source)
            after[source].append(target)
    layer = [0] * len(items)
    for index in range(len(items)):  # run order is a topological order
        layer[index] = max((layer[source] + 1 for source in before[index]), default=0)
    for index in reversed(range(len(items))):  # as late as possible where that makes no edge longer in sum
        if len(before[index]) <= len(after[index]):
            layer[index] = min((layer[target] for target in after[index]), default=layer[index] + 1) - 1
    used = sorted(set(layer))
    rows: list[list[int]] = [[index for index in range(len(items)) if layer[index] == height] for height in used]
    place = {index: float(column) for row in rows for column, index in enumerate(row)}
    for neighbours, order in ((before, rows), (after, rows[::-1]), (before, rows)):
        for row in order:
            centre = {
                index: sum(place[other] for other in neighbours[index]) / len(neighbours[index])
                if neighbours[index]
                else place[index]
                for index in row
            }
            row.sort(key=lambda index: (centre[index], index))
            for column, index in enumerate(row):
                place[index] = column - (len(row) - 1) / 2
    return [[items[index] for index in row] for row in rows]


def _key(item: int | Group) -> int:
    return -item.id - 1 if isinstance(item, Group) else item
