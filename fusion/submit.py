"""From a job spec to a job at a coordinator: load, capture, upload, post."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dag.capture import capture
from dag.graph import OpDag
from dag.serialize import digest, dumps
from fusion.client import Client, Json
from fusion.data import PreparedData, prepare
from fusion.data.separate import separate
from fusion.errors import CoordinatorError, UserError
from fusion.messages import BlobRef
from fusion.models import build_loss, build_model
from fusion.remote_files import RemoteFolder, fetch, is_url, shown
from fusion.spec import JobSpec
from fusion.spec_file import folder_of, load_spec, spec_from
from fusion.trial import compare_training, compared_parameters, evaluating, try_once, written_by
from fusion.user_code import printing_aside

Say = Callable[[str], None]


@dataclass(frozen=True)
class CapturedJob:
    """Everything that a coordinator needs of a job."""

    spec: JobSpec
    dag: OpDag
    tensors: Mapping[str, Tensor]
    """Weights, buffers and constants by the names that the OP-DAG uses."""
    data: PreparedData


def _quiet(_: str) -> None:
    return


def read_job(job: str | Path | JobSpec | Mapping[str, Any], base: Path | None = None) -> tuple[JobSpec, Path]:
    """A spec and the folder that its paths are relative to: the file's own, or `base` (the current one). `SpecError`."""
    if isinstance(job, JobSpec):
        return job, base or Path.cwd()
    if isinstance(job, Mapping):
        return spec_from(job), base or Path.cwd()
    return load_spec(job), folder_of(Path(job))


@printing_aside()
def capture_job(spec: JobSpec, base: Path, say: Say = _quiet) -> CapturedJob:
    """Load the user's model and data and capture them. Raises `UserError` and its kinds."""
    say("loading the model")
    model = build_model(spec, base)
    loss = build_loss(spec, base)
    say("reading the data")
    data = prepare(spec.data, spec.train, base, forward=model.forward, loss_is_the_models=loss == "model")
    say("capturing")
    return captured(spec, model, loss, data)


def captured(spec: JobSpec, model: nn.Module, loss: str | Callable[..., Any], data: PreparedData) -> CapturedJob:
    """Capture a model that is already made, and try it once on real numbers. Raises `CaptureError`."""
    autocast = "bfloat16" if spec.train.precision == "bfloat16" else None
    result = capture(model, data.example, loss, name=spec.name, autocast=autocast)
    tried = try_once(model, loss, data.example, autocast, compared_parameters(result.dag), written_by(result))
    compare_training(result, data.example, tried)
    if spec.train.eval_every is not None:
        result = evaluating(model, loss, data.example, result)
    return CapturedJob(spec, result.dag, result.tensors, data)


def remarks_on(job: CapturedJob) -> list[str]:
    """What may not be as its author meant it, though it can be trained."""
    schedule = job.spec.train.lr_schedule
    unused = [
        f"train.lr_schedule.{option} changes nothing: the schedule is {schedule.name}; "
        f"{'step' if option in ('every', 'gamma') else 'linear or cosine'} would use it"
        for option in schedule.unused
    ]
    return [f"note: {remark}" for remark in (*job.dag.notes, *unused)]


def submit(client: Client, job: CapturedJob, *, resume: str | None = None, say: Say = _quiet) -> Json:
    """Upload what the coordinator does not have yet and post the job. Returns the job as the coordinator describes it.

    `resume`: `JOBID`, `JOBID@STEP`, or a folder or file from `fusion checkpoint get`, here or at a URL.
    """
    resumed = resume_from(client, resume, say) if resume is not None else None
    encoded = dumps(job.dag)
    dag = BlobRef(digest=digest(encoded), size=len(encoded))
    say("uploading")
    client.upload_blob(dag, encoded)
    with weights_file(job.tensors) as (weights, path):
        client.upload_blob(weights, path)
    client.upload_blob(job.data.manifest.blob, job.data.blob)
    body: dict[str, Any] = {
        "spec": job.spec.model_dump(mode="json"),
        "dag": dag.model_dump(),
        "weights": weights.model_dump(),
        "data": job.data.manifest.model_dump(mode="json"),
        "resume": resumed,
    }
    return client.submit_raw(body)


@contextmanager
def weights_file(tensors: Mapping[str, Tensor]) -> Iterator[tuple[BlobRef, Path]]:
    """The tensors as a safetensors file that is gone afterwards: weights may be too large to hold twice."""
    with tempfile.TemporaryDirectory(prefix="fusion-") as folder:
        path = Path(folder) / "weights.safetensors"
        try:
            save_file(separate(tensors), path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"can't write the weights to {folder}: {error}; set TMPDIR to a folder with room") from None
        yield file_ref(path), path


def file_ref(path: Path) -> BlobRef:
    with open(path, "rb") as file:
        return BlobRef(digest=hashlib.file_digest(file, "sha256").hexdigest(), size=path.stat().st_size)


def resume_from(client: Client, resume: str, say: Say = _quiet) -> Json:
    """What `POST /api/v1/jobs` takes as `resume`. Raises `UserError` or `CoordinatorError`."""
    if is_url(resume):
        return _resume_from_url(client, resume, say)
    local = Path(resume)
    if local.exists():
        return _resume_from_files(client, local, say)
    job, at, step = resume.partition("@")
    if "/" in resume or resume.endswith(".safetensors"):
        raise UserError(f"--resume {resume}: no such file or folder")
    if at:
        if not step.isdecimal():
            raise UserError(f"--resume {resume}: {step!r} is not a step; write JOBID@STEP")
        return {"checkpoint": f"{job}@{int(step)}"}
    try:
        steps = [int(checkpoint["step"]) for checkpoint in client.checkpoints(job)]
    except CoordinatorError as error:
        if error.status == 404:
            raise UserError(f"--resume {resume}: neither a job of {client.url} nor a file or folder here") from None
        raise
    if not steps:
        raise UserError(f"--resume {resume}: job {job} has no checkpoint yet")
    return {"checkpoint": f"{job}@{max(steps)}"}


def _resume_from_url(client: Client, url: str, say: Say) -> Json:
    """Of a folder the model and, where it is there, the optimizer."""
    with tempfile.TemporaryDirectory(prefix="fusion-") as folder:
        model = Path(folder) / "model.safetensors"
        say(f"fetching {shown(url)}")
        if url.endswith(model.suffix):
            fetch(url, model)
            return _resume_from_files(client, model, say)
        there = RemoteFolder(url)
        if not there.get(model, model.name):
            raise UserError(f"--resume {shown(url)}: no model.safetensors in this folder")
        there.get(model.with_name("optimizer.safetensors"), "optimizer.safetensors")
        return _resume_from_files(client, Path(folder), say)


def _resume_from_files(client: Client, path: Path, say: Say) -> Json:
    model = path / "model.safetensors" if path.is_dir() else path
    if not model.is_file():
        raise UserError(f"--resume {path}: no model.safetensors in this folder")
    optimizer = model.with_name("optimizer.safetensors") if model.name == "model.safetensors" else None
    step = _step_of(model)
    ref = file_ref(model)
    client.upload_blob(ref, model)
    optimizer_ref = None
    if optimizer is not None and optimizer.is_file() and _step_of(optimizer) == step:
        optimizer_ref = file_ref(optimizer)
        client.upload_blob(optimizer_ref, optimizer)
    else:
        say(f"no optimizer.safetensors of step {step} beside {model.name}: the optimizer's state starts from zero")
    return {
        "model": ref.model_dump(),
        "optimizer": optimizer_ref.model_dump() if optimizer_ref is not None else None,
        "step": step,
    }


def _step_of(path: Path) -> int:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None
    step = metadata.get("step", "0")
    return int(step) if step.isdecimal() else 0
