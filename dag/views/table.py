"""The OP-DAG as a table by module for the terminal; deep levels and runs of like modules are folded."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dag.graph import OpDag
from dag.views.modules import Module, Totals, module_tree, rolled_up
from dag.views.text import count_text
from fusion.units import format_bytes

MAX_ROWS = 40


def as_table(dag: OpDag, depth: int | None = None) -> RenderableType:
    """A rich renderable with one row per module: ops, parameters, FLOPs and activation bytes of one micro-batch.

    `depth` is how many levels below the model are shown; by default as many as fit into about 40 rows.
    Siblings of equal cost whose names are consecutive numbers share one row.
    """
    root = module_tree(dag)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("module", no_wrap=True, overflow="ellipsis", max_width=48)
    for column in ("ops", "parameters", "bytes", "FLOPs", "share", "activations"):
        table.add_column(column, justify="right", no_wrap=True)
    shown = rolled_up(root, _fitting_depth(root) if depth is None else depth)
    everything = root.total.flops + root.total.backward_flops
    for label, totals, level in _rows(shown):
        share = (totals.flops + totals.backward_flops) / everything if everything else 0.0
        table.add_row(
            Text("  " * level + label, style="bold" if level == 0 else ""),
            f"{totals.ops:,}",
            f"{totals.parameters:,}" if totals.parameters else "",
            format_bytes(totals.parameter_bytes) if totals.parameter_bytes else "",
            count_text(totals.flops + totals.backward_flops) if totals.flops else "",
            f"{share:.0%}" if totals.flops else "",
            format_bytes(totals.activation_bytes) if totals.activation_bytes else "",
        )
    lines: list[RenderableType] = [table, Text(_inputs_line(dag), style="dim")]
    lines += [Text(f"note: {note}", style="yellow") for note in dag.notes]
    return Group(*lines)


def _inputs_line(dag: OpDag) -> str:
    shapes = [f"{op.target} {op.meta.dtype}{list(op.meta.shape)}" for op in dag.placeholders]
    return (
        f"One micro-batch: {', '.join(shapes)}. FLOPs count forward and backward; "
        "activations are the bytes kept from forward for backward."
    )


def _fitting_depth(root: Module) -> int:
    depth = 1
    while depth < 12:
        rows = sum(1 for _ in _rows(rolled_up(root, depth + 1)))
        if rows > MAX_ROWS or rows == sum(1 for _ in _rows(rolled_up(root, depth))):
            break
        depth += 1
    return depth


def _rows(module: Module, level: int = 0, label: str | None = None) -> Iterator[tuple[str, Totals, int]]:
    """(label, totals, indent) of a module and what is shown below it."""
    label = module.name if label is None else label
    while len(module.children) == 1 and module.own == Totals():
        (module,) = module.children.values()
        label = f"{label}.{module.name}"
    yield label, module.total, level
    children = list(module.children.values())
    if children and module.own.ops:
        yield "(directly)", module.own, level + 1
    while children:
        alike = _run_of_like(children)
        if alike > 1:
            total = Totals()
            for child in children[:alike]:
                total += child.total
            yield f"{children[0].name} … {children[alike - 1].name}  ({alike} alike)", total, level + 1
            if children[0].children:
                yield from _below(children[0], level + 2)
        else:
            yield from _rows(children[0], level + 1)
        children = children[alike:]


def _below(module: Module, level: int) -> Iterator[tuple[str, Totals, int]]:
    """The rows inside one of several like modules, marked as such."""
    for index, row in enumerate(_rows(module, level - 1)):
        if index:
            yield (f"{row[0]}  (each)" if row[2] == level else row[0]), row[1], row[2]


def _run_of_like(children: list[Module]) -> int:
    """How many modules from the first on are numbered one after the other and cost the same."""
    if not children[0].name.isdecimal():
        return 1
    first = int(children[0].name)
    count = 1
    for child in children[1:]:
        if child.name != str(first + count) or not _same_shape(child, children[0]):
            break
        count += 1
    return count


def _same_shape(left: Module, right: Module) -> bool:
    return left.total == right.total and list(left.children) == list(right.children)
