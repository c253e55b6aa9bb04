"""The views of an OP-DAG: a table by module, JSON, DOT and the HTML page."""

from __future__ import annotations

import html
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
from rich.console import Console

from dag.graph import Op, OpDag, Parameter, Ref, TensorMeta
from dag.views import as_dot, as_html, as_json, as_table
from dag.views.modules import module_tree
from dag.views.runs import Group, group_by_module

HOSTILE = '</script><script>alert("1")</script>\\"; }; <!-- \u2028'
ACTIVATION = TensorMeta((4, 8), "float32")
WEIGHT = TensorMeta((8, 8), "float32")


def mlp(blocks: int = 3, *, name: str = "mlp", data_key: str = "inputs") -> OpDag:
    """`blocks` times a linear, a ReLU and a residual add, then a loss; made by hand."""
    ops = [
        Op(0, "inputs", "placeholder", data_key, outputs=(ACTIVATION,)),
        Op(1, "targets", "placeholder", "targets", outputs=(TensorMeta((4,), "int64"),)),
    ]
    parameters: list[Parameter] = []

    def add(
        kind: str, target: str, *sources: int, module: str = "", meta: TensorMeta = ACTIVATION, flops: int = 0
    ) -> int:
        new = Op(
            len(ops),
            f"op_{len(ops)}",
            kind,  # type: ignore[arg-type]
            target,
            args=tuple(Ref(source) for source in sources),
            outputs=(meta,),
            module=module,
            requires_grad=True,
            flops=flops,
            saved_bytes=meta.nbytes if kind == "call" else 0,
        )
        ops.append(new)
        return new.id

    x = 0
    for index in range(blocks):
        weight = add("parameter", f"blocks.{index}.linear.weight", meta=WEIGHT)
        parameters.append(Parameter(weight, f"blocks.{index}.linear.weight", order=index))
        hidden = add("call", "aten.linear.default", x, weight, module=f"blocks.{index}.linear", flops=512)
        hidden = add("call", "aten.relu.default", hidden, module=f"blocks.{index}.act")
        x = add("call", "aten.add.Tensor", x, hidden, module=f"blocks.{index}")
    scalar = TensorMeta((), "float32")
    value = add("call", "aten.cross_entropy_loss.default", x, 1, meta=scalar)
    add("loss", "loss", value, meta=scalar)
    return OpDag(tuple(ops), tuple(parameters), name=name, notes=("a branch was baked in",))


def rendered(dag: OpDag, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(as_table(dag))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_module_totals_add_up() -> None:
    dag = mlp(3)
    tree = module_tree(dag)
    assert tree.total.ops == sum(op.kind == "call" for op in dag.ops) == 10
    assert tree.total.parameters == 3 * 64
    assert tree.total.parameter_bytes == 3 * 256
    assert tree.total.flops == 3 * 512
    blocks = tree.children["blocks"]
    assert [child.path for child in blocks.children.values()] == ["blocks.0", "blocks.1", "blocks.2"]
    assert blocks.children["1"].total.ops == 3


def test_table_folds_modules_that_are_alike() -> None:
    text = rendered(mlp(48))
    assert "0 … 47  (48 alike)" in text
    assert "linear  (each)" in text
    assert "1 … 47" not in text
    assert "note: a branch was baked in" in text
    assert len(text.splitlines()) < 45


def test_table_of_a_module_tree_that_is_too_deep_stops_at_a_level_that_fits() -> None:
    ops = [Op(0, "inputs", "placeholder", "inputs", outputs=(ACTIVATION,))]
    for outer in range(6):
        for inner in range(20):
            module = f"part{outer}.sub{inner}"
            source = Ref(len(ops) - 1)
            ops.append(
                Op(
                    len(ops),
                    f"r{len(ops)}",
                    "call",
                    "aten.relu.default",
                    (source,),
                    outputs=(ACTIVATION,),
                    module=module,
                )
            )
    ops.append(Op(len(ops), "loss", "loss", "loss", (Ref(len(ops) - 1),), outputs=(ACTIVATION,)))
    text = rendered(OpDag(tuple(ops), ()))
    assert "part5" in text
    assert "sub3" not in text


def test_json_says_everything_about_each_op() -> None:
    dag = mlp(2)
    document = json.loads(as_json(dag))
    assert len(document["ops"]) == len(dag.ops)
    linear = next(op for op in document["ops"] if op["target"] == "aten.linear.default")
    assert linear["inputs"] == [0, 2]
    assert linear["outputs"] == [{"shape": [4, 8], "dtype": "float32", "bytes": 128}]
    assert document["totals"]["flops"] == 1024
    assert document["parameters"][0]["name"] == "blocks.0.linear.weight"
    assert document["cut_points"][0]["position"] == 1


def test_dot_nests_modules_and_quotes_names() -> None:
    text = as_dot(mlp(2, name=HOSTILE))
    assert text.count("subgraph cluster_") == 3  # blocks, 0 and 1; modules of one op give way to the op
    assert as_dot(mlp(2)).count("{") == as_dot(mlp(2)).count("}")
    assert re.search(r"\bn0 -> n3;", text)
    label = text.splitlines()[1]
    assert '\\"1\\"' in label
    assert not re.search(r'(?<!\\)"1', label)


def layered(group: Group) -> list[Group]:
    return [group, *(deeper for child in group.groups() for deeper in layered(child))]


def test_rows_follow_the_edges_at_every_level() -> None:
    dag = mlp(4)
    for group in layered(group_by_module(dag)):
        row_of = {op: number for number, row in enumerate(group.rows) for item in row for op in ops_in(item)}
        member_of = {op: index for index, item in enumerate(group.items) for op in ops_in(item)}
        assert sorted(map(id, group.items)) == sorted(id(item) for row in group.rows for item in row)
        for op in row_of:
            for source in dag.ops[op].inputs():
                if source in row_of and member_of[source] != member_of[op]:
                    assert row_of[source] < row_of[op]


def ops_in(item: int | Group) -> list[int]:
    return [op for member in item.items for op in ops_in(member)] if isinstance(item, Group) else [item]


def test_a_module_that_is_called_twice_makes_two_groups() -> None:
    modules = ["shared.a", "shared.b", "", "shared.a", "shared.b"]
    ops = [Op(0, "inputs", "placeholder", "inputs", outputs=(ACTIVATION,))]
    for number, module in enumerate(modules, 1):
        ops.append(
            Op(
                number,
                f"r{number}",
                "call",
                "aten.relu.default",
                (Ref(number - 1),),
                outputs=(ACTIVATION,),
                module=module,
            )
        )
    ops.append(Op(6, "loss", "loss", "loss", (Ref(5),), outputs=(ACTIVATION,)))
    root = group_by_module(OpDag(tuple(ops), ()))
    assert [group.title for group in root.groups()] == ["shared", "shared (call 2)"]


def page_data(page: str) -> dict[str, object]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, object] = json.loads(found[1])
    return data


def test_page_holds_every_op_and_refers_to_nothing_outside() -> None:
    dag = mlp(2)
    page = as_html(dag)
    data = page_data(page)
    assert set(data["ops"]) == {str(op.id) for op in dag.ops if op.kind in ("placeholder", "call", "loss")}  # type: ignore[call-overload]
    assert not re.search(r"(?:src|href)\s*=|@import|url\((?!#)", page)
    assert set(re.findall(r"https?://[^\"'\s]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "@DATA@" not in page


def test_names_from_outside_stay_text_in_the_page() -> None:
    plain, hostile = as_html(mlp(1)), as_html(mlp(1, name=HOSTILE + "@SCRIPT@", data_key=HOSTILE))
    assert hostile.count("<script") == plain.count("<script")
    assert hostile.count("</script") == plain.count("</script")
    assert html.escape(HOSTILE + "@SCRIPT@ · OP-DAG") in hostile
    assert page_data(hostile)["name"] == HOSTILE + "@SCRIPT@"
    assert "script-src 'sha256-" in hostile


@pytest.mark.parametrize("view", [as_json, as_dot, as_html, rendered])
def test_two_thousand_ops_are_drawn_in_a_moment(view: Callable[[OpDag], str]) -> None:
    dag = mlp(660)
    started = time.perf_counter()
    assert view(dag)
    assert time.perf_counter() - started < 5


def test_rows_of_a_wide_graph_do_not_grow_with_its_length() -> None:
    root = group_by_module(mlp(50))
    blocks = root.groups()[0]
    assert all(len(row) == 1 for row in blocks.rows)
    assert all(left is not right for left, right in pairwise(blocks.items))


def test_views_do_not_import_torch() -> None:
    code = "import sys, dag.views; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
