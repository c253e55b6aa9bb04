"""What is done about links: probes are ordered, news is told, and workers that can't reach each other meet at a relay. Sans I/O."""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.life import events as ev
from coordinator.life.books import Books
from coordinator.life.links import MAX_BYTES, MAX_SECONDS, Failed
from coordinator.life.pool import Member
from fusion.addresses import place_of
from fusion.messages import Arrivals, ExpectProbe, LinkMeasured, ProbeLink, Reached, Unreached

LinkReport = LinkMeasured | Arrivals | Unreached | Reached


class LinkWatch:
    """The rules; what is known stands in `links` and `relays`."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._links = books.links
        self._relays = books.relays

    def tick(self, now: float) -> None:
        """Have pairs of workers measure the links between them, as far as that is due."""
        self._do(self._relays.sweep(now, self._books.pool.live()))
        self._do(self._relays.try_directly(now, self._books.pool.live()))
        for asks, answers in self._links.due(now, self._books.pool.live()):
            expect = ExpectProbe(peer=asks.address, max_bytes=MAX_BYTES, seconds=MAX_SECONDS)
            self._books.do(ev.Send(answers.incarnation, expect))
            probe = ProbeLink(peer=answers.address, max_bytes=MAX_BYTES, seconds=MAX_SECONDS)
            self._books.do(ev.Send(asks.incarnation, probe))
        self._tell()

    def heard(self, member: Member, message: LinkReport, now: float) -> None:
        """A worker says something of its links."""
        match message:
            case LinkMeasured():
                if not message.reached:
                    self._out_of_reach(member, message.peer, now)
                # Over another way from now on, it is measured anew: no failure of it is known.
                self._links.measured(now, member.name, message)
                if message.there is not None:
                    self._do(self._relays.reached(member.name, message.peer, message.there))
            case Arrivals():
                pool = self._books.pool
                peers = {other.name for other in pool.of_job(member.job)} if member.job else set()
                self._links.arrived(now, member.name, message, peers - {member.name})
            case Unreached():
                self._out_of_reach(member, message.peer, now)
            case Reached(directly=True):
                self._do(self._relays.reached_directly(member, message.peer, self._books.pool.live()))
            case Reached():
                self._do(self._relays.reached(member.name, message.peer))
        self._tell()

    def _out_of_reach(self, member: Member, name: str, now: float) -> None:
        """The two meet at a relay, where there is one."""
        peer = self._books.pool.get(name)
        if peer is not None and peer.name != member.name:
            self._do(self._relays.unreached(now, member, peer, self._books.pool.live()))

    def _tell(self) -> None:
        """Tell people, and have running jobs look for a better placement, when a link is not what it was."""
        for news in self._links.news():
            ends = (news.source, news.target)
            if isinstance(news, Failed):
                self._books.story(None, "link-failed", news.words, source=news.source, target=news.target)
                continue
            members = [self._books.pool.get(name) for name in ends]
            if all(member is not None and place_of(member.endpoint) == "" for member in members):
                continue  # Between processes of one machine it is the processor that is busy.
            for job in self._books.jobs.values():
                if job.state == "running" and job.run is not None and all(name in job.hosts for name in ends):
                    self._books.story(job, "link-changed", news.words, source=news.source, target=news.target)
                    job.run.reconsider = news.words

    def _do(self, instructions: Iterable[ev.Instruction]) -> None:
        for instruction in instructions:
            self._books.do(instruction)
