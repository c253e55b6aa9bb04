"""Jobs for a coordinator under load: a chain of layers that is cut into as many fragments as a crew has workers."""

from __future__ import annotations

from coordinator_cases import floats, tensors_file

from dag.graph import Op, OpDag, Parameter, Ref, TensorMeta


def chain(length: int) -> tuple[OpDag, bytes]:
    """An OP-DAG of so many linear layers in a row, and its weights."""
    matrix, batch, scalar = TensorMeta((2, 2), "float32"), TensorMeta((4, 2), "float32"), TensorMeta((), "float32")
    ops = [
        Op(0, "inputs", "placeholder", "inputs", outputs=(batch,)),
        Op(1, "targets", "placeholder", "targets", outputs=(batch,)),
    ]
    names = [f"layers.{index}.weight" for index in range(length)]
    for name in names:
        ops.append(Op(len(ops), name.replace(".", "_"), "parameter", name, outputs=(matrix,), requires_grad=True))
    value = 0
    for index, name in enumerate(names):
        arguments, number = (Ref(value), Ref(2 + index)), len(ops)
        ops.append(_call(number, "aten.linear.default", arguments, batch, name))
        value = number
    ops.append(_call(len(ops), "aten.mse_loss.default", (Ref(value), Ref(1)), scalar, ""))
    ops.append(Op(len(ops), "loss", "loss", "loss", (Ref(len(ops) - 1),), outputs=(scalar,), requires_grad=True))
    parameters = tuple(Parameter(2 + index, name, (), index) for index, name in enumerate(names))
    weights = tensors_file({name: ("F32", (2, 2), floats(1, 2, 3, 4)) for name in names})
    return OpDag(tuple(ops), parameters, name="chain"), weights


def _call(number: int, target: str, args: tuple[Ref, ...], meta: TensorMeta, module: str) -> Op:
    return Op(number, f"op{number}", "call", target, args, outputs=(meta,), module=module, requires_grad=True, flops=16)
