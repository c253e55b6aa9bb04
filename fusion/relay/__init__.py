"""A relay for pairs of workers that can't reach each other: it joins two connections that were opened to it, and sees ciphertext.

::

    worker A ── DEALER ── call ══> relay <══ answer ── ROUTER ── worker B

Each end connects out, shows that it holds the pair's ticket, and from then on the relay copies bytes both ways. CURVE stays
between the two workers. `desk` decides who is let in and who is joined, `server` has the sockets, `child` its own process.
"""
