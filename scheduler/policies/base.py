"""The interface of a partition policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from scheduler.cost import Costs
from scheduler.estimate import Estimator, Placed
from scheduler.simulator import play


@dataclass(frozen=True, eq=False)
class Request:
    """What a policy is asked: place the workload in `costs` on `costs.devices`.

    `fragments` None leaves the number to the policy. `use_all`: every device gets at least one fragment as far as there
    are legal pieces. `cuts` not None: only place.
    """

    costs: Costs
    estimate: Estimator
    fragments: int | None = None
    use_all: bool = False
    cuts: tuple[int, ...] | None = None
    seed: int = 0
    factors: tuple[float, float] = (1.0, 1.0)
    """Wire bytes over tensor bytes, forward and back, to expect of a crossing activation."""

    def simulated(self, placed: Placed) -> tuple[float, float]:
        """(bytes of memory missing, simulated step time and handling): exacter than the estimate's score, and dearer."""
        estimate = self.estimate(placed)
        if estimate.missing_bytes > 0:
            return estimate.score
        return (0.0, play(self.costs, self.estimate, placed, estimate.in_flight).step_seconds + estimate.handling)


class Policy(Protocol):
    """Answers a request. The answer is legal; whether it fits in memory is checked by the planner."""

    def __call__(self, request: Request, /) -> Placed: ...
