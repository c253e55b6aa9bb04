"""The pool of child processes: it trains, it says why it can't, and it never outlives its owner."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

import fusion
from fusion.cli import main
from fusion.errors import ServiceError
from fusion.follow import follow
from fusion.local import LocalPool, LocalWorker
from fusion.runs import run_folder

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]


def test_who_waits_for_workers_listens_no_longer_than_that(tmp_path, monkeypatch) -> None:
    """The pool's stream goes on for as long as the pool: what comes of it would be kept for nobody."""
    news: queue.SimpleQueue[str] = queue.SimpleQueue()
    ended = threading.Event()

    class Pool:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def workers(self):
            return [{"name": "a"}]

        def stream(self):
            try:
                while True:
                    yield news.get(timeout=20)
            finally:
                ended.set()

    pool = LocalPool(tmp_path, [LocalWorker("a")])
    monkeypatch.setattr(pool, "client", Pool)
    pool.wait_for_workers()
    news.put("pulse")
    assert ended.wait(10)


@pytest.fixture
def job(tmp_path) -> Path:
    (tmp_path / "model.py").write_text(
        "import torch\nimport scheduler  # a file of the user's own, not ours\n\n"
        "def build():\n    return torch.nn.Sequential(torch.nn.Linear(3, scheduler.WIDTH), torch.nn.Tanh(), "
        "torch.nn.Linear(scheduler.WIDTH, 2))\n"
    )
    (tmp_path / "scheduler.py").write_text("WIDTH = 8\n")
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(32, 3))
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=inputs[:, :2] * 2)
    (tmp_path / "job.yaml").write_text(
        "name: tiny\nmodel: {entrypoint: model.py:build}\nloss: mse\ndata: {arrays: data.npz, holdout: 0.25}\n"
        "train: {steps: 6, global_batch: 8, micro_batch: 2, eval_every: 3, optimizer: {name: sgd, lr: 0.1}}\n"
    )
    return tmp_path / "job.yaml"


def up(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["up", *arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_a_checkpoint_that_is_not_there_is_told_before_anything_starts(tmp_path, capsys):
    code, out, err = up(capsys, "--resume", str(tmp_path / "nope"), "--state", str(tmp_path / "run"))
    assert (code, out, err) == (1, "", f"error: --resume {tmp_path / 'nope'}: no such file or folder\n")
    assert not (tmp_path / "run").exists()


def plain_training() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Written without any code of ours but the order of samples."""
    from fusion.sampling import SampleOrder

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    inputs = torch.tensor(np.random.default_rng(0).normal(size=(32, 3)), dtype=torch.float32)
    targets = torch.tensor(np.random.default_rng(0).normal(size=(32, 3))[:, :2] * 2, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    order, losses = SampleOrder(0, 24, 4, 2), []
    for step in range(1, 7):
        total = 0.0
        optimizer.zero_grad()
        for micro_batch in range(4):
            chosen = torch.from_numpy(order.micro_batch(step, micro_batch))
            loss = torch.nn.functional.mse_loss(model(inputs[chosen]), targets[chosen])
            (loss / 4).backward()
            total += loss.item()
        optimizer.step()
        losses.append(total / 4)
    return losses, model.state_dict()


def test_up_trains_resumes_and_writes_what_it_says(capsys, job, tmp_path):
    folder, metrics = tmp_path / "run", tmp_path / "metrics.jsonl"
    code, out, err = up(capsys, str(job), "--workers", "2", "--metrics", str(metrics), "--state", str(folder))
    assert code == 0, err
    assert "tiny is trained: 6 steps" in out
    assert "fragment" in out
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if "event" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "step_seconds", "sent_bytes", "samples", "epoch"} <= line.keys() for line in steps)
    assert [line["step"] for line in steps if "eval_loss" in line] == [3, 6]
    assert {"started", "done"} <= {line["event"] for line in lines if "event" in line}
    losses, weights = plain_training()
    assert [line["loss"] for line in steps] == losses
    trained = load_file(folder / "checkpoint" / "model.safetensors")
    assert trained.keys() == weights.keys()
    assert all(torch.equal(trained[name], weights[name]) for name in weights)

    longer = tmp_path / "longer.yaml"
    longer.write_text(job.read_text().replace("steps: 6", "steps: 8"))
    arguments = ("--workers", "1", "--metrics", str(metrics), "--resume", str(folder / "checkpoint"))
    code, _, err = up(capsys, str(longer), *arguments, "--state", str(tmp_path / "again"))
    assert code == 0, err
    resumed = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in resumed if "event" not in line] == [7, 8]


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_run_that_is_told_to_end_says_where_it_is_and_leaves_nobody_behind(job, tmp_path, number, code, word):
    endless = tmp_path / "endless.yaml"
    endless.write_text(job.read_text().replace("steps: 6", "steps: 1000000000"))
    command = [sys.executable, "-m", "fusion", "up", str(endless), "--workers", "1", "--state", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        told = []
        for line in process.stdout:
            told.append(line)
            if line.startswith("step "):
                break
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        told += process.stdout.readlines()
        assert process.wait(30) == code
    finally:
        process.kill()
    assert f"stopping; what there is stays in {tmp_path / 'run'}\n" in told
    assert told[-1] == f"{word}\n"
    assert len(children) == 2
    assert psutil.wait_procs(children, 20)[1] == []


def test_an_interrupted_run_does_not_hold_up_the_next_one_in_its_folder(capsys, job, tmp_path):
    folder, endless = tmp_path / "run", tmp_path / "endless.yaml"
    endless.write_text(
        job.read_text().replace("steps: 6", "steps: 1000000000") + "checkpoint: {every: 4, keep: 1000}\n"
    )
    with LocalPool(folder, [LocalWorker("worker-1")]) as pool, fusion.Client(pool.url, pool.token) as client:
        left = client.submit(endless)["id"]
        next(item for item in follow(client, left) if item.data.get("event") == "checkpoint")
    code, _, err = up(capsys, str(job), "--workers", "1", "--state", str(folder))
    assert code == 0, err
    told = next(line for line in err.splitlines() if line.startswith(f"job {left} of an earlier run in this folder is"))
    kept = Path(told.rpartition(" ")[2])
    longer = tmp_path / "longer.yaml"
    longer.write_text(job.read_text().replace("steps: 6", f"steps: {int(kept.name) + 1}"))
    code, _, err = up(capsys, str(longer), "--workers", "1", "--state", str(folder), "--resume", str(kept))
    assert code == 0, err
    assert f"step {int(kept.name) + 1}/" in err
    assert "of an earlier run" not in err


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_submit_follow_and_fetch(capsys, job, tmp_path, monkeypatch):
    metrics = tmp_path / "metrics.jsonl"
    with LocalPool(tmp_path / "pool", [LocalWorker("a"), LocalWorker("b")]) as pool:
        pool.wait_for_workers()
        monkeypatch.setenv("FUSION_COORDINATOR", pool.url)
        monkeypatch.setenv("FUSION_TOKEN", pool.token)
        code, out, err = run(capsys, "submit", str(job), "--follow", "--metrics", str(metrics))
        assert err.endswith(f"tiny is trained; `fusion checkpoint get {out.strip()}` fetches it\n")
        assert code == 0, err
        job_id = out.strip()
        assert [json.loads(line).get("step") for line in metrics.read_text().splitlines()][-1] == 6
        assert job_id in run(capsys, "jobs")[1]
        assert json.loads(run(capsys, "job", job_id, "--json")[1])["state"] == "done"
        assert "done" in run(capsys, "logs", job_id, "-f")[1]
        fetched = tmp_path / "kept"
        assert run(capsys, "checkpoint", "get", job_id, "-o", str(fetched))[0] == 0
        assert sorted(load_file(fetched / "model.safetensors")) == ["0.bias", "0.weight", "2.bias", "2.weight"]

        job.write_text(job.read_text().replace("steps: 6", "steps: 7"))
        code, out, err = run(capsys, "submit", str(job), "--resume", job_id, "--metrics", str(metrics))
        assert code == 0, err
        assert [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line] == [7]
        monkeypatch.setenv("FUSION_TOKEN", "wrong")
        code, _, err = run(capsys, "submit", str(job))
        assert code == 1
        assert "the bearer token is wrong; give --token" in err

        client = fusion.Client(pool.url, pool.token)
        posted = client.submit(job)
        assert client.wait(posted["id"])["step"] == 7


def test_a_topology_names_the_workers(capsys, job, tmp_path):
    (tmp_path / "pool.yaml").write_text(
        "workers:\n  - {name: oslo-1, region: oslo, speed: 4.0e+10, memory: 4GiB}\n"
        "  - {name: lima-1, region: lima, speed: 2.0e+10, memory: 8GiB}\n"
        "links:\n  - {between: [oslo, lima], bandwidth: 1Gbit/s, latency: 1ms}\n"
    )
    arguments = (str(job), "--topology", str(tmp_path / "pool.yaml"), "--state", str(tmp_path / "run"))
    code, out, err = up(capsys, *arguments)
    assert code == 0, err
    assert "oslo-1" in out
    assert f"links between workers, and workers beside the fastest, are as slow as {tmp_path / 'pool.yaml'} says" in err
    assert (tmp_path / "run" / "logs" / "lima-1.log").exists()
    code, _, err = up(capsys, *arguments, "--workers", "3")
    assert (code, err) == (1, "error: --workers 3: the topology has 2; leave out --workers\n")


def test_where_the_workers_can_not_do_it_nobody_waits_for_others(capsys, job, tmp_path):
    (tmp_path / "pool.yaml").write_text(
        "workers:\n  - {name: box, region: home, speed: 4.0e+10, memory: 64MiB}\n"
        "links:\n  - {between: [home, home], bandwidth: 1Gbit/s, latency: 1ms}\n"
    )
    code, _, err = up(capsys, str(job), "--topology", str(tmp_path / "pool.yaml"), "--state", str(tmp_path / "run"))
    assert code == 1
    assert "error: job tiny-1 can't be trained on these workers: fragment 0 needs 480 B" in err
    assert "box has no room: 480 B missing" in err


def test_a_model_that_raises_stops_the_pool(capsys, job, tmp_path):
    (tmp_path / "scheduler.py").write_text("raise RuntimeError('not today')\n")
    code, _, err = up(capsys, str(job), "--workers", "1", "--state", str(tmp_path / "run"))
    assert code == 1
    assert "scheduler.py:1: RuntimeError: not today" in err
    assert "Traceback" not in err


def test_a_port_in_use(tmp_path):
    with LocalPool(tmp_path / "first", []) as pool:
        port = int(pool.url.rpartition(":")[2])
        with (
            pytest.raises(ServiceError, match=f"the coordinator could not go on: port {port} on 127.0.0.1 is in use"),
            LocalPool(tmp_path / "second", [], port=port),
        ):
            pass


def test_a_worker_that_can_not_start(tmp_path):
    workers = [LocalWorker("fine"), LocalWorker("odd", device="cuda:99")]
    with LocalPool(tmp_path, workers) as pool, pytest.raises(ServiceError, match="worker odd"):
        pool.wait_for_workers()


def test_children_leave_when_their_owner_is_killed(tmp_path):
    script = tmp_path / "owner.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom fusion.local import LocalPool, LocalWorker\n"
        "pool = LocalPool(Path(sys.argv[1]), [LocalWorker('a')])\npool.start()\npool.wait_for_workers()\n"
        "print(*pool.process_ids().values(), flush=True)\nsys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    children = [psutil.Process(int(number)) for number in owner.stdout.readline().split()]
    assert len(children) == 2
    os.kill(owner.pid, signal.SIGKILL)
    owner.communicate()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_run_folders_never_collide(tmp_path):
    made = [run_folder("job", parent=tmp_path) for _ in range(3)]
    assert len(set(made)) == 3
    assert run_folder("job", tmp_path / "mine") == tmp_path / "mine"


def test_the_short_script(tmp_path):
    """It is in the README; it also shows that no `if __name__ == "__main__"` is needed."""
    script = ROOT / "examples" / "train_in_15_lines.py"
    assert len(script.read_text().splitlines()) <= 15
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    share = float(done.stdout.rsplit("%", 1)[0].rsplit(" ", 1)[1])
    assert share > 85
    assert list(tmp_path.iterdir()) == [], "without `folder` nothing is left behind"


@pytest.mark.slow
def test_the_built_in_example(capsys, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    code, out, err = up(capsys, "--state", str(tmp_path / "run"), "--metrics", str(metrics))
    assert code == 0, err
    losses = [line["loss"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    assert losses[0] > 5.4
    assert losses[-1] < 3
    assert "between 4 workers" in out
    assert all(f"worker-{number}" in out for number in (1, 2, 3, 4))
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").exists()
