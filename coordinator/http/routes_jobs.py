"""HTTP routes of jobs: submit, list, look, cancel, and what they have recorded."""

from __future__ import annotations

from aiohttp import web

from coordinator.backlog import CantRecordError
from coordinator.engine import Engine
from coordinator.http.bodies import read_body
from coordinator.http.routes_blobs import file_response
from coordinator.http.routing import (
    CANT_RECORD,
    ENGINE,
    Answer,
    HttpError,
    Parameter,
    Route,
    after_parameter,
    natural,
    newest_parameter,
)
from coordinator.life import events as ev
from coordinator.life.jobs import Job
from coordinator.shown.views import (
    CheckpointList,
    ErrorView,
    EventList,
    JobList,
    JobView,
    LogList,
    MetricList,
    Submission,
    job_view,
)
from coordinator.storage.blobs import DiskFullError
from coordinator.storage.checkpoints import MODEL_FILE, OPTIMIZER_FILE
from fusion.errors import FusionError


def find_job(request: web.Request) -> Job:
    """The job that the path names. Raises `HttpError` 404."""
    name = request.match_info["id"]
    job = request.app[ENGINE].lifecycle.jobs.get(name)
    if job is None:
        raise HttpError(404, f"no job {name!r} here; `fusion jobs` lists them")
    return job


async def submit(request: web.Request) -> web.Response:
    return await queue(request.app[ENGINE], await read_body(request, Submission))


async def queue(engine: Engine, submission: Submission) -> web.Response:
    """Answers with the job. Raises `HttpError` when it does not pass the checks."""
    try:
        job = await engine.submit(submission)
    except DiskFullError as error:
        raise HttpError(507, str(error)) from None
    except CantRecordError:
        raise
    except FusionError as error:
        raise HttpError(400, str(error)) from None
    return web.json_response(job_view(job), status=201, headers={"Location": f"/api/v1/jobs/{job.id}"})


async def list_jobs(request: web.Request) -> web.Response:
    jobs = sorted(request.app[ENGINE].lifecycle.jobs.values(), key=lambda job: job.number)
    return web.json_response({"jobs": [job_view(job) for job in jobs]})


async def get_job(request: web.Request) -> web.Response:
    return web.json_response(job_view(find_job(request)))


async def cancel(request: web.Request) -> web.Response:
    job, engine = find_job(request), request.app[ENGINE]
    if job.terminal:
        raise HttpError(409, f"job {job.id} is {job.state} already")
    engine.must_record()
    engine.post(ev.CancelRequested(engine.clock(), job.id))
    return web.json_response(job_view(job))


async def metrics(request: web.Request) -> web.Response:
    job = find_job(request)
    return web.json_response({"metrics": request.app[ENGINE].store.metrics(job.id, natural(request, "after"))})


async def job_events(request: web.Request) -> web.Response:
    after, limit, newest = _part(request)
    events = request.app[ENGINE].store.events(find_job(request).id, after, limit, newest=newest)
    return web.json_response({"events": events})


async def all_events(request: web.Request) -> web.Response:
    after, limit, newest = _part(request)
    return web.json_response({"events": request.app[ENGINE].store.events(None, after, limit, newest=newest)})


async def logs(request: web.Request) -> web.Response:
    after, limit, newest = _part(request)
    found = request.app[ENGINE].store.logs(find_job(request).id, after, limit, newest=newest)
    return web.json_response({"logs": found})


def _part(request: web.Request) -> tuple[int, int, bool]:
    """Which part of a long list is asked for: after which number, at most how many, the newest or the first."""
    newest = "newest" in request.query
    asked = natural(request, "newest", _MOST, least=1)
    return natural(request, "after"), min(asked, _MOST), newest


async def checkpoints(request: web.Request) -> web.Response:
    job = find_job(request)
    return web.json_response({"checkpoints": request.app[ENGINE].store.checkpoints(job.id)})


async def checkpoint_file(request: web.Request) -> web.StreamResponse:
    """Also serves HEAD; `Range` is understood."""
    job, engine = find_job(request), request.app[ENGINE]
    step, part = request.match_info["step"], request.match_info["part"]
    found = engine.archive.find(job.id, int(step)) if step.isascii() and step.isdigit() and len(step) <= 18 else None
    if found is None:
        known = ", ".join(str(item["step"]) for item in engine.store.checkpoints(job.id)) or "none"
        raise HttpError(404, f"job {job.id} has no checkpoint of step {step}; it has: {known}")
    if part not in ("model", "optimizer"):
        raise HttpError(404, f"a checkpoint has {MODEL_FILE} and {OPTIMIZER_FILE}, not {part}.safetensors")
    path = engine.checkpoints.folder(job.id, found.step) / (MODEL_FILE if part == "model" else OPTIMIZER_FILE)
    if not path.exists():
        raise HttpError(404, f"{path} was removed")
    return file_response(request, path, (found.model if part == "model" else found.optimizer).digest)


async def job_dag(request: web.Request) -> web.StreamResponse:
    job, engine = find_job(request), request.app[ENGINE]
    if engine.blobs.size(job.dag.digest) is None:
        raise HttpError(404, f"the OP-DAG of job {job.id} is gone")
    return file_response(request, engine.blobs.path(job.dag.digest), job.dag.digest)


_MOST = 10_000
_ID = Parameter("id", "The job's id.")
_NO_JOB = Answer(404, "No such job.", ErrorView)
_BAD_QUERY = Answer(400, "Not a natural number.", ErrorView)
_FILE = "application/octet-stream"

ROUTES = (
    Route(
        "POST",
        "/api/v1/jobs",
        submit,
        "Submit a job whose blobs are uploaded.",
        (
            Answer(201, "Queued.", JobView),
            Answer(400, "It does not pass the checks; nothing is queued.", ErrorView),
            CANT_RECORD,
            Answer(507, "The disk is full.", ErrorView),
        ),
        body=Submission,
        right="operator",
    ),
    Route(
        "GET",
        "/api/v1/jobs",
        list_jobs,
        "All jobs, in order of submission.",
        (Answer(200, "Jobs.", JobList),),
        right="viewer",
    ),
    Route(
        "GET",
        "/api/v1/jobs/{id}",
        get_job,
        "One job.",
        (Answer(200, "The job.", JobView), _NO_JOB),
        (_ID,),
        right="viewer",
    ),
    Route(
        "POST",
        "/api/v1/jobs/{id}/cancel",
        cancel,
        "Cancel a job.",
        (Answer(200, "Cancelled.", JobView), _NO_JOB, Answer(409, "It has ended already.", ErrorView), CANT_RECORD),
        (_ID,),
        right="operator",
    ),
    Route(
        "GET",
        "/api/v1/jobs/{id}/metrics",
        metrics,
        "Finished steps (at most 10000 at once; ask again after the last).",
        (Answer(200, "Metrics by step.", MetricList), _BAD_QUERY, _NO_JOB),
        (_ID, after_parameter("steps")),
        right="viewer",
    ),
    Route(
        "GET",
        "/api/v1/jobs/{id}/events",
        job_events,
        "What happened to the job.",
        (Answer(200, "Events by number.", EventList), _BAD_QUERY, _NO_JOB),
        (_ID, after_parameter("events"), newest_parameter("events")),
        right="viewer",
    ),
    Route(
        "GET",
        "/api/v1/events",
        all_events,
        "What happened to the pool and all jobs.",
        (Answer(200, "Events by number.", EventList), _BAD_QUERY),
        (after_parameter("events"), newest_parameter("events")),
        right="viewer",
    ),
    Route(
        "GET",
        "/api/v1/jobs/{id}/logs",
        logs,
        "What workers had to say.",
        (Answer(200, "Log lines by number.", LogList), _BAD_QUERY, _NO_JOB),
        (_ID, after_parameter("lines"), newest_parameter("lines")),
        right="viewer",
    ),
    Route(
        "GET",
        "/api/v1/jobs/{id}/checkpoints",
        checkpoints,
        "The checkpoints that are kept.",
        (Answer(200, "Checkpoints by step.", CheckpointList), _NO_JOB),
        (_ID,),
        right="viewer",
    ),
    Route(
        "GET",
        "/api/v1/jobs/{id}/checkpoints/{step}/{part}.safetensors",
        checkpoint_file,
        "A checkpoint's file, or a range of it.",
        (
            Answer(200, "All of it.", content_type=_FILE),
            Answer(206, "The range.", content_type=_FILE),
            Answer(416, "The range is not in the file.", ErrorView),
            Answer(404, "No such checkpoint.", ErrorView),
        ),
        (
            _ID,
            Parameter("step", "The step.", schema={"type": "integer", "minimum": 0}),
            Parameter("part", "Which file.", schema={"type": "string", "enum": ["model", "optimizer"]}),
        ),
        right="viewer",
    ),
    Route(
        "GET",
        "/api/v1/jobs/{id}/dag",
        job_dag,
        "The job's OP-DAG (msgpack).",
        (
            Answer(200, "The OP-DAG.", content_type=_FILE),
            Answer(206, "The range.", content_type=_FILE),
            Answer(416, "The range is not in the file.", ErrorView),
            _NO_JOB,
        ),
        (_ID,),
        right="viewer",
    ),
)
