"""The interface of a partition policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Protocol

from scheduler.cost import Costs
from scheduler.estimate import Estimator, Placed
from scheduler.memory import fit_in_flight, fragment_memory
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
    _simulated: dict[Placed, tuple[float, float]] = field(default_factory=dict)

    def simulated(self, placed: Placed) -> tuple[float, float]:
        """(bytes of memory missing, simulated step time and handling): exacter than the estimate's score, and dearer."""
        found = self._simulated.get(placed)
        if found is None:
            found = self._simulated[placed] = self._simulate(placed)
        return found

    def glanced(self, placed: Placed) -> float:
        """Time of a single simulated step with everything as far ahead as memory lets it: a cheap first look."""
        if self.estimate(placed).missing_bytes > 0:
            return inf
        return float(play(self.costs, self.estimate, placed, self._deepest(placed), steps=1).step_seconds)

    def _simulate(self, placed: Placed) -> tuple[float, float]:
        estimate = self.estimate(placed)
        if estimate.missing_bytes > 0:
            return estimate.score
        # Where the pipeline comes back to a device, or gradients of weights wait, the deepest is often better.
        depths = [estimate.in_flight, self._deepest(placed)]
        seconds = min(play(self.costs, self.estimate, placed, depth).step_seconds for depth in dict.fromkeys(depths))
        return (0.0, seconds + estimate.handling)

    def _deepest(self, placed: Placed) -> tuple[int, ...]:
        costs = self.costs
        memory = fragment_memory(costs, placed.cuts, placed.devices, costs.workload.crossings(placed.cuts))
        last = 1 if costs.schedule == "1f1b" else costs.micro_batches
        ahead = [costs.micro_batches] * (len(placed.devices) - 1) + [last]
        return fit_in_flight(costs, memory, placed.devices, ahead)


class Policy(Protocol):
    """Answers a request. The answer is legal; whether it fits in memory is checked by the planner."""

    def __call__(self, request: Request, /) -> Placed: ...
