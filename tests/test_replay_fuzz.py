"""Hostile requests through the real encrypted socket: each is answered, and nobody else notices anything.

TWINRL_LONG=1 sends 100,000 instead of 1,000, in ten parts; a part that passed is skipped when the same seed is
run again. TWINRL_SEED changes the seed, TWINRL_CASE=n sends case n alone.
"""

import contextlib
import copy
import itertools
import math
import os
import random
import socket
import struct
import threading
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
import xxhash
import zmq

from buffer_service import record
from buffer_service.client import Cursor, Reader, Writer
from buffer_service.files import path_of
from buffer_service.testing import SCHEMA, ServiceProcess, segment
from twinrl.core import codec as codecs
from twinrl.core import wire
from twinrl.core.errors import TwinRLError
from twinrl.core.keys import secure_client
from twinrl.core.sockets import MAX_REQUEST_HEADER_BYTES, wait_until

LONG = bool(os.environ.get("TWINRL_LONG"))
SEED = int(os.environ.get("TWINRL_SEED", "20260729"))
CASES = 10_000 if LONG else 1_000  # in a part
PARTS = 10 if LONG else 1
ANSWER_SECONDS = 20.0  # a long poll may take 10
GROWTH_BYTES = 64 << 20  # of the service's own memory, files it maps left out
STEPS = 8

pytestmark = pytest.mark.timeout(45 * 60 if LONG else 120)

LARGE = 1 << 62  # far from every id that is really there, also with a few bits flipped
DEEP = 600  # msgpack reads 1,024 levels and writes 511
WEIRD = (
    *(None, True, False, 0, -1, 1, 1.5, -0.0, 1e308, math.nan, math.inf, -math.inf),
    *(1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63)),
    *("", "x", "1", "9" * 40, "nan", "x" * 100_000, "\0", "a:b", "é\U0001f916", "../../etc/passwd"),
    *(b"", b"\xff\xfe", b"x" * 100_000, [], {}, [[]], [None], {"": None}, {"a": {"b": {}}}),
    *([0] * 10_000, msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 1), "deep"),
)
DTYPES = (
    *(
        "O",
        "|O",
        "V8",
        "|V8",
        "<U4",
        "M8[s]",
        "<m8[s]",
        "c16",
        "<c8",
        "g",
        "<f16",
        "f4,f4",
        "(2,)f4",
    ),
    *(
        "S0",
        "|S0",
        "S999999999",
        "|S9999",
        "",
        "nonsense",
        "<i3",
        "<f4\0",
        ">f4",
        "<f4",
        "<f8",
        "|u1",
    ),
    *(
        None,
        5,
        1.5,
        [],
        ["<f4"],
        [["a", "<f4"]],
        {"names": ["a"], "formats": ["<f4"]},
        b"<f4",
        True,
    ),
)
SHAPES = (
    *([], [0], [-1], [1 << 62, 0], [1 << 62], [1 << 32, 1 << 32], [1] * 9, [1] * 100, [2] * 64),
    *(
        [1 << 63] * 2000,
        ["8"],
        [8.0],
        [None],
        [[8]],
        None,
        8,
        "8",
        {},
        [math.nan],
        [True],
        [-8, -1],
    ),
)
CODECS = (*codecs.CODECS, "nonsense", "", None, 5, [], "__class__", "x" * 1000)
CODED = tuple(name for name in codecs.CODECS if name != "raw")
TASK = "fuzz"


class Peer:
    """A connection with a valid key that sends frames of any kind."""

    def __init__(self, service: ServiceProcess) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        secure_client(self._socket, service.keys())
        self._socket.connect(service.address)
        self._numbers = itertools.count(LARGE)
        self._others: list = []  # answers that came while `call` waited for its own

    def send(self, frames) -> None:
        self._socket.send_multipart(frames)

    def receive(self, seconds: float):
        """The next answer's header, or None."""
        if self._others:
            return self._others.pop(0)
        return self._receive(seconds)

    def _receive(self, seconds: float):
        if not self._socket.poll(seconds * 1000):
            return None
        frames = self._socket.recv_multipart()
        version, header, _ = msgpack.unpackb(frames[0])
        if version == wire.PROTOCOL:  # else in the version of a request that has another one
            wire.unpack(frames)
        kinds = {"result", "error", "rejected"} & set(header)
        assert len(kinds) == 1, f"an answer has one of result, error, rejected: {header}"
        assert len(str(header.get("error", header.get("rejected", "")))) <= 2000
        return header

    def call(self, method: str, args=None):
        """A well-formed request and its result; AssertionError when it is refused."""
        number = next(self._numbers)
        self.send(wire.pack({"id": number, "method": method, "args": args or {}}))
        deadline = time.monotonic() + ANSWER_SECONDS
        while (answer := self._receive(max(deadline - time.monotonic(), 0))) is not None:
            if answer["id"] == number:
                assert "result" in answer, answer
                return answer["result"]
            self._others.append(answer)
        raise AssertionError(f"no answer to {method}")

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class Honest:
    """A writer and a reader that go about their work and check every value."""

    def __init__(self, service: ServiceProcess) -> None:
        self.service = service
        self.taken = self.written = 0
        self.failure: BaseException | None = None
        self._stop, self._complete = threading.Event(), threading.Event()
        self._writer = Writer(service.address, service.keys(), "honest", schema=SCHEMA)
        self._reader = Reader(service.address, service.keys(), name="honest")
        self._threads = [
            threading.Thread(target=self._guard, args=(f,), daemon=True)
            for f in (self._write, self._read)
        ]
        for thread in self._threads:
            thread.start()

    def _guard(self, work) -> None:
        try:
            work()
        except BaseException as error:
            self.failure = error

    def _write(self) -> None:
        while not self._stop.wait(0.02):
            self._writer.write(*honest_segment(self.written))
            self.written += 1

    def _read(self) -> None:
        cursor = Cursor(self._reader, "honest", source=None, task="honest")
        while not (self._complete.is_set() and self.taken >= self.written):
            for each in cursor.take(timeout=30):
                check_segment(each, self.taken)
                self.taken += 1
            cursor.commit()

    def check(self, story: str) -> None:
        """Nothing has disturbed them so far."""
        assert self.failure is None, f"{self.failure!r} by or before {story}"

    def end(self) -> None:
        """Stop, whatever there is."""
        self._stop.set()
        self._complete.set()
        with contextlib.suppress(TwinRLError):
            self._writer.close(0.0)
        self._reader.close()

    def close(self) -> None:
        """All that was written arrived, once and in order."""
        self._stop.set()
        self._threads[0].join(30)
        with contextlib.suppress(TwinRLError):
            self._writer.flush()
        self._writer.write(*honest_segment(self.written))  # lets the reader see the end
        self.written += 1
        self._complete.set()
        self._threads[1].join(40)
        trouble = self._reader.stats()["reader/trouble"]
        self.end()
        if self.failure is not None:
            raise self.failure
        assert not any(thread.is_alive() for thread in self._threads)
        assert self.taken == self.written
        assert trouble == ""


def honest_segment(number: int):
    return segment(number * STEPS, STEPS, task="honest", end="truncated")


def check_segment(found, number: int) -> None:
    """Bit for bit what `honest_segment(number)` is."""
    header, columns = honest_segment(number)
    assert found.header["episode"] == header["episode"], f"segment {number}"
    assert set(found.columns) == set(columns)
    for name, column in columns.items():
        assert found.columns[name].dtype == column.dtype
        np.testing.assert_array_equal(found.columns[name], column, f"segment {number}: {name}")


def check_honest(service: ServiceProcess, written: int, folder: Path) -> None:
    """Every honest segment is there exactly once, read from the files and fetched."""
    for run_dir in (None, folder):
        with Reader(service.address, service.keys(), run_dir) as reader:
            reader.sync()
            assert reader.mapped == (run_dir is None)
            found = list(reader.segments(task="honest"))
            assert len(found) == written
            for number, each in enumerate(found):
                check_segment(each, number)


DIRECT = {"writer": "fuzz direct", "session": "s", "source": "twin"}


class Direct:
    """A segment file of the peer's own, as a writer on the service's host has one."""

    def __init__(self, peer: Peer) -> None:
        hello = {"protocol": wire.PROTOCOL, "digest": SCHEMA.digest(), **DIRECT}
        self._folder = Path(peer.call("hello", hello)["folder"])
        self._peer, self.sequence = peer, 0
        self.allocate()
        answer = peer.call("insert_file", self.put(self.record()))
        assert answer["acknowledged"] == 0, answer
        self.heard(answer)

    def allocate(self) -> None:
        answer = self._peer.call("allocate", {**DIRECT, "bytes": 1 << 20})
        self._file, self._size, self._end, self._length = answer["file"], answer["size"], 0, 0

    def record(self) -> bytes:
        """A good one, the next."""
        buffers, _ = record.encode(*good_segment("fuzz direct", self.sequence))
        return b"".join(bytes(each) for each in buffers)

    def put(self, data: bytes):
        """The arguments for `data`, which lies where the next record belongs."""
        with path_of(self._folder, self._file).open("r+b") as target:
            target.seek(self._end)
            target.write(data)
        self._length = len(data)
        place = {"file": self._file, "offset": self._end, "length": len(data)}
        return {**DIRECT, "sequence": self.sequence, "oldest": self.sequence, **place}

    def heard(self, result) -> None:
        """What became of the last one."""
        if result.get("acknowledged") == self.sequence:
            self._end += self._length
            self.sequence += 1
        self._length = 0
        # A repeat: an answer before went to an id that was flipped.
        if result.get("anew") or result.get("repeated") or self._end + (1 << 20) > self._size:
            self.allocate()


class Forge:
    """Makes case n: (what it is, frames, whether it must be refused; None: just wait for the answer)."""

    def __init__(self, peer: Peer, seed: int) -> None:
        self._seed = seed
        self.direct = Direct(peer)

    def __call__(self, case: int):
        rng = random.Random(f"{self._seed}/{case}")
        kinds = (self.wrong, self.wrong, self.weird, self.spec, self.bytes, self.frames, self.raw)
        kinds += (self.record, self.coded, self.rows)
        what, frames, must_fail = rng.choice(kinds)(rng, case)
        if "insert_file" in what and not must_fail:
            must_fail = None  # where the next record belongs depends on the answer
        return what, frames, must_fail

    def good(self, rng: random.Random, case: int, method: str | None = None):
        """A request in order."""
        writer = f"fuzz {case}"
        insert = good_segment(writer, 0)
        requests = {
            "hello": ({"protocol": wire.PROTOCOL, "writer": writer, "session": "s"}, {}),
            "insert": ({"header": insert[0], "oldest": 0, "session": "s"}, insert[1]),
            "index": (
                {"after": LARGE, "boot": "", "seen": 0, "evicted_to": 0, "sampled": 0, "wait": 0.0},
                {},
            ),
            "fetch": ({"ids": [1, 2, LARGE]}, {}),
            "recall": ({"ids": [1, 2, LARGE]}, {}),
            "rows": ({"chunk": 4, "windows": [[rng.randint(1, 40), 0, 4, 0], [2, 3, 4, 0]]}, {}),
            "permit": ({"sample": 0, "wait": 0.0, "who": "fuzz"}, {}),
            "cursor_read": ({"name": f"fuzz {case % 50}"}, {}),
            "cursor_commit": (
                {"name": f"fuzz {case % 50}", "values": {"position": 5, "taken": 5}},
                {},
            ),
            "info": ({}, {}),
            "priorities": ({"ids": [LARGE], "values": [1.0]}, {}),
            "priorities_read": ({"after": LARGE}, {}),
            "delete": ({"ids": [LARGE + 12345]}, {}),
        }
        allocate = {"writer": f"fuzz direct {case % 4}", "session": "s", "bytes": 4096}
        requests["allocate"] = ({**allocate, "source": "twin"}, {})
        if method == "insert_file":
            requests[method] = (self.direct.put(self.direct.record()), {})
        method = method or rng.choice(list(requests))
        args, arrays = requests.get(method, ({}, {}))
        return {"id": number_of(case), "method": method, "args": copy.deepcopy(args)}, arrays

    def wrong(self, rng, case):
        """One argument that is certainly wrong."""
        method, path, value = rng.choice(WRONG)
        header, arrays = self.good(rng, case, method)
        put(header["args"], path, value)
        return (
            f"{method} with {'.'.join(map(str, path))} = {value!r:.60}",
            pack(header, arrays),
            True,
        )

    def weird(self, rng, case):
        """One field somewhere replaced, dropped or added."""
        header, arrays = self.good(rng, case)
        places = list(leaves(header))
        path, value = rng.choice(places), rng.choice(WEIRD)
        how = rng.choice(("replace", "replace", "replace", "drop", "add"))
        if header["method"] == "delete" and "ids" in path:
            how = "drop"  # a weird id may be a segment of somebody else, whom we may delete
        if how == "add":
            path = (*path[:-1], rng.choice(("extra", "session", "wait", "", "\0", "x" * 5000)))
        put(header, path, value, drop=how == "drop")
        what = f"{header.get('method')!r:.40}: {how} {'.'.join(map(str, path)):.60} = {value!r:.60}"
        return what, pack(header, arrays), False

    def spec(self, rng, case):
        """An array whose description is wrong."""
        header, arrays = self.good(rng, case, "insert")
        head, *buffers = pack(header, arrays)
        version, header, specs = msgpack.unpackb(head)
        place = rng.randrange(len(specs))
        field = rng.choice(("dtype", "shape", "name", "codec", "whole", "twice"))
        before = copy.deepcopy(specs)
        if field == "dtype":
            specs[place][1] = rng.choice(DTYPES)
        elif field == "shape":
            specs[place][2] = rng.choice(SHAPES)
        elif field == "name":
            specs[place][0] = rng.choice((*WEIRD, "observation.images.none", "policy.x", "other"))
        elif field == "codec":
            specs[place].append(rng.choice(CODECS))
        elif field == "twice":
            specs[place][0] = specs[place - 1][0]
        else:
            specs[place] = rng.choice(WEIRD)
        what = f"insert with {field} {before[place]!r} -> {str(specs[place])[:100]}"
        must_fail = field in ("shape", "whole", "twice") and specs != before
        return what, [packb([version, header, specs]), *buffers], must_fail

    def bytes(self, rng, case):
        """Flipped, cut or added bytes."""
        header, arrays = self.good(rng, case)
        frames = [bytearray(frame) for frame in pack(header, arrays)]
        place = 0 if rng.random() < 0.5 else rng.randrange(len(frames))
        frame, how = frames[place], rng.choice(("flip", "flip", "cut", "add", "zero"))
        if how == "flip" and frame:
            for _ in range(rng.choice((1, 2, 8))):
                frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del frame[rng.randrange(len(frame)) if frame else 0 :]
        elif how == "add":
            frame += rng.randbytes(rng.choice((1, 7, 100_000)))
        else:
            frame[:] = bytes(len(frame))
        fails = how in ("cut", "add") and bytes(frame) != bytes(pack(header, arrays)[place])
        return f"{header['method']}: {how} in frame {place}", frames, fails

    def frames(self, rng, case):
        """Frames missing, doubled, in another order, or far too many."""
        header, arrays = self.good(rng, case, "insert")
        frames = [bytes(frame) for frame in pack(header, arrays)]
        how = rng.choice(("drop", "double", "order", "empty", "many", "head only"))
        place = rng.randrange(1, len(frames))
        if how == "drop":
            del frames[place]
        elif how == "double":
            frames.insert(place, frames[place])
        elif how == "order":
            frames[1:] = frames[:0:-1]
        elif how == "empty":
            frames[place] = b""
        elif how == "many":
            frames += [b"x"] * rng.choice((1, 300, 5000))
        else:
            frames = frames[:1]
        return f"insert: frames {how}", frames, True

    def record(self, rng, case):
        """A record that a writer put into its file, broken or forged so that its checksums fit."""
        data = bytearray(self.direct.record())
        how = rng.choice(("flip", "cut", "noise", "prefix", "forge", "forge", "forge"))
        if how == "flip":
            for _ in range(rng.choice((1, 2, 8))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del data[rng.randrange(len(data)) :]
        elif how == "noise":
            data[:] = rng.randbytes(rng.choice((0, 1, 48, 5000)))
        elif how == "prefix":  # its lengths and checksums
            place = rng.randrange(8, 48, 8)
            data[place : place + 8] = rng.choice(
                (0, 1, 64, 1 << 20, 1 << 40, (1 << 64) - 1)
            ).to_bytes(8, "little")
        else:
            data, how = self._forged(rng, data)
        args = self.direct.put(bytes(data))
        request = {"id": number_of(case), "method": "insert_file", "args": args}
        return f"insert_file: {how}", pack(request, {}), None

    def _forged(self, rng, data):
        magic, _, head_length, *rest = PREFIX.unpack_from(data)
        header, specs = msgpack.unpackb(data[48 : 48 + head_length])
        columns = bytes(data[-(-(48 + head_length) // 64) * 64 :])
        place, field = rng.randrange(len(specs)), rng.randrange(-1, 7)
        if field < 0:
            path = rng.choice(list(leaves(header)))
            put(header, path, rng.choice(WEIRD))
        elif field == 6:
            specs[place] = rng.choice(WEIRD)
        else:
            choices = {1: DTYPES, 2: SHAPES, 5: CODECS}.get(field, WEIRD)
            specs[place][field] = rng.choice(choices)
        head = packb([header, specs])
        start = -(-(48 + len(head)) // 64) * 64
        digest = xxhash.xxh3_64_intdigest(head)
        prefix = PREFIX.pack(magic, start + len(columns), len(head), rest[0], digest, rest[2])
        what = str(header if field < 0 else specs[place])[:100]
        return (prefix + head).ljust(start, b"\0") + columns, f"forged {what}"

    def coded(self, rng, case):
        """Encoded images whose bytes are damaged: the service keeps them, and whoever decodes them must not fall."""
        header, arrays = self.good(rng, case, "insert")
        codec = rng.choice(CODED)
        for name in ("observation.images.front", "observation.images.wrist"):
            arrays = {**arrays, name: codecs.encode(arrays[name], codec)}
        frames = [bytearray(frame) for frame in pack(header, arrays)]
        frame, how = (
            rng.choice(frames[-2:]),
            rng.choice(("no", "flip", "cut", "add", "noise", "table")),
        )
        if how == "flip":
            for _ in range(rng.choice((1, 2, 8))):
                frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del frame[rng.randrange(len(frame)) :]
        elif how == "add":
            frame += rng.randbytes(rng.choice((1, 7, 1000)))
        elif how == "noise":
            frame[:] = rng.randbytes(len(frame))
        elif how == "table":
            place = 4 * rng.randrange(STEPS + 1)
            frame[place : place + 4] = rng.choice((0, 1, 1 << 16, (1 << 32) - 1)).to_bytes(
                4, "little"
            )
        return f"insert in {codec}: {how}", frames, False

    def rows(self, rng, case):
        """Rows of what was sent before, damaged or not."""
        header, _ = self.good(rng, case, "rows")
        most = 3 + case % CASES // 4
        windows = [
            [rng.randint(1, most), rng.randrange(9), rng.randint(1, 4), 0]
            for _ in range(rng.randint(1, 8))
        ]
        header["args"] |= {"windows": windows, "codec": rng.choice((*CODED, "raw"))}
        return f"rows {windows}", pack(header, {}), False

    def raw(self, rng, case):
        """No request at all."""
        good = msgpack.packb(
            [wire.PROTOCOL, {"id": number_of(case), "method": "info", "args": {}}, []]
        )
        kinds = {
            "nothing": [b""],
            "noise": [rng.randbytes(rng.choice((1, 10, 1000, 100_000)))],
            "nil": [b"\xc0"],
            "array of 4 G": [b"\xdd\xff\xff\xff\xff"],
            "map of 4 G": [b"\xdf\xff\xff\xff\xff" + b"\x80" * 100],
            "text of 4 GB": [b"\xdb\xff\xff\xff\xff" + b"x"],
            "deep": [b"\x91" * 100_000 + b"\xc0"],
            "deep id": [packb([wire.PROTOCOL, {"id": "deep", "method": "info", "args": {}}, []])],
            "deep argument": [packb([wire.PROTOCOL, {"id": number_of(case), "method": "hello", "args": "deep"}, []])],
            "large": [b"\xdc\xff\xff" + b"\x80" * 65535],
            "larger": [b"\xdd\x00\x20\x00\x00" + b"\x80" * (2 << 20)],
            "too large": [packb([wire.PROTOCOL, {"id": number_of(case), "x": "x" * MAX_REQUEST_HEADER_BYTES}, []])],
            "other version": [packb([rng.choice((0, 1, 99, -1, "2", None, 2.5)), {"id": number_of(case)}, []])],
            "more": [good + b"\x00"],
            "unknown method": [packb([wire.PROTOCOL, {"id": number_of(case), "method": rng.choice(("nonsense", "__init__", "close", "")), "args": {}}, []])],
            "list as header": [packb([wire.PROTOCOL, [1, 2], []])],
            "arrays as map": [packb([wire.PROTOCOL, {"id": number_of(case), "method": "info"}, {}])],
            "recursive type": [packb([wire.PROTOCOL, {"id": number_of(case), "method": "info"}, [["a", [["a", "<f4"]], [1]]]]), b"1234"],
        }  # fmt: skip
        name = rng.choice(list(kinds))
        return name, kinds[name], True


def wrong_values():
    """Arguments that a service must refuse, whatever it thinks of the rest."""
    no_number = (None, True, "1", "x", [], {}, math.nan)
    no_count = (*no_number, -1, 1.5, 1 << 63, (1 << 64) - 1, math.inf)
    no_name = (None, 5, 1.5, [], {}, b"x", "x" * 100_000)
    yield from (("insert", ("header", "sequence"), v) for v in no_count)
    yield from (("insert", ("header", "first_step"), v) for v in no_count)
    for name in ("writer", "episode", "task", "region"):
        yield from (("insert", ("header", name), v) for v in no_name)
    yield from (("insert", ("header", "source"), v) for v in (*no_name, "", "other", "TWIN"))
    yield from (("insert", ("header", "configuration"), v) for v in (None, 5, "x", []))
    yield from (("insert", ("header", "last"), v) for v in (None, 1, "yes"))
    yield from (("insert", ("header",), v) for v in (None, 5, "x", [], {}))
    yield from (("insert", ("oldest",), v) for v in no_count)
    yield from (("insert", ("session",), v) for v in (5, [], {}, "x" * 100_000))
    yield from (("hello", ("writer",), v) for v in (5, [], {}, b"x", "x" * 100_000))
    yield from (("hello", ("protocol",), v) for v in (None, "1", 1.5, [], 0, 1 << 63))
    yield from (("hello", ("digest",), v) for v in ("", "x", 5, [], b"x"))
    yield from (("index", ("after",), v) for v in no_count)
    yield from (("index", ("sampled",), v) for v in no_count)
    yield from (("index", ("wait",), v) for v in no_number)
    yield from (("permit", ("sample",), v) for v in no_count)
    yield from (("permit", ("wait",), v) for v in no_number)
    yield from (("permit", ("who",), v) for v in no_name)
    yield from (
        ("fetch", ("ids",), v) for v in (None, 5, "x", {}, [None], [[]], ["1"], [math.nan], [-1])
    )
    for value in (None, 5, "x", {}, [None], [[]], ["1"], [math.nan], [-1]):
        yield "recall", ("ids",), value
    for value in (*no_number, [[]], [None], [[1, 0, 4]], [[1, 0, 4, 0, 0]], [[1, 0, "4", 0]]):
        yield "rows", ("windows",), value
    for column, values in enumerate(((0, -1), (-1, 8, 1 << 70 >> 8), (0, -1, 5, 1 << 62), (-1, 1))):
        yield from (("rows", ("windows", 1, column), v) for v in (*values, *no_number, 1.5))
    yield from (("rows", ("chunk",), v) for v in (*no_count, 0, 1 << 40))
    yield from (("cursor_read", ("name",), v) for v in no_name)
    yield from (("cursor_commit", ("name",), v) for v in no_name)
    yield from (("cursor_commit", ("values", "position"), v) for v in (*no_count, "9" * 40, 1e300))
    yield from (("cursor_commit", ("values",), v) for v in (None, 5, "x", [], {5: 5}))
    yield from (("cursor_commit", ("values", f"x{'y' * 5000}"), v) for v in (1, 2))
    yield from (
        ("priorities", ("ids",), v) for v in (None, 5, "x", {}, [None], ["1"], [math.nan], [1, 2])
    )
    yield from (("priorities", ("values", 0), v) for v in (*no_number, 0, -1, -0.5, math.inf))
    yield from (("priorities", ("values",), v) for v in (None, 5, "x", {}, []))
    yield from (("priorities_read", ("after",), v) for v in no_count)
    yield from (
        ("delete", ("ids",), v) for v in (None, 5, "x", {}, [None], ["1"], [math.nan], [[]])
    )
    for name in ("offset", "length", "file", "sequence"):
        yield from (("insert_file", (name,), v) for v in (*no_count, 1 << 40, "../x", "000001.seg"))
    yield from (("insert_file", ("offset",), v) for v in (1, 63, 64, 4096, 1 << 20, 1 << 30))
    yield from (("insert_file", ("length",), v) for v in (0, 1, 63, 1 << 20, 1 << 30))
    yield from (("insert_file", ("file",), v) for v in (0, 1 << 20))
    yield from (("insert_file", ("writer",), v) for v in (*no_name, "nobody", "honest"))
    yield from (("allocate", ("bytes",), v) for v in (*no_count, 1 << 50))
    yield from (("allocate", ("source",), v) for v in (*no_name, "", "other"))
    yield from (("allocate", ("writer",), v) for v in (*no_name, ""))


WRONG = tuple(wrong_values())
PREFIX = struct.Struct("<8sQQdQQ")  # of a record


def harmless(result) -> bool:
    """Whether a request that got this result changed nothing: out of order, a repeat, of what is not there."""
    return any(map(result.get, ("refused", "repeated", "missing")))


def number_of(case: int) -> int:
    """The request's id: far from those of other cases, also with a few bits flipped."""
    return random.Random(case).getrandbits(62)


def good_segment(writer: str, sequence: int):
    header, columns = segment(0, STEPS, task=TASK, end="truncated")
    return {**header, "writer": writer, "sequence": sequence}, columns


def put(tree, path, value, drop: bool = False) -> None:
    """Set, or drop, what lies at `path`."""
    for key in path[:-1]:
        tree = tree[key]
    if isinstance(tree, list) and not isinstance(path[-1], int):
        tree.append(value)
    elif drop:
        del tree[path[-1]]
    else:
        tree[path[-1]] = value


def leaves(tree, path=()):
    """The paths of everything in maps and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from leaves(value, (*path, key))


def packb(value) -> bytes:
    """msgpack, with "deep" as a list that is nested deeper than msgpack itself would write."""
    deep = b"\x91" * DEEP + b"\xc0"
    return msgpack.packb(value).replace(msgpack.packb("deep"), deep)


def pack(header, arrays):
    """As wire.pack does, but whatever is in the header."""
    frames = wire.pack({}, arrays)
    version, _, specs = msgpack.unpackb(frames[0])
    return [packb([version, header, specs]), *frames[1:]]


def own_memory(pid: int) -> int:
    """Bytes that the process has for itself: mapped files do not count."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


@pytest.fixture
def service(tmp_path):
    service = ServiceProcess(tmp_path / "run")
    yield service
    if service.process.poll() is None:
        service.stop()
    service.process.stdout.close()


@pytest.fixture
def honest(service):
    honest = Honest(service)
    yield honest
    honest.end()


@pytest.fixture
def peer(service):
    peer = Peer(service)
    yield peer
    peer.close()  # ZeroMQ would wait for ever in whichever thread collects an open one


@pytest.mark.parametrize("part", range(PARTS))
def test_whatever_is_sent_is_answered_and_nothing_else_happens(
    service, honest, peer, part, tmp_path, request
):
    done = f"twinrl/fuzz/{SEED}/{part}/{CASES}"
    if LONG and request.config.cache.get(done, False):
        pytest.skip("passed before; run with --cache-clear to repeat it")
    print(f"seed {SEED}, part {part}")
    forge = Forge(peer, SEED)
    sent: dict[int, str] = {}
    strays, memory = 0, 0  # answers that name no case: of requests whose number could not be read
    cases = range(part * CASES, (part + 1) * CASES)
    if "TWINRL_CASE" in os.environ:
        cases = [int(os.environ["TWINRL_CASE"])]

    def take(answer) -> int | None:
        nonlocal strays
        if "result" in answer and "insert_file" in sent.get(answer["id"], ""):
            forge.direct.heard(answer["result"])
        if sent.pop(answer["id"], None) is None:
            strays += 1
        return answer["id"]

    for count, case in enumerate(cases):
        what, frames, must_fail = forge(case)
        story = f"seed {SEED}, case {case}: {what}"
        sent[number_of(case)] = story
        peer.send(frames)
        deadline = time.monotonic() + ANSWER_SECONDS
        while must_fail is not False:
            answer = peer.receive(deadline - time.monotonic())
            assert answer is not None, f"no answer to {story}; {service.log()[-2000:]}"
            if take(answer) in (number_of(case), None):
                refused = not must_fail or "result" not in answer or harmless(answer["result"])
                assert refused, f"{story} was taken: {answer}"
                break
        while (answer := peer.receive(0)) is not None:
            take(answer)
        if count % 100 == 0:
            assert service.process.poll() is None, f"the service died by or before {story}"
            honest.check(story)
        if count == CASES // 5:
            memory = own_memory(service.process.pid)
    deadline = time.monotonic() + ANSWER_SECONDS
    while len(sent) > strays:
        answer = peer.receive(max(deadline - time.monotonic(), 0))
        assert answer is not None, f"unanswered: {list(sent.values())}, {strays} unnamed"
        take(answer)
    assert peer.call("info")["sizes"], "the service still serves"
    growth = own_memory(service.process.pid) - memory
    assert "TWINRL_CASE" in os.environ or growth < GROWTH_BYTES, f"grew by {growth} bytes"
    honest.close()
    check_honest(service, honest.written, tmp_path)
    check_others(service)
    assert service.stop() == 0
    service.start()  # with what the peer left in Redis and on disk
    check_honest(service, honest.written, tmp_path)
    assert "Traceback" not in service.log(), service.log()[-3000:]
    request.config.cache.set(done, True)


def check_others(service: ServiceProcess) -> None:
    """What the peer got in is a segment, or is refused by whoever reads it, at once."""
    with Reader(service.address, service.keys()) as reader:
        reader.sync()
        for entry in itertools.islice(reader.entries(task=TASK), 2000):
            began = time.monotonic()
            with contextlib.suppress(TwinRLError):
                reader.load([entry])
            assert time.monotonic() - began < 5


GARBAGE = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "zeros": bytes(10_000),
    "noise": random.Random(SEED).randbytes(10_000),
    "greeting of another mechanism": b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48),
    "half a greeting": b"\xff" + bytes(8) + b"\x7f\x03",
    "curve and then noise": b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(47)
    + b"\x04\xc8\x05HELLO" + bytes(194) + random.Random(SEED + 1).randbytes(5000),
    "a frame of 2**63 bytes": b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(47) + b"\x06\x7f" + b"\xff" * 7,
}  # fmt: skip


def test_bytes_that_are_no_messages(service, honest):
    """Raw TCP, half-open connections and half handshakes beside honest work."""
    host, port = service.address.removeprefix("tcp://").split(":")
    held = []
    memory = own_memory(service.process.pid)
    for data in list(GARBAGE.values()) * 20:
        raw = socket.create_connection((host, int(port)), timeout=10)
        with contextlib.suppress(OSError):  # it may hang up while we talk
            raw.sendall(data)
        held.append(raw)
    for raw in held[::2]:
        raw.close()
    wait_until(lambda: honest.taken > 50, 30, "honest work beside the garbage")
    assert own_memory(service.process.pid) - memory < GROWTH_BYTES
    for raw in held[1::2]:  # those who never finish the handshake are cut off
        raw.settimeout(30)
        with contextlib.suppress(ConnectionError):
            while raw.recv(4096):
                pass
        raw.close()
    honest.close()


def test_a_wrong_key_gets_nothing_and_disturbs_nobody(service, honest):
    public, secret = (key.decode() for key in zmq.curve_keypair())
    keys = service.keys()
    context = zmq.Context()
    sockets = []
    wrong = (
        keys._replace(public=public, secret=secret),  # unknown
        keys._replace(public=keys.server),  # somebody else's public key without its secret
        keys._replace(server=public),  # another server expected
    )
    for each in wrong * 20:
        sockets.append(context.socket(zmq.DEALER))
        sockets[-1].linger = 0
        secure_client(sockets[-1], each)
        sockets[-1].connect(service.address)
        sockets[-1].send_multipart(wire.pack({"id": 1, "method": "info", "args": {}}))
    plain = context.socket(zmq.DEALER)
    plain.linger = 0
    plain.connect(service.address)
    plain.send(b"hello")
    sockets.append(plain)
    wait_until(lambda: honest.taken > 50, 30, "honest work beside them")
    assert not any(each.poll(0) for each in sockets)
    context.destroy(0)
    honest.close()
