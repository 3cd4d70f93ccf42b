"""The channel between hosts, within one process: who is let in, what is refused and said, and that a loss is noticed."""

from __future__ import annotations

import logging
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest

from messages import says
from sgl_jax.multihost.address import Address, parse_address
from sgl_jax.multihost.follower import Follower, connect
from sgl_jax.multihost.leader import Leader
from sgl_jax.multihost.watch import Watch
from sgl_jax.multihost.wire import (
    HANDSHAKE_LIMIT,
    PROTOCOL,
    Alive,
    Challenge,
    Ended,
    HostMessage,
    HostsError,
    Identity,
    Link,
    LinkClosed,
    Welcome,
    WireError,
    frame,
)

PATIENCE_S = 30.0
IDENTITY = Identity({"jax": "1.0"}, {"--page-size": 16, "--dtype": "auto"}, {"model.safetensors": "12 bytes"})


def free_address() -> Address:
    """Find a port that is free, and the one above it, too."""
    for _ in range(50):
        with socket.create_server(("127.0.0.1", 0)) as a:
            port = a.getsockname()[1]
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except OSError:
                continue
            return Address("127.0.0.1", port)
    raise AssertionError("no two ports in a row are free")


class Host0:
    """Leader that waits for the other hosts in a thread."""

    def __init__(self, nnodes: int = 2, token: str = "t", timeout_s: float = PATIENCE_S):
        self.deaths: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.outcome: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.address = free_address()
        self.leader = Leader(self.address, nnodes, IDENTITY, token, self.deaths.put)
        self._thread = threading.Thread(target=self._gather, args=(timeout_s,))
        self._thread.start()

    def _gather(self, timeout_s: float) -> None:
        try:
            self.leader.gather(timeout_s)
            self.outcome.put("together")
        except HostsError as error:
            self.outcome.put(str(error))

    def wait(self) -> str:
        return self.outcome.get(timeout=PATIENCE_S)

    def connect(self, rank: int = 1, token: str = "t", identity: Identity = IDENTITY) -> Link:
        return connect(self.address, rank, identity, token, PATIENCE_S)

    def complete(self) -> None:
        """Let the last missing host join."""
        link = self.connect()
        assert self.wait() == "together"
        link.close()

    def stranger(self) -> socket.socket:
        while True:
            try:
                return socket.create_connection(self.address, timeout=PATIENCE_S)
            except ConnectionRefusedError:  # it does not listen yet
                time.sleep(0.01)


@contextmanager
def host0(**options: Any) -> Iterator[Host0]:
    host = Host0(**options)
    try:
        yield host
    finally:
        host.leader.close()
        host._thread.join(PATIENCE_S)


@contextmanager
def together() -> Iterator[tuple[Host0, Follower, queue.SimpleQueue[str]]]:
    with host0() as host:
        deaths: queue.SimpleQueue[str] = queue.SimpleQueue()
        follower = Follower(host.connect(), deaths.put)
        assert host.wait() == "together"
        assert follower.wait_start() == host.address.port + 1
        try:
            yield host, follower, deaths
        finally:
            follower.close()


def in_thread[T](call: Callable[[], T]) -> Callable[[], T]:
    """Start a call in a thread, and return a function that waits for its result."""
    results: queue.SimpleQueue[T] = queue.SimpleQueue()
    threading.Thread(target=lambda: results.put(call()), daemon=True).start()
    return lambda: results.get(timeout=PATIENCE_S)


# --- work


def test_runs_arrive_as_they_were_announced_and_end_with_the_leader() -> None:
    with together() as (host, follower, deaths):
        sent = [
            ("tokens=8 rows=2", np.arange(300_000, dtype=np.int32), ""),
            ("load pages", np.array([-1, 2**31 - 1]), ""),
            ("load adapter", np.array([3]), "/adapters/a name"),
        ]
        for program, vector, source in sent:
            host.leader.announce(program, vector.astype(np.int32), source)
        got = in_thread(lambda: [(program, vector.tolist(), source) for program, vector, source in follower.runs()])
        closing = in_thread(host.leader.close)
        assert got() == [(program, vector.tolist(), source) for program, vector, source in sent]
        follower.close()
        closing()
        assert deaths.empty()
        assert host.deaths.empty()


def test_hosts_agree_on_the_least_number() -> None:
    with host0(nnodes=3) as host:
        followers = [Follower(host.connect(rank), lambda reason: None) for rank in (2, 1)]
        assert host.wait() == "together"
        for follower in followers:
            follower.wait_start()
        for own, others in ((5, (7, 6)), (9, (3, 4))):
            answers = [
                in_thread(lambda f=follower, n=n: f.agree(n)) for follower, n in zip(followers, others, strict=True)
            ]
            assert host.leader.agree(own) == min(own, *others)
            assert [answer() for answer in answers] == [min(own, *others)] * 2
        for follower in followers:
            follower.close()


# --- who is let in


def test_a_wrong_token_is_refused_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), host0() as host:
        with pytest.raises(HostsError, match=r"host 0 \(127.0.0.1:\d+\) .*token"):
            host.connect(token="other")
        host.complete()  # host 0 goes on waiting for a host that has the token
    assert says(caplog.text, "refused … --dist-token")


def test_a_follower_does_not_believe_a_host_0_without_the_token() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend() -> None:
            link = Link(listener.accept()[0], "stranger")
            link.send(Challenge(PROTOCOL, b"0" * 32))
            answer = link.receive(PATIENCE_S)
            # The follower's own proof, sent back to it, proves nothing.
            link.send_frame(frame(Welcome(answer.proof)))
            heard.append(in_time(link))
            link.close()

        def in_time(link: Link) -> str:
            try:
                return type(link.receive(PATIENCE_S)).__name__
            except HostsError:
                return "closed"

        heard: list[str] = []
        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(HostsError, match="tokens differ"):
            connect(Address("127.0.0.1", listener.getsockname()[1]), 1, IDENTITY, "t", PATIENCE_S)
        thread.join(PATIENCE_S)
        assert heard == ["closed"]  # no Hello: it learns nothing about us


def test_another_version_of_the_protocol_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1])

        def pretend() -> None:
            link = Link(listener.accept()[0], "x")
            link.send(Challenge(PROTOCOL + 1, b"0" * 32))
            link.close()

        talk = in_thread(pretend)
        with pytest.raises(HostsError, match=f"{PROTOCOL + 1} .*this host .*{PROTOCOL}"):
            connect(address, 1, IDENTITY, "t", PATIENCE_S)
        talk()


@pytest.mark.parametrize(
    ("part", "theirs", "message"),
    [
        ("versions", {"jax": "2.0"}, "jax … 2.0 on host 1 … 1.0 on host 0"),
        ("versions", {"jax": "1.0", "libtpu": "3"}, "libtpu … 3 on host 1 … not set on host 0"),
        ("flags", {"--page-size": 32, "--dtype": "auto"}, "--page-size … 32 on host 1 … 16 on host 0"),
        (
            "flags",
            {"--page-size": None, "--dtype": "bfloat16"},
            "--dtype … bfloat16 on host 1 … auto on host 0; --page-size … not set on host 1 … 16 on host 0",
        ),
        (
            "model",
            {"model.safetensors": "13 bytes"},
            "model.safetensors … 13 bytes on host 1 … 12 bytes on host 0",
        ),
    ],
)
def test_what_differs_is_refused_with_both_values(part: str, theirs: dict, message: str) -> None:
    with host0(timeout_s=1.0) as host:
        with pytest.raises(HostsError) as refused:
            host.connect(identity=msgspec.structs.replace(IDENTITY, **{part: theirs}))
        assert says(str(refused.value), f"host 0 ({host.address}) refuses … {message}")
        assert says(host.wait(), f"--dist-timeout … 1 of 2 hosts … {host.address} … node rank 1 … refused … {message}")


@pytest.mark.parametrize("rank", [0, 2, -1])
def test_a_node_rank_that_is_not_waited_for_is_refused(rank: int) -> None:
    with host0() as host:
        with pytest.raises(HostsError, match=f"--node-rank .*{rank}.* host 0 .*1 to 1"):
            host.connect(rank)
        host.complete()


def test_a_node_rank_that_is_taken_is_refused_until_it_leaves() -> None:
    with host0(nnodes=3) as host:
        first = host.connect(1)
        with pytest.raises(HostsError, match=r"--node-rank .*1.* host 1"):
            host.connect(1)
        first.close()
        links = []
        for _ in range(300):  # until host 0 has noticed; were it complete before, it would end with the lost host
            try:
                links.append(host.connect(1))
                break
            except HostsError:
                time.sleep(0.05)
        links.append(host.connect(2))
        assert host.wait() == "together"
        for link in links:
            link.close()


# --- waiting


def test_the_line_names_who_is_missing_and_all_give_up_with_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), host0(nnodes=4, timeout_s=2.0) as host:
        deaths: queue.SimpleQueue[str] = queue.SimpleQueue()
        follower = Follower(host.connect(2), deaths.put)
        line = host.wait()
        assert says(line, f"--dist-timeout … 2 of 4 hosts … {host.address} … node ranks 1, 3")
        assert says(deaths.get(timeout=PATIENCE_S), f"host 0 ({host.address}) ended … {line}")
        follower.close()
    assert any(says(each, f"3 of 4 hosts … {host.address} … node ranks 1, 2, 3") for each in caplog.messages)


def test_a_follower_gives_up_with_the_reason() -> None:
    address = free_address()
    with pytest.raises(HostsError) as given_up:
        connect(address, 1, IDENTITY, "", 0.3)
    assert says(str(given_up.value), f"--dist-timeout … host 0 … {address} … Connection refused")


def test_the_coordinators_port_must_be_free() -> None:
    address = free_address()
    with socket.create_server(address.next_port()):
        leader = Leader(address, 2, IDENTITY, "", lambda reason: None)
        with pytest.raises(HostsError, match=f"port {address.port + 1}.* --dist-init-addr"):
            leader.gather(PATIENCE_S)


def test_an_address_of_another_machine_is_refused() -> None:
    leader = Leader(Address("192.0.2.1", 10011), 2, IDENTITY, "", lambda reason: None)
    with pytest.raises(HostsError, match=r"192.0.2.1:10011.* address"):
        leader.gather(PATIENCE_S)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("10.0.0.1:5", "10.0.0.1", 5), ("[::1]:70", "::1", 70), ("node-0.svc:8", "node-0.svc", 8)],
)
def test_addresses_read_as_they_print(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port)
    assert str(parse_address(text)) == text


# --- strangers


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", f"{int.from_bytes(b'GET ')} bytes … {HANDSHAKE_LIMIT}"),
        (b"\0\0\0\4\xff\xff\xff\xff", "no message of ours"),
        (frame(Alive()), "Alive … Answer"),
        ((HANDSHAKE_LIMIT + 1).to_bytes(4), f"{HANDSHAKE_LIMIT + 1} bytes … {HANDSHAKE_LIMIT}"),
    ],
    ids=["http", "garbage", "out of turn", "oversized"],
)
def test_a_stranger_is_put_off_and_the_wait_goes_on(data: bytes, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), host0() as host:
        with host.stranger() as stranger:
            stranger.sendall(data)
            while stranger.recv(4096):  # its Challenge, then the end
                pass
        host.complete()
    assert says(caplog.text, said)


def test_a_stranger_that_says_nothing_keeps_nobody_waiting() -> None:
    with host0() as host, host.stranger():
        host.complete()


# --- losses


def test_a_host_that_goes_away_is_noticed_and_so_is_why() -> None:
    with together() as (host, follower, _):
        follower.close("it was told to stop (SIGTERM)")
        assert says(host.deaths.get(timeout=PATIENCE_S), "host 1 (127.0.0.1: … ended … it was told to stop (SIGTERM)")
        with pytest.raises(HostsError, match="told to stop"), host.leader.blaming():
            raise RuntimeError("a collective failed")


def test_a_connection_that_closes_without_a_word_is_a_loss() -> None:
    with together() as (host, follower, deaths):
        follower._link._socket.shutdown(socket.SHUT_RDWR)
        assert says(host.deaths.get(timeout=PATIENCE_S), "host 1 … closed")
        assert says(deaths.get(timeout=PATIENCE_S), f"host 0 ({host.address}) … closed")


def test_a_connection_that_is_reset_was_closed() -> None:
    """A process that dies with unread messages resets its connection, and is reported as one that closed it."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as here:
        there, _ = server.accept()
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        there.close()
        with pytest.raises(LinkClosed, match=r"^host 1 .*closed"):
            Link(here, "host 1").receive(PATIENCE_S)


def test_an_error_of_this_host_stays_what_it_was() -> None:
    with together() as (host, _, _), pytest.raises(ZeroDivisionError), host.leader.blaming():
        raise ZeroDivisionError


def test_when_one_of_several_is_lost_the_others_hear_which() -> None:
    with host0(nnodes=3) as host:
        deaths: queue.SimpleQueue[str] = queue.SimpleQueue()
        first, second = Follower(host.connect(1), deaths.put), Follower(host.connect(2), lambda reason: None)
        assert host.wait() == "together"
        second.close("out of memory")
        assert says(host.deaths.get(timeout=PATIENCE_S), "host 2 … ended … out of memory")
        assert says(deaths.get(timeout=PATIENCE_S), f"host 0 ({host.address}) ended … host 2 … out of memory")
        first.close()


def test_the_leaders_reason_reaches_the_followers() -> None:
    with together() as (host, _, deaths):
        host.leader.close("the device is lost")
        assert says(deaths.get(timeout=PATIENCE_S), f"host 0 ({host.address}) ended … the device is lost")


def test_a_frame_over_the_limit_between_hosts_is_a_loss() -> None:
    with together() as (host, follower, _):
        follower._link.send_frame(b"\xff\xff\xff\xff")
        assert says(host.deaths.get(timeout=PATIENCE_S), "4294967295 bytes")


def test_a_host_that_lives_and_finishes_no_program_is_lost_and_named() -> None:
    with together() as (host, follower, deaths):
        host.leader.serve(stall_s=2.5)
        for _ in range(3):  # each finished in time, 3 s in all
            host.leader.announce("tokens=8 rows=2", np.zeros(1, np.int32))
            time.sleep(1.0)
            follower.num_finished += 1
        time.sleep(3.0)  # with nothing to do
        assert host.deaths.empty()
        host.leader.announce("tokens=8 rows=2", np.zeros(1, np.int32))
        said = host.deaths.get(timeout=PATIENCE_S)
        assert says(said, "host 1 … 3 of 4 programs … 3 s … --watchdog-timeout 2.5")
        assert says(deaths.get(timeout=PATIENCE_S), "host 0")


def test_silence_is_a_loss_and_being_alive_is_none() -> None:
    a, b = socket.socketpair()
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    messages: queue.SimpleQueue[HostMessage] = queue.SimpleQueue()
    mine, theirs = Link(_as_tcp(a), "host 1"), Link(_as_tcp(b), "host 0")
    watch = Watch(
        lambda _, message: messages.put(message),
        lambda _, reason: lost.put(reason),
        num_finished=lambda: 7,
        beat_s=0.05,
        silence_s=1.0,
    )
    watch.add(mine)
    assert theirs.receive(PATIENCE_S) == Alive(7)
    for i in range(15):
        theirs.send(Alive(i))
        time.sleep(0.1)
    assert [messages.get(timeout=PATIENCE_S) for _ in range(15)] == [Alive(i) for i in range(15)]
    assert lost.empty()
    theirs.send(Ended())
    assert messages.get(timeout=PATIENCE_S) == Ended()
    assert says(lost.get(timeout=PATIENCE_S), "host 1 … nothing … 1")
    watch.close()
    theirs.close()


def _as_tcp(connection: socket.socket) -> Any:
    class Tcp(socket.socket):
        def setsockopt(self, *_: Any) -> None: ...  # a Unix socket knows no TCP_NODELAY

    return Tcp(fileno=connection.detach())


def test_messages_come_whole_however_they_are_cut() -> None:
    a, b = socket.socketpair()
    link = Link(_as_tcp(a), "x")
    data = frame(Ended("one")) + frame(Ended("two"))
    for i in range(len(data)):
        b.sendall(data[i : i + 1])
    assert [link.receive(PATIENCE_S), link.receive(PATIENCE_S)] == [Ended("one"), Ended("two")]
    b.sendall(b"\0\0\0\1")
    with pytest.raises(TimeoutError):
        link.receive(0.05)
    b.sendall(b"\xc1")
    with pytest.raises(WireError, match="no message of ours"):
        link.receive(PATIENCE_S)
    link.close()
    b.close()
