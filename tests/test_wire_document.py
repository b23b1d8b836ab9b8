"""docs/wire.md is enough to write a client, and says what the code does.

`Foreign` below is that client: it uses pyzmq, msgpack and xxhash, and nothing of this project.
"""

import hashlib
import importlib
import json
import re
import struct
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
import xxhash
import zmq

from buffer_service import record
from buffer_service.replay import Service
from buffer_service.shard_list import ShardList
from robot_bridge.gateway import Gateway
from twinrl.core import codec as codecs
from twinrl.core.segment import HEADER_FIELDS, OPTIONAL_STEP_COLUMNS, STEP_COLUMNS, Schema

pytestmark = pytest.mark.timeout(60)
PAGE = (Path(__file__).parent.parent / "docs/wire.md").read_text(encoding="utf-8")
UNITS = {"MiB": 1 << 20, "": 1}
MODULES = {
    **dict.fromkeys(("wire", "sockets", "codec", "segment", "arguments"), "twinrl.core"),
    **dict.fromkeys(("record", "polls", "replay", "rows", "changes", "files"), "buffer_service"),
    **dict.fromkeys(("gateway", "weights_relay"), "robot_bridge"),
}
NOT_ON_THE_WIRE = {"polls.MAX_CLIENTS"}  # how finely waits are counted


def code(name):
    return importlib.import_module(f"{MODULES[name]}.{name}")


# -- the page and the code -------------------------------------------------------------------------------


def test_every_limit_is_on_the_page_with_its_value():
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \| (\d+) ?(\w*) \|", PAGE, flags=re.M)
    assert len(rows) > 20
    for module, name, number, unit in rows:
        assert getattr(code(module), name) == int(number) * UNITS[unit], f"{module}.{name}"
    told = {f"{module}.{name}" for module, name, *_ in rows}
    for module in MODULES:
        for name in vars(code(module)):
            if name.startswith("MAX_") and f"{module}.{name}" not in NOT_ON_THE_WIRE:
                owners = [m for m in MODULES if f"{m}.{name}" in told]
                assert owners, f"{module}.{name} is not in docs/wire.md"


def test_every_method_of_the_replay_service_is_on_the_page(bench):
    bench.start()
    client = bench.client()
    headings = "\n".join(re.findall(r"^### (.*)$", PAGE, flags=re.M))
    told = set(re.findall(r"`(\w+)`", headings))
    for method in told:
        try:
            client.call(method, {"protocol": 0})
        except Exception as error:
            assert "knows no method" not in str(error), f"{method} is on the page only"
    source = Path(importlib.import_module(Service.__module__).__file__).read_text()
    bound = re.search(r"for method in \((.*?)\n        \):", source, flags=re.S)
    assert bound is not None
    listing = Path(importlib.import_module(ShardList.__module__).__file__).read_text()
    methods = re.findall(r'"(\w+)"', bound[1]) + re.findall(r'bind\("(\w+)"', listing)
    assert set(methods) == told


def test_every_method_of_the_gateway_is_on_the_page():
    source = Path(importlib.import_module(Gateway.__module__).__file__).read_text()
    bound = re.findall(r"for method in \((.*?)\):", source, flags=re.S)
    names = set(re.findall(r"self\.(\w+)(?=[,)\s])", " ".join(bound[:2])))
    names |= {"weights_offer", "weights_chunk"}
    part = PAGE.partition("## Methods of the gateway")[2]
    told = {
        name
        for cell in re.findall(r"^\| (`.*?) \|", part, flags=re.M)
        for name in re.findall(r"`(\w+)`", cell)
    }
    assert names == told


def test_columns_header_fields_codecs_and_dtypes_are_on_the_page():
    for name in (*HEADER_FIELDS, *STEP_COLUMNS, *OPTIONAL_STEP_COLUMNS, *codecs.CODECS):
        assert f"`{name}`" in PAGE, name
    for name, (dtype, shape) in {**STEP_COLUMNS, **OPTIONAL_STEP_COLUMNS}.items():
        row = next(
            line
            for line in PAGE.splitlines()
            if line.startswith("|") and f"`{name}`" in line and "| step |" in line
        )
        size = f"(T, {shape[0]})" if shape else "(T,)"
        assert f"`{dtype}` {size}".replace("|b1", r"\|b1") in row, name
    for place, name in enumerate(
        (
            "TWRLREC2",
            "whole record",
            "head, u64",
            "Unix time",
            "XXH3-64 of the head",
            "XXH3-64 of the col",
            "the head",
        )
    ):
        row = next(line for line in PAGE.splitlines() if re.match(rf"\| {8 * place} \|", line))
        assert name in row
    assert record.PREFIX_BYTES == 48 and record.ALIGNMENT == 64


# -- a client made from the page alone -------------------------------------------------------------------


def digest(state, privileged, cameras, size, chunk):
    text = next(line.strip() for line in PAGE.splitlines() if line.startswith("    (2, (STATE_DIM"))
    names = (
        "(" + ", ".join(f"'{name}'" for name in cameras) + ("," if len(cameras) == 1 else "") + ")"
    )
    for name, value in (
        ("STATE_DIM", state),
        ("PRIVILEGED_DIM", privileged),
        ("CAMERAS", names),
        ("IMAGE_SIZE", size),
        ("CHUNK", chunk),
    ):
        text = text.replace(name, str(value), 1)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


SIZES = {"|b1": 1, "|u1": 1, "<i4": 4, "<f4": 4, "<i8": 8, "<f8": 8}


def column(dtype, shape, values):
    """(dtype, shape, bytes) of a column without NumPy."""
    kind = {"|b1": "?", "|u1": "B", "<i4": "i", "<f4": "f", "<i8": "q", "<f8": "d"}[dtype]
    return dtype, list(shape), struct.pack(f"<{len(values)}{kind}", *values)


class Foreign:
    def __init__(self, run_dir: Path):
        key = json.loads((run_dir / "keys/cluster.key").read_text())
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.curve_publickey = key["public"].encode()
        self.socket.curve_secretkey = key["secret"].encode()
        self.socket.curve_serverkey = key["server"].encode()
        self.socket.connect((run_dir / "replay/address").read_text())
        self.number = 0

    def ask(self, method, args, columns=None):
        self.number += 1
        columns = columns or {}
        specs = [
            [name, dtype, shape, *codec] for name, (dtype, shape, _, *codec) in columns.items()
        ]
        head = [2, {"id": self.number, "method": method, "args": args}, specs]
        self.socket.send_multipart([msgpack.packb(head), *(each[2] for each in columns.values())])
        assert self.socket.poll(20_000), f"no answer to {method}"
        head, *frames = self.socket.recv_multipart()
        protocol, header, specs = msgpack.unpackb(head)
        assert protocol == 2 and header["id"] == self.number and len(specs) == len(frames)
        assert "result" in header, header
        return header["result"], {
            spec[0]: (spec, frame) for spec, frame in zip(specs, frames, strict=True)
        }

    def close(self):
        self.socket.close()
        self.context.term()


def read(data):
    """The header and columns [(name, dtype, shape, codec, bytes)] of a record."""
    magic, length, head_length, when, head_sum, columns_sum = struct.unpack_from("<8sQQdQQ", data)
    assert magic == b"TWRLREC2" and length == len(data) and length % 64 == 0
    assert abs(when - time.time()) < 3600
    head = data[48 : 48 + head_length]
    assert xxhash.xxh3_64_intdigest(head) == head_sum
    header, described = msgpack.unpackb(head)
    start, columns = -(-(48 + head_length) // 64) * 64, []
    for name, dtype, shape, offset, count, codec in described:
        assert offset % 64 == 0
        columns.append((name, dtype, shape, codec, data[start + offset : start + offset + count]))
    assert xxhash.xxh3_64_intdigest(b"".join(each[-1] for each in columns)) == columns_sum
    return header, columns


def make(header, columns):
    """A record of the same."""
    described, body = [], b""
    for name, (dtype, shape, raw, *codec) in columns.items():
        described.append([name, dtype, shape, len(body), len(raw), *(codec or [""])])
        body += raw + bytes(-len(raw) % 64)
    head = msgpack.packb([header, described])
    start = -(-(48 + len(head)) // 64) * 64
    sums = (
        xxhash.xxh3_64_intdigest(head),
        xxhash.xxh3_64_intdigest(b"".join(each[2] for each in columns.values())),
    )
    prefix = struct.pack("<8sQQdQQ", b"TWRLREC2", start + len(body), len(head), time.time(), *sums)
    return (prefix + head).ljust(start, b"\0") + body


T, SIZE = 3, 8


def a_segment(sequence, **header):
    """A segment of the schema [3, 2, [front, wrist], 8, 4], as the page describes it."""
    steps = [T * sequence + t for t in range(T + 1)]
    columns = {
        "action": column("<f4", (T, 7), [float(t) for t in steps[:-1] for _ in range(7)]),
        "reward": column("<f4", (T,), [0.5] * T),
        "policy_version": column("<i8", (T,), [-1] * T),
        "chunk_id": column("<i4", (T,), [-1] * T),
        "timestamp": column("<f8", (T,), [t / 10 for t in steps[:-1]]),
        "observation.state": column("<f4", (T + 1, 3), [float(t) for t in steps for _ in range(3)]),
        "frame_step": column("<i4", (2,), [0, T]),
    }
    for name in ("terminated", "truncated", "success", "intervention"):
        columns[name] = column("|b1", (T,), [False] * T)
    for camera in ("front", "wrist"):
        shape = (2, SIZE, SIZE, 3)
        columns[f"observation.images.{camera}"] = column(
            "|u1", shape, [steps[0], steps[-1]] * (SIZE * SIZE * 3)
        )
    fields = {"source": "twin", "task": "lift", "instruction": "lift the cube", "region": "id"}
    fields |= {
        "configuration": {},
        "episode": "foreign 0",
        "first_step": T * sequence,
        "last": False,
    }
    return {**fields, "writer": "foreign", "sequence": sequence, **header}, columns


@pytest.fixture
def foreign(bench):
    bench.start()
    made = Foreign(bench.run_dir)
    yield made
    made.close()


def test_the_hash_of_the_schema_is_the_pages():
    for fields in ((3, 2, ("front", "wrist"), 8, 4), (7, 0, ("side",), 128, 10), (1, 0, (), 0, 0)):
        assert digest(*fields) == Schema(*fields).digest()


def test_a_client_made_from_the_page_writes_and_reads(foreign, bench):
    hello = {"protocol": 2, "digest": digest(3, 2, ("front", "wrist"), 8, 4)}
    greeting, _ = foreign.ask("hello", {**hello, "writer": "foreign", "session": "one"})
    assert (greeting["appended"], greeting["committed"]) == (-1, -1)
    assert greeting["schema"] == [3, 2, ["front", "wrist"], 8, 4]

    header, columns = a_segment(0)
    answer, _ = foreign.ask("insert", {"header": header, "oldest": 0, "session": "one"}, columns)
    assert answer == {"acknowledged": 0, "repeated": False, "hold": False}
    answer, _ = foreign.ask("insert", {"header": header, "oldest": 0, "session": "one"}, columns)
    assert answer["repeated"]
    answer, _ = foreign.ask("insert", {"header": a_segment(5)[0], "oldest": 1}, a_segment(5)[1])
    assert answer == {"refused": True, "expected": 1}

    # The direct path.
    header, columns = a_segment(1, last=True)
    data = make(header, columns)
    place = {"writer": "foreign", "session": "one", "source": "twin"}
    file, _ = foreign.ask("allocate", {**place, "bytes": len(data)})
    assert file["size"] >= len(data)
    with open(f"{greeting['folder']}/{file['file']:06d}.seg", "r+b") as target:
        target.write(data)
    args = {**place, "sequence": 1, "oldest": 1, "file": file["file"], "offset": 0}
    answer, _ = foreign.ask("insert_file", {**args, "length": len(data)})
    assert answer["acknowledged"] == 1

    news, _ = foreign.ask("index", {"after": 0, "boot": "", "seen": 0, "wait": 5.0})
    names = "id, source, task, region, episode, first_step, steps, end, frame_step, version, writer, sequence, time, file, offset, length, success, marked"
    assert " ".join(names.split()) in " ".join(PAGE.split())
    entries = [dict(zip(names.split(", "), each, strict=True)) for each in news["entries"]]
    assert [(e["sequence"], e["steps"], e["end"], e["frame_step"]) for e in entries] == [
        (0, T, 0, [0, T]),
        (1, T, 2, [0, T]),
    ]

    answer, records = foreign.ask("fetch", {"ids": [entry["id"] for entry in entries] + [99]})
    assert answer == {"missing": [99]}
    for sequence, entry in enumerate(entries):
        (_, dtype, shape), data = records[str(entry["id"])]
        assert dtype == "|u1" and shape == [len(data)] == [entry["length"]]
        found, stored = read(data)
        header, columns = a_segment(sequence, last=bool(sequence))
        assert found == header
        assert {name: (dtype, shape, raw) for name, dtype, shape, codec, raw in stored} == columns
        with open(f"{greeting['folder']}/{entry['file']:06d}.seg", "rb") as file:
            file.seek(entry["offset"])
            assert file.read(entry["length"]) == data
    reader = bench.reader()
    reader.sync()
    assert [each.columns["action"][0, 0] for each in reader.segments()] == [0, T]
    answer, _ = foreign.ask("priorities", {"ids": [entries[0]["id"]], "values": [2.5]})
    assert foreign.ask("priorities_read", {"after": 0})[0] == {
        "ids": [entries[0]["id"]],
        "values": [2.5],
    }
    foreign.ask("cursor_commit", {"name": "mine", "values": {"position": 2}})
    assert foreign.ask("cursor_read", {"name": "mine"})[0] == {"position": 2}
    window = [entries[0]["id"], 0, 3, 0]
    answer, batch = foreign.ask("rows", {"windows": [window], "chunk": 4})
    assert answer == {"missing": [], "instructions": ["lift the cube"]}
    (_, dtype, shape), data = batch["action"]
    assert (dtype, shape) == ("<f4", [1, 4, 7])
    assert struct.unpack("<28f", data) == tuple([0.0] * 7 + [1.0] * 7 + [2.0] * 7 + [0.0] * 7)
    assert foreign.ask("delete", {"ids": [entries[0]["id"]]})[0] == {"deleted": 1}
    after, _ = foreign.ask(
        "index", {"after": 0, "boot": news["boot"], "seen": news["seen"], "wait": 5.0}
    )
    assert after["gone"] == [entries[0]["id"]]


def up(row, lines):
    """The filter of the page: each line but the first minus the line above."""
    width = len(row) // lines
    above = bytes(width) + row[:-width]
    return bytes((a - b) % 256 for a, b in zip(row, above, strict=True))


@pytest.mark.parametrize("name", [name for name in codecs.CODECS if not name.startswith("jpeg")])
def test_encoded_columns_are_as_the_page_says(name):
    import lz4.block
    import zstandard

    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 256, (4, 5, 3), np.uint8).tobytes() for _ in range(9)]
    compressor, _, filter = name.partition("-")
    plain = []
    for number, row in enumerate(rows):
        if filter == "up" or (filter == "delta" and number % 4 == 0):
            row = up(row, 4)
        elif filter == "delta":
            row = bytes((a - b) % 256 for a, b in zip(row, rows[number - 1], strict=True))
        plain.append(row)
    if compressor == "lz4":
        packed = [lz4.block.compress(row, store_size=False) for row in plain]
    elif compressor == "zstd":
        packed = [zstandard.ZstdCompressor().compress(row) for row in plain]
    if name == "raw":
        data = b"".join(rows)
    else:
        ends = [sum(len(each) for each in packed[: n + 1]) for n in range(len(packed))]
        data = struct.pack(f"<{len(ends)}I", *ends) + b"".join(packed)
    found = codecs.Encoded(name, "|u1", (9, 4, 5, 3), data).decode()
    assert found.tobytes() == b"".join(rows)
