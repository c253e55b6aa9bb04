"""`fusion submit`."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from fusion.cli.connection import connect
from fusion.cli.options import (
    CaOption,
    CoordinatorOption,
    JobArgument,
    JsonOption,
    MetricsOption,
    TensorBoardOption,
    TokenOption,
)
from fusion.cli.output import note, out, print_json


def submit(
    job: JobArgument,
    follow: Annotated[
        bool, typer.Option("--follow", envvar="FUSION_FOLLOW", help="Show progress until the job has ended.")
    ] = False,
    metrics: MetricsOption = None,
    tensorboard: TensorBoardOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            envvar="FUSION_RESUME",
            metavar="CHECKPOINT",
            help="JOBID, JOBID@STEP, or a folder or file from `fusion checkpoint get`, here or at a URL.",
        ),
    ] = None,
    coordinator: CoordinatorOption = None,
    token: TokenOption = None,
    ca: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Capture a job and hand it to a pool; prints the job's id. With --metrics or --tensorboard it also follows the job."""
    from fusion.spec_file import folder_of, load_spec, placed

    spec = load_spec(job)  # a bad spec is told before torch is imported, which takes a second
    client = connect(coordinator, token, ca)
    client.jobs()  # so is a coordinator that does not answer
    from fusion.metrics_file import MetricsFile
    from fusion.submit import capture_job, remarks_on
    from fusion.submit import submit as post
    from fusion.tensorboard import TensorBoardFile

    # Before the job is handed over: a file that can't be written would end this command, but not the job.
    with closing(MetricsFile(metrics)) as file, closing(TensorBoardFile(tensorboard)) as board, client:
        with placed(job):
            captured = capture_job(spec, folder_of(job), say=note)
        for remark in remarks_on(captured):
            note(remark)
        posted = post(client, captured, resume=resume, say=note)
        if as_json:
            print_json(posted)
        else:
            out(str(posted["id"]))
        if not (follow or metrics is not None or tensorboard is not None):
            return
        from fusion.follow import follow as items
        from fusion.local import check_done
        from fusion.run_view import RunView

        final = posted
        with RunView(spec.name, spec.train.steps) as view:
            for item in items(client, str(posted["id"])):
                file.write(item)
                board.write(item)
                view.show(item)
                if item.kind == "job":
                    final = item.data
        check_done(final)
        note(f"{spec.name} is trained; `fusion checkpoint get {posted['id']}` fetches it")
