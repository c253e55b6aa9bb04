"""Small OP-DAGs and pools for the scheduler's tests, made without torch."""

from __future__ import annotations

from random import Random

from dag.graph import Op, OpDag, Parameter, Ref, TensorMeta
from scheduler.devices import Device, Link, Network

MEGA = 1_000_000


def transformer(
    blocks: int = 4, *, elements: int = 4096, flops: int = 50 * MEGA, tied: bool = False, aside: bool = False
) -> OpDag:
    """An embedding, residual blocks of five calls, a head and a loss; one value crosses between blocks, two inside.

    With `aside` the targets come to the loss by a call of their own, which stands between the head and the loss.
    """
    ops: list[Op] = []
    parameters: list[Parameter] = []
    hidden = TensorMeta((elements,), "float32")

    def add(kind: str, target: str, *sources: int, meta: TensorMeta = hidden, work: int = 0) -> int:
        ops.append(
            Op(
                id=len(ops),
                name=f"{kind}_{len(ops)}",
                kind=kind,  # type: ignore[arg-type]
                target=target,
                args=tuple(Ref(source) for source in sources),
                outputs=(meta,),
                requires_grad=kind != "placeholder",
                flops=work,
                backward_flops=2 * work,
                saved_bytes=meta.nbytes if work else 0,
            )
        )
        return len(ops) - 1

    def weight(name: str, count: int = 4 * elements) -> int:
        op = add("parameter", name, meta=TensorMeta((count,), "float32"))
        parameters.append(Parameter(op, name, order=len(parameters)))
        return op

    inputs = add("placeholder", "inputs", meta=TensorMeta((64,), "int64"))
    targets = add("placeholder", "targets", meta=TensorMeta((64,), "int64"))
    table = weight("embedding", 8 * elements)
    value = add("call", "aten.embedding.default", table, inputs)
    for block in range(blocks):
        first, second = weight(f"{block}.first"), weight(f"{block}.second")
        inner = add("call", "aten.linear.default", value, first, work=flops)
        inner = add("call", "aten.gelu.default", inner)
        inner = add("call", "aten.linear.default", inner, second, work=flops)
        inner = add("call", "aten.dropout.default", inner)
        value = add("call", "aten.add.Tensor", value, inner)
    head = table if tied else weight("head", 8 * elements)
    logits = add("call", "aten.linear.default", value, head, work=flops)
    scalar = TensorMeta((), "float32")
    if aside:
        targets = add("call", "aten.view.default", targets, meta=TensorMeta((64,), "int64"))
    loss = add("call", "aten.cross_entropy_loss.default", logits, targets, meta=scalar)
    add("loss", "loss", loss, meta=scalar)
    return OpDag(tuple(ops), tuple(parameters))


def chain(works: list[int], sizes: list[int], target: str = "aten.linear.default") -> OpDag:
    """Calls in a row: call i costs `works[i]` FLOPs and hands on `sizes[i]` float32 values (the last one: a scalar)."""
    ops = [Op(0, "inputs", "placeholder", "inputs", outputs=(TensorMeta((1,), "float32"),))]
    parameters = []
    for index, (work, size) in enumerate(zip(works, [*sizes, 1], strict=True)):
        weight = Op(
            len(ops), f"w{index}", "parameter", f"w{index}", outputs=(TensorMeta((1,), "float32"),), requires_grad=True
        )
        ops.append(weight)
        parameters.append(Parameter(weight.id, weight.target, order=index))
        source = weight.id - 1
        ops.append(
            Op(
                len(ops),
                f"call{index}",
                "call",
                target,
                args=(Ref(source), Ref(weight.id)),
                outputs=(TensorMeta((size,), "float32"),),
                requires_grad=True,
                flops=work,
                backward_flops=2 * work,
                saved_bytes=4 * size,
            )
        )
    ops.append(
        Op(
            len(ops),
            "loss",
            "loss",
            "loss",
            args=(Ref(len(ops) - 1),),
            outputs=(TensorMeta((1,), "float32"),),
            requires_grad=True,
        )
    )
    return OpDag(tuple(ops), tuple(parameters))


def two_cities(inside: float = 125e6, between: float = 1e6, delay: float = 0.02) -> tuple[tuple[Device, ...], Network]:
    """Two devices in each of two cities, joined alternately."""
    devices = tuple(Device(f"{city}-{number}", city, 1e10) for number in (1, 2) for city in ("oslo", "lima"))
    slow, fast = Link(between, delay), Link(inside, 0.001)
    regions = {(a, b): fast if a == b else slow for a in ("oslo", "lima") for b in ("oslo", "lima")}
    return devices, Network(slow, {}, regions, {device.name: device.region for device in devices})


def random_case(seed: int, *, most_devices: int, positions: int) -> tuple[OpDag, tuple[Device, ...], Network, int]:
    """A chain, a pool and a number of micro-batches; every quantity varies over an order of magnitude or two."""
    generator = Random(seed)
    works = [int(10 ** generator.uniform(6.5, 8.5)) for _ in range(positions)]
    sizes = [int(10 ** generator.uniform(2.5, 5)) for _ in range(positions - 1)]
    dag = chain(works, sizes)
    count = generator.randint(2, most_devices)
    devices = tuple(Device(f"d{index}", flops_per_second=10 ** generator.uniform(9.5, 10.5)) for index in range(count))
    links = {}
    for first in range(count):
        for second in range(first):
            link = Link(10 ** generator.uniform(5.5, 8), 10 ** generator.uniform(-3.5, -1.3))
            links[f"d{first}", f"d{second}"] = links[f"d{second}", f"d{first}"] = link
    return dag, devices, Network(workers=links), generator.choice([1, 2, 4, 8])
