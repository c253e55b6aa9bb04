"""The OP-DAG as JSON for other programs: ops, parameters, modules and the legal cuts with what crosses them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from dag.cut import cut_points
from dag.graph import Op, OpDag, TensorMeta
from dag.views.modules import module_tree
from dag.views.text import argument_text

FORMAT_VERSION = 1


def as_json(dag: OpDag) -> str:
    """One JSON object, indented. Keys: `format`, `name`, `autocast`, `notes`, `totals`, `inputs`, `ops`, `parameters`,
    `modules`, `cut_points`. Sizes are bytes, costs are those of one micro-batch; arguments are text for people, `inputs`
    of an op are the ids that it reads.
    """
    tree = module_tree(dag)
    document: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "name": dag.name,
        "autocast": dag.autocast,
        "notes": list(dag.notes),
        "totals": asdict(tree.total),
        "inputs": [{"key": op.target, **_tensor(op.meta)} for op in dag.placeholders],
        "ops": [_op(dag, op) for op in dag.ops],
        "parameters": [asdict(parameter) for parameter in dag.parameters],
        "modules": [{"path": module.path, **asdict(module.total)} for module in tree.walk()],
        "cut_points": [asdict(point) for point in cut_points(dag)],
    }
    return json.dumps(document, indent=1, allow_nan=False)


def _tensor(meta: TensorMeta) -> dict[str, Any]:
    return {"shape": list(meta.shape), "dtype": meta.dtype, "bytes": meta.nbytes}


def _op(dag: OpDag, op: Op) -> dict[str, Any]:
    return {
        "id": op.id,
        "name": op.name,
        "kind": op.kind,
        "target": op.target,
        "module": op.module,
        "arguments": [argument_text(dag, arg) for arg in op.args],
        "keywords": {name: argument_text(dag, arg) for name, arg in op.kwargs},
        "inputs": list(op.inputs()),
        "outputs": [_tensor(meta) for meta in op.outputs],
        "requires_grad": op.requires_grad,
        "no_grad": op.no_grad,
        "random": op.random,
        "mutates": list(op.mutates),
        "aliases": list(op.aliases),
        "constant": op.id in dag.constant,
        "only_in": op.only_in or None,
        "flops": op.flops,
        "backward_flops": op.backward_flops,
        "saved_bytes": op.saved_bytes,
    }
