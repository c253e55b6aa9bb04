"""Who lies, when two workers say different things of the same work. Sans-I/O.

Of such a pair one at least is not to be trusted, and nobody can tell which. So both stay, others check them from then on, and
whoever is at odds with a second worker is the liar. A machine that computes wrong numbers is so at once, if it hosts and
checks. Where there is no third worker, or the same two are at odds again, the checker's word counts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

Pair = tuple[str, str]
"""(host, checker)."""


def liar(earlier: Collection[Pair], now: Sequence[Pair], workers: int) -> str | None:
    """Who of those that are at odds `now`, the first lie first, is to go; None when that can't be told yet."""
    pairs = {frozenset(pair) for pair in (*earlier, *now)}
    for pair in now:
        partners = {name: sum(name in other for other in pairs) for name in pair}
        worst = max(pair, key=lambda name: partners[name])
        if partners[worst] > 1 and len(set(partners.values())) > 1:
            return worst
    known = {frozenset(pair) for pair in earlier}
    return next(
        (pair[0] for pair in now if workers < 3 or frozenset(pair) in known or _at_odds_with_many(pairs, pair)), None
    )


def impartial_first(accusations: Collection[Pair], host: str, candidates: Sequence[str]) -> list[str]:
    """Those that were not at odds with the host come first, so that somebody else checks it."""
    partial = {name for pair in accusations if host in pair for name in pair}
    return sorted(candidates, key=lambda name: name in partial)


def _at_odds_with_many(pairs: Collection[frozenset[str]], pair: Pair) -> bool:
    """Both sides are at odds with several: no better sign than the checker's word is to be had."""
    return all(sum(name in other for other in pairs) > 1 for name in pair)
