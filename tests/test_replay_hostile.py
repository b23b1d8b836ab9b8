"""The replay service in bad company: full disks, jumping clocks, old clients, slow readers, crowds, dead writers."""

import ast
import contextlib
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq

import buffer_service
import twinrl.core
from buffer_service import record
from buffer_service.client import Reader, Writer
from buffer_service.entry import CUT, LEASE, OPEN
from buffer_service.files import path_of
from buffer_service.testing import SCHEMA, ServiceProcess, segment
from twinrl.core import wire
from twinrl.core.errors import Rejected, TwinRLError
from twinrl.core.keys import Keys, secure_client
from twinrl.core.sockets import MAX_UNREAD_BYTES, wait_until

pytestmark = pytest.mark.timeout(120)
STEPS = 8
LONG = bool(os.environ.get("TWINRL_LONG"))
BIG = SCHEMA._replace(image_size=96)  # 0.5 MB a segment


def write(writer: Writer, first: int, last: int, **options) -> None:
    for number in range(first, last):
        writer.write(*segment(number * STEPS, STEPS, **options))


def numbers(reader: Reader) -> list[int]:
    """Which segments there are, by their values, in order."""
    reader.sync()
    return [int(each.columns["action"][0, 0]) // STEPS for each in reader.segments()]


def own_memory(pid: int) -> int:
    """Bytes that the process has for itself: mapped files do not count."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


class Raw:
    """A bare DEALER socket with the cluster's key."""

    def __init__(self, service: ServiceProcess, context: zmq.Context | None = None, **options):
        self._own = context is None
        self._context = context or zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        for name, value in options.items():
            setattr(self.socket, name, value)
        secure_client(self.socket, service.keys())
        self.socket.connect(service.address)

    def send(self, method: str, args=None, number: int = 1) -> None:
        self.socket.send_multipart(
            wire.pack({"id": number, "method": method, "args": args or {}}), zmq.NOBLOCK
        )

    def receive(self, seconds: float = 20.0):
        assert self.socket.poll(seconds * 1000), f"no answer within {seconds:g} s"
        return wire.unpack(self.socket.recv_multipart())

    def call(self, method: str, args=None):
        self.send(method, args)
        header, arrays = self.receive()
        assert "result" in header, header
        return header["result"], arrays

    def close(self) -> None:
        self.socket.close()
        if self._own:
            self._context.term()


@pytest.fixture
def raw(bench):
    """Makes bare connections to the service, closed at the end."""
    made = []

    def make(**options) -> Raw:
        made.append(Raw(bench.service, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


# -- disk full -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False])
def test_a_full_disk_holds_writers_until_there_is_room(bench, direct):
    """The system refuses the service every byte beyond a limit, as it does on a full disk."""
    service = bench.start()
    writer, reader = bench.writer(direct=direct, deadline=60), bench.reader()
    write(writer, 0, 3)
    writer.flush()
    pid = service.process.pid
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    bench.writer("other", direct=direct, deadline=60)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 10, hard))
    real = bench.writer("real", direct=direct, deadline=60)
    write(real, 100, 105, source="real", end="truncated")
    wait_until(lambda: "make room there" in str(real.stats()), 20, "the writer to say why it waits")
    assert service.process.poll() is None
    assert numbers(reader)[:3] == [0, 1, 2], "what is there can be read"
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    real.flush()
    write(writer, 3, 6)
    writer.flush()
    found = numbers(reader)
    assert [n for n in found if n < 100] == list(range(6))
    assert [n for n in found if n >= 100] == list(range(100, 105))
    service.kill()
    service.start()
    again = bench.reader()
    assert sorted(numbers(again)) == [*range(6), *range(100, 105)]


def mount_namespace() -> list[str] | None:
    """A command prefix that gives a process mounts of its own, if this user may have that."""
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return None
    for prefix in (["unshare", "-m"], ["unshare", "-r", "-m"]):
        probe = [*prefix, "mount", "-t", "tmpfs", "none", "/mnt"]
        if subprocess.run(probe, capture_output=True).returncode == 0:
            return prefix
    return None


class Mounted(ServiceProcess):
    """A service whose run folder, Redis's included, is a file system of `mebibytes`."""

    def __init__(self, run_dir: Path, prefix: list[str], mebibytes: int, **options) -> None:
        self._prefix, self._mebibytes = prefix, mebibytes
        super().__init__(run_dir, BIG, **options)

    def start(self) -> None:
        if self._command[0] == sys.executable:
            mount = f'mount -t tmpfs -o size={self._mebibytes}m none {self.run_dir} && exec "$@"'
            self._command = [*self._prefix, "sh", "-c", mount, "sh", *self._command]
        super().start()

    @property
    def root(self) -> Path:
        """The run folder as the service sees it."""
        return Path(f"/proc/{self.process.pid}/root{self.run_dir}")

    def keys(self, role: str = "cluster") -> Keys:
        return Keys.load(self.root / "keys" / f"{role}.key")

    def enlarge(self, mebibytes: int) -> None:
        """Make room."""
        enter = ["nsenter", "-t", str(self.process.pid), "-m"]
        if self._prefix[1] == "-r":
            enter.insert(3, "-U")
        mount = ["mount", "-o", f"remount,size={mebibytes}m", str(self.run_dir)]
        subprocess.run([*enter, *mount], check=True)


def test_a_full_file_system_for_service_and_redis(bench):
    """Segments and Redis's log share a disk that fills up: nothing acknowledged is lost."""
    prefix = mount_namespace()
    if prefix is None:  # the test above exercises a refused write without any right
        pytest.skip("neither root nor a user namespace: no file system to be had")
    bench.run_dir.mkdir(parents=True)
    service = bench.service = Mounted(bench.run_dir, prefix, 40)
    writer = bench.writer(schema=BIG, deadline=60, direct=False)
    for number in range(
        60
    ):  # 60 times 0.5 MB and Redis's files: more than there is beside the reserve
        with contextlib.suppress(TwinRLError):
            writer.write(*segment(number * STEPS, STEPS, schema=BIG), deadline=1)
        if writer.stats()["writer/queued_segments"] > 10:
            break
    wait_until(
        lambda: (
            "make room there" in str(writer.stats()) or not writer.stats()["writer/queued_segments"]
        ),
        30,
        "a full disk",
    )
    written = writer._next
    if not writer.stats()["writer/queued_segments"]:  # it was large enough: fill it up
        filler = service.root / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        for number in range(written, written + 40):
            writer.write(*segment(number * STEPS, STEPS, schema=BIG))
        written += 40
        wait_until(lambda: "make room there" in str(writer.stats()), 30, "a full disk")
    assert service.process.poll() is None
    before = writer.stats()["writer/acknowledged"]
    assert before < written
    service.enlarge(400)
    writer.flush()
    reader = bench.reader()
    assert numbers(reader) == list(range(written))
    assert service.stop() == 0


# -- clocks ----------------------------------------------------------------------------------------------

SHIFTED = """
import os, time
real, real_ns = time.time, time.time_ns
def shift():
    try:
        with open(os.environ["SHIFT"]) as file:
            return float(file.read() or 0)
    except (OSError, ValueError):
        return 0.0
time.time = lambda: real() + shift()
time.time_ns = lambda: real_ns() + int(shift() * 1e9)
"""


def test_jumps_of_the_clock_change_nothing_but_times(bench, tmp_path, monkeypatch):
    shift = tmp_path / "shift"
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim/sitecustomize.py").write_text(SHIFTED)
    path = [str(tmp_path / "shim"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("SHIFT", str(shift))
    service = bench.start(lease=10)
    writers = [bench.writer(f"w{n}", direct=bool(n)) for n in range(2)]
    reader, times = bench.reader(), []
    for round, seconds in enumerate((0, 1e6, -1e6, 3e8, 0)):
        shift.write_text(str(seconds))
        for n, writer in enumerate(writers):
            number = 100 * n + round
            writer.write(
                *segment(number * STEPS, STEPS, episode=f"of {n}", first_step=round * STEPS)
            )
            writer.flush()
        reader.sync()
        reader.sample(8, chunk=4)
        times.append(reader.entries()[-1].time - time.time() - seconds)
        began = time.monotonic()
        client = bench.client()
        client.call("index", {"after": 1 << 60, "boot": "", "seen": 0, "wait": 0.3})
        client.call("permit", {"sample": 0, "wait": 0.3, "who": "test"})
        assert time.monotonic() - began < 5
    assert all(abs(each) < 60 for each in times), "the shim shifts the service's clock"
    assert all(entry.end == OPEN and not entry.marked for entry in reader.entries())
    service.kill()
    shift.write_text("-1e7")
    service.start()
    assert sorted(numbers(bench.reader())) == [*range(5), *range(100, 105)]


WALL_CLOCK = {  # where a time of day is told, never waited for
    "entry.py": "when a segment was inserted",
    "record.py": "when a record was encoded",
    "replay.py": "which start of the service this is",
    "metrics.py": "when a report was made",
    "provenance.py": "when a segment was written",
    "redis_lease.py": "when a holder of the run last wrote, shown to people",
}


def test_no_wait_hangs_on_the_wall_clock():
    for package in (buffer_service, twinrl.core):
        for path in Path(package.__file__).parent.glob("*.py"):
            calls = {
                node.attr
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "time"
            }
            wall = calls & {"time", "time_ns", "localtime", "gmtime"}
            assert not wall or path.name in WALL_CLOCK, f"{path.name} uses time.{wall}: monotonic?"


# -- other clients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 3, 99])
def test_a_client_of_another_protocol_is_refused_in_its_own(bench, raw, version):
    """Its answer has its own version number, so that it can read why."""
    bench.start()
    peer = raw()
    hello = {"id": 7, "method": "hello", "args": {"protocol": version, "writer": "old"}}
    peer.socket.send(msgpack.packb([version, hello, []]))
    assert peer.socket.poll(10_000), "no answer"
    head, *buffers = peer.socket.recv_multipart()
    answered, header, specs = msgpack.unpackb(head)
    assert (answered, header["id"], specs, buffers) == (version, 7, [], [])
    assert f"protocol {version}" in header["rejected"]
    assert f"speaks {wire.PROTOCOL}" in header["rejected"]


@pytest.mark.parametrize("form", ["files", "redis"] if LONG else ["redis"])
def test_a_slow_reader_slows_nobody_and_fills_no_memory(bench, raw, form):
    service = bench.service = ServiceProcess(bench.run_dir, BIG, store=form)
    writer = bench.writer(schema=BIG)
    write(writer, 0, 60, schema=BIG)  # 30 MB
    writer.flush()
    reader = bench.reader()
    reader.sync()
    ids = [entry.id for entry in reader.entries()]
    slow = raw(rcvhwm=1, rcvbuf=1 << 16)
    slow.call("info")
    memory, growth = own_memory(service.process.pid), 0
    for number in range(200):  # 6 GB of answers, none of which is read
        slow.send("fetch", {"ids": ids}, number + 1)
    end, number, longest = time.monotonic() + 10, 60, 0.0
    while time.monotonic() < end:
        began = time.monotonic()
        write(writer, number, number + 1, schema=BIG)
        writer.flush()
        number += 1
        reader.sync()
        reader.sample(16, chunk=4)
        longest = max(longest, time.monotonic() - began)
        growth = max(growth, own_memory(service.process.pid) - memory)
        time.sleep(0.05)
    assert longest < 5, f"somebody else waited {longest:.1f} s"
    assert growth < MAX_UNREAD_BYTES + (150 << 20), f"grew by {growth >> 20} MiB"
    deadline = time.monotonic() + 30
    header, _ = slow.receive()  # it reads on: answers, refusals, or after a cut nothing more
    while "error" not in header and time.monotonic() < deadline and slow.socket.poll(500):
        header, _ = slow.receive()
    assert "not taken yet" in header.get("error", "not taken yet")
    assert raw().call("info")[0]["stats"]["replay/segments"] == number


def test_a_thousand_connections_get_an_answer_each(bench):
    service = bench.start()
    count = 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * count if hard == resource.RLIM_INFINITY else min(hard, 4 * count)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 2 * count)
    began, connections = time.monotonic(), []
    try:
        for number in range(count):
            connections.append(Raw(service, context))
            connections[-1].send("cursor_read", {"name": "none"}, number)
        for number, each in enumerate(connections):
            header, _ = each.receive(60)
            assert header == {"id": number, "result": {"position": 0}}
        connected = time.monotonic() - began
        began = time.monotonic()
        for number, each in enumerate(connections):
            each.send("info", {}, number)
        for number, each in enumerate(connections):
            assert each.receive(60)[0]["id"] == number
        asked = time.monotonic() - began
        with bench.writer() as writer:
            write(writer, 0, 5)
        assert numbers(bench.reader()) == list(range(5))
    finally:
        for each in connections:
            each.close()
        context.term()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(
        f"{count} connections: {connected:.1f} s to the first answers, {asked:.2f} s for one more each"
    )
    assert connected < 60 and asked < 30


def test_a_flood_of_long_polls_is_bounded(bench, raw):
    bench.start()
    peer = raw(sndhwm=0, rcvhwm=0)
    for number in range(5000):
        args = {"after": 1 << 60, "boot": "", "seen": 0, "wait": 10.0}
        peer.send("index", {**args, "boot": "x"} if number % 2 else args, number)
    peer.send("permit", {"sample": 1 << 30, "wait": 10.0, "who": "x" * 200}, 5000)
    began = time.monotonic()
    assert bench.client().call("info")[0]["stats"]["replay/segments"] == 0
    assert time.monotonic() - began < 10
    kinds = {"result": 0, "error": 0}
    for _ in range(5001):
        header, _ = peer.receive(40)
        kinds["result" if "result" in header else "error"] += 1
    assert sum(kinds.values()) == 5001


def test_two_services_on_one_run_and_on_one_redis(bench, tmp_path):
    """Of two services for the same run the second is refused, whether it has the folder or just the Redis."""
    from buffer_service.embedded_redis import EmbeddedRedis

    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    try:
        url = f"unix://:{server.password}@{server.socket}"
        bench.start(redis_url=url, run="mine")
        write(bench.writer(), 0, 3)
        with pytest.raises(RuntimeError, match="already serving"):
            ServiceProcess(bench.run_dir, redis_url=url, run="mine")
        with pytest.raises(RuntimeError, match=r"mine|run\.name"):
            ServiceProcess(tmp_path / "elsewhere", redis_url=url, run="mine")
        assert numbers(bench.reader()) == [0, 1, 2], "the first goes on"
        bench.close()
    finally:
        server.stop()


# -- dead writers ----------------------------------------------------------------------------------------


def test_a_writer_that_dies_within_a_record_leaves_no_trace(bench, raw):
    """On the direct path it dies between the record's first and last byte."""
    service = bench.start()
    peer = raw()
    hello = {"protocol": wire.PROTOCOL, "digest": SCHEMA.digest(), "writer": "torn", "session": "a"}
    folder = Path(peer.call("hello", hello)[0]["folder"])
    allocate = {"writer": "torn", "session": "a", "source": "twin", "bytes": 1 << 16}
    file = peer.call("allocate", allocate)[0]["file"]
    place = 0
    for sequence in range(3):
        header, columns = segment(sequence * STEPS, STEPS)
        buffers, length = record.encode({**header, "writer": "torn", "sequence": sequence}, columns)
        data = b"".join(bytes(each) for each in buffers)
        if sequence == 2:  # dies here, and what follows the cut is noise from before
            data = data[: length // 2] + np.random.default_rng(0).bytes(length - length // 2)
        with path_of(folder, file).open("r+b") as target:
            target.seek(place)
            target.write(data)
        if sequence < 2:
            args = {**allocate, "sequence": sequence, "oldest": sequence}
            args |= {"file": file, "offset": place, "length": length}
            assert peer.call("insert_file", args)[0]["acknowledged"] == sequence
        place += length
    service.kill()
    service.start()
    assert numbers(bench.reader()) == [0, 1]
    successor = bench.writer("torn")
    assert successor.write(*segment(2 * STEPS, STEPS)) == 2, "the number was not used up"
    successor.flush()
    service.kill()
    service.start()
    assert numbers(bench.reader()) == [0, 1, 2]
    assert "lost:" not in service.log()


WRITE_AND_HANG = """
import sys, time
from buffer_service.client import Writer
from buffer_service.testing import SCHEMA, segment
from twinrl.core.keys import Keys
address, key, direct = sys.argv[1:]
writer = Writer(address, Keys.load(key), "mortal", schema=SCHEMA, direct=direct == "True")
for step in (0, 8):
    writer.write(*segment(step, 8, episode="unfinished", first_step=step))
writer.flush()
print("acknowledged", flush=True)
time.sleep(600)
"""


def start_mortal(service: ServiceProcess, direct: bool) -> subprocess.Popen:
    key = service.run_dir / "keys/cluster.key"
    command = [sys.executable, "-c", WRITE_AND_HANG, service.address, str(key), str(direct)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "acknowledged\n"
    return process


@pytest.mark.parametrize("direct", [True, False] if LONG else [True])
def test_a_dead_writers_episode_is_closed_by_its_lease(bench, direct):
    service = bench.start(lease=4)
    reader = bench.reader()
    process = start_mortal(service, direct)
    try:
        time.sleep(6)  # alive and silent: it says hello by itself
        reader.sync()
        assert [entry.end for entry in reader.entries()] == [OPEN, OPEN]
        process.kill()
        process.wait(10)
        wait_until(lambda: reader.entries()[-1].marked == LEASE, 30, "the end of the lease")
        assert [(e.end, e.marked) for e in reader.entries()] == [(OPEN, ""), (CUT, LEASE)]
        service.kill()
        service.start()
        again = bench.reader()
        again.sync()
        assert [(e.end, e.marked) for e in again.entries()] == [(OPEN, ""), (CUT, LEASE)]
    finally:
        process.kill()
        process.wait(10)


def test_a_restarted_writer_closes_what_its_predecessor_left_open(bench):
    """A supervisor brings a writer back under its name before any lease is over."""
    service = bench.start()
    process = start_mortal(service, True)
    process.kill()
    process.wait(10)
    successor, reader = bench.writer("mortal"), bench.reader()
    write(successor, 5, 6)
    successor.flush()
    wait_until(lambda: len(reader.entries()) == 3, 20, "three segments")
    wait_until(lambda: reader.entries()[1].marked == LEASE, 20, "the end of the old episode")
    assert [e.end for e in reader.entries()] == [OPEN, CUT, OPEN]


def test_segments_without_a_session_keep_their_writer_alive(bench):
    """Robots' segments come through the gateway, which has no session."""
    bench.start(lease=3)
    client, reader = bench.client(), bench.reader()
    for sequence in range(5):
        header, columns = segment(
            sequence * STEPS, STEPS, episode="long", first_step=sequence * STEPS
        )
        header |= {"writer": "robot", "sequence": sequence}
        client.call("insert", {"header": header}, columns)
        time.sleep(1)
    reader.sync()
    assert [(e.end, e.marked) for e in reader.entries()] == [(OPEN, "")] * 5


def test_a_writer_that_was_taken_over_is_told(bench):
    bench.start()
    first, second = bench.writer("name"), bench.writer("name")
    write(second, 0, 1)
    second.flush()
    with pytest.raises(Rejected, match="taken over"):
        write(first, 0, 1)
        first.flush()
