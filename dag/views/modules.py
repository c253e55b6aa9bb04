"""The tree of modules of an OP-DAG with what each holds and costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from dag.graph import Op, OpDag
from dag.views.text import home_module


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a module and everything below it, for one micro-batch."""

    ops: int = 0
    """Calls."""
    parameters: int = 0
    """Parameter elements; a tied parameter counts once, at its first name."""
    parameter_bytes: int = 0
    flops: int = 0
    """Forward floating-point operations."""
    backward_flops: int = 0
    activation_bytes: int = 0
    """Bytes kept from forward for backward."""

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.ops + other.ops,
            self.parameters + other.parameters,
            self.parameter_bytes + other.parameter_bytes,
            self.flops + other.flops,
            self.backward_flops + other.backward_flops,
            self.activation_bytes + other.activation_bytes,
        )


@dataclass(slots=True)
class Module:
    """One module; `path` is empty for the whole model."""

    path: str
    name: str
    children: dict[str, Module] = field(default_factory=dict)
    own: Totals = field(default_factory=Totals)
    """What stands directly in this module, not in its children."""
    total: Totals = field(default_factory=Totals)

    def walk(self) -> Iterator[Module]:
        """This module and all below it, parents first."""
        yield self
        for child in self.children.values():
            yield from child.walk()


def totals_of(op: Op) -> Totals:
    if op.kind == "parameter":
        return Totals(parameters=op.meta.elements, parameter_bytes=op.meta.nbytes)
    return Totals(
        ops=int(op.kind == "call"),
        flops=op.flops,
        backward_flops=op.backward_flops,
        activation_bytes=op.saved_bytes,
    )


def module_tree(dag: OpDag) -> Module:
    """All modules of `dag`, in the order in which their first call runs (parameters alone come last)."""
    root = Module("", dag.name)
    inputs_last = sorted(dag.ops, key=lambda op: op.kind in ("parameter", "buffer", "constant", "placeholder"))
    for op in inputs_last:
        node = root
        for part in filter(None, home_module(op).split(".")):
            path = f"{node.path}.{part}" if node.path else part
            node = node.children.setdefault(part, Module(path, part))
        node.own += totals_of(op)
    _sum_up(root)
    return root


def _sum_up(root: Module) -> None:
    for module in reversed(list(root.walk())):
        module.total = module.own
        for child in module.children.values():
            module.total += child.total


def rolled_up(module: Module, depth: int) -> Module:
    """A copy of the tree in which modules at `depth` (0: the root alone) have swallowed everything below them."""
    children = {name: rolled_up(child, depth - 1) for name, child in module.children.items()} if depth > 0 else {}
    return Module(module.path, module.name, children, module.own if children else module.total, replace(module.total))
