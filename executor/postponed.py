"""The gradients of weights that one micro-batch still owes: the second half of its backward (Qi et al. 2024, pass W).

The first half (pass B) runs autograd for the gradients that are sent, and for the parameters that can't wait. A hook
on each watched op keeps the gradient of its value as it comes by. The second half starts autograd again at that op alone,
with this gradient and for its parameters only. So both halves run the kernels, on the same operands, that one backward
would have run, and the sums of gradients come out with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from executor.gradients import own_gradients


@dataclass(frozen=True, slots=True)
class _Watched:
    edge: GradientEdge
    hook: RemovableHandle
    gradients: list[Tensor]
    """That of the op's value, once it is known."""
    parameters: tuple[Tensor, ...]


class PostponedWeights:
    """One micro-batch's. `watch` in the forward, then the first half of the backward, then `compute` while there is more.

    `parameters` maps each op that is watched to those whose gradients wait. Keeps the autograd graph alive until then.
    """

    def __init__(self, parameters: Mapping[int, tuple[Tensor, ...]]) -> None:
        self._parameters = parameters
        self._watched: list[_Watched] = []

    def watch(self, op: int, value: Tensor) -> None:
        """`op` has just computed `value`, under autograd."""
        if value.grad_fn is None:
            return
        gradients: list[Tensor] = []

        def keep(incoming: Iterable[Tensor | None]) -> None:
            gradients.extend(gradient for gradient in incoming if gradient is not None)

        hook = value.grad_fn.register_prehook(keep)
        self._watched.append(_Watched(get_gradient_edge(value), hook, gradients, self._parameters[op]))

    def compute(self) -> bool:
        """Add the gradients of one op to its parameters' `.grad`; whether there are more. The graph goes with the last."""
        if self._watched:
            watched = self._watched.pop()  # from the last op to the first, as autograd goes
            watched.hook.remove()
            if watched.gradients:
                fresh = [parameter for parameter in watched.parameters if parameter.grad is None]
                torch.autograd.backward((watched.edge,), watched.gradients, inputs=watched.parameters)
                own_gradients(fresh, watched.gradients)
        return bool(self._watched)
