"""The OP-DAG as one self-contained HTML page that a person can pan, zoom, search and unfold.

Grouping and layering happen here; the page's script only packs the rows into boxes, because sizes change when a module is
folded. Everything that came from outside is JSON data in the page: the script writes it as text, never as markup, and a
content security policy with the script's hash lets nothing else run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

from dag.cut import cut
from dag.graph import Op, OpDag
from dag.views.modules import Totals, totals_of
from dag.views.runs import Group, group_by_module
from dag.views.text import call_text, category, count_text, meta_text, short_target
from fusion.plan import Plan
from fusion.units import format_bytes

FIRST_SIGHT = 28
"""At most about so many boxes are unfolded when the page opens."""
_HUES = (212, 152, 28, 272, 340, 190, 96, 48, 310, 240)


def as_html(dag: OpDag, plan: Plan | None = None) -> str:
    """A whole HTML document without outside references; modules open and close, wheel and drag move about.

    With a `plan`, ops are coloured by the worker that runs them.
    """
    data = json.dumps(
        _payload(dag) | (_placement(dag, plan) if plan is not None else {}),
        separators=(",", ":"),
        ensure_ascii=True,
        allow_nan=False,
    )
    for character in "<>&":  # so that nothing in a name can end the script element
        data = data.replace(character, f"\\u{ord(character):04x}")
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "@POLICY@": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "@TITLE@": html.escape(f"{dag.name} · OP-DAG"),
        "@STYLE@": _asset("page.css"),
        "@DATA@": data,
        "@SCRIPT@": script,
    }
    # One pass, so that a replacement is never searched for placeholders again.
    return re.sub("|".join(parts), lambda found: parts[found[0]], _asset("page.html"))


def _asset(name: str) -> str:
    return resources.files("dag.views").joinpath(name).read_text(encoding="utf-8")


def _payload(dag: OpDag) -> dict[str, Any]:
    root = group_by_module(dag)
    groups: list[dict[str, Any]] = []
    total = _group(dag, root, None, groups)
    _unfold_first_sight(groups)
    drawn = [op for op in dag.ops if op.kind in ("placeholder", "call", "loss")]
    inside = {item: group.path for group in _all_groups(root) for item in group.items if not isinstance(item, Group)}
    return {
        "name": dag.name,
        "summary": _summary(total),
        "notes": list(dag.notes),
        "groups": groups,
        "ops": {str(op.id): _op(dag, op, inside[op.id]) for op in drawn},
    }


def _placement(dag: OpDag, plan: Plan) -> dict[str, Any]:
    """The plan's workers, and for each op of a fragment its fragment."""
    return {
        "workers": list(plan.workers),
        "hosts": [plan.workers.index(worker) for worker in plan.placement],
        "fragments": {
            str(op): fragment.index
            for fragment in cut(dag, plan.cuts).fragments
            for op in (*fragment.ops, *fragment.placeholders)
        },
    }


def _all_groups(root: Group) -> Iterator[Group]:
    yield root
    for group in root.groups():
        yield from _all_groups(group)


def _summary(total: Totals) -> str:
    texts = [f"{total.ops:,} ops"]
    if total.parameters:
        texts.append(f"{count_text(total.parameters)} params")
    if total.flops:
        texts.append(f"{count_text(total.flops + total.backward_flops)}FLOP")
    return " · ".join(texts)


def _group(dag: OpDag, group: Group, parent: int | None, found: list[dict[str, Any]]) -> Totals:
    """Appends `group` and all below it to `found`, a group before its children; returns its totals."""
    entry: dict[str, Any] = {"id": group.id, "parent": parent, "name": group.title, "path": group.path, "open": False}
    found.append(entry)
    total = Totals()
    held: dict[int, None] = {}
    for item in group.items:
        if isinstance(item, Group):
            total += _group(dag, item, group.id, found)
        else:
            total += totals_of(dag.ops[item])
            held.update(dict.fromkeys(dag.ops[item].inputs()))
    total += _parameters(dag, held)
    kind = next((part for part in reversed(group.name.split(".")) if not part.isdecimal()), "")
    entry["hue"] = _HUES[int.from_bytes(hashlib.sha256(kind.encode()).digest()[:4], "big") % len(_HUES)]
    entry["summary"] = _summary(total)
    entry["details"] = [
        ["Module", group.path or "(the model)"],
        ["Ops", f"{total.ops:,}"],
        ["Parameters", f"{total.parameters:,} ({format_bytes(total.parameter_bytes)})"],
        ["FLOPs forward", count_text(total.flops)],
        ["FLOPs backward", count_text(total.backward_flops)],
        ["Kept for backward", format_bytes(total.activation_bytes)],
    ]
    # A group is its id as a negative number less one, an op its id.
    entry["rows"] = [[-item.id - 1 if isinstance(item, Group) else item for item in row] for row in group.rows]
    return total


def _parameters(dag: OpDag, ids: dict[int, None]) -> Totals:
    total = Totals()
    for op in ids:
        if dag.ops[op].kind == "parameter":
            total += totals_of(dag.ops[op])
    return total


def _unfold_first_sight(groups: list[dict[str, Any]]) -> None:
    """Opens groups level by level while what is seen stays small."""
    children: dict[int, list[dict[str, Any]]] = {}
    for group in groups[1:]:
        children.setdefault(group["parent"], []).append(group)
    groups[0]["open"] = True
    seen = sum(map(len, groups[0]["rows"]))
    level = children.get(groups[0]["id"], [])
    while level:
        more = sum(sum(map(len, group["rows"])) - 1 for group in level)
        if seen + more > FIRST_SIGHT:
            break
        seen += more
        for group in level:
            group["open"] = True
        level = [child for group in level for child in children.get(group["id"], [])]


def _op(dag: OpDag, op: Op, group: str) -> dict[str, Any]:
    """`group` is the path of the module whose box the op stands in."""
    stored = [dag.ops[source] for source in op.inputs() if dag.ops[source].kind in ("parameter", "buffer", "constant")]
    flags = {
        "random": op.random,
        "no gradient": op.no_grad,
        "in place": bool(op.mutates),
        "view": bool(op.aliases) and not op.mutates,
        "constant": op.id in dag.constant,
        f"in {op.only_in} alone": bool(op.only_in),
        "reads other values in evaluation": op.id in dag.rewired_ops,
    }
    details = [
        ["Kind", op.kind],
        ["Target", op.target],
        ["Call", call_text(dag, op) if op.kind == "call" else ""],
        ["Module", op.module],
        ["Output", ", ".join(meta_text(meta) for meta in op.outputs)],
        ["Bytes", format_bytes(op.output_bytes)],
        ["FLOPs forward", count_text(op.flops) if op.flops else ""],
        ["FLOPs backward", count_text(op.backward_flops) if op.backward_flops else ""],
        ["Kept for backward", format_bytes(op.saved_bytes) if op.saved_bytes else ""],
        ["Marks", ", ".join(name for name, given in flags.items() if given)],
        ["Writes into", ", ".join(dag.ops[other].name for other in op.mutates)],
    ]
    details += [[other.kind.capitalize(), f"{other.target}  {meta_text(other.meta)}"] for other in stored]
    return {
        "name": op.name,
        "label": short_target(op),
        "module": op.module.removeprefix(group).lstrip("."),
        "shape": " ".join(meta_text(meta) for meta in op.outputs),
        "class": category(op),
        "stored": [other.target.rpartition(".")[2] for other in stored],
        "find": " ".join([op.name, op.target, op.module, *(other.target for other in stored)]).lower(),
        "in": [source for source in op.inputs() if dag.ops[source].kind in ("placeholder", "call")],
        "details": [[key, value] for key, value in details if value],
    }
