"""Gradient clipping by global norm when the parameters are spread over fragments.

Gives the bits of `torch.nn.utils.clip_grad_norm_` over the whole model: the norm of each gradient where the gradient is,
then the norm of those norms in the order of `model.parameters()`, computed alike by every fragment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dag.cut import Fragment
from dag.graph import OpDag, Parameter
from dag.operators import torch_dtype
from fusion.errors import FrameError

NO_GRADIENT = -1.0
"""Stands in a vector of norms for a parameter without gradient; torch leaves such parameters out, it does not count 0."""


def norms_of(parameters: Sequence[Tensor]) -> Tensor:
    """Float32 on the CPU: the L2 norm of each parameter's gradient, `NO_GRADIENT` where it has none.

    The norm of a float64 gradient is rounded to float32.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # The function that clip_grad_norm_ takes, on CPU and CUDA alike.
    found = iter(torch._foreach_norm(gradients, 2.0)) if gradients else iter(())
    missing = torch.tensor(NO_GRADIENT)
    norms = [missing if parameter.grad is None else next(found).float().cpu() for parameter in parameters]
    return torch.stack(norms) if norms else torch.zeros(0)


def home_order(dag: OpDag, fragment: Fragment) -> tuple[Parameter, ...]:
    """The parameters at home in `fragment`, in the order of `model.parameters()`."""
    here = set(fragment.parameters)
    return tuple(sorted((p for p in dag.parameters if p.op in here), key=lambda parameter: parameter.order))


class GlobalNorm:
    """Puts the norms of all fragments together.

    A fragment knows only its own piece of the partition. But a parameter's home is the first fragment that uses it, so
    the homes ascend with the parameters' first uses: the lengths of the vectors tell which parameters are whose.
    """

    def __init__(self, dag: OpDag) -> None:
        body = set(dag.body)
        first_use = {p: min((user for user in dag.users[p.op] if user in body), default=None) for p in dag.parameters}
        used = [(use, parameter) for parameter, use in first_use.items() if use is not None]
        self._by_use = [parameter for _, parameter in sorted(used, key=lambda pair: (pair[0], pair[1].op))]
        # clip_grad_norm_ takes the parameters dtype by dtype, in the order in which the dtypes first come up.
        in_order = sorted(self._by_use, key=lambda parameter: parameter.order)
        dtypes = list(dict.fromkeys(dag.ops[parameter.op].meta.dtype for parameter in in_order))
        self._rank = {p.op: (dtypes.index(dag.ops[p.op].meta.dtype), p.order) for p in self._by_use}
        self._dtype = torch_dtype(dtypes[0]) if dtypes else torch.float32
        for name in dtypes[1:]:
            self._dtype = torch.promote_types(self._dtype, torch_dtype(name))
        self._permutations: dict[tuple[int, ...], Tensor] = {}

    def total(self, norms: Mapping[int, Tensor], device: torch.device) -> Tensor:
        """The norm of all gradients, a scalar on `device`, from the vector of each fragment (`norms_of`).

        Raises `FrameError` when the vectors do not hold one norm per parameter of the model.
        """
        indices = sorted(norms)
        vector = torch.cat([norms[index] for index in indices])
        if vector.numel() != len(self._by_use):
            raise FrameError(
                f"the fragments' norms are {vector.numel()} in all, the model has {len(self._by_use)} parameters"
            )
        lengths = tuple(norms[index].numel() for index in indices)
        if lengths not in self._permutations:
            self._permutations[lengths] = self._permutation(lengths)
        vector = vector[self._permutations[lengths]]
        vector = vector[vector != NO_GRADIENT]
        if vector.numel() == 0:
            return torch.zeros((), device=device)
        total: Tensor = torch.linalg.vector_norm(vector.to(device=device, dtype=self._dtype), 2.0)
        return total

    def _permutation(self, lengths: Sequence[int]) -> Tensor:
        """Where each norm, in torch's order, stands in the vectors of fragments with so many parameters each."""
        standing: list[Parameter] = []
        for length in lengths:
            members = self._by_use[len(standing) : len(standing) + length]
            standing.extend(sorted(members, key=lambda parameter: parameter.order))
        order = sorted(range(len(standing)), key=lambda position: self._rank[standing[position].op])
        return torch.tensor(order, dtype=torch.int64)


def clip(parameters: Sequence[Tensor], max_norm: float, total: Tensor) -> None:
    """Scale the gradients by `max_norm / total` where that is below 1."""
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
