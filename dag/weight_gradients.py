"""Which parameters' gradients can wait: those that only their op needs, once the gradient of its value is known.

The backward of a matrix product or a convolution is two computations: the gradient of its input, which the ops before it
wait for, and that of its weights, which nobody waits for until the update. A stage that does the first for a micro-batch
at once, and the second when it would be idle, keeps the stages before it waiting for less (zero-bubble pipelining, Qi et
al. 2024, section 2: the passes B and W).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from dag.graph import OpDag, refs_of

_TARGETS = frozenset(
    f"aten.{name}"
    for name in (
        "linear.default",
        "mm.default",
        "addmm.default",
        "convolution.default",
        *(f"conv{n}d.{overload}" for n in (1, 2, 3) for overload in ("default", "padding")),
        "conv_transpose1d.default",
        "conv_transpose2d.input",
        "conv_transpose3d.input",
    )
)
"""Ops that compute the gradients of their input and of their weights apart from each other, to the same bits."""


def separable(dag: OpDag, gradients: Collection[int]) -> dict[int, tuple[int, ...]]:
    """Op -> its parameters, for the ops whose parameters' gradients can wait: no other op uses these.

    `gradients` are the ops whose values receive one (`dag.cut.differentiated`).
    """
    found: dict[int, tuple[int, ...]] = {}
    for op in dag.body:
        if dag.ops[op].target in _TARGETS and op in gradients:
            parameters = tuple(
                origin
                for source in dict.fromkeys(dag.ops[op].inputs())
                if source in gradients and (origin := _origin(dag, source, op)) is not None
            )
            if parameters:
                found[op] = parameters
    return found


def postponed(
    dag: OpDag, body: Sequence[int], arriving: Iterable[int], gradients: Collection[int]
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """(op, parameters) of a fragment's ops for which waiting helps: their input's gradient leads to one that is sent.

    `body` are the fragment's ops in order, `arriving` the values whose gradients go back to other fragments.
    """
    live = set(arriving)
    if not live:
        return ()
    for op in body:
        if op in gradients and not live.isdisjoint(dag.ops[op].inputs()):
            live.add(op)
    inside = frozenset(body)
    return tuple(
        (op, parameters)
        for op, parameters in separable(dag, gradients).items()
        # A cast of a parameter may have stayed behind in the fragment before.
        if op in inside and op in live and all(inside.issuperset(dag.users[parameter]) for parameter in parameters)
    )


def _origin(dag: OpDag, source: int, user: int) -> int | None:
    """The parameter that `source` is, or is a cast or a view of, if `user` alone uses it, and once."""
    while dag.users[source] == (user,) and _uses(dag, user, source) == 1:
        op = dag.ops[source]
        if op.kind == "parameter":
            return source
        inputs = tuple(op.inputs())
        if op.kind != "call" or len(inputs) != 1 or op.mutates or op.random:
            return None
        source, user = inputs[0], source
    return None


def _uses(dag: OpDag, user: int, source: int) -> int:
    op = dag.ops[user]
    arguments = (*op.args, *(named for _, named in op.kwargs))
    return sum(ref == source for argument in arguments for ref in refs_of(argument))
