"""Gives the machine back while its owner needs it (`--pause-when-busy`): the worker is out of the pool until it is quiet again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import psutil

from fusion.messages import Leaving
from worker.machine.owner import Owner
from worker.machine.processor import reading

# The coordinator lets a leaving worker wait for the next checkpoint for a minute at most.
LEAVE_PATIENCE = 90.0
_LOOK_SECONDS = 1.0


class Pause:
    """Of one worker. Belongs to the event loop.

    `leave` tells the coordinator that we want to go, `go` ends our part in the pool, `may_pause` says whether now is a time to begin;
    `say` is for people.
    """

    def __init__(
        self,
        *,
        say: Callable[[str], None],
        leave: Callable[[Leaving], None],
        go: Callable[[], None],
        may_pause: Callable[[], bool],
    ) -> None:
        self._say = say
        self._leave = leave
        self._go = go
        self._may_pause = may_pause
        self._share = ""
        self._patience: asyncio.TimerHandle | None = None
        """Ends the coordinator's time to move our fragments."""
        self._quiet = asyncio.Event()
        self.on = False
        """From when we ask to leave until we have joined again."""

    async def mind_the_owner(self) -> None:
        """Look at the machine, for ever."""
        owner = Owner(psutil.cpu_count() or 1)
        while True:
            if owner.take(reading()) and not owner.away:
                self._quiet.set()
            if owner.away and not self.on and self._may_pause():
                self.on = True
                self._quiet.clear()
                self._share = f"other programs take {owner.others:.0%} of this machine"
                self._say(f"{self._share}: leaving the pool until they are quiet")
                self.ask_to_leave()
            await asyncio.sleep(_LOOK_SECONDS)

    def ask_to_leave(self) -> None:
        """Tell a coordinator that is there; once more when it has been away, as the word may have been lost."""
        self._stop_waiting()
        self._leave(Leaving(reason=self._share))
        self._patience = asyncio.get_running_loop().call_later(LEAVE_PATIENCE, self._go)

    async def until_quiet(self) -> None:
        """We are out of the pool: return when the machine is quiet."""
        self._stop_waiting()
        await self._quiet.wait()
        self._say("the machine is quiet again")

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
