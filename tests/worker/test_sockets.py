"""CURVE sockets: known keys pass and are named, unknown keys never get a message through."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from fusion.errors import FusionError
from fusion.sockets import Gatekeeper, KeyPair, bind_tcp, new_keys, secure_client, secure_server, sender_key


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context = zmq.Context()
    yield context
    context.destroy(0)


def client(context: zmq.Context[Any], keys: KeyPair, server_key: str, port: int) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    secure_client(socket, keys, server_key)
    socket.connect(f"tcp://127.0.0.1:{port}")
    return socket


def test_a_known_key_passes_and_is_named_and_an_unknown_one_is_refused(context: zmq.Context[Any]) -> None:
    refused: list[tuple[str, str, str]] = []
    seen = threading.Event()

    def on_refused(*what: str) -> None:
        refused.append(what)  # type: ignore[arg-type]
        seen.set()

    gate = Gatekeeper(context, on_refused)
    gate.start()
    server_keys, friend, stranger = new_keys(), new_keys(), new_keys()
    gate.allow("data", friend.public)
    server = context.socket(zmq.ROUTER)
    secure_server(server, server_keys, "data")
    port = bind_tcp(server, "127.0.0.1", 0)

    bad = client(context, stranger, server_keys.public, port)
    bad.send(b"let me in")
    assert seen.wait(10)
    assert refused[0][::2] == ("data", stranger.public)
    assert not server.poll(0)

    good = client(context, friend, server_keys.public, port)
    good.send(b"hello")
    assert server.poll(10_000)
    _, frame = server.recv_multipart(copy=False)
    assert frame.bytes == b"hello"
    assert sender_key(frame) == friend.public
    assert gate.refused >= 1

    for socket in (bad, good, server):
        socket.close(0)
    gate.close()
    gate.close()


def test_domains_are_apart_and_keys_can_be_forbidden(context: zmq.Context[Any]) -> None:
    gate = Gatekeeper(context)
    key = new_keys().public
    gate.allow("control", key)
    assert gate.admits("control", key)
    assert not gate.admits("data", key)
    gate.forbid("control", key)
    gate.forbid("never-seen", key)
    assert not gate.admits("control", key)


def test_a_port_in_use_is_one_clear_line(context: zmq.Context[Any]) -> None:
    first, second = context.socket(zmq.ROUTER), context.socket(zmq.ROUTER)
    port = bind_tcp(first, "127.0.0.1", 0)
    with pytest.raises(FusionError, match=f"port {port} on 127.0.0.1 is in use"):
        bind_tcp(second, "127.0.0.1", port)


def test_secrets_do_not_show_in_repr() -> None:
    keys = new_keys()
    assert keys.secret not in repr(keys)
