"""Requests and replies over real encrypted sockets."""

import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest

from twinrl.core import sockets
from twinrl.core.errors import DeadlineError, Rejected, RemoteError, TwinRLError
from twinrl.core.keys import Keys
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
