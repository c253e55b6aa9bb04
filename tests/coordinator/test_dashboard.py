"""The dashboard's files: served from the package with a strict policy, asked for again only when they change."""

from __future__ import annotations

import re
from importlib import resources

from coordinator_cases import Server

FILES = {
    path.name: path.read_text() for path in resources.files("coordinator.http.dashboard").iterdir() if path.is_file()
}


async def test_the_policy_lets_nothing_in_from_elsewhere_and_nothing_inline(server: Server) -> None:
    async with server.session.get(server.url) as answer:
        policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
        page = await answer.text()
    assert policy["default-src"] == "'none'"
    assert all(sources in ("'self'", "'none'") for sources in policy.values())
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", page)


async def test_a_file_is_sent_once_while_it_stays_the_same(server: Server) -> None:
    async with server.session.get(f"{server.url}/dashboard/main.js") as answer:
        tag, content = answer.headers["ETag"], await answer.text()
    assert content == FILES["main.js"]
    async with server.session.get(f"{server.url}/dashboard/main.js", headers={"If-None-Match": tag}) as again:
        assert (again.status, await again.read()) == (304, b"")
    async with server.session.get(f"{server.url}/dashboard/main.js", headers={"If-None-Match": '"other"'}) as changed:
        assert changed.status == 200


def test_scripts_import_each_other_only_and_set_no_markup() -> None:
    for name, text in FILES.items():
        if name.endswith(".js"):
            assert set(re.findall(r'^import .*?"(.*?)"|^\} from "(.*?)"', text, re.MULTILINE)) <= {
                (f"./{other}", "") for other in FILES
            }, name
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://(?!www\.w3\.org)", text
            ), name
        if name.endswith(".css"):
            assert not re.search(r"@import|url\(", text), name
