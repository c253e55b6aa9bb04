"""The dashboard in a real browser: it fills, follows a job live, and complains about nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from browser import CHROMIUM, browser_page
from coordinator_cases import FakeWorker, Server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")


async def test_the_dashboard_follows_a_job(server: Server, tmp_path: Path) -> None:
    async with FakeWorker(server, "a") as worker, browser_page(tmp_path / "profile") as page, asyncio.timeout(120):
        worker.pause_after = 3
        job = await server.submit(train={"steps": 6, "eval_every": 2})
        await server.until(job["id"], lambda shown: shown["step"] == 3)
        await page.open(server.url + "/")
        await page.until("document.querySelectorAll('#chart .main-svg').length > 0")
        assert await page.evaluate("document.getElementById('connection').textContent") == "live"
        assert await page.evaluate("document.querySelector('#workers tbody').innerText.split('\\t')[0]") == "a"
        assert await page.evaluate("document.getElementById('chart').data[0].x.length") == 3
        assert "training starts" in await page.evaluate("document.getElementById('story').innerText")
        await server.call("POST", f"/api/v1/jobs/{job['id']}/cancel")
        await page.until("document.getElementById('job-state').textContent === 'cancelled'")
        worker.pause_after = None
        second = await server.submit(name="next")
        await page.until(f"document.getElementById('job-title').textContent === '{second['id']}'")
        await page.until("document.getElementById('job-state').textContent === 'done'")
        await page.until("document.getElementById('chart').data[0].x.length === 6")
        assert await page.evaluate("document.querySelectorAll('#plan tbody tr').length") == 1
        assert page.problems == []
