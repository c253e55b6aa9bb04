"""A worker that hears of a job late refuses its peers at first; they get in as soon as it knows them."""

from __future__ import annotations

from collections import Counter
from threading import Event

import pytest
import zmq

from fusion.errors import UnreachableError
from fusion.messages import PeerAddress
from fusion.sockets import Gatekeeper, bind_tcp, keep_alive, new_keys, secure_client, secure_server
from worker.transport.handshakes import HANDSHAKE_EVENTS, await_handshakes
from worker.transport.route import Peer


@pytest.mark.parametrize("admitted_after", [1, 3])
def test_a_refused_peer_tries_again(admitted_after: int) -> None:
    server_keys, client_keys = new_keys(), new_keys()
    refused = Counter[str]()
    server, client = zmq.Context[zmq.Socket[bytes]](), zmq.Context[zmq.Socket[bytes]]()

    def count(domain: str, address: str, key: str) -> None:
        refused[key] += 1
        if refused[key] == admitted_after:
            gate.allow("data", client_keys.public)

    gate = Gatekeeper(server, count)
    gate.start()
    router = server.socket(zmq.ROUTER)
    secure_server(router, server_keys, "data")
    endpoint = f"tcp://127.0.0.1:{bind_tcp(router, '127.0.0.1', 0)}"
    dealer = client.socket(zmq.DEALER)
    keep_alive(dealer, 5.0)
    secure_client(dealer, client_keys, server_keys.public)
    monitor = dealer.get_monitor_socket(HANDSHAKE_EVENTS)
    peer = Peer(dealer, PeerAddress(worker="late", endpoint=endpoint, public_key=server_keys.public))
    dealer.connect(endpoint)
    try:
        await_handshakes({"late": monitor}, {"late": peer}, 20.0, Event().is_set)
        assert refused[client_keys.public] == admitted_after
        peer.transmit(b"here", None)
        assert router.poll(10_000)
    finally:
        dealer.disable_monitor()
        monitor.close(0)
        peer.close()
        router.close(0)
        gate.close()
        client.destroy(0)
        server.destroy(0)


def test_nobody_there_is_said_in_words() -> None:
    keys = new_keys()
    context = zmq.Context[zmq.Socket[bytes]]()
    dealer = context.socket(zmq.DEALER)
    secure_client(dealer, keys, keys.public)
    monitor = dealer.get_monitor_socket(HANDSHAKE_EVENTS)
    peer = Peer(dealer, PeerAddress(worker="gone", endpoint="tcp://127.0.0.1:9", public_key=keys.public))
    dealer.connect("tcp://127.0.0.1:9")
    try:
        with pytest.raises(UnreachableError, match=r"can't reach gone at tcp://127\.0\.0\.1:9"):
            await_handshakes({"gone": monitor}, {"gone": peer}, 0.3, Event().is_set)
    finally:
        dealer.disable_monitor()
        monitor.close(0)
        peer.close()
        context.destroy(0)
