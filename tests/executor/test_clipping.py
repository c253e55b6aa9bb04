"""The norm over fragments is clip_grad_norm_'s over the model, whatever the cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dag.cut import Fragment
from dag.graph import Op, OpDag, Parameter, Ref, TensorMeta
from executor import clipping


def chain(sizes: list[int], orders: list[int], dtypes: list[str]) -> OpDag:
    """Parameters used one after the other; `orders` is their order in `model.parameters()`."""
    count = len(sizes)
    ops = [
        Op(index, f"p{index}", "parameter", f"p{index}", outputs=(TensorMeta((sizes[index],), dtypes[index]),))
        for index in range(count)
    ]
    for index in range(count):
        ops.append(
            Op(
                count + index,
                f"c{index}",
                "call",
                "aten.sum.default",
                (Ref(index),),
                outputs=(TensorMeta((), "float32"),),
            )
        )
    ops.append(Op(2 * count, "loss", "loss", "loss", (Ref(2 * count - 1),), outputs=(TensorMeta((), "float32"),)))
    return OpDag(tuple(ops), tuple(Parameter(index, f"p{index}", (), orders[index]) for index in range(count)))


def fragments(bounds: list[int]) -> list[Fragment]:
    pairs = pairwise(bounds)
    return [
        Fragment(index, (), (), tuple(range(first, last)), (), (), (), (), (), False)
        for index, (first, last) in enumerate(pairs)
    ]


@pytest.mark.parametrize("bounds", [[0, 6], [0, 2, 6], [0, 1, 1, 4, 6]])
@pytest.mark.parametrize("missing", [(), (1, 4), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("mixed", [False, True])
def test_total_and_clipped_gradients_are_torchs(bounds: list[int], missing: tuple[int, ...], mixed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    sizes, orders = [3, 50, 7, 1, 1000, 20], [5, 0, 3, 1, 4, 2]
    dtypes = ["float32"] * 6 if not mixed else ["float32", "bfloat16", "float32", "bfloat16", "float32", "float32"]
    dag = chain(sizes, orders, dtypes)
    parameters = []
    for index, size in enumerate(sizes):
        parameter = torch.zeros(size, dtype=getattr(torch, dtypes[index]), requires_grad=True)
        if index not in missing:
            parameter.grad = torch.randn(size, generator=generator).to(parameter.dtype)
        parameters.append(parameter)
    copies = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    for copy, parameter in zip(copies, parameters, strict=True):
        copy.grad = None if parameter.grad is None else parameter.grad.clone()
    in_order = sorted(range(6), key=lambda index: orders[index])
    expected = torch.nn.utils.clip_grad_norm_([copies[index] for index in in_order], 0.5)

    norms = {}
    homes = []
    for fragment in fragments(bounds):
        mine = [parameters[parameter.op] for parameter in clipping.home_order(dag, fragment)]
        homes.append(mine)
        norms[fragment.index] = clipping.norms_of(mine)
        assert norms[fragment.index].dtype == torch.float32
    total = clipping.GlobalNorm(dag).total(norms, torch.device("cpu"))
    if mixed:
        # torch groups by dtype through an unordered map; the order, and so the last bit, is not specified.
        assert float(total) == pytest.approx(float(expected), rel=1e-6)
    else:
        assert float(total) == float(expected)
    for mine in homes:
        clipping.clip(mine, 0.5, total)
    if not mixed:
        for parameter, copy in zip(parameters, copies, strict=True):
            assert (parameter.grad is None and copy.grad is None) or torch.equal(parameter.grad, copy.grad)  # type: ignore[arg-type]
