"""Weights between the processes of one host: never torn, never mixed, never lost without a word."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import twinrl.weights
import twinrl.weights_publisher
import twinrl.weights_slots
from twinrl.core.errors import DeadlineError, TwinRLError, WireError
from twinrl.weights import Weights, checksum, make_weights
from twinrl.weights_publisher import Publisher
from twinrl.weights_slots import SlotReader, SlotWriter, owned, remove_abandoned

VALUES = 300_000  # of a set that takes a while to copy


def numbered(version, values=1000):
    """A set in which every value says its version."""
    return {
        "matrix": np.full((values // 10, 10), version, np.float32),
        "nothing": np.zeros((0, 3), np.float32),
        "count": np.array(version, np.int64),
        "flags": np.array([True, False, True]),
        "turned": np.full((7, 5), version, np.float64).T,
    }


def versions_in(arrays):
    return {int(v) for name in ("matrix", "count", "turned") for v in np.unique(arrays[name])}


@pytest.fixture
def publisher(tmp_path):
    made = Publisher(tmp_path / "slots")
    yield made
    made.close()


@pytest.fixture
def reader(publisher, tmp_path):
    return SlotReader(tmp_path / "slots")


@pytest.mark.parametrize("large", [0, 1 << 40])
def test_a_set_comes_back_as_it_was(publisher, reader, monkeypatch, large):
    monkeypatch.setattr(twinrl.weights_publisher, "LARGE", large)
    arrays = numbered(0)
    assert reader.poll(-1) is None
    publisher.publish(0, arrays)
    found = reader.wait(-1, 10)
    assert (found.version, found.checksum, found.verified) == (0, checksum(arrays), True)
    assert found.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].shape == array.shape
        np.testing.assert_array_equal(found.arrays[name], array)
        assert not found.arrays[name].flags.writeable
    assert found.arrays["matrix"].base is not None  # a view
    assert reader.poll(0) is None


def test_the_newest_n_stay_and_files_are_used_again(publisher, reader):
    publisher.publish(0, numbered(0))
    publisher.flush()
    inodes = set()
    for version in range(1, 12):
        publisher.publish(version, numbered(version))
        publisher.flush()
        assert reader.versions() == list(range(max(0, version - 2), version + 1))
        assert reader.poll(version - 1).version == version
        inodes.update(entry.inode() for entry in os.scandir(reader.folder) if entry.name[0] in "vs")
    assert len(inodes) <= 5
    assert versions_in(reader.get(10).arrays) == {10}
    with pytest.raises(TwinRLError, match=r"version 3 is gone; there are \[9, 10, 11\]"):
        reader.get(3)


def test_keep_is_the_callers(tmp_path):
    publisher = Publisher(tmp_path / "slots", keep=5)
    for version in range(9):
        publisher.publish(version, numbered(version))
    publisher.flush()
    assert SlotReader(tmp_path / "slots").versions() == [4, 5, 6, 7, 8]
    publisher.close(remove=True)
    assert not (tmp_path / "slots").exists()


def test_what_somebody_reads_is_not_written(publisher, reader):
    """A slow reader keeps its views, however many versions come meanwhile."""
    publisher.publish(0, numbered(0))
    held = {0: reader.wait(-1, 10)}
    for version in range(1, 10):
        publisher.publish(version, numbered(version))
        publisher.flush()
        if version % 3 == 0:
            held[version] = reader.get(version)
    for version, weights in held.items():
        assert versions_in(weights.arrays) == {version}
        weights._replace(verified=False).verify()
    view = held.pop(9).arrays["matrix"][2:4, 1:]  # one view of a view is enough
    for version in range(10, 20):
        publisher.publish(version, numbered(version))
    publisher.flush()
    assert (view == 9).all()


READER = """
import sys
from pathlib import Path
from twinrl.weights_slots import SlotReader
weights = SlotReader(Path(sys.argv[1])).wait(-1, 30)
print(weights.version, flush=True)
sys.stdin.readline()
found = {int(x) for a in weights.arrays.values() if a.dtype == "<f4" for x in set(a.ravel().tolist())}
print(sorted(found), flush=True)
"""


def test_a_stopped_process_keeps_what_it_reads_and_a_dead_one_does_not(publisher, reader):
    publisher.publish(0, numbered(0))
    process = subprocess.Popen(
        [sys.executable, "-c", READER, str(reader.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "0\n"
    process.send_signal(signal.SIGSTOP)
    for version in range(1, 8):
        publisher.publish(version, numbered(version))
        publisher.flush()
    process.send_signal(signal.SIGCONT)
    assert process.communicate("\n", timeout=30)[0] == "[0]\n"
    victim = subprocess.Popen(
        [sys.executable, "-c", READER, str(reader.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert victim.stdout.readline() == "7\n"
    held = (reader.folder / "v7").stat().st_ino
    victim.kill()
    victim.communicate(timeout=30)
    used = set()
    for version in range(8, 14):
        publisher.publish(version, numbered(version))
        publisher.flush()
        used.add((reader.folder / f"v{version}").stat().st_ino)
    assert held in used  # its lock went with it


@pytest.mark.parametrize("large", [0, 1 << 40])
def test_training_goes_on_while_a_version_is_sent(tmp_path, monkeypatch, large):
    """The arrays change as soon as `publish` returns: no version ever has a value of another."""
    for module in (twinrl.weights, twinrl.weights_slots):
        monkeypatch.setattr(module, "BLOCK", 1 << 14)
    monkeypatch.setattr(twinrl.weights_slots, "PIECE", 1 << 12)
    monkeypatch.setattr(twinrl.weights_publisher, "LARGE", large)
    publisher, folder = Publisher(tmp_path / "slots"), tmp_path / "slots"
    seen, stop = [], threading.Event()

    def read():
        reader = SlotReader(folder)
        newest = -1
        while not stop.is_set() or reader.newest() > newest:
            weights = reader.poll(newest)
            if weights is not None:
                newest = weights.version
                seen.append((newest, versions_in(weights.arrays)))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    arrays = numbered(0, VALUES)
    for version in range(100):
        publisher.publish(version, arrays)
        for name in ("matrix", "count", "turned"):  # in place, as an optimiser does
            arrays[name] += 1
    publisher.flush()
    stop.set()
    for thread in threads:
        thread.join(30)
    publisher.close()
    assert len(seen) >= 6
    assert all(inside == {version} for version, inside in seen)
    assert max(version for version, _ in seen) == 99


def test_every_damaged_byte_is_noticed(publisher, reader):
    """No flipped bit of head, table or arrays is loaded; the error names the version."""
    publisher.publish(5, {"a": np.arange(20, dtype=np.float32), "b": np.array(3)})
    publisher.flush()
    path = reader.folder / "v5"
    whole = path.read_bytes()
    covered = np.zeros(len(whole), bool)
    found = reader.look(5)
    covered[: 40 + int.from_bytes(whole[24:32], "little")] = True
    base = found.arrays["a"].base
    start = base.__array_interface__["data"][0]
    for array in found.arrays.values():
        offset = array.__array_interface__["data"][0] - start
        covered[offset : offset + array.nbytes] = True
    del found, base, array
    fd = os.open(path, os.O_RDWR)
    for index in np.flatnonzero(covered):
        os.pwrite(fd, bytes([whole[index] ^ 0x10]), index)
        with pytest.raises(WireError, match="version 5"):
            reader.open(5)
        os.pwrite(fd, whole[index : index + 1], index)
    os.close(fd)
    assert reader.open(5).arrays["b"] == 3
    path.write_bytes(whole[:20])
    with pytest.raises(WireError):
        SlotReader(reader.folder).open(5)


def test_another_version_under_a_name_is_not_loaded(publisher, reader):
    for version in (3, 4):
        publisher.publish(version, numbered(version))
    publisher.flush()
    os.rename(reader.folder / "v3", reader.folder / "v4")
    assert reader.open(4) is None
    with pytest.raises(TwinRLError, match="version 4 is gone"):
        reader.get(4)


def test_a_restarted_learner_counts_on(tmp_path):
    folder = tmp_path / "slots"
    first = Publisher(folder)
    first.publish(7, numbered(7))
    first.flush()
    assert owned(folder)
    first.close()
    assert not owned(folder)
    slot, _ = SlotWriter(folder).take(numbered(9))  # dies over it
    assert slot.path.name[0] == "s"
    script = (
        "import sys, numpy as np\nfrom pathlib import Path\n"
        "from twinrl.weights_slots import SlotWriter\n"
        "w = SlotWriter(Path(sys.argv[1])); s, t = w.take({'a': np.ones(9)})\n"
        "s.fill({'a': np.ones(9)}, t); import os; os.kill(os.getpid(), 9)\n"
    )
    folder = tmp_path / "killed"
    before = Publisher(folder)
    before.publish(7, numbered(7))
    before.close()
    subprocess.run([sys.executable, "-c", script, str(folder)], timeout=60, check=False)
    second = Publisher(folder)
    assert second.newest() == 7
    assert versions_in(SlotReader(folder).get(7).arrays) == {7}
    with pytest.raises(TwinRLError, match="version 7 comes after version 7"):
        second.publish(second.newest(), numbered(7))
    second.publish(8, numbered(8))
    second.flush()
    assert SlotReader(folder).versions() == [7, 8]
    second.close()


def test_two_publishers_are_one_too_many(publisher, reader, monkeypatch):
    monkeypatch.setattr(twinrl.weights_slots, "OWNER_SECONDS", 0.2)
    with pytest.raises(DeadlineError, match="publisher"):
        Publisher(reader.folder)


def test_what_fails_in_the_background_reaches_the_learner(tmp_path):
    heard = threading.Event()

    def announce(version, checksum, views):
        if version == 1:
            heard.set()
            raise ConnectionError("the store is away")
        return [version]

    publisher = Publisher(tmp_path / "slots", announce=announce)
    publisher.publish(0, numbered(0))
    publisher.flush()
    publisher.publish(1, numbered(1))
    assert heard.wait(10)
    with pytest.raises(
        TwinRLError, match="version 1 was not handed out: ConnectionError: the store"
    ):
        publisher.flush()
    publisher.publish(2, numbered(2))  # told once; the next one is tried
    publisher.flush()
    publisher.publish(3, numbered(3))
    publisher.close()


def test_a_copy_that_fails_publishes_nothing(publisher, reader):
    class Broken:
        dtype, shape, nbytes = np.dtype(np.float32), (3,), 12

        def __array__(self, dtype=None, copy=None):
            if not hasattr(self, "asked"):
                self.asked = 0
            self.asked += 1
            if self.asked > 2:
                raise MemoryError("gone")
            return np.zeros(3, np.float32)

    publisher.publish(0, numbered(0))
    with pytest.raises(MemoryError):
        publisher.publish(1, {"a": np.ones(9), "b": Broken()})
    publisher.publish(2, numbered(2))
    publisher.flush()
    assert reader.versions() == [0, 2]


def test_no_room_is_said_with_figures(publisher, reader):
    huge = np.broadcast_to(np.zeros(1, np.float32), (1 << 50,))
    with pytest.raises(TwinRLError, match=r"no room for \d+ MB of weights in .* MB free"):
        publisher.publish(0, {"a": huge})
    publisher.publish(1, numbered(1))
    assert reader.wait(-1, 10).version == 1


def test_sets_of_other_sizes_follow_each_other(publisher, reader):
    for version, values in enumerate((100, 100_000, 50, 200_000, 1000)):
        publisher.publish(version, numbered(version, values))
        publisher.flush()
        assert versions_in(reader.get(version).arrays) == {version}


def test_waiting_ends_and_says_for_what(publisher, reader):
    began = time.monotonic()
    with pytest.raises(DeadlineError, match="version above 4"):
        reader.wait(4, 0.1)
    assert time.monotonic() - began < 5
    empty = SlotReader(Path("/nonexistent/slots"))
    assert empty.newest() == -1
    assert empty.versions() == []
    assert empty.open(3) is None


def test_a_reader_that_hangs_in_its_turn_holds_up_nobody(publisher, reader, monkeypatch):
    monkeypatch.setattr(twinrl.weights_slots, "TURN", 0.1)
    publisher.publish(0, numbered(0))
    publisher.flush()
    with SlotReader(reader.folder)._turn():
        assert reader.open(0).version == 0


def test_what_ended_runs_left_in_memory_is_given_back(tmp_path):
    folder = tmp_path / f"twinrl-{os.getuid()}-run"
    other = tmp_path / "twinrl-of-somebody-else"
    other.mkdir()
    publisher = Publisher(folder)
    publisher.publish(0, numbered(0))
    publisher.flush()
    long_ago = time.time() - 3600
    for path in (folder, other):
        os.utime(path, (long_ago, long_ago))
    remove_abandoned(tmp_path)
    assert folder.exists()  # somebody owns it
    publisher.close()
    os.utime(folder)
    remove_abandoned(tmp_path)
    assert folder.exists()  # used a moment ago: its learner may be coming back
    os.utime(folder, (long_ago, long_ago))
    remove_abandoned(tmp_path)
    assert not folder.exists()
    assert other.exists()


def test_the_checksum_sees_everything_but_order():
    a = {"x": np.arange(6, dtype=np.float32), "y": np.ones(2)}
    assert checksum(a) == checksum(dict(reversed(a.items())))
    others = [
        {**a, "x": a["x"].reshape(2, 3)},
        {**a, "x": a["x"].astype(np.int32)},
        {"x": a["x"]},
        {"x": a["x"], "z": a["y"]},
        {**a, "x": a["x"][::-1]},
    ]
    assert len({checksum(b) for b in [a, *others]}) == 6
    assert checksum({"x": a["x"][::2]}) == checksum({"x": a["x"][::2].copy()})
    good = make_weights(4, a)
    good.verify()
    with pytest.raises(WireError, match="version 4 arrived damaged"):
        Weights(4, {**a, "y": np.zeros(2)}, good.checksum).verify()
