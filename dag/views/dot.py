"""The OP-DAG in Graphviz's language, modules as nested clusters."""

from __future__ import annotations

from collections.abc import Iterator

from dag.graph import Op, OpDag
from dag.views.runs import Group, group_by_module
from dag.views.text import category, meta_text, short_target

_FILL = {
    "input": "#dbeafe",
    "loss": "#fecaca",
    "compute": "#fde68a",
    "norm": "#e9d5ff",
    "random": "#fbcfe8",
    "lookup": "#bfdbfe",
    "layout": "#f3f4f6",
    "activation": "#bbf7d0",
    "other": "#ffffff",
}


def as_dot(dag: OpDag) -> str:
    """A `digraph`; `dot -Tsvg` draws it. Parameters stand in the label of the op that uses them."""
    lines = [
        "digraph {",
        f"  label={_quoted(dag.name)}; labelloc=t; fontname=Helvetica; rankdir=TB; compound=true;",
        '  node [shape=box, style="rounded,filled", fontname=Helvetica, fontsize=10, color="#6b7280"];',
        '  edge [color="#6b7280", arrowsize=0.6];',
    ]
    lines += _members(dag, group_by_module(dag), "  ")
    drawn = {op.id for op in dag.ops if op.kind in ("placeholder", "call", "loss")}
    lines += [
        f"  n{source} -> n{op.id};" for op in dag.ops if op.id in drawn for source in op.inputs() if source in drawn
    ]
    return "\n".join([*lines, "}", ""])


def _members(dag: OpDag, group: Group, indent: str) -> Iterator[str]:
    for item in group.items:
        if isinstance(item, Group):
            yield f"{indent}subgraph cluster_{item.id} {{"
            yield f'{indent}  label={_quoted(item.title)}; style=rounded; color="#9ca3af"; fontname=Helvetica; fontsize=11;'
            yield from _members(dag, item, indent + "  ")
            yield f"{indent}}}"
        else:
            op = dag.ops[item]
            yield f'{indent}n{op.id} [label={_quoted(_label(dag, op))}, fillcolor="{_FILL[category(op)]}"];'


def _label(dag: OpDag, op: Op) -> str:
    stored = [dag.ops[source] for source in op.inputs() if dag.ops[source].kind in ("parameter", "buffer", "constant")]
    lines = [
        op.name if op.kind == "placeholder" else short_target(op),
        " ".join(meta_text(meta) for meta in op.outputs),
    ]
    return "\n".join([*lines, *(f"{source.kind} {source.target} {list(source.meta.shape)}" for source in stored)])


def _quoted(text: str) -> str:
    """A DOT string: quotes and backslashes escaped, so that no name is read as DOT, and newlines as line breaks."""
    plain = "".join(character for character in text if character == "\n" or character.isprintable())
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
