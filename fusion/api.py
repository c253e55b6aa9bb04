"""The Python API: capture a model, train it on an embedded pool, submit a job to a pool."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor, nn

from dag.capture import capture as capture_model
from dag.graph import OpDag
from fusion import client as http
from fusion.client import StreamItem
from fusion.credentials import resolve
from fusion.data import prepare_object
from fusion.errors import JobFailedError, UserError
from fusion.follow import follow
from fusion.local import LocalPool, LocalWorker, check_done
from fusion.metrics_file import MetricsFile
from fusion.run_view import RunView
from fusion.runs import train_on
from fusion.spec import JobSpec
from fusion.spec_file import spec_from
from fusion.submit import CapturedJob, capture_job, captured, read_job
from fusion.submit import submit as post

Loss = Literal["cross_entropy", "mse", "model"] | Callable[..., Any]


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns."""

    losses: list[float]
    """Mean loss of each step's micro-batches; NaN where it was no finite number."""
    state_dict: dict[str, Tensor]
    """The trained weights; `train` has loaded them into the model already."""
    metrics: list[dict[str, Any]]
    """One entry per step: `step`, `loss`, `step_seconds`, `sent_bytes`, `tokens` or `samples`, `epoch`, and
    `gradient_norm` and `eval_loss` where there are any."""
    job: dict[str, Any]
    """The job as the coordinator describes it, with its plan and fragments."""


def capture(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor],
    loss: Loss = "cross_entropy",
    *,
    name: str = "model",
    autocast: str | None = None,
) -> OpDag:
    """Capture one micro-batch of `model` and `loss` as an OP-DAG.

    `example_inputs`: a mapping by placeholder (`inputs`, `targets`, or names of forward's arguments), the pair
    (inputs, targets), or the inputs alone with `loss="model"`. Raises `CaptureError` with the line of the model's source.
    """
    if isinstance(example_inputs, Tensor):
        example: Mapping[str, Tensor] = {"inputs": example_inputs}
    elif isinstance(example_inputs, Mapping):
        example = example_inputs
    else:
        example = dict(zip(("inputs", "targets"), example_inputs, strict=False))
    return capture_model(model, example, loss, name=name, autocast=autocast).dag


def train(
    model: nn.Module,
    loss: Loss,
    data: Any,
    *,
    steps: int,
    global_batch: int,
    micro_batch: int | None = None,
    workers: int = 2,
    optimizer: str | Mapping[str, Any] = "adamw",
    lr: float | None = None,
    lr_schedule: Mapping[str, Any] | str = "constant",
    clip_grad_norm: float | None = None,
    eval_every: int | None = None,
    eval_batches: int = 8,
    holdout: float = 0.1,
    seed: int = 0,
    precision: str = "float32",
    recompute: bool = False,
    plan: Mapping[str, Any] | None = None,
    compression: Mapping[str, Any] | None = None,
    fault_tolerance: Mapping[str, Any] | None = None,
    verify: Mapping[str, Any] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
    name: str = "train",
    threads: int = 1,
    folder: str | Path | None = None,
    metrics: str | Path | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train `model` over `workers` processes on this machine, and load the trained weights into it.

    `loss`: `"cross_entropy"`, `"mse"`, `"model"` when forward returns the loss, or a function of (output, targets).
    `data`: a mapping of arrays or tensors (`inputs` and `targets`, or the names of forward's arguments; first axis the
    sample), the pair (inputs, targets), or a `torch.utils.data.Dataset`; workers get float64 as float32, and integers as
    int64. The other options are those of a job spec. `folder` keeps state, logs and checkpoint; without it they go when training ends.

    Raises `UserError` and its kinds for what does not fit, `JobFailedError` when training fails.
    """
    _check_arguments(model, loss, optimizer, workers, holdout)
    optimizer_spec: dict[str, Any] = {"name": optimizer} if isinstance(optimizer, str) else dict(optimizer)
    if lr is not None:
        optimizer_spec["lr"] = lr
    spec = spec_from(
        {
            "name": name,
            # Names for people only: model, loss and data are here as objects.
            "model": {"entrypoint": f"{type(model).__module__}:{type(model).__qualname__}"},
            "loss": loss if isinstance(loss, str) else {"entrypoint": _name_of(loss)},
            "data": {"entrypoint": f"{type(data).__module__}:{type(data).__qualname__}"},
            "train": {
                "steps": steps,
                "global_batch": global_batch,
                "micro_batch": micro_batch,
                "seed": seed,
                "optimizer": optimizer_spec,
                "lr_schedule": {"name": lr_schedule} if isinstance(lr_schedule, str) else _section(lr_schedule),
                "clip_grad_norm": clip_grad_norm,
                "eval_every": eval_every,
                "eval_batches": eval_batches,
                "precision": precision,
                "recompute": recompute,
            },
            "plan": _section(plan, workers=workers),
            "compression": _section(compression),
            "fault_tolerance": _section(fault_tolerance),
            "verify": _section(verify),
            "checkpoint": _section(checkpoint),
        },
        where="fusion.train",
    )

    def prepare() -> CapturedJob:
        prepared = prepare_object(
            data, spec.train, holdout=holdout, forward=model.forward, loss_is_the_models=loss == "model"
        )
        return captured(spec, model, loss, prepared)

    recorded: list[dict[str, Any]] = []
    with _folder(folder) as place, closing(MetricsFile(metrics)) as file, RunView(name, steps, quiet=quiet) as view:

        def show(item: StreamItem) -> None:
            file.write(item)
            if item.kind == "metrics":
                recorded.append(item.data)
            view.show(item)

        team = [LocalWorker(f"worker-{index + 1}", threads) for index in range(workers)]
        with LocalPool(place, team, dashboard=False) as pool:
            run = train_on(pool, prepare, show=show, say=view.status, remark=view.say)
        state = load_file(run.checkpoint / "model.safetensors")
    # Extra state is no tensor, so that workers have not changed it.
    unchanged = {key: value for key, value in model.state_dict().items() if not isinstance(value, Tensor)}
    model.load_state_dict({**unchanged, **state})
    # A record has no place for what is no number, and says null.
    losses = [math.nan if metric["loss"] is None else float(metric["loss"]) for metric in recorded]
    return TrainResult(losses, state, recorded, run.job)


class Client(http.Client):
    """Talks to a coordinator, and submits jobs to it.

    Without `url` it takes `FUSION_COORDINATOR`, or what `fusion coordinator` left for the same user.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        timeout: float = 30.0,
        ca: str | Path | None = None,
    ) -> None:
        found = resolve(url, token, str(ca) if ca is not None else None)
        super().__init__(found.url, found.token, timeout=timeout, ca=found.ca)

    def submit(
        self, job: str | Path | JobSpec | Mapping[str, Any], *, base: Path | None = None, resume: str | None = None
    ) -> dict[str, Any]:
        """Capture and submit a job: the path of a spec, or a spec as data whose paths are relative to `base`.

        Returns the job as the coordinator describes it. Raises `UserError` and its kinds, `CoordinatorError`.
        """
        spec, folder = read_job(job, base)
        return post(self, capture_job(spec, folder), resume=resume)

    def wait(self, job: str, show: Callable[[StreamItem], None] | None = None) -> dict[str, Any]:
        """Return the job once it is done. Raises `JobFailedError` when it ends otherwise."""
        for item in follow(self, job):
            if show is not None:
                show(item)
            if item.kind == "job" and item.data.get("state") in ("done", "failed", "cancelled"):
                check_done(item.data)
                return item.data
        raise JobFailedError(f"job {job} was lost")


def _section(given: Any, **defaults: Any) -> Any:
    """A part of the spec; what is no mapping is left to the spec, which says so."""
    return {**defaults, **(given or {})} if given is None or isinstance(given, Mapping) else given


def _check_arguments(model: Any, loss: Any, optimizer: Any, workers: Any, holdout: Any) -> None:
    """What the job spec can't say better. Raises `UserError`."""
    if not isinstance(model, nn.Module):
        made = f"the class {model.__name__}; make one" if isinstance(model, type) else f"a {type(model).__name__}"
        raise UserError(f"fusion.train: model is {made}; it must be a torch.nn.Module")
    if not isinstance(loss, str) and not callable(loss):
        raise UserError(
            f"fusion.train: loss is a {type(loss).__name__}; it must be 'cross_entropy', 'mse', 'model' or a function of "
            "(output, targets)"
        )
    if not isinstance(optimizer, str | Mapping):
        raise UserError(
            "fusion.train: optimizer must be a name ('adamw') or a mapping ({'name': 'sgd', 'momentum': 0.9}); workers make "
            "their own from it"
        )
    if type(workers) is not int or workers < 1:
        raise UserError(f"fusion.train: workers must be a whole number from 1 on, got {workers!r}")
    if not isinstance(holdout, int | float) or not 0 <= holdout < 1:
        raise UserError(f"fusion.train: holdout is a share from 0 to below 1, got {holdout!r}")


def _name_of(function: Any) -> str:
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}:{kind.__qualname__}"


@contextmanager
def _folder(folder: str | Path | None) -> Iterator[Path]:
    if folder is not None:
        yield Path(folder)
        return
    made = Path(tempfile.mkdtemp(prefix="fusion-train-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
