"""`fusion token create`, `list` and `revoke`."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from fusion.cli.command import Command
from fusion.cli.connection import connect
from fusion.cli.options import CaOption, CoordinatorOption, JsonOption, TokenOption, not_empty
from fusion.cli.output import clock, note, out, print_json, show, table
from fusion.errors import UserError
from fusion.units import parse_seconds

app = typer.Typer(help="Make and end tokens for people and workers.", no_args_is_help=True, rich_markup_mode=None)


class TokenRole(Enum):
    """What a token is for."""

    viewer = "viewer"
    operator = "operator"
    join = "join"


@app.command("create", cls=Command)
def create(
    role: Annotated[
        TokenRole,
        typer.Option(
            "--role", envvar="FUSION_ROLE", help="viewer reads, operator does everything, join lets workers in."
        ),
    ] = TokenRole.join,
    ttl: Annotated[
        str,
        typer.Option("--ttl", envvar="FUSION_TTL", metavar="TIME", help="How long it lasts: 90s, 12h, 7d or never."),
    ] = "7d",
    uses: Annotated[
        int | None,
        typer.Option(
            "--uses",
            envvar="FUSION_USES",
            min=1,
            metavar="N",
            help="How many workers may join by it; for the other roles, how many requests it answers for.",
        ),
    ] = None,
    remark: Annotated[
        str, typer.Option("--note", envvar="FUSION_NOTE", metavar="TEXT", help="What it is for, shown in the list.")
    ] = "",
    coordinator: CoordinatorOption = None,
    token: TokenOption = None,
    ca: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token and print it, this once. One for join comes with the command that adds a worker."""
    lifetime = _lifetime(ttl)
    with connect(coordinator, token, ca) as client:
        made = client.create_token(role.value, lifetime, uses, remark)
    if as_json:
        print_json(made)
        return
    out(str(made["token"]))
    note(f"token {made['id']}: {role.value}, {_uses(made)}, {_end(made)}; it is not shown again")
    if made.get("join_url"):
        note(f"add worker  fusion worker --join '{made['join_url']}'")


def _lifetime(text: str) -> float | None:
    if text.strip().lower() in ("never", "none"):
        return None
    try:
        seconds = parse_seconds(text)
    except ValueError:
        raise UserError(f"--ttl: can't read {text!r} as a duration; write it like 90s, 12h, 7d, or never") from None
    if seconds == 0:
        raise UserError("--ttl: a token that lasts no time is of no use; write it like 90s, 12h, 7d, or never")
    return seconds


@app.command("list", cls=Command)
def list_tokens(
    coordinator: CoordinatorOption = None, token: TokenOption = None, ca: CaOption = None, as_json: JsonOption = False
) -> None:
    """List the tokens that were made, without their secrets."""
    with connect(coordinator, token, ca) as client:
        found = client.tokens()
    if as_json:
        print_json(found)
    elif not found:
        out("no tokens were made; `fusion token create` makes one")
    else:
        rows = [
            (
                entry["id"],
                entry["role"],
                entry["state"],
                _uses(entry),
                clock(entry["created_at"]),
                _end(entry),
                entry["note"],
            )
            for entry in found
        ]
        show(table(None, ("id", "role", "state", "uses", "made", "end", "note"), rows))


def _id_of(token: str) -> str:
    # A person may paste the whole token: its secret does not go out again.
    return not_empty(token.partition(".")[0])


@app.command("revoke", cls=Command)
def revoke(
    token_id: Annotated[
        str, typer.Argument(metavar="ID", help="The token's id, the part before the point.", callback=_id_of)
    ],
    coordinator: CoordinatorOption = None,
    token: TokenOption = None,
    ca: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a token at once and for good. Workers that joined by it stay, but read no more blobs by it."""
    with connect(coordinator, token, ca) as client:
        ended = client.revoke_token(token_id)
    if as_json:
        print_json(ended)
    else:
        out(f"token {ended['id']} {ended['state']}")


def _uses(token: dict[str, Any]) -> str:
    if token["uses"] is None:
        return f"{token['used']} used" if token["role"] == "join" else "any number of uses"
    return f"{token['used']} of {token['uses']} used"


def _end(token: dict[str, Any]) -> str:
    return f"ends {clock(token['expires_at'])}" if token["expires_at"] is not None else "never ends"
