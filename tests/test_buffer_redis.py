"""Redis by every road (access lists, TLS, Sentinel, Cluster), its refusals in clear words, and the lease of a run."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest
import redis
import trustme

from buffer_service import record, redis_address, redis_lease
from buffer_service.embedded_redis import EmbeddedRedis, find_binary
from buffer_service.promise import keeps, promise
from buffer_service.redis_address import ACL, RedisCluster, connect, explain, prefix
from buffer_service.redis_lease import LeaseLost, RedisLease
from buffer_service.redis_store import RedisStore
from buffer_service.testing import SCHEMA, segment
from twinrl.core.errors import ConfigError, TwinRLError
from twinrl.core.segment import Segment
from twinrl.core.sockets import wait_until

pytestmark = pytest.mark.timeout(60)


def free_port() -> int:
    """A port nobody listens on, nor on the one that a Cluster's node adds; not one that the system gives away."""
    while True:
        port = random.randint(15_000, 22_000)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port


class Servers:
    """Redis servers on TCP ports, ended with the test."""

    def __init__(self, folder):
        self.folder, self.running = folder, {}

    def start(self, *lines, port=None, sentinel=False, wait=True):
        port = port or free_port()
        home = self.folder / f"server{port}"
        home.mkdir(exist_ok=True)
        config = home / "redis.conf"
        if not config.exists():  # a Sentinel writes what it learns into its own
            text = [f"port {port}", "bind 127.0.0.1", f"dir {home}", *lines]
            config.write_text("\n".join([*text, "logfile redis.log", ""]))
        command = [find_binary(), str(config), *(["--sentinel"] if sentinel else [])]
        self.running[port] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        if wait:

            def answers():
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection(("127.0.0.1", port), 5) as probe,
                ):
                    probe.sendall(b"PING\r\n")
                    return probe.recv(100)  # also that it wants a password

            wait_until(answers, 20, "Redis to answer")
        return port

    def kill(self, port):
        process = self.running.pop(port)
        process.kill()
        process.wait(10)

    def close(self):
        for port in list(self.running):
            self.kill(port)


@pytest.fixture
def servers(tmp_path):
    servers = Servers(tmp_path)
    yield servers
    servers.close()


@pytest.fixture
def embedded(tmp_path):
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


def url_of(server: EmbeddedRedis) -> str:
    return f"unix://:{server.password}@{server.socket}"


def works(client) -> bool:
    """A transaction over several keys of one run."""
    with client.pipeline(transaction=True) as pipeline:
        pipeline.set(prefix("run") + "a", "1")
        pipeline.hset(prefix("run") + "b", mapping={"x": "2"})
        pipeline.execute()
    return client.get(prefix("run") + "a") == b"1" and client.hlen(prefix("run") + "b") == 1


def test_a_user_of_an_access_list_needs_no_more_than_the_documented_rights(servers, tmp_path):
    port = servers.start("user default off", f"user robot on >s3cret/@ {ACL}", wait=False)
    address = f"redis://robot:s3cret%2F%40@127.0.0.1:{port}/0"

    def connected():
        with contextlib.suppress(ConfigError):
            return connect(address)

    wait_until(connected, 20, "Redis to answer")
    client = connect(address)
    assert works(client)
    RedisLease(client, prefix("run"), tmp_path).acquire().release()
    with pytest.raises(redis.exceptions.NoPermissionError) as caught:
        client.set("other", 1)
    assert "ACL SETUSER" in explain(caught.value)
    (tmp_path / "password").write_text("s3cret/@\n")
    url = f"redis://robot@127.0.0.1:{port}"
    assert works(connect(url, password_file=str(tmp_path / "password")))
    for wrong in (url, address.replace("s3cret", "wrong")):
        with pytest.raises(ConfigError, match="refuses the password or the user") as caught:
            connect(wrong)
        assert "wrong" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere"):
        connect(url, password_file="/nowhere")


def test_a_user_without_any_right_is_told_which(servers):
    port = servers.start("user robot on >secret -@all +auth +hello +client", wait=True)
    with pytest.raises(ConfigError, match=r"may not do this: ACL SETUSER .*~twinrl:"):
        connect(f"redis://robot:secret@127.0.0.1:{port}")


class TlsFront:
    """TLS in front of a server: what stunnel or a hosted Redis does."""

    def __init__(self, port: int, authority: trustme.CA, ask_for_certificate: bool) -> None:
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("127.0.0.1", "localhost").configure_cert(self._context)
        if ask_for_certificate:
            self._context.verify_mode = ssl.CERT_REQUIRED
            authority.configure_trust(self._context)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port, self._to = self._listener.getsockname()[1], port
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                plain = self._listener.accept()[0]
                threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with contextlib.suppress(OSError):
            near = self._context.wrap_socket(plain, server_side=True)
            far = socket.create_connection(("127.0.0.1", self._to))
            threading.Thread(target=self._pump, args=(far, near), daemon=True).start()
            self._pump(near, far)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for each in (source, target):
            each.close()


def test_tls_with_an_authority_of_our_own_and_a_client_certificate(servers, tmp_path, monkeypatch):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    client = authority.issue_cert("robot@example.org")
    client.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    client.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    ca, cert, key = (str(tmp_path / name) for name in ("ca.pem", "cert.pem", "key.pem"))
    port = servers.start()
    open_front, strict_front = TlsFront(port, authority, False), TlsFront(port, authority, True)
    try:
        address = f"rediss://127.0.0.1:{open_front.port}/0"
        assert works(connect(address, tls_ca=ca))
        assert works(connect(f"{address}?ssl_ca_certs={ca}"))
        with pytest.raises(ConfigError, match=r"set redis\.tls_ca to the authority that signed it"):
            connect(address)
        with pytest.raises(ConfigError, match="TLS"):
            connect(address.replace("rediss", "redis"))
        for name in ("socket_timeout", "socket_connect_timeout"):
            monkeypatch.setitem(redis_address.CLIENT_OPTIONS, name, 1.0)
        with pytest.raises(ConfigError, match="write redis:// if it speaks no TLS"):
            connect(f"rediss://127.0.0.1:{port}/0", tls_ca=ca)
        with pytest.raises(ConfigError, match=r"uses no TLS, but redis\.tls_\* is set"):
            connect(f"redis://127.0.0.1:{port}/0", tls_ca=ca)
        address = f"rediss://127.0.0.1:{strict_front.port}/0"
        assert works(connect(address, tls_ca=ca, tls_certificate=cert, tls_key=key))
        with pytest.raises(ConfigError, match=r"redis\.tls_certificate"):
            connect(address, tls_ca=ca)
    finally:
        open_front.close()
        strict_front.close()


@pytest.mark.timeout(120)
def test_sentinels_name_the_master_also_after_it_died(servers):
    secrets = "requirepass secret", "masterauth secret", "repl-diskless-sync-delay 0"
    master = servers.start(*secrets)
    copy = servers.start(*secrets, f"replicaof 127.0.0.1 {master}")
    watchers = [
        servers.start(
            f"sentinel monitor mine 127.0.0.1 {master} 1",
            "sentinel auth-pass mine secret",
            "sentinel down-after-milliseconds mine 1000",
            "sentinel failover-timeout mine 3000",
            sentinel=True,
        )
    ]
    with pytest.raises(ConfigError, match=rf"read-only copy of 127\.0\.0\.1:{master}"):
        connect(f"redis://:secret@127.0.0.1:{copy}")
    hosts = ",".join(f"127.0.0.1:{port}" for port in [free_port(), *watchers])
    url = f"redis+sentinel://:secret@{hosts}/mine/0"
    client = connect(url)
    assert works(client)
    with pytest.raises(ConfigError, match="no Sentinel there names a master"):
        connect(f"redis+sentinel://:secret@{hosts}/other")
    with pytest.raises(ConfigError, match="names no service behind the Sentinels"):
        connect(f"redis+sentinel://:secret@{hosts}")
    sentinel = redis.Redis(port=watchers[0])
    wait_until(lambda: sentinel.sentinel_slaves("mine"), 30, "the copy to be known")
    wait_until(lambda: client.wait(1, 100) == 1, 20, "the copy to be complete")
    servers.kill(master)

    def moved():
        with contextlib.suppress(redis.RedisError, ConfigError):
            return works(connect(url)) and connect(url).connection_pool.get_master_address()

    wait_until(moved, 40, "the fail-over")
    assert moved() == ("127.0.0.1", copy)
    assert client.hlen(prefix("run") + "b") == 1, "the client of before follows"


def test_a_cluster_holds_a_run_on_one_node(servers):
    lines = "cluster-enabled yes", "cluster-node-timeout 2000", "appendonly yes"
    ports = [servers.start(*lines) for _ in range(3)]
    nodes = [redis.Redis(port=port) for port in ports]
    for n, node in enumerate(nodes):
        first, last = n * 16384 // 3, (n + 1) * 16384 // 3 - 1
        node.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
        node.execute_command("CLUSTER SET-CONFIG-EPOCH", n + 1)
        if n:
            node.execute_command("CLUSTER MEET", "127.0.0.1", ports[0])

    def formed():
        told = [node.execute_command("CLUSTER INFO") for node in nodes]
        return all(each["cluster_state"] == "ok" and each["cluster_size"] == "3" for each in told)

    wait_until(formed, 30, "the cluster to form")
    url = "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in [free_port(), *ports])
    client = connect(url)
    assert isinstance(client, RedisCluster) and works(client)
    assert sorted(node.dbsize() for node in nodes) == [0, 0, 2]
    lease = RedisLease(client, prefix("run"), servers.folder).acquire()
    with client.pipeline(transaction=True) as pipeline:
        lease.guard(pipeline)
        pipeline.set(prefix("run") + "a", "3")
        pipeline.execute()
    lease.release()
    assert client.get(prefix("run") + "a") == b"3"
    for _ in range(2):  # as after a restart
        store = RedisStore(servers.folder / "run", connect(url), "run", SCHEMA, flush="never")
        assert store.recover().lost == []
        for _ in range(3):
            sequence = store.appended.get("w", -1) + 1
            header, columns = segment(sequence * 8, 8)
            header |= {"writer": "w", "sequence": sequence}
            entry = store.append(Segment(header, columns))
            store.commit([entry], [])
            store.publish([entry], [])
        oldest = [store.entries[min(store.entries)]]
        store.commit([], oldest)
        store.publish([], oldest)
    assert sorted(store.entries) == [3, 4, 5, 6]
    assert all(record.intact(store.raw(entry)) for entry in store.entries.values())
    store.reconnect(connect(url))
    with pytest.raises(ConfigError, match="no Redis answers there"):
        connect(f"redis+cluster://127.0.0.1:{free_port()}")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://:secret@127.0.0.1:1/0", r"redis://:\*\*\*@127.* no Redis answers there"),
        ("unix:///nowhere/redis.sock?password=secret", r"\*\*\*.*leave redis.url empty"),
        ("127.0.0.1:6379", "is no address"),
        ("http://127.0.0.1", "begins with 'http'"),
        ("redis+magic://127.0.0.1:1", "begins with 'redis\\+magic'"),
        ("redis+sentinel://127.0.0.1/mine", "is not HOST:PORT"),
    ],
)
def test_a_wrong_address_is_explained(url, message):
    with pytest.raises(ConfigError, match=message) as caught:
        connect(url)
    assert "secret" not in str(caught.value)


def test_a_redis_that_may_drop_keys_is_refused(servers):
    port = servers.start("maxmemory 100mb", "maxmemory-policy allkeys-lru")
    with pytest.raises(ConfigError, match="CONFIG SET maxmemory-policy noeviction"):
        connect(f"redis://127.0.0.1:{port}")


def test_refusals_are_explained(tmp_path):
    server = EmbeddedRedis(tmp_path / "redis", memory_mb=8)
    client = server.start()
    try:
        with pytest.raises(redis.RedisError) as caught:  # within a transaction, as the store writes
            for n in range(100):
                with client.pipeline(transaction=True) as pipeline:
                    pipeline.set(f"k{n}", bytes(1 << 20))
                    pipeline.execute()
        assert "out of memory" in explain(caught.value) and "redis_memory_mb" in explain(
            caught.value
        )
        assert 2 < client.dbsize() < 10
        client.delete("k0", "k1", "k2")
        client.set("k", "v")
        client.replicaof("127.0.0.1", "1")
        with pytest.raises(redis.RedisError) as caught:
            client.set("k", "w")
        assert "read-only copy" in explain(caught.value)
    finally:
        server.stop()


def test_every_refusal_has_its_words():
    """Among them those that a test would need a full disk or a broken copy for."""
    told = "Command # 1 (HSET a b) of pipeline caused error: "
    for text, words in (
        ("MISCONF Errors writing to the AOF file: No space left on device", "make room there"),
        ("NOREPLICAS Not enough good replicas to write.", "min-replicas-to-write"),
        ("CLUSTERDOWN The cluster is down", "no node for this run"),
        ("ERR unknown command", r"Redis refuses \(ERR"),
    ):
        for start in ("", told):
            found = explain(redis.ResponseError(start + text))
            assert re.search(words, found) and "HSET" not in found and text in found
    assert explain(redis.ConnectionError("cut")) == "Redis is away (cut)"


def test_the_log_of_the_runs_own_redis_is_rewritten(tmp_path):
    server = EmbeddedRedis(tmp_path / "redis")
    client = server.start()
    try:
        assert client.config_get("auto-aof-rewrite-percentage") == {
            "auto-aof-rewrite-percentage": "100"
        }
        client.config_set("auto-aof-rewrite-min-size", 4 << 20)

        def size() -> int:
            files = (tmp_path / "redis" / "appendonlydir").glob("*")
            return sum(path.stat().st_size for path in files if path.exists())

        def rewritten() -> bool:
            told = client.info("persistence")
            small = told["aof_current_size"] < 2.2 * max(told["aof_base_size"], 4 << 20)
            return small and not told["aof_rewrite_in_progress"]

        largest = 0
        for n in range(120):  # 120 MB of which 4 are kept
            client.set(f"k{n % 4}", os.urandom(1 << 20))
            largest = max(largest, size())
            if n % 8 == 7:  # the server looks ten times a second; here the writes wait for it
                wait_until(rewritten, 20, "the log to be rewritten")
        assert largest < 80 << 20
    finally:
        server.stop()


@pytest.mark.parametrize("damage", [b"", bytes(5000), b"*3\r\n$3\r\nSET\r\n$9999999\r\nabc", b"x"])
def test_a_log_whose_end_never_reached_the_disk_is_repaired(tmp_path, damage):
    server = EmbeddedRedis(tmp_path / "redis")
    client = server.start()
    for n in range(50):
        with client.pipeline(transaction=True) as pipeline:
            pipeline.set(f"k{n}", os.urandom(1000))
            pipeline.set("last", n)
            pipeline.execute()
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not server.alive(), 10, "the end of Redis")
    log = max((tmp_path / "redis" / "appendonlydir").glob("*.incr.aof"))
    with log.open("r+b") as file:
        if damage == b"x":  # within the last transaction
            file.seek(-900, os.SEEK_END)
            file.write(bytes(900))
        else:
            file.seek(0, os.SEEK_END)
            file.write(damage)
    client = server.start()
    try:
        last = 48 if damage == b"x" else 49
        assert client.get("last") == str(last).encode() and client.dbsize() == last + 2
        client.set("k", "v")
    finally:
        server.stop()


def test_a_promise_says_what_is_lost_when():
    assert promise("always", "always", "files").endswith("every process and of the machine")
    assert "its last second" in promise("everysec", "everysec", "files")
    assert "half a minute" in promise("never", "no", "files")
    assert "loses cursors" in promise("everysec", "off", "files")
    assert "last two seconds" in promise("everysec", "everysec", "redis")
    assert "no append-only file" in promise("everysec", "off", "redis")
    assert not keeps("everysec", "always", "redis") and not keeps("always", "no", "files")
    assert "appendfsync always" in keeps("always", "everysec", "redis")
    assert "appendonly yes" in keeps("never", "off", "redis")


class Holder:
    """A lease with its own connection and what it heard."""

    def __init__(self, server, folder, **options):
        self.client, self.errors = connect(url_of(server)), []
        folder.mkdir(exist_ok=True)
        self.lease = RedisLease(self.client, prefix("run"), folder, self.errors.append, **options)

    def write(self, value: str) -> None:
        with self.client.pipeline(transaction=True) as pipeline:
            self.lease.guard(pipeline)
            pipeline.set(prefix("run") + "value", value)
            pipeline.execute()


def test_of_two_services_on_two_hosts_the_second_is_refused(embedded, tmp_path):
    first, second = Holder(embedded, tmp_path / "a"), Holder(embedded, tmp_path / "b")
    first.lease.acquire()
    with pytest.raises(TwinRLError, match=r"another replay service serves this run on .*/a\)"):
        second.lease.acquire()
    other = RedisLease(second.client, prefix("other run"), tmp_path / "b").acquire()
    other.release()
    first.write("1")
    first.lease.release()
    since = time.monotonic()
    Holder(embedded, tmp_path / "c").lease.acquire().release()
    assert time.monotonic() - since < 5, "a lease given back is free at once"


def test_a_dead_holder_is_waited_for_elsewhere_but_not_in_its_own_folder(embedded, tmp_path):
    script = (
        "import sys,time;from pathlib import Path;from buffer_service.redis_address import *;"
        "from buffer_service.redis_lease import RedisLease;"
        "RedisLease(connect(sys.argv[1]),prefix('run'),Path(sys.argv[2]),seconds=2).acquire();"
        "print('held',flush=True);time.sleep(60)"
    )
    for folder, least, most in (("a", 0.0, 1.5), ("b", 0.3, 6.0)):
        (tmp_path / "a").mkdir(exist_ok=True)
        command = [sys.executable, "-c", script, url_of(embedded), str(tmp_path / "a")]

        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "held\n"
            process.send_signal(signal.SIGKILL)
        since = time.monotonic()
        holder = Holder(embedded, tmp_path / folder, seconds=2.0)
        holder.lease.acquire()
        assert least <= time.monotonic() - since <= most
        holder.write("x")
        holder.lease.release()


def test_a_stopped_holder_cannot_write_after_the_change_of_hands(embedded, tmp_path, monkeypatch):
    monkeypatch.setattr(redis_lease, "RENEW_SECONDS", 3600)  # as if stopped: it renews nothing
    first, second = (Holder(embedded, tmp_path / name, seconds=0.5) for name in "ab")
    first.lease.acquire()
    with first.client.pipeline(transaction=True) as pipeline:
        first.lease.guard(pipeline)
        pipeline.set(prefix("run") + "value", "late")
        second.lease.acquire()
        second.write("new")
        with pytest.raises(redis.WatchError):
            pipeline.execute()
    with pytest.raises(LeaseLost, match="taken this run over"):
        first.write("late")
    assert first.client.get(prefix("run") + "value") == b"new"
    first.lease.release()
    assert json.loads(second.client.get(prefix("run") + "lease"))["folder"].endswith("/b")


def test_a_clock_that_jumps_costs_no_holder_its_lease(embedded, tmp_path):
    holder, client = Holder(embedded, tmp_path / "a"), connect(url_of(embedded))
    holder.lease.acquire()
    key = prefix("run") + "lease"
    client.delete(key)  # Redis's clock jumped ahead: the lease expired
    holder.write("1")
    wait_until(lambda: client.get(key), 10, "the lease to be taken again")
    client.persist(key)  # it jumped back: the lease would last for ages
    wait_until(lambda: 0 < client.pttl(key) <= 10_000, 10, "the lease to expire in time again")
    client.flushall()  # Redis came back without its data
    holder.write("2")
    wait_until(lambda: client.get(key), 10, "the lease to be taken again")
    holder.write("3")
    assert not holder.errors
    holder.lease.release()
    client.set(
        key, json.dumps({"host": "elsewhere", "place": "elsewhere"})
    )  # dead, and without an end
    heir = Holder(embedded, tmp_path / "b", seconds=1.0)
    heir.lease.acquire().release()


def test_a_holder_hears_of_its_loss(embedded, tmp_path):
    holder = Holder(embedded, tmp_path / "a")
    holder.lease.acquire()
    thief = {"token": "t", "host": "elsewhere", "pid": 1, "folder": "/x"}
    holder.client.set(prefix("run") + "owner", json.dumps(thief))
    wait_until(lambda: holder.errors, 10, "the news")
    assert "on elsewhere (process 1, /x)" in str(holder.errors[0])
    holder.lease.release()
