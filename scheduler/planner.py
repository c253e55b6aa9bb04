"""Makes a plan: asks a policy for cuts and a placement, chooses codecs, and says in words why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf

from dag.graph import OpDag
from dag.workload import Crossings, workload
from fusion.errors import PlanError
from fusion.plan import CodecChoice, Plan, ScheduleName
from fusion.spec import CompressionSpec, OptimizerSpec
from fusion.units import format_bytes, plural
from scheduler.compression import choose_codecs, device_names, expected_factors
from scheduler.cost import Costs
from scheduler.devices import Device, Network
from scheduler.estimate import Estimate, Estimator, Placed, busiest_seconds
from scheduler.memory import fit_behind, fit_in_flight, fragment_memory
from scheduler.messages import Messages, messages
from scheduler.policies import POLICIES, Request
from scheduler.policies.op_fence import SMALL_POOL
from scheduler.simulator import play

MOST_SIMULATED = 4096
"""Forwards per step up to which the predicted time comes from the simulator."""
MOST_TRIED = 512
"""Forwards per step up to which it is tried out fragment by fragment whose gradients of weights are to wait."""
COMPARED_POOL = 128
"""Pools of up to so many devices are planned twice for `auto`: planning many takes seconds."""
CHEAPER = (0.25, 0.25)
"""Where planning is quick, messages are also expected to come to so little, whatever the codec: where they hide behind compute,
it is work that decides, and the search finds other cuts.
"""
UNNOTICED = 1.01
"""A step that takes so many times as long is as good, where nothing is lost on the way."""


def plan_job(
    dag: OpDag,
    devices: Sequence[Device],
    network: Network | None = None,
    *,
    policy: str = "op-fence",
    schedule: ScheduleName = "1f1b",
    micro_batches: int = 1,
    fragments: int | None = None,
    optimizer: OptimizerSpec | str = "adamw",
    recompute: bool = False,
    clip: bool = False,
    compression: CompressionSpec | None = None,
    cuts: Sequence[int] | None = None,
    codecs: Mapping[int, CodecChoice] | None = None,
    use_all: bool = False,
    seed: int = 0,
) -> Plan:
    """Cut `dag` and place the fragments on `devices`.

    With `cuts` only the placement is decided (the same cuts and `codecs` give the same bits). `use_all` gives every device
    at least one fragment, as far as there are legal pieces. Deterministic.

    Raises `PlanError` saying which fragment needs how much memory more, or how many fragments the model can make.
    """
    if not devices:
        raise PlanError("there is no worker to plan for; join one with: fusion worker --join URL")
    if policy not in POLICIES:
        raise PlanError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")
    work = workload(dag)
    spec = OptimizerSpec.model_validate({"name": optimizer}) if isinstance(optimizer, str) else optimizer
    net = network or Network()
    costs = Costs(work, tuple(devices), net, schedule, micro_batches, spec, recompute, clip)
    pieces = len(work.cut_points) + 1
    if fragments is not None and cuts is None and fragments > pieces:
        raise PlanError(
            f"asked for {fragments} fragments but the model has only {pieces} legal {plural('piece', pieces)}; "
            f"set plan.fragments to {pieces} or less"
        )
    if cuts is not None:
        _check_cuts(cuts, {point.position for point in work.cut_points}, work.size)
    kept = None if cuts is None else tuple(cuts)

    def plan(sent: CompressionSpec) -> Plan:
        encoding = _Encoding(costs, sent, codecs)
        return _plan(policy, Request(costs, Estimator(costs, encoding), fragments, use_all, kept, seed), encoding)

    chosen = compression or CompressionSpec()
    best = plan(chosen)
    if chosen.codec == "auto" and codecs is None and len(devices) <= COMPARED_POOL:
        # Its rule looks at one link at a time, and codecs take time too.
        with suppress(PlanError):
            plain = plan(chosen.model_copy(update={"codec": "none"}))
            if _seconds(plain) <= _seconds(best) * (UNNOTICED if best.codecs else 1.0):
                return plain
    return best


@dataclass(frozen=True)
class _Encoding:
    """What each placement's values are encoded with."""

    costs: Costs
    compression: CompressionSpec
    fixed: Mapping[int, CodecChoice] | None

    def choices(self, placed: Placed, crossings: Crossings) -> Mapping[int, CodecChoice]:
        if self.fixed is not None:
            return self.fixed
        costs, names = self.costs, device_names(self.costs.devices, placed.devices)
        busy = busiest_seconds(costs, placed) if self.compression.codec == "auto" else 0.0
        return choose_codecs(self.compression, costs.workload, crossings, names, costs.network, busy)

    def __call__(self, placed: Placed, crossings: Crossings) -> Messages:
        return messages(self.costs.workload, crossings, self.choices(placed, crossings))


def _plan(policy: str, request: Request, encoding: _Encoding) -> Plan:
    """The policy's best answer, with what it leaves open."""
    costs, estimator = request.costs, request.estimate
    expected = expected_factors(encoding.compression)
    if len(costs.devices) <= SMALL_POOL:
        expected = tuple(dict.fromkeys((*expected, CHEAPER)))
    answers = [POLICIES[policy](replace(request, factors=each)) for each in expected]
    placed = _best(request, tuple(dict.fromkeys(answers)))
    estimate = estimator(placed)
    if estimate.missing_bytes > 0:
        raise PlanError(_too_large(costs, placed, estimate, request.use_all))
    in_flight, weights_behind, seconds = tuned(costs, estimator, placed, estimate)
    return Plan(
        policy=policy,
        schedule=costs.schedule,
        cuts=placed.cuts,
        placement=device_names(costs.devices, placed.devices),
        in_flight=in_flight,
        weights_behind=weights_behind,
        codecs=dict(encoding.choices(placed, costs.workload.crossings(placed.cuts))),
        predicted_step_seconds=seconds,
    )


def _seconds(plan: Plan) -> float:
    return plan.predicted_step_seconds or inf


def _best(request: Request, answers: Sequence[Placed]) -> Placed:
    """By simulation, as the estimate knows nothing of waiting for one another; where an answer is too long for it, by the estimate."""
    forwards = request.costs.micro_batches * max(len(placed.devices) for placed in answers)
    score = request.simulated if forwards <= MOST_SIMULATED else lambda placed: request.estimate(placed).score
    return min(answers, key=score)


def tuned(
    costs: Costs, estimator: Estimator, placed: Placed, estimate: Estimate
) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    """The depths with the least simulated step time among the estimate's and some others that fit; how far gradients of
    weights may be behind with them; that time.
    """
    memory = fragment_memory(costs, placed.cuts, placed.devices, costs.workload.crossings(placed.cuts))
    if costs.micro_batches * len(placed.devices) > MOST_SIMULATED:
        behind = fit_behind(costs, memory, placed.devices, estimate.in_flight)
        return estimate.in_flight, behind, estimate.seconds
    depths = [estimate.in_flight]
    if costs.schedule == "1f1b" and len(placed.devices) > 1:
        last = len(placed.devices) - 1
        wanted = [[depth + (index < last) * more for index, depth in enumerate(estimate.in_flight)] for more in (1, 2)]
        wanted.append([last + 1 - index for index in range(last + 1)])
        wanted.append([costs.micro_batches] * last + [1])
        for deeper in wanted:
            capped = [min(costs.micro_batches, depth) for depth in deeper]
            depths.append(fit_in_flight(costs, memory, placed.devices, capped))
    played = {depth: play(costs, estimator, placed, depth).step_seconds for depth in dict.fromkeys(depths)}
    best = min(played, key=lambda depth: (round(played[depth], 9), sum(depth)))
    behind = fit_behind(costs, memory, placed.devices, best)
    return best, *_worthwhile(costs, estimator, placed, best, behind, played[best])


def _worthwhile(
    costs: Costs,
    estimator: Estimator,
    placed: Placed,
    in_flight: tuple[int, ...],
    behind: tuple[int, ...],
    seconds: float,
) -> tuple[tuple[int, ...], float]:
    """Gradients of weights wait where it makes a step shorter: to compute them apart takes longer than a whole backward.

    From all that may wait, one fragment after the other is tried without, and at last none at all.
    """

    def played(tried: tuple[int, ...]) -> float:
        return play(costs, estimator, placed, in_flight, weights_behind=tried).step_seconds

    kept = behind
    one_by_one = costs.micro_batches * len(placed.devices) <= MOST_TRIED
    for index in range(len(behind)) if one_by_one else ():
        without = (*kept[:index], 0, *kept[index + 1 :])
        if kept[index] and (shorter := played(without)) <= seconds:
            kept, seconds = without, shorter
    none = (0,) * len(behind)
    if any(kept) and (shorter := played(none)) <= seconds:
        kept, seconds = none, shorter
    return kept, seconds


def _check_cuts(cuts: Sequence[int], legal: set[int], size: int) -> None:
    if list(cuts) != sorted(set(cuts)):
        raise PlanError(f"cut positions {list(cuts)} must ascend")
    for position in cuts:
        if position not in legal:
            raise PlanError(f"cut position {position} is not legal in a body of {size} ops")


def _too_large(costs: Costs, placed: Placed, estimate: Estimate, use_all: bool) -> str:
    """Names the device that lacks the most, and its fragments; what helps, where all devices have to take part."""

    def missing(device: int) -> float:
        limit = costs.devices[device].memory_bytes
        return -1.0 if limit is None else estimate.memory[device] - limit

    worst = max(estimate.memory, key=missing)
    device, need = costs.devices[worst], estimate.memory[worst]
    mine = [str(index) for index, host in enumerate(placed.devices) if host == worst]
    what = f"fragment {mine[0]} needs" if len(mine) == 1 else f"fragments {', '.join(mine)} need"
    limit = device.memory_bytes or 0
    if limit == 1:  # stands for none, as 0 would for no limit
        limit = 0
    has = format_bytes(limit) if limit else "no room"
    fewer = "ask for fewer plan.workers, " if use_all and len(set(placed.devices)) > 1 else ""
    return (
        f"{what} {format_bytes(need)}, {device.name} has {has}: {format_bytes(need - limit)} missing; "
        f"{fewer}add workers or memory, use a smaller micro_batch, or set train.recompute"
    )
