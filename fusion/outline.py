"""A job's OP-DAG without its weights: the model is made on the meta device, so that its size costs no memory.

For questions that shapes answer, such as a plan on paper. The OP-DAG is the one that `fusion.submit` would upload.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

from dag.capture import capture, with_evaluation
from dag.graph import OpDag
from fusion.data import prepare
from fusion.errors import CaptureError, FusionError
from fusion.models import build_loss, build_model
from fusion.spec import EntrypointData, JobSpec, ModelFromEntrypoint
from fusion.submit import capture_job
from fusion.trial import evaluates_otherwise
from fusion.user_code import load_entrypoint, printing_aside


def outline_job(spec: JobSpec, base: Path) -> OpDag:
    """The OP-DAG of a job, of whose data one micro-batch is read.

    A model that can't be made or traced without real numbers is made with them. Raises `UserError` and its kinds.
    """
    try:
        with printing_aside():
            return _without_weights(spec, base)
    except (FusionError, RuntimeError, NotImplementedError):
        # Its constructor looks at values, or mixes devices; what is wrong for other reasons fails again, in words.
        return capture_job(spec, base).dag


def _without_weights(spec: JobSpec, base: Path) -> OpDag:
    if isinstance(spec.model, ModelFromEntrypoint):
        # What the user's module makes when it is imported stays real: the next one to build the model finds it there.
        load_entrypoint(spec.model.entrypoint, base, where="model.entrypoint")
    with torch.device("meta"):
        model = build_model(spec, base)
    loss = build_loss(spec, base)
    train = spec.train.model_copy(update={"eval_every": None})
    data, size = spec.data, spec.train.micro_batch_size
    if isinstance(data, EntrypointData):
        data = data.model_copy(update={"limit": min(size, data.limit or size)})
    prepared = prepare(data, train, base, forward=model.forward, loss_is_the_models=loss == "model")
    autocast = "bfloat16" if spec.train.precision == "bfloat16" else None
    captured = capture(model, prepared.example, loss, name=spec.name, autocast=autocast)
    if spec.train.eval_every is not None and evaluates_otherwise(model, loss, captured):
        # Where that can't be captured, numbers decide whether the job can be submitted.
        with suppress(CaptureError):
            captured = with_evaluation(captured, model, prepared.example, loss)
    return captured.dag
