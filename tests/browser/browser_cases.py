"""What the browser's tests share: a real Chromium, workers that report traces and traffic, and a line that can be cut."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from coordinator_cases import FakeWorker
from playwright.async_api import Browser, Page, async_playwright

from fusion.messages import StepReport, StepTrace, ToCoordinator

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE_MILLISECONDS = 60_000


class ShownWorker(FakeWorker):
    """A played worker whose reports have what pages draw: traces, bytes to its neighbours, memory."""

    async def say(self, message: ToCoordinator) -> None:
        if isinstance(message, StepReport):
            others = [name for name in self.peers[self.server] if name != self.name]
            message = message.model_copy(
                update={
                    "trace": self._trace(message),
                    "sent_to": dict.fromkeys(others, 4096),
                    "memory_used_bytes": 3 << 20,
                }
            )
        await super().say(message)

    def _trace(self, report: StepReport) -> StepTrace:
        assert self._plan is not None
        tasks: list[tuple[Literal["forward", "backward", "update", "evaluate"], int, int, float, float]] = []
        arrivals: list[tuple[Literal["activation", "gradient"], int, int, float, str]] = []
        for times in report.fragments:
            at = times.fragment * 0.02
            for micro_batch in range(2):
                tasks.append(("forward", times.fragment, micro_batch, at, at + 0.01))
                if times.fragment:
                    arrivals.append(
                        ("activation", times.fragment - 1, micro_batch, at, self._plan.placement[times.fragment - 1])
                    )
                at += 0.012
            tasks.append(("backward", times.fragment, 0, 0.1, 0.12))
            tasks.append(("update", times.fragment, 0, 0.2, 0.21))
        return StepTrace(begun=time.time() - 0.3, told=0.3, tasks=tasks, arrivals=arrivals)


@dataclass
class Tab:
    """A page, and what it complained about."""

    page: Page
    problems: list[str] = field(default_factory=list)

    async def text(self, selector: str) -> str:
        return (await self.page.locator(selector).first.text_content()) or ""

    async def shows(self, selector: str, text: str) -> None:
        """Wait until an element with this text is there."""
        await self.page.locator(selector, has_text=text).first.wait_for()

    async def rows(self, table: str) -> list[list[str]]:
        """The cells of a table's rows, by the table's caption."""
        found: list[list[str]] = await self.page.evaluate(
            """caption => [...document.querySelectorAll("table")].filter(table => table.caption.textContent === caption)
                .flatMap(table => [...table.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.innerText.trim())))""",
            table,
        )
        return found

    async def until(self, condition: str, argument: Any = None) -> None:
        """Wait until a JavaScript function is true."""
        await self.page.wait_for_function(condition, arg=argument)


@asynccontextmanager
async def a_browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def a_tab(
    browser: Browser, width: int = 1280, height: int = 900, scheme: Literal["light", "dark"] = "light"
) -> AsyncIterator[Tab]:
    """A tab with nothing remembered."""
    context = await browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(PATIENCE_MILLISECONDS)
    tab = Tab(await context.new_page())
    tab.page.on("pageerror", lambda error: tab.problems.append(str(error)))
    tab.page.on("console", lambda said: tab.problems.append(said.text) if said.type == "error" else None)
    try:
        yield tab
    finally:
        await context.close()


class Line:
    """A TCP line to a server that can be cut and mended, or carry nothing for a while."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.flows = asyncio.Event()
        self.flows.set()

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in tuple(self._open):
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._open |= {writer, there_writer}
        try:
            await asyncio.gather(self._pump(reader, there_writer), self._pump(there_reader, writer))
        finally:
            self._open -= {writer, there_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                await self.flows.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
