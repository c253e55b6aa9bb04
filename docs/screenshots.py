"""Makes the README's pictures of the dashboard from a real run: four workers in two regions train the demo, one is killed.

`python docs/screenshots.py [--folder docs/images] [--steps 70]` needs the system's Chromium and playwright (the `dev` extra).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from playwright.sync_api import Browser, sync_playwright

from fusion.client import Client
from fusion.demo import write_demo
from fusion.local import LocalPool, LocalWorker
from fusion.submit import capture_job, read_job, submit

TOPOLOGY = """
workers:
  - {name: oslo-1, region: oslo, speed: 4.0e+10, memory: 4GiB}
  - {name: oslo-2, region: oslo, speed: 4.0e+10, memory: 4GiB}
  - {name: lima-1, region: lima, speed: 3.0e+10, memory: 8GiB}
  - {name: lima-2, region: lima, speed: 3.0e+10, memory: 8GiB}
links:
  - {between: [oslo, oslo], bandwidth: 1Gbit/s, latency: 1ms}
  - {between: [lima, lima], bandwidth: 1Gbit/s, latency: 1ms}
  - {between: [oslo, lima], bandwidth: 50Mbit/s, latency: 45ms}
"""
BEFORE = [
    ("pool", "#/", 1280, 640, "light", "svg.topology .flow"),
    ("pipeline", "#/job/{job}/pipeline", 1280, 700, "dark", "canvas.timeline"),
    ("phone", "#/job/{job}", 390, 844, "dark", "svg.chart path.line"),
]
AFTER = [
    ("curves", "#/job/{job}", 1280, 760, "light", "svg.chart path.line"),
]


def write_job(folder: Path, steps: int) -> Path:
    """The demo with a fragment for each worker, and compressed links."""
    path = write_demo(folder)
    spec = yaml.safe_load(path.read_text())
    spec["train"].update(steps=10 * steps, eval_every=10, eval_batches=2)
    spec["plan"].update(policy="equal-compute", workers=4, fragments=4)
    spec["compression"] = {"codec": "int8"}
    spec["checkpoint"] = {"every": 50, "keep": 1}
    path.write_text(yaml.safe_dump(spec))
    return path


def wait_for_step(client: Client, job: str, step: int) -> None:
    for item in client.stream(job):
        if item.kind == "metrics" and item.data["step"] >= step:
            return
        if item.kind == "job" and item.data["state"] in ("failed", "cancelled"):
            raise SystemExit(f"the job {item.data['state']}: {item.data['reason']}")


def shoot(browser: Browser, url: str, job: str, shots: list[Any], folder: Path) -> None:
    for name, address, width, height, scheme, ready in shots:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        page = context.new_page()
        page.goto(f"{url}/{address.format(job=job)}")
        page.locator(ready).first.wait_for()
        page.wait_for_timeout(2500)  # a pulse or two: what is live is there
        page.screenshot(path=folder / f"{name}.png")
        context.close()
        print(f"wrote {folder / name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--steps", type=int, default=70, help="steps before and after a worker is killed, together")
    asked = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium here: apt-get install chromium")
    asked.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made, sync_playwright() as playwright:
        folder = Path(made)
        spec, base = read_job(write_job(folder / "job", asked.steps))
        (folder / "topology.yaml").write_text(TOPOLOGY)
        names = [LocalWorker(worker["name"]) for worker in yaml.safe_load(TOPOLOGY)["workers"]]
        with LocalPool(folder / "run", names, topology=folder / "topology.yaml") as pool:
            pool.wait_for_workers()
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            with pool.client() as client:
                job = str(submit(client, capture_job(spec, base))["id"])
                wait_for_step(client, job, asked.steps // 2)
                shoot(browser, pool.url, job, BEFORE, asked.folder)
                pool.kill("lima-2")
                wait_for_step(client, job, client.job(job)["step"] + asked.steps // 2)
                shoot(browser, pool.url, job, AFTER, asked.folder)
            browser.close()


if __name__ == "__main__":
    main()
