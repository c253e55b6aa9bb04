"""The commands: what they print, their exit codes, and that a failure is one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from loopback_server import as_json, serving

from fusion.cli import app, main
from fusion.cli.links import links_table
from fusion.cli.predictions import _short

JOB = {
    "id": "small-1",
    "name": "small",
    "state": "running",
    "reason": "",
    "submitted_at": 1.0,
    "started_at": 2.0,
    "finished_at": None,
    "step": 3,
    "steps": 10,
    "loss": 1.25,
    "first_loss": 2.0,
    "step_seconds": 0.5,
    "tokens_per_second": 1000.0,
    "samples_per_second": None,
    "sent_bytes": 2048,
    "epoch": 0,
    "plan": None,
    "workers": ["a"],
    "fragments": [
        {
            "index": 0,
            "worker": "a",
            "ops": 5,
            "first_module": "stem",
            "last_module": "head",
            "parameters": 200,
            "parameter_bytes": 400,
            "flops": 2_000_000,
            "backward_flops": 4_000_000,
        }
    ],
    "checkpoint": 2,
}
WORKER = {
    "name": "a",
    "state": "busy",
    "job": "small-1",
    "fragments": [0],
    "device": {
        "kind": "cpu",
        "description": "AMD",
        "cores": 2,
        "threads": 1,
        "memory_bytes": 2**30,
        "flops_per_second": 8e10,
        "declared": False,
        "convolution_flops_per_second": 4e10,
        "bytes_per_second": 6e9,
    },
    "memory_used_bytes": 2**20,
    "endpoint": "tcp://127.0.0.1:1",
}
LOG = {"seq": 2, "time": 5.0, "job": "small-1", "worker": "a", "message": "fetched 3 parameters"}
EVENT = {"seq": 1, "time": 4.0, "job": "small-1", "event": "checkpoint-copy-failed", "message": "the store is away"}
CHECKPOINT = {"job": "small-1", "step": 2, "time": 3.0, "model": {"size": 7}, "optimizer": {"size": 9}}

LINK = {
    "from": "a",
    "to": "b",
    "seconds": 0.02,
    "bytes_per_second": 1e6,
    "source": "probe",
    "age_seconds": 75.0,
    "error": None,
}
FAILED_LINK = {**LINK, "from": "b", "to": "a", "seconds": None, "bytes_per_second": None, "error": "no answer"}


def routes(method, path, body, headers):
    path = path.partition("?")[0]
    answers = {
        "/api/v1/jobs": {"jobs": [JOB]},
        "/api/v1/jobs/small-1": JOB,
        "/api/v1/jobs/small-1/cancel": {**JOB, "state": "cancelled"},
        "/api/v1/jobs/small-1/logs": {"logs": [LOG]},
        "/api/v1/jobs/small-1/events": {"events": [EVENT]},
        "/api/v1/jobs/small-1/checkpoints": {"checkpoints": [CHECKPOINT]},
        "/api/v1/workers": {"workers": [WORKER]},
        "/api/v1/links": {"links": [LINK, FAILED_LINK]},
        "/api/v1/workers/a/drain": {**WORKER, "state": "draining"},
    }
    if path.endswith(".safetensors"):
        return 200, path.rpartition("/")[2].encode(), {}
    return as_json(answers[path]) if path in answers else as_json({"error": f"no job at {path}"}, 404)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    code = ended.value.code
    return code if isinstance(code, int) else 0, out, err


@pytest.fixture
def pool(monkeypatch):
    with serving(routes) as url:
        monkeypatch.setenv("FUSION_COORDINATOR", url)
        monkeypatch.setenv("FUSION_TOKEN", "secret")
        yield url


def test_version_and_help(capsys):
    assert run(capsys, "--version")[:2] == (0, "fusion 0.1.0\n")
    for command in ("up", "coordinator", "worker", "submit", "jobs", "dag", "plan", "checkpoint"):
        code, out, _ = run(capsys, command, "--help")
        assert code == 0
        assert "Usage: fusion" in out


@pytest.mark.parametrize("group", [[], ["checkpoint"], ["token"]])
def test_summaries_of_commands_fit_a_terminal(capsys, monkeypatch, group):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run(capsys, *group, "--help")[1].splitlines()
    assert "Commands:" in lines
    assert not [line for line in lines if line.endswith("...") and not line.startswith("Usage:")]


PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", re.findall(r"^## fusion (.*)$", PAGE, re.MULTILINE))
def test_help_names_values_as_the_page_of_commands_does(capsys, command):
    _, _, rest = PAGE.partition(f"## fusion {command}\n")
    rows = [line.split(" | ")[0] for line in rest.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    given = [re.findall("`(.*?)`", row)[-1].replace("\\|", "|").split() for row in rows]
    assert given
    out = run(capsys, *command.split(), "--help")[1]
    usage = out.splitlines()[0].split()
    for name, *value in given:
        if not name.startswith("-"):
            assert name in usage or f"[{name}]" in usage, usage
        elif value:
            assert re.search(rf"{name} (<{re.escape(value[0])}>|{re.escape(value[0])})\s", out), (
                f"{name} {value[0]}: {out}"
            )


@pytest.mark.parametrize(
    "command",
    [
        ("jobs",),
        ("job", "small-1"),
        ("cancel", "small-1"),
        ("workers",),
        ("workers", "--links"),
        ("drain", "a"),
        ("checkpoint", "ls", "small-1"),
    ],
)
def test_every_listing_prints_text_and_json(capsys, pool, command):
    code, out, err = run(capsys, *command)
    assert (code, err) == (0, "")
    assert out.strip()
    code, out, err = run(capsys, *command, "--json")
    assert (code, err) == (0, "")
    json.loads(out)


def test_workers_shows_speeds_and_links(capsys, pool):
    out = run(capsys, "workers")[1]
    assert "80 / 40 GFLOP/s" in out
    assert "6.0 GB/s" in out
    links = run(capsys, "workers", "--links")[1]
    assert "8 Mbit/s, 20.0 ms" in links
    assert "probe, 1m15s ago" in links
    assert "failed: no answer" in links
    assert json.loads(run(capsys, "workers", "--links", "--json")[1]) == [LINK, FAILED_LINK]


def test_the_links_of_many_workers_are_a_list():
    names = [f"w{index}" for index in range(20)]
    shown = links_table(names, [{**LINK, "from": "w0", "to": name} for name in names[1:]])
    assert (len(shown.columns), shown.row_count) == (4, 19)


def test_a_relayed_link_says_over_whom():
    known = {**LINK, "relay": "the coordinator"}
    unknown = {**known, "from": "b", "to": "a", "seconds": None, "bytes_per_second": None}
    cells = [list(column.cells) for column in links_table(["a", "b"], [known, unknown]).columns]
    assert cells[2][0] == "8 Mbit/s, 20.0 ms\nrelayed over the coordinator, probe, 1m15s ago"
    assert cells[1][1] == "?, ?\nrelayed over the coordinator, not measured"


def test_job_shows_its_plan(capsys, pool):
    out = run(capsys, "job", "small-1")[1]
    assert re.search(r"loss +1\.2500 \(first 2\.0000\)", out)
    assert re.search(r"speed +1,000 tokens/s", out)
    assert "MFLOP forward + backward" in out
    assert re.search(r"0 +a +stem \.\. head +5 +200 +400 B +6\.0", out)


def test_logs_and_events_in_order(capsys, pool):
    out = run(capsys, "logs", "small-1")[1].splitlines()
    assert [line.split(maxsplit=3)[2:] for line in out] == [
        ["checkpoint-copy-failed", "the store is away"],
        ["a", "fetched 3 parameters"],
    ]
    assert len({line.index(line.split(maxsplit=3)[3]) for line in out}) == 1  # A column for who says it.
    lines = run(capsys, "logs", "small-1", "--json")[1].splitlines()
    assert [json.loads(line)["seq"] for line in lines] == [1, 2]


def test_checkpoint_get(capsys, pool, tmp_path):
    code, out, _ = run(capsys, "checkpoint", "get", "small-1", "-o", str(tmp_path / "m.safetensors"))
    assert (code, out) == (0, f"{tmp_path / 'm.safetensors'}\n")
    assert (tmp_path / "m.safetensors").read_text() == "model.safetensors"
    assert run(capsys, "checkpoint", "get", "small-1", "-o", str(tmp_path / "both"))[0] == 0
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["model.safetensors", "optimizer.safetensors"]
    code, _, err = run(capsys, "checkpoint", "get", "small-1", "--step", "5")
    assert (code, err) == (1, "error: job small-1 has no checkpoint of step 5; it has 2\n")


def test_errors_are_one_line(capsys, pool, tmp_path, monkeypatch):
    assert run(capsys, "job", "other") == (1, "", "error: no job at /api/v1/jobs/other\n")
    code, _, err = run(capsys, "submit", str(tmp_path / "none.yaml"))
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"error: {tmp_path}/none.yaml: no such file")
    monkeypatch.delenv("FUSION_COORDINATOR")
    assert run(capsys, "jobs")[2].startswith("error: no coordinator known")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("job",), "error: Missing argument 'ID'; see `fusion job --help`"),
        (("jobs", "--jsn"), "error: No such option: --jsn"),
        (("nope",), "error: No such command 'nope'"),
        (("up", "--workers", "0"), "error: Invalid value for '--workers'"),
        (("dag", "x.yaml", "--format", "svg"), "error: Invalid value for '--format'"),
        (("job", ""), "error: Invalid value for 'ID': it is empty; see `fusion job --help`"),
        (("logs", " "), "error: Invalid value for 'ID': it is empty"),
        (("cancel", ""), "error: Invalid value for 'ID': it is empty"),
        (("drain", ""), "error: Invalid value for 'WORKER': it is empty"),
        (("checkpoint", "ls", ""), "error: Invalid value for 'ID': it is empty"),
        (("checkpoint", "get", "", "-o", "x"), "error: Invalid value for 'ID': it is empty"),
        (("token", "revoke", ""), "error: Invalid value for 'ID': it is empty"),
        (("token", "revoke", ".secret"), "error: Invalid value for 'ID': it is empty"),
    ],
)
def test_wrong_usage(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_debug_raises(pool):
    with pytest.raises(Exception, match="no job at"):
        main(["job", "other", "--debug"])


def test_bad_options_of_a_worker(capsys):
    for speed in ("-1", "0", "fast", "nan", "inf", "1e-300", "1e300"):
        code, _, err = run(capsys, "worker", "--join", "http://127.0.0.1:1", "--speed", speed)
        wanted = f"error: --speed '{speed}' is not a speed in FLOP/s between 1e-6 and 1e24; write it like 4e11\n"
        assert (code, err) == (1, wanted)
    code, _, err = run(capsys, "worker", "--join", "http://127.0.0.1:1", "--memory-limit", "lots")
    assert (code, err) == (1, "error: --memory-limit: can't read 'lots' as a size; write it like 2GiB\n")
    code, _, err = run(capsys, "worker", "--join", "http://127.0.0.1:1", "--memory-limit", "1e290GiB")
    assert (code, err) == (1, "error: --memory-limit: must be between 1B and 1000TiB, got '1e290GiB'\n")
    for limit in ("0", "0.5B"):
        code, _, err = run(capsys, "worker", "--join", "http://127.0.0.1:1", "--memory-limit", limit)
        assert (code, err) == (1, f"error: --memory-limit: must be between 1B and 1000TiB, got '{limit}'\n")
    code, _, err = run(capsys, "worker", "--join", "http://127.0.0.1:1", "--name", "a b")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("error: --name 'a b' is not a worker's name: up to 64 letters")
    code, _, err = run(capsys, "worker", "--join", "http://[::1?token=secret")
    assert (code, err.count("\n"), "secret" in err) == (1, 1, False)
    assert "is not a coordinator's address" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [("jobs",), ("jobs", "--json"), ("--version",)])
def test_a_full_disk_under_stdout_is_said_so(pool, arguments):
    command = [sys.executable, "-m", "fusion", *arguments]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "error: can't write to stdout: No space left on device\n")


def test_what_nobody_expected_is_one_line_too(capsys, pool, monkeypatch):
    def fail(*_):
        raise RuntimeError("one\n  two\n")

    monkeypatch.setattr("fusion.client.Client.jobs", fail)
    told = "error: unexpected RuntimeError: one two (run again with --debug for the traceback)\n"
    assert run(capsys, "jobs") == (1, "", told)


def test_every_flag_has_an_environment_variable():
    def options(command, path):
        for name, child in getattr(command, "commands", {}).items():
            yield from options(child, f"{path} {name}")
        for parameter in command.params:
            if parameter.opts[0].startswith("-") and parameter.name not in ("help", "version"):
                yield path, parameter

    found = list(options(typer.main.get_command(app), "fusion"))
    assert len(found) > 40
    for path, parameter in found:
        flag = max(parameter.opts, key=len).removeprefix("--").replace("-", "_").upper()
        assert parameter.envvar == f"FUSION_{flag}", f"{path} {parameter.opts}"


def test_quick_commands_import_no_torch():
    code = "import sys\nfrom fusion.cli import main\ntry:\n    main(['jobs'])\nexcept SystemExit:\n    pass\n"
    code += "assert 'torch' not in sys.modules and 'aiohttp' not in sys.modules and 'yaml' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SPEC = """\
model: {entrypoint: model.py:build}
loss: mse
data: {arrays: data.npz}
train: {steps: 2, global_batch: 4, micro_batch: 2}
"""


@pytest.fixture
def job(tmp_path) -> Path:
    import numpy as np

    (tmp_path / "model.py").write_text(
        "import torch\n\ndef build():\n    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))\n"
    )
    np.savez(tmp_path / "data.npz", inputs=np.ones((8, 3)), targets=np.ones((8, 2)))
    (tmp_path / "job.yaml").write_text(SPEC)
    (tmp_path / "pool.yaml").write_text(
        "workers:\n  - {name: a, region: x, speed: 1.0e+9, memory: 1GiB}\n  - {name: b, region: x, speed: 1.0e+9, memory: 1GiB}\n"
        "links:\n  - {between: [x, x], bandwidth: 1Gbit/s, latency: 1ms}\n"
    )
    return tmp_path / "job.yaml"


def test_dag(capsys, job, tmp_path):
    code, out, err = run(capsys, "dag", str(job))
    assert (code, err) == (0, "")
    assert "parameters" in out
    assert json.loads(run(capsys, "dag", str(job), "--format", "json")[1])["ops"]
    assert run(capsys, "dag", str(job), "--format", "dot")[1].startswith("digraph")
    for name, start in (("g.html", "<!"), ("g.txt", "module")):
        kind = "html" if name == "g.html" else "table"
        assert run(capsys, "dag", str(job), "--format", kind, "-o", str(tmp_path / name))[0] == 0
        assert (tmp_path / name).read_text().lstrip().lower().startswith(start)
    assert run(capsys, "dag", str(job), "-o", str(tmp_path / "no" / "where"))[0] == 1


@pytest.mark.parametrize("command", [("dag", "--format", "json"), ("plan", "--json")])
def test_a_spec_through_a_pipe(capsys, job, tmp_path, monkeypatch, command):
    """A pipe gives its content once, and its paths are those of the working folder."""
    monkeypatch.chdir(tmp_path)
    topology = ("--topology", "pool.yaml") if command[0] == "plan" else ()
    reading, writing = os.pipe()
    os.write(writing, job.read_bytes())
    os.close(writing)
    try:
        code, out, err = run(capsys, command[0], f"/dev/fd/{reading}", *command[1:], *topology)
    finally:
        os.close(reading)
    assert code == 0, err
    assert json.loads(out)


def test_plan(capsys, job, tmp_path):
    topology = str(tmp_path / "pool.yaml")
    code, out, err = run(capsys, "plan", str(job), "--topology", topology)
    assert (code, err) == (0, "")
    assert "per step" in out
    found = json.loads(run(capsys, "plan", str(job), "--topology", topology, "--json")[1])
    assert found["policy"] == "op-fence"
    compared = json.loads(run(capsys, "plan", str(job), "--topology", topology, "--compare", "--json")[1])
    wanted = {"policy", "codec", "step_seconds", "bubble", "bytes_per_link", "memory_per_worker", "placement"}
    assert all(wanted <= entry.keys() for entry in compared)
    assert {entry["policy"] for entry in compared} >= {"op-fence", "equal-ops", "equal-compute"}
    assert {entry["codec"] for entry in compared} >= {"none", "int8", "topk", "adatopk", "adaint", "auto"}
    page, trace = str(tmp_path / "steps.html"), str(tmp_path / "steps.json")
    assert run(capsys, "plan", str(job), "--topology", topology, "--compare", "--timeline", page)[0] == 0
    assert Path(page).read_text().startswith("<!doctype html>")
    assert run(capsys, "plan", str(job), "--topology", topology, "--timeline", trace)[0] == 0
    assert json.loads(Path(trace).read_text())["traceEvents"]
    code, _, err = run(capsys, "plan", str(job), "--topology", topology, "--timeline", "steps.png")
    assert (code, err.count("\n")) == (1, 1)
    assert "must end in .html" in err
    code, _, err = run(capsys, "plan", str(job), "--topology", topology, "--policy", "op-fnce")
    assert (code, err) == (1, "error: --policy: no policy 'op-fnce'; did you mean 'op-fence'?\n")


def test_plan_uses_as_many_workers_as_the_job_asks_for(capsys, job, tmp_path):
    topology = tmp_path / "pool.yaml"
    topology.write_text(
        "workers:\n"
        + "".join(
            f"  - {{name: {name}, region: {name[0]}, speed: 1.0e+9, memory: 1GiB}}\n" for name in ("x1", "y1", "x2")
        )
        + "links:\n  - {between: [x, x], bandwidth: 1Gbit/s, latency: 1ms}\n"
        "  - {between: [x, y], bandwidth: 16Mbit/s, latency: 90ms}\n"
    )
    arguments = ("plan", str(job), "--topology", str(topology))
    job.write_text(SPEC + "plan: {workers: 2}\n")
    assert set(json.loads(run(capsys, *arguments, "--json")[1])["placement"]) == {"x1", "x2"}
    compared = json.loads(run(capsys, *arguments, "--compare", "--json")[1])
    assert {frozenset(entry["placement"]) for entry in compared} == {frozenset({"x1", "x2"})}
    job.write_text(SPEC + "plan: {workers: 5}\n")
    for more in ((), ("--compare",)):
        code, out, err = run(capsys, *arguments, *more)
        assert (code, out) == (1, "")
        assert err == (f"error: {job}: plan.workers is 5, but {topology} has 3 workers; the job would wait for 5\n")


def test_plan_names_the_job_s_own_codecs(capsys, job, tmp_path):
    job.write_text(SPEC + "compression: {codec: int8, forward: int4, backward: 'int3:stochastic=1'}\n")
    arguments = ("plan", str(job), "--topology", str(tmp_path / "pool.yaml"))
    assert run(capsys, *arguments)[1].startswith("op-fence, codec int4/int3:stochastic=1: ")
    compared = json.loads(run(capsys, *arguments, "--compare", "--json")[1])
    assert [entry["codec"] for entry in compared].count("int4/int3:stochastic=1") == 4


def test_a_model_that_can_not_be_captured_names_its_line(capsys, job, tmp_path):
    (tmp_path / "model.py").write_text(
        "import torch\n\nclass Bad(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.a = torch.nn.Linear(3, 2)\n\n    def forward(self, x):\n"
        "        if x.sum() > 0:\n            x = -x\n        return self.a(x)\n\ndef build():\n    return Bad()\n"
    )
    code, _, err = run(capsys, "dag", str(job))
    assert code == 1
    assert "model.py:9" in err


def test_a_long_placement_is_shown_by_its_ends_and_counted():
    assert _short(("a",) * 9) == "a a a ... a (9 fragments on 1 worker)"
    assert _short((*"abcdefgh", "z")) == "a b c ... z (9 fragments on 9 workers)"
