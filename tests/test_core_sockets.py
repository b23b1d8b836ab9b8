"""Requests and replies over real encrypted sockets."""

import threading
import time
from concurrent.futures import Future

import msgpack
import numpy as np
import pytest
import zmq

from twinrl.core import sockets, wire
from twinrl.core.errors import DeadlineError, Rejected, RemoteError, TwinRLError, WireError
from twinrl.core.keys import Keys, secure_client, secure_server
from twinrl.core.metrics import Reporter
from twinrl.core.sockets import Client, Server, free_port, wait_until

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def address():
    return f"tcp://127.0.0.1:{free_port()}"


@pytest.fixture
def serve(keys):
    """Starts servers of `handlers` and closes them."""
    servers = []

    def start(address, **handlers):
        server = Server("oracle", address, keys["server"], {keys["cluster"].public: "cluster"})
        for method, handler in handlers.items():
            server.bind(method, handler)
        servers.append(server.start())
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def connect(keys):
    clients = []

    def start(address, role="cluster", **options):
        clients.append(Client("oracle", address, keys[role], **options))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


def test_call_with_arrays(serve, connect, address):
    serve(address, double=lambda r: ({"role": r.role, **r.args}, {"x": r.arrays["x"] * 2}))
    result, arrays = connect(address).call("double", {"a": 1}, {"x": np.arange(4)})
    assert result == {"role": "cluster", "a": 1}
    np.testing.assert_array_equal(arrays["x"], [0, 2, 4, 6])


def test_large_answers_that_were_taken_are_forgotten(serve, connect, address, monkeypatch):
    """A peer that reads on may be given any number of bytes in the course of time."""
    monkeypatch.setattr(sockets, "MAX_UNREAD_BYTES", 16 << 20)
    large = np.ones(3 << 20, np.uint8)
    serve(address, fetch=lambda r: ({}, {"x": large}))
    client = connect(address)
    for _ in range(12):
        _, arrays = client.call("fetch")
        assert arrays["x"].nbytes == large.nbytes


def test_errors_reach_the_caller(serve, connect, address):
    def refuse(request):
        raise Rejected("wrong run; attach to run 'b'")

    def fail(request):
        return 1 / 0

    serve(address, refuse=refuse, fail=fail)
    client = connect(address)
    with pytest.raises(Rejected, match="attach to run 'b'"):
        client.call("refuse")
    with pytest.raises(RemoteError, match="ZeroDivisionError"):
        client.call("fail")
    with pytest.raises(Rejected, match="no method 'nonsense'"):
        client.call("nonsense")


def test_what_cannot_be_packed_is_an_error_of_its_own(serve, connect, address):
    deep: list = []
    for _ in range(2000):
        deep = [deep]
    answers = {"deep": deep, "large": 1 << 64, "object": object()}
    late = Future()
    serve(address, ask=lambda r: {"x": answers[r.args["what"]]}, late=lambda r: late)
    client = connect(address)
    for what in answers:
        with pytest.raises((RemoteError, Rejected), match=r"encoded|pack|plain"):
            client.call("ask", {"what": what})
    waiting = client.submit("late")
    late.set_result(({"x": deep}, {}))
    with pytest.raises((RemoteError, Rejected), match=r"encoded|pack|plain"):
        waiting.result(5)


def test_unanswered_requests_of_a_peer_are_bounded(serve, connect, address, monkeypatch):
    monkeypatch.setattr(sockets, "MAX_UNANSWERED", 3)
    late = []

    def wait(request):
        late.append(Future())
        return late[-1]

    serve(address, wait=wait, echo=lambda r: dict(r.args))
    greedy, modest = connect(address), connect(address)
    waiting = [greedy.submit("wait") for _ in range(5)]
    for refused in waiting[3:]:
        with pytest.raises(RemoteError, match="3 requests of yours wait"):
            refused.result(5)
    fourth = modest.submit("wait")
    wait_until(lambda: len(late) == 4, 5, "the other peer's request")
    for each in late:
        each.set_result({})
    for each in (*waiting[:3], fourth):
        assert each.result(5)[0] == {}
    again = greedy.submit("wait")
    wait_until(lambda: len(late) == 5, 5, "a request after the others were answered")
    late[-1].set_result({})
    again.result(5)


def test_answers_that_nobody_takes_are_bounded(serve, keys, connect, address, monkeypatch):
    monkeypatch.setattr(sockets, "MAX_UNREAD_BYTES", 8 << 20)
    block = np.zeros(4 << 20, np.uint8)
    server = serve(address, block=lambda r: ({}, {"x": block}))
    context = zmq.Context()
    deaf = context.socket(zmq.DEALER)
    deaf.linger, deaf.rcvhwm, deaf.rcvbuf = 0, 1, 1 << 16
    secure_client(deaf, keys["cluster"])
    deaf.connect(address)
    try:
        for number in range(30):
            deaf.send_multipart(wire.pack({"id": number, "method": "block", "args": {}}))
        wait_until(lambda: server.stats().get("requests/failed", 0) > 15, 10, "refusals")
        _, arrays = connect(address).call("block")
        assert arrays["x"].nbytes == block.nbytes, "another peer gets its answer"
        errors = 0
        for _ in range(30):
            assert deaf.poll(5000)
            header, _ = wire.unpack(deaf.recv_multipart())
            errors += "not taken yet" in header.get("error", "")
        assert 15 < errors < 30
    finally:
        context.destroy(0)


def test_a_frame_that_is_too_large_cuts_its_peer_off_and_nobody_else(
    serve, connect, address, monkeypatch
):
    monkeypatch.setattr(sockets, "MAX_MESSAGE_BYTES", 1 << 20)
    serve(address, echo=lambda r: ({}, r.arrays))
    good, bad = connect(address), connect(address)
    with pytest.raises(DeadlineError):
        bad.call("echo", {}, {"x": np.zeros(2 << 20, np.uint8)}, timeout=1)
    assert good.call("echo", {}, {"x": np.zeros(1 << 19, np.uint8)})[1]["x"].nbytes == 1 << 19


def test_a_header_that_is_too_large_is_refused_on_both_sides(serve, keys, connect, address):
    serve(address, echo=lambda r: dict(r.args))
    client = connect(address)
    with pytest.raises(WireError, match="at most 1048576"):
        client.call("echo", {"x": "x" * (1 << 20)})
    assert client.call("echo", {"x": "x" * 1_000_000})[0]["x"] == "x" * 1_000_000
    context = zmq.Context()
    raw = context.socket(zmq.DEALER)
    secure_client(raw, keys["cluster"])
    raw.connect(address)
    try:
        # Not even looked at: its number is not in the answer.
        raw.send(msgpack.packb([1, {"id": 5, "method": "echo", "x": "x" * (1 << 20)}, []]))
        assert raw.poll(5000)
        header, _ = wire.unpack(raw.recv_multipart())
        assert header["id"] is None and "at most 1048576" in header["rejected"]
    finally:
        context.destroy(0)


def test_complaints_are_logged_at_a_bounded_rate(serve, connect, address, caplog, monkeypatch):
    monkeypatch.setattr(sockets, "COMPLAINT_SECONDS", 0.5)
    caplog.set_level("INFO")

    def fail(request):
        raise ValueError("line\nof its own " + "x" * 100_000)

    serve(address, fail=fail)
    client = connect(address)
    for _ in range(200):
        with pytest.raises(RemoteError):
            client.call("fail")
    time.sleep(0.6)
    with pytest.raises(RemoteError) as caught:
        client.call("fail")
    assert len(str(caught.value)) < 2100
    lines = [each.getMessage() for each in caplog.records]
    assert sum("refuses a request" in line for line in lines) <= 5 * sockets.COMPLAINTS
    assert any("more of these" in line for line in lines)
    assert all("\n" not in line and len(line) < 2100 for line in lines)


def test_an_answer_of_another_version_ends_no_client(keys, address):
    """Its requests fail with the reason, and it serves on."""
    context = zmq.Context()
    server = context.socket(zmq.ROUTER)
    server.linger = 0
    secure_server(server, keys["server"])
    server.bind(address)
    client = Client("oracle", address, keys["cluster"])
    try:
        for answer in ([99, {"id": 1, "result": {}}, []], 5, [wire.PROTOCOL, {"id": [1]}, []]):
            waiting = client.submit("hello")
            assert server.poll(10_000)
            peer, _ = server.recv_multipart()
            server.send_multipart([peer, msgpack.packb(answer)])
            with pytest.raises(Rejected, match="the answer of oracle"):
                waiting.result(5)
        waiting = client.submit("hello")
        peer, _ = server.recv_multipart()
        server.send_multipart([peer, *wire.pack({"id": waiting.number, "result": {"a": 1}})])
        assert waiting.result(5)[0] == {"a": 1}
    finally:
        client.close()
        context.destroy(0)


def test_late_answers_do_not_block_others(serve, connect, address):
    late = Future()
    serve(address, late=lambda r: late, soon=lambda r: {"ok": True})
    client = connect(address)
    waiting = client.submit("late")
    assert client.call("soon")[0] == {"ok": True}
    assert not waiting.done()
    late.set_result({"answer": 42})
    assert waiting.result(5)[0] == {"answer": 42}


def test_a_wrong_key_never_gets_in(serve, connect, address):
    serve(address, hello=lambda r: {})
    with pytest.raises(DeadlineError, match=f"oracle at {address}"):
        connect(address, role="robot", timeout=0.5).call("hello")
    assert connect(address).call("hello") == ({}, {})


def test_a_server_with_another_key_is_not_believed(serve, connect, keys, address):
    serve(address, hello=lambda r: {})
    impostor = keys["cluster"]._replace(server=keys["robot"].public)
    client = Client("oracle", address, impostor, timeout=0.5)
    try:
        with pytest.raises(DeadlineError):
            client.call("hello")
    finally:
        client.close()


def test_a_client_survives_its_servers_restart(serve, connect, address):
    first = serve(address, name=lambda r: {"name": "first"})
    client = connect(address, timeout=10)
    assert client.call("name")[0] == {"name": "first"}
    first.close()
    serve(address, name=lambda r: {"name": "second"})
    assert client.call("name")[0] == {"name": "second"}


def test_no_server_is_a_deadline_not_a_hang(connect, address):
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"within 0\.3 s"):
        connect(address).call("hello", timeout=0.3)
    assert time.monotonic() - began < 3


def test_a_taken_port_says_so(serve, address):
    serve(address)
    with pytest.raises(TwinRLError, match="another run"):
        serve(address)


def test_closing_fails_what_waits(serve, keys, address):
    serve(address, never=lambda r: Future())
    client = Client("oracle", address, keys["cluster"])
    waiting = client.submit("never")
    client.close()
    with pytest.raises(RemoteError, match="closed"):
        waiting.result(1)


def test_many_threads_share_a_client(serve, connect, address):
    serve(address, echo=lambda r: dict(r.args))
    client = connect(address)
    results = {}

    def ask(i):
        results[i] = [client.call("echo", {"n": (i, k)})[0]["n"] for k in range(50)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [[i, k] for k in range(50)] for i in range(8)}


def test_key_files_are_private_and_checked(keys, tmp_path):
    assert (tmp_path / "keys" / "robot.key").stat().st_mode & 0o077 == 0
    with pytest.raises(TwinRLError, match="no key file"):
        Keys.load(tmp_path / "none.key")
    (tmp_path / "bad.key").write_text("{}")
    with pytest.raises(TwinRLError, match="not a TwinRL key"):
        Keys.load(tmp_path / "bad.key")


def test_reporting_to_nobody_never_waits(keys, address):
    reporter = Reporter(address, keys["cluster"], "actor", "a", lambda: {"x": 1})
    began = time.monotonic()
    for i in range(5000):
        reporter.event("info", f"event {i}")
    assert time.monotonic() - began < 3
    reporter.close()


def test_waiting_names_what_for():
    with pytest.raises(DeadlineError, match="the moon"):
        wait_until(lambda: False, 0.1, "the moon")
    assert wait_until(lambda: 7, 1, "seven") == 7
