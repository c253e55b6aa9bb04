"""The dashboard in a real browser: it shows what the API says, follows live, heals, and can be used by everybody."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from browser_cases import CHROMIUM, Line, ShownWorker, Tab, a_browser, a_tab
from coordinator_cases import Server, serving
from playwright.async_api import Browser, Route

from fusion.messages import Unreached, Warned
from fusion.topology import Topology

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)"),
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),  # one browser for all
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with a_browser() as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serving(tmp_path / "state") as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def tab(browser: Browser) -> AsyncIterator[Tab]:
    async with a_tab(browser) as opened:
        yield opened


async def a_paused_job(server: Server, *workers: ShownWorker, step: int = 3, **changes: Any) -> str:
    for worker in workers:
        worker.pause_after = step
    job = await server.submit(**{"train": {"steps": 40, "eval_every": 2}, "plan": {"workers": len(workers)}, **changes})
    await server.until(job["id"], lambda shown: shown["step"] == step)
    return str(job["id"])


async def test_the_pool_is_what_the_api_says_and_changes_with_it(server: Server, tab: Tab) -> None:
    async with ShownWorker(server, "a", memory=1 << 30) as first, ShownWorker(server, "b", memory=2 << 30) as second:
        job = await a_paused_job(server, first, second)
        server.engine.lifecycle.relays.own_port = 8762
        await first.say(Unreached(peer="b"))
        _, links = await server.call("GET", "/api/v1/links")
        while not links["links"]:
            _, links = await server.call("GET", "/api/v1/links")
        await tab.page.goto(server.url)
        await tab.shows("#connection", "live")
        await tab.shows("table", "of 2.0 GiB")
        await tab.shows("table", "relayed over the coordinator")
        await tab.shows("table", "3 / 40")
        assert await tab.page.locator("svg.topology line.relayed").count() == 1
        assert "a and b can't reach each other" in await tab.text("svg.topology line.relayed title")
        _, listed = await server.call("GET", "/api/v1/workers")
        shown = {row[0]: row[1:4] for row in await tab.rows("Workers")}
        assert shown == {
            worker["name"]: [worker["state"], worker["job"], ", ".join(map(str, worker["fragments"]))]
            for worker in listed["workers"]
        }
        assert [row[:3] for row in await tab.rows("Jobs")] == [[job, "running", "3 / 40"]]
        assert {(row[0], row[1]) for row in await tab.rows("Links")} == {("a", "b"), ("b", "a")}
        assert "2 workers in pool (2)" in str(await tab.page.locator("svg.topology").get_attribute("aria-label"))
        async with ShownWorker(server, "late"):
            await tab.shows("svg.topology", "late")
            await tab.shows("th", "late")
            await server.call("POST", "/api/v1/workers/late/drain")
            await tab.until("() => ![...document.querySelectorAll('th')].some(head => head.textContent === 'late')")
        await tab.shows(".group-name", "pool · 2")
        await second.die()
        await tab.shows("g.worker.lost", "lost")
        await tab.shows(".group-name", "pool · 1")
    assert tab.problems == []


async def test_what_a_topology_declares_has_no_age(tmp_path: Path, tab: Tab) -> None:
    links = [{"between": ["a", "b"], "bandwidth": "16Mbit/s", "latency": "90ms"}]
    workers = [{"name": name, "region": name, "speed": 1e11, "memory": "2GiB"} for name in "ab"]
    topology = Topology.model_validate({"workers": workers, "links": links})
    async with (
        serving(tmp_path / "state", topology=topology) as server,
        ShownWorker(server, "a"),
        ShownWorker(server, "b"),
    ):
        await tab.page.goto(server.url)
        await tab.shows("td", "declared")
        assert {tuple(row[3:]) for row in await tab.rows("Links")} == {("16.0 Mbit/s", "90 ms", "declared", "–")}
        behind = "text => text.previousElementSibling?.classList.contains('behind')"
        assert await tab.page.locator(".link-words").evaluate_all(f"found => found.every({behind})")
        assert tab.problems == []


async def test_the_drawing_of_a_job_stays_in_its_frame_until_somebody_moves_it(server: Server, tab: Tab) -> None:
    async with ShownWorker(server, "a") as worker:
        job = await a_paused_job(server, worker)
        await tab.page.goto(f"{server.url}/api/v1/jobs/{job}/diagram")
        where = "document.getElementById('scene').getAttribute('transform')"
        middle = """() => { const of = id => { const box = document.getElementById(id).getBoundingClientRect(); return box.x + box.width / 2; };
            return Math.abs(of('scene') - of('view')) < 2; }"""
        await tab.until(middle)
        before = await tab.page.evaluate(where)
        await tab.page.set_viewport_size({"width": 500, "height": 400})
        await tab.until(f"before => {where} !== before", before)
        await tab.until(middle)
        await tab.page.keyboard.press("ArrowLeft")
        moved = await tab.page.evaluate(where)
        await tab.page.set_viewport_size({"width": 900, "height": 700})
        await tab.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert await tab.page.evaluate(where) == moved
    assert tab.problems == []


async def test_the_way_to_add_a_worker_leaves_nothing_out(server: Server, tab: Tab) -> None:
    await tab.page.goto(f"{server.url}/#/submit")
    await tab.shows("code", "fusion token create --role join")
    assert "fusion worker --join" not in await tab.text("main")
    await tab.page.get_by_role("button", name="Operator").click()
    assert await tab.page.locator("dialog code").all_inner_texts() == [
        "fusion coordinator",
        "fusion token create --role operator",
    ]


async def test_the_first_words_claim_nothing_that_is_not_known_yet(server: Server, tab: Tab) -> None:
    async with ShownWorker(server, "a"):
        held = asyncio.Event()

        async def hold(route: Route) -> None:
            await held.wait()
            await route.continue_()

        await tab.page.route("**/api/v1/stream", hold)
        await tab.page.goto(server.url)
        await tab.shows("section[aria-labelledby='h-workers']", "Asking the coordinator…")
        assert [await tab.page.locator("dd").nth(index).text_content() for index in range(3)] == ["–"] * 3
        assert "No worker yet" not in await tab.text("main")
        assert "No job yet" not in await tab.text("main")
        held.set()
        await tab.until("() => document.querySelector('dd').textContent === '1'")
        await tab.shows("section[aria-labelledby='h-jobs']", "No job yet")
    assert tab.problems == []


async def test_curves_are_the_recorded_metrics_and_grow_live(server: Server, tab: Tab) -> None:
    async with ShownWorker(server, "a") as worker:
        job = await a_paused_job(server, worker, step=5)
        await tab.page.goto(f"{server.url}/#/job/{job}")
        await tab.until("() => document.querySelector('svg.chart')?.getAttribute('aria-label').includes('at step 5')")
        chart = tab.page.locator("svg.chart").first
        await chart.focus()
        _, recorded = await server.call("GET", f"/api/v1/jobs/{job}/metrics")
        said = []
        await chart.press("Home")
        for _ in recorded["metrics"]:
            said.append(await tab.text("output.readout"))
            await chart.press("ArrowRight")
        expected = [f"step {each['step']}: loss {each['loss']:#.5g}" for each in recorded["metrics"]]
        assert [line.split(", held-out")[0] for line in said] == expected
        assert [line.partition("held-out loss ")[2] for line in said if "held-out" in line] == [
            f"{each['eval_loss']:#.5g}" for each in recorded["metrics"] if each.get("eval_loss")
        ]
        shown = await server.job(job)
        assert shown["samples_per_second"] == pytest.approx(8 / shown["step_seconds"])
        await tab.shows("dd", "samples/s")
        await tab.shows("figcaption", "Samples per second")
        marks = await tab.page.locator("svg.chart .mark").all_text_contents()
        assert {"0", "0 s", "0 B"} <= set(marks)
        assert [mark for mark in marks if mark.startswith(("-0", "0.0"))] == []
        worker.pause_after = 12
        await tab.until("() => document.querySelector('svg.chart').getAttribute('aria-label').includes('at step 12')")
        await tab.shows("dd", "12 / 40")
        assert worker.server.engine.lifecycle.jobs[job].step == 12
    assert tab.problems == []


async def test_pipeline_and_plan_are_those_of_the_api(server: Server, tab: Tab) -> None:
    async with ShownWorker(server, "a") as first, ShownWorker(server, "b") as second:
        job = await a_paused_job(server, first, second)
        home = f"/api/v1/jobs/{job}"
        await tab.page.goto(f"{server.url}/#/job/{job}/pipeline")
        await tab.shows("p", "bars")
        _, timeline = await server.call("GET", f"{home}/timeline")
        steps = " and ".join(str(step["step"]) for step in timeline["steps"])
        assert f"Below: step{'s' if ' and ' in steps else ''} {steps} by" in await tab.text("section p[role=status]")
        assert f"{len(timeline['spans'])} bars" in await tab.text("section p[role=status]")
        assert f"Bubble {timeline['bubble'] * 100:.0f} %" in await tab.text("section p[role=status]")
        canvas = tab.page.locator("canvas.timeline")
        await canvas.press("Home")
        first_span = min(timeline["spans"], key=lambda span: span["begin"])
        assert (await tab.text("output.readout")).startswith(f"{first_span['worker']}: {first_span['kind']}")
        assert {row[0] for row in await tab.rows("How each worker spends a mean step")} == {"a", "b"}
        await tab.page.get_by_role("link", name="Plan and links").click()
        await tab.shows("article.plan", "Epoch 0")
        shown = await server.job(job)
        assert [row[:2] for row in await tab.rows("Fragments")] == [
            [str(fragment["index"]), fragment["worker"]] for fragment in shown["fragments"]
        ]
        _, links = await server.call("GET", f"{home}/links")
        assert [row[:3] for row in await tab.rows("Links of the job")] == [
            [link["from"], link["to"], ", ".join(link["codecs"])] for link in links["links"]
        ]
        await first.die()
        await tab.shows("article.plan", "fragment moved")
        _, plans = await server.call("GET", f"{home}/plans")
        assert await tab.page.locator("article.plan").count() == len(plans["plans"]) == 2
        assert "b ← a" in await tab.text("li.moved")
        await tab.page.get_by_role("link", name="OP-DAG").click()
        await tab.page.frame_locator("iframe.dag").locator("#legend", has_text="b").wait_for()
    assert tab.problems == []


async def test_events_and_logs_are_told_as_text(server: Server, tab: Tab) -> None:
    async with ShownWorker(server, "a") as worker:
        job = await a_paused_job(server, worker)
        await tab.page.goto(f"{server.url}/#/job/{job}/logs")
        await tab.shows(".story", "training starts")
        hostile = "<img src=x onerror=document.title='broken'>"
        await worker.say(Warned(job=job, message=hostile))
        await tab.shows(".story", hostile)
        _, told = await server.call("GET", f"/api/v1/jobs/{job}/events")
        lines = await tab.page.locator(".story .message").all_inner_texts()
        assert lines == [event["message"] for event in reversed(told["events"])]
        assert await tab.page.locator("main img").count() == 0
        await tab.page.goto(f"{server.url}/#/events")
        await tab.shows(".story", "training starts")
        await tab.page.get_by_label("trouble only").check()
        assert "training starts" not in await tab.text(".story")
        assert hostile in await tab.text(".story")
        await tab.page.get_by_label("Show").fill("no such word")
        await tab.shows("p", "Nothing that fits.")
        assert "Nothing has happened" not in await tab.text("main")
    assert tab.problems == []


async def test_a_lost_connection_is_shown_and_heals(server: Server, tab: Tab) -> None:
    line = Line(urlsplit(server.url).port or 0)
    await line.mend()
    async with ShownWorker(server, "a") as worker:
        job = await a_paused_job(server, worker)
        await tab.page.goto(f"http://127.0.0.1:{line.port}/#/job/{job}")
        await tab.until("() => document.querySelector('svg.chart')?.getAttribute('aria-label').includes('at step 3')")
        await line.cut()
        await tab.shows("#connection", "connection lost")
        worker.pause_after = 9
        await server.until(job, lambda shown: shown["step"] == 9)
        async with ShownWorker(server, "new"):
            await line.mend()
            await tab.shows("#connection", "live")
            await tab.until(
                "() => document.querySelector('svg.chart').getAttribute('aria-label').includes('at step 9')"
            )
            await tab.shows("dd", "9 / 40")
            await tab.page.get_by_role("link", name="Pool").click()
            await tab.shows("th", "new")
        await line.cut()


async def test_a_connection_that_falls_silent_is_lost_too(server: Server, tab: Tab) -> None:
    line = Line(urlsplit(server.url).port or 0)
    await line.mend()
    await tab.page.clock.install()
    await tab.page.goto(f"http://127.0.0.1:{line.port}")
    await tab.shows("#connection", "live")
    line.flows.clear()
    await tab.page.clock.fast_forward(11_000)
    await tab.shows("#connection", "connection lost")
    line.flows.set()
    await tab.page.clock.fast_forward(1_000)
    await tab.shows("#connection", "live")
    await line.cut()


async def test_that_nothing_can_be_recorded_is_shown_until_it_can(server: Server, tab: Tab) -> None:
    """What is shown is old then, though the connection stands."""
    await tab.page.goto(server.url)
    await tab.shows("#connection", "live")
    store = server.engine.store
    with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store.pin("x", ["y"])
        store.commit()
        await tab.shows("#connection", "nothing can be recorded: database is locked")
        await tab.until("() => document.body.classList.contains('stale')")
        other.execute("COMMIT")
    await tab.shows("#connection", "live")
    await tab.until("() => !document.body.classList.contains('stale')")
    assert tab.problems == []


async def test_an_operator_cancels_a_job_with_the_token_and_nobody_else(server: Server, tab: Tab) -> None:
    async with ShownWorker(server, "a") as worker:
        job = await a_paused_job(server, worker)
        await tab.page.goto(f"{server.url}/#/job/{job}")
        for token, answer in (("wrong", "the bearer token is wrong"), (server.access.operator_token, "asked for")):
            await tab.page.get_by_role("button", name="Cancel…").click()
            await tab.page.get_by_role("button", name="Cancel the job").click()
            await tab.page.get_by_role("textbox", name="Token").fill(token)
            await tab.page.keyboard.press("Enter")
            await tab.shows(".notice", answer)
        await tab.shows(".pill", "cancelled")
        assert (await server.job(job))["state"] == "cancelled"
        stored = await tab.page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])")
        assert server.access.operator_token not in stored


async def test_an_operator_submits_a_job_again_with_other_settings(server: Server, tab: Tab) -> None:
    async with ShownWorker(server, "a") as worker:
        job = await a_paused_job(server, worker)
        await tab.page.goto(f"{server.url}/#/submit")
        settings = tab.page.get_by_role("textbox", name="Settings")
        await tab.until("() => document.getElementById('again-settings')?.value.includes('steps')")
        await settings.fill((await settings.input_value()).replace('"steps": 40', '"steps": 0'))
        await tab.page.get_by_role("button", name="Submit…").click()
        await tab.page.get_by_role("button", name="Submit the job").click()
        await tab.page.get_by_role("textbox", name="Token").fill(server.access.operator_token)
        await tab.page.keyboard.press("Enter")
        await tab.shows(".notice", "settings.train.steps: Input should be greater than 0")
        await settings.fill((await settings.input_value()).replace('"steps": 0', '"steps": 7'))
        await tab.page.get_by_role("button", name="Submit…").click()
        await tab.page.get_by_role("button", name="Submit the job").click()
        await tab.shows(".pill", "queued")
        made = await server.job(await tab.text("h1"))
        assert (made["steps"], made["name"]) == (7, (await server.job(job))["name"])
        assert made["id"] != job
    assert [line for line in tab.problems if "400" not in line] == []


async def test_a_viewers_token_opens_the_page_and_does_not_stay_in_the_address(tmp_path: Path, tab: Tab) -> None:
    async with serving(tmp_path / "state", require_token=True) as server, ShownWorker(server, "a") as worker:
        job = await a_paused_job(server, worker)
        await tab.page.goto(server.url)
        assert "needs a token" in await tab.text("[role=alert]")
        await tab.page.get_by_label("Token").fill(server.access.viewer_token)
        await tab.page.get_by_role("button", name="Look").click()
        await tab.shows("#connection", "live")
        await tab.shows("th", job)
        assert server.access.viewer_token not in tab.page.url
        await tab.page.goto(f"{server.url}/#/job/{job}/dag")
        await tab.page.frame_locator("iframe.dag").locator("#legend", has_text="a").wait_for()


# Resolves when the page has heard of its new address.
TURN_TO = """hash => new Promise(done => {
    if (location.hash === hash) return done();
    addEventListener("hashchange", () => done(), {once: true});
    location.hash = hash;
})"""

# What can be pressed or looked at and has no name for those who can't see it.
NAMED = """() => [...document.querySelectorAll("main a, main button, input, select, svg[role], canvas, iframe, meter")].filter(item => {
    const label = item.getAttribute("aria-label") || item.title || item.textContent.trim() || item.labels?.[0]?.textContent.trim();
    return item.checkVisibility() && !label;
}).map(item => item.outerHTML)"""

# The least contrast (WCAG's formula) of any visible text of a page to what is painted behind it.
CONTRAST = """() => {
    const rgba = text => { const pen = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d");
        pen.fillStyle = text; pen.fillRect(0, 0, 1, 1); const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
    const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a)];
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, index) => sum + v * [0.2126, 0.7152, 0.0722][index], 0);
    let least = [21, ""];
    for (const item of document.querySelectorAll("body *:not(svg *)")) {
        if (!item.checkVisibility() || ![...item.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())) continue;
        if (item.closest(".hidden, .skip, option")) continue;
        const stack = [];
        for (let parent = item; parent; parent = parent.parentElement) stack.push(rgba(getComputedStyle(parent).backgroundColor));
        const behind = stack.reduceRight((under, paint) => over(paint, under), [255, 255, 255]);
        const [a, b] = [light(over(rgba(getComputedStyle(item).color), behind)), light(behind)];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < least[0]) least = [ratio, `${item.tagName} ${item.className}: ${item.textContent.slice(0, 40)}`];
    }
    return least;
}"""


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
async def test_every_page_fits_has_names_and_can_be_read(
    server: Server, browser: Browser, width: int, scheme: Any
) -> None:
    async with (
        ShownWorker(server, "a") as first,
        ShownWorker(server, "b") as second,
        a_tab(browser, width, 800, scheme) as tab,
    ):
        job = await a_paused_job(server, first, second)
        await tab.page.goto(server.url)
        await tab.shows("#connection", "live")
        home = f"#/job/{job}"
        pages = {
            "#/": "svg.topology g.worker",
            "#/jobs": "tbody tr",
            "#/events": ".story li",
            "#/submit": "main pre",
            home: "svg.chart path.line",
            f"{home}/pipeline": "canvas.timeline",
            f"{home}/plan": "article.plan",
            f"{home}/dag": "iframe.dag",
            f"{home}/logs": ".story li",
        }
        for page, there in pages.items():
            await tab.page.evaluate(TURN_TO, page)
            await tab.page.locator(there).first.wait_for()
            assert await tab.page.evaluate("document.documentElement.scrollWidth") <= width, page
            assert await tab.page.evaluate(NAMED) == [], page
            cut = "[...document.querySelectorAll('.scroll')].filter(each => each.scrollWidth > each.clientWidth).map(each => each.ariaLabel)"
            assert "Memory by worker" not in await tab.page.evaluate(cut)
            ratio, where = await tab.page.evaluate(CONTRAST)
            assert ratio >= 4.5, f"{page}: {where} has a contrast of {ratio:.2f}"
        assert tab.problems == []


async def test_the_keyboard_alone_gets_everywhere(server: Server, tab: Tab) -> None:
    async with ShownWorker(server, "a") as worker:
        job = await a_paused_job(server, worker)
        await tab.page.goto(server.url)
        await tab.shows("th", job)
        focused = "document.activeElement.textContent.trim()"
        await tab.page.keyboard.press("Tab")
        assert await tab.page.evaluate(focused) == "Skip to the content"
        for _ in range(40):
            await tab.page.keyboard.press("Tab")
            if await tab.page.evaluate(focused) == job:
                break
        await tab.page.keyboard.press("Enter")
        await tab.shows("h1", job)
        await tab.until("() => document.title.includes('Fusion') && location.hash.startsWith('#/job/')")
