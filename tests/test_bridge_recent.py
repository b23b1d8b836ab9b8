"""Frames that crossed the link with a question are not sent again, and what is stored has every bit nevertheless."""

import contextlib

import numpy as np
import pytest

from robot_bridge import frames, parts, protocol, recent
from robot_bridge.link import Link
from tests.test_bridge_link import SCHEMA, Stage, check_exactly_once, finish
from twinrl.core import wire
from twinrl.core.codec import Encoded
from twinrl.core.errors import Rejected, RemoteError, WireError
from twinrl.core.keys import Keys
from twinrl.core.sockets import Client

pytestmark = pytest.mark.timeout(60)
SIDE = "observation.images.side"
STEPS, CHUNK = 8, 4


def pictures(codec, count=STEPS + 1, size=16, seed=0):
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 255, (size, size, 3), np.uint8) for _ in range(count)]
    return [frames.encode({SIDE: image}, codec) for image in images]


def segment_of(seen, codec, sequence=0, writer="arm-1"):
    """A whole segment as it lies in the spool."""
    steps = len(seen) - 1
    ends = np.arange(steps) == steps - 1
    header = {"source": "real", "task": "reach", "instruction": "i", "region": "id"}
    header.update(configuration={}, episode=f"{writer}-{sequence}", first_step=0, last=True)
    header.update(writer=writer, sequence=sequence)
    columns = {
        "action": np.zeros((steps, 7), "<f4"),
        "reward": np.zeros(steps, "<f4"),
        "terminated": np.zeros(steps, bool),
        "truncated": ends,
        "success": np.zeros(steps, bool),
        "intervention": np.zeros(steps, bool),
        "policy_version": np.full(steps, 7, "<i8"),
        "chunk_id": (np.arange(steps) // CHUNK).astype("<i4"),
        "timestamp": np.arange(steps) / 10,
        "observation.state": np.zeros((steps + 1, 6), "<f4"),
        "frame_step": np.arange(steps + 1, dtype="<i4"),
        **frames.pack(seen, codec),
        "skew": np.zeros(steps, "<f4"),
    }
    return parts.join(wire.pack({"header": header, "codec": codec}, columns))


def back(data, memory):
    """What the gateway makes of `thin`'s bytes: (how many are missing, the whole's bytes)."""
    header, columns = wire.unpack(parts.split(data, "it"))
    missing = recent.whole(header, columns, memory)
    header = {key: value for key, value in header.items() if key != recent.LACKING}
    return missing, parts.join(wire.pack(header, columns))


@pytest.mark.parametrize("codec", frames.CODECS)
@pytest.mark.parametrize("asked", [(0, 4), (8,), range(9)], ids=str)
def test_what_is_left_out_comes_back_bit_by_bit(codec, asked):
    seen, memory = pictures(codec), recent.Recent()
    known = {digest for step in asked for digest in memory.keep(seen[step])}
    data = segment_of(seen, codec)
    thin = recent.thin(data, known)
    saved = sum(len(recent._flat(seen[step][SIDE])) for step in asked)
    assert 0 < len(data) - len(thin) < saved
    assert (
        saved - (len(data) - len(thin)) < 20 * len(known) + 60
    )  # a digest for each, and their names
    assert back(thin, memory) == (0, data)
    assert recent.thin(data, known={b"x" * 16}) is None
    memory.clear()
    missing, unchanged = back(thin, memory)
    assert missing == len(known) and len(unchanged) < len(data)


def test_what_is_remembered_is_bounded():
    memory = recent.Recent(most=3, largest=1000)
    one, two, three, four = (memory.keep({SIDE: bytes([n]) * 300})[0] for n in range(4))
    assert memory.find([one, two, three, four])[0] is None and memory.bytes == 900
    memory.keep({SIDE: bytes([1]) * 300})  # again: as new as the newest
    memory.keep({SIDE: b"x" * 500})
    assert memory.find([two])[0] and memory.find([three, four]) == [None, None]
    memory.keep({SIDE: b"x" * 1001})  # more than there is room for
    assert memory.bytes == 0 and memory.find([two]) == [None]


def test_only_answered_questions_count():
    told = recent.Told()
    sent = [told.keep(each)[0] for each in pictures("jpeg", 3)]
    assert not told.known()
    told.answered([sent[1]])
    assert told.known() == {sent[1]}
    told.clear()
    assert not told.known()


def hostile():
    """(what it says, the columns beside it)."""
    seen = pictures("jpeg", 3)
    memory = recent.Recent()
    digest = memory.keep(seen[0])[0]
    jpeg, raw = frames.pack(seen, "jpeg"), frames.pack(pictures("raw", 3), "raw")
    other = Encoded("zstd", "|u1", (3, 16, 16, 3), jpeg[SIDE].data)
    good = [[0], digest]
    for name, told, columns in (
        *((SIDE, told, jpeg) for told in (None, [], [[0]], [0, digest], [[0], "x"], [digest, [0]])),
        *((SIDE, told, jpeg) for told in ([[], b""], [[0], digest[:-1]], [[0, 1], digest])),
        *((SIDE, [rows, digest], jpeg) for rows in ([-1], [4], [1 << 70], [True], ["0"], [None])),
        *((SIDE, [rows, digest * 2], jpeg) for rows in ([1, 0], [1, 1], [0, 9])),
        (SIDE, [list(range(5000)), digest * 5000], jpeg),
        ("action", good, {"action": np.zeros((3, 7), "<f4")}),
        ("observation.images.top", good, jpeg),
        (5, good, jpeg),
        (SIDE, good, {SIDE: np.zeros((3, 16, 16), np.uint8)}),
        (SIDE, good, {SIDE: other}),
        (SIDE, good, raw),  # JPEG bytes among raw frames
        (SIDE, good, {SIDE: Encoded("jpeg95", "|u1", (3, 16, 16, 3), jpeg[SIDE].data[:-9])}),
        (SIDE, good, {SIDE: Encoded("jpeg95", "|u1", (3, 16, 16, 3), np.zeros(2, np.uint8))}),
    ):
        yield {name: told}, columns, memory
    yield [SIDE], jpeg, memory
    yield {f"x{i}": good for i in range(300)}, jpeg, memory


@pytest.mark.parametrize("case", range(len(list(hostile()))))
def test_hostile_words_about_what_lacks_are_refused(case):
    lacking, columns, memory = list(hostile())[case]
    with pytest.raises(WireError, match=r"lack|rows|encoded|raw frames"):
        recent.whole({recent.LACKING: lacking}, dict(columns), memory)


def test_a_few_digests_do_not_make_endless_memory():
    """A frame of 20 MB named 1000 times would be 20 GB."""
    memory = recent.Recent()
    digest = memory.keep({SIDE: b"\0" * (20 << 20)})[0]
    column = Encoded("jpeg95", "|u1", (0, 16, 16, 3), b"")
    lacking = {SIDE: [list(range(1000)), digest * 1000]}
    with pytest.raises(WireError, match="more than"):
        recent.whole({recent.LACKING: lacking}, {SIDE: column}, memory)


# -- over real sockets ---------------------------------------------------------------------------------------


class Robot:
    """An attached link whose questions are answered."""

    def __init__(self, stage, writer="arm-1"):
        self.stage, self.writer = stage, writer
        self.link = Link(stage.url, Keys.load(stage.folder / "keys/robot.key"), "arm")
        features = protocol.features_of(SCHEMA)
        self.attached = {
            "kind": "point",
            "writer": writer,
            "features": [6, ["side"], 16],
            "digest": features.digest(),
        }
        self.link.attach(5, **self.attached)

    def ask(self, seen, codec):
        args = {"episode": f"{self.writer}-0", "step": 0, "parameters": {}, "instruction": "i"}
        args.update(codec=codec, timeout=5.0)
        arrays = {"observation.state": np.zeros(6, "<f4"), **frames.pack([seen], codec)}
        answer, _ = self.link.observe(args, arrays).result(10)
        assert "version" in answer, answer

    def send(self, data, sequence=0):
        """The segment over the link: (bytes that it took, what the replay service has of it)."""
        before = self.link.sent_bytes
        answer = self.link.segment(sequence, data)
        assert answer["acknowledged"] == sequence
        stored = self.stage.replay.segments[-1]
        return self.link.sent_bytes - before, stored

    def memory(self):
        return self.stage.gateway._leases.robots["arm"].incoming.recent


@pytest.fixture
def stage(tmp_path):
    made = Stage(tmp_path)
    made.act()
    yield made
    made.close()


def same(stored, data):
    """What is stored is what the spool has: header and columns, each bit, in the same order."""
    told, columns = wire.unpack(parts.split(data, "it"))
    one = parts.join(wire.pack(told["header"], columns))
    return one == parts.join(wire.pack(stored.header, stored.columns))


@pytest.mark.parametrize("codec", frames.CODECS)
def test_the_stored_segment_is_the_same_with_and_without(stage, codec):
    """Whole from a link that never asked; thin; after the gateway has forgotten one, all, or was started anew."""
    robot = Robot(stage)
    with contextlib.closing(robot.link):
        for sequence, event in enumerate(("never asked", "asked", "evicted", "left", "restarted")):
            seen = pictures(codec, seed=sequence)
            if event != "never asked":
                for step in range(0, STEPS, CHUNK):
                    robot.ask(seen[step], codec)
            if event == "evicted":
                robot.memory()._kept.popitem()
            elif event == "left":
                robot.link.close()
                robot = Robot(stage)
            elif event == "restarted":
                stage.gateway.close()
                stage.open_gateway()
            data = segment_of(seen, codec, sequence)
            took, stored = robot.send(data, sequence)
            assert same(stored, data), event
            frame = len(recent._flat(seen[0][SIDE]))
            if event == "asked":
                assert len(data) - took > 1.9 * (frame - 30)
            elif event in ("never asked", "left"):
                assert took == len(data)
            else:  # told in vain, then whole
                assert len(data) < took < 2 * len(data)
        assert len(stage.replay.segments) == 5 and stage.replay.repeated == 0


def test_a_segment_that_is_sent_again_with_other_frames_begins_anew(stage):
    """Half of it came when the link broke; the second time other frames of the same size are left out."""
    robot = Robot(stage)
    seen = pictures("raw")
    data = segment_of(seen, "raw")
    client = Client("gateway", stage.url, Keys.load(stage.folder / "keys/robot.key"))
    with contextlib.closing(robot.link), contextlib.closing(client):
        digests = []
        for step in (0, 4):
            robot.ask(seen[step], "raw")
            digests.append(recent.digest_of(recent._flat(seen[step][SIDE])))
        first, second = (recent.thin(data, {digest}) for digest in digests)
        assert len(first) == len(second)
        half = len(first) // 2

        def piece(data, low, high):
            args = {"sequence": 0, "offset": low, "total": len(data), **robot.link._me()}
            args["digest"] = recent.digest_of(data)
            array = np.frombuffer(data, np.uint8)[low:high]
            return client.call("segment", args, {"data": array}, timeout=10)[0]

        assert piece(first, 0, half) == {"offset": half}
        assert piece(second, half, len(second)) == {"offset": 0}  # not what it goes on with
        assert piece(second, 0, half) == {"offset": half}
        assert piece(second, half, len(second))["acknowledged"] == 0
        assert same(stage.replay.segments[-1], data)
        # What is not there, and what is no frame, is told to its sender; the gateway goes on.
        stage.gateway._leases.robots["arm"].incoming.forget()
        assert piece(first, 0, len(first)) == {"missing": 1}
        told, columns = wire.unpack(parts.split(first, "it"))
        told[recent.LACKING][SIDE][0] = [99]
        with pytest.raises((Rejected, RemoteError), match="do not rise"):
            bad = parts.join(wire.pack(told, columns))
            piece(bad, 0, len(bad))
        assert piece(data, 0, len(data))["repeated"]


def test_an_episode_takes_fewer_bytes(stage):
    """The bridge itself: a question for each chunk of 4, of 25 frames six are not sent again."""
    output = finish(stage.attach("--speed", "50", "--episodes", "3", "--codec", "raw"))
    assert "detached" in output and "Traceback" not in output
    totals = stage.row()["last"]["totals"]
    assert len(check_exactly_once(stage.replay.segments)) == 3
    frame = 16 * 16 * 3
    for segment in stage.replay.segments:
        image = segment.columns[SIDE]
        np.testing.assert_array_equal(image[:, 0, 0, 0], np.arange(25))
    # The last question of an episode may still be open when its segment leaves.
    assert 3 * 5 * (frame - 30) < totals["spared_bytes"] <= 3 * 6 * frame
    share = totals["spared_bytes"] / (totals["bytes"] + totals["spared_bytes"])
    assert 0.1 < share < 0.25
