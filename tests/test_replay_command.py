"""`twinrl replay` as a user runs it: against a running service, and against the folder of a stopped run."""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from buffer_service.client import Reader, Writer
from buffer_service.entry import Entry
from buffer_service.testing import SCHEMA, ServiceProcess, segment
from dashboard.collector import Collector
from deploy.replay_columns import join, track
from deploy.replay_episodes import Selection, ago, episodes, find, moment, size, version_range
from deploy.replay_sheet import MARGIN, TAKEOVER, WIDTH, choose, sheet
from twinrl.core.errors import ConfigError, TwinRLError
from twinrl.core.segment import Segment
from twinrl.core.sockets import wait_until
from twinrl.main import main

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).parent.parent
STEPS = 8  # of a segment; an episode has three
WRITERS = (("twin-0", "twin", 6), ("twin-1", "twin", 4), ("arm", "real", 4), ("people", "demo", 2))
NUMBER = sum(count for *_, count in WRITERS)


def twinrl(*words, fails=False):
    """What `twinrl replay WORDS` prints; with `fails` what it says why not."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = main(["replay", *map(str, words)])
        except SystemExit as end:  # of the command line's parser
            code = end.code
    assert (code != 0) == fails, out.getvalue() + error.getvalue()
    return error.getvalue() if fails else out.getvalue()


def process(*words):
    """The same in a process of its own: (standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, "-m", "twinrl.main", "replay", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=100,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def rows(*words):
    return [json.loads(line) for line in twinrl(*words, "--json").splitlines()]


def write_episode(writer, name, number, source):
    """Three segments; every value at step t is f(100 * number + t). Each 3rd episode succeeds."""
    for part in range(3):
        last = part == 2
        header, columns = segment(
            100 * number + part * STEPS,
            STEPS,
            source=source,
            end="terminated" if last else "",
            version=-1 if source == "demo" else 10 * number + part,
            region="ood" if number % 2 else "id",
            episode=name,
            configuration={"number": number},
        )
        header["first_step"] = part * STEPS
        columns["success"][-1] = last and number % 3 == 0
        columns["intervention"][:] = source == "real" and part == 1
        writer.write(header, columns)


def fill(service):
    """The episodes of WRITERS, twin-0-0 and so on, and one of twin-0 that nobody ends."""
    for name, source, count in WRITERS:
        with Writer(service.address, service.keys(), name, schema=SCHEMA) as writer:
            for number in range(count):
                write_episode(writer, f"{name}-{number}", number, source)
            if name == "twin-0":
                header, columns = segment(0, STEPS, episode="endless")
                writer.write(header, columns)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """The folder of a run whose service has stopped in order."""
    run = tmp_path_factory.mktemp("filled") / "run"
    service = ServiceProcess(run)
    fill(service)
    settings = {
        "run_dir": str(run),
        "address": service.address,
        "redis_url": "",
        "schema": {**SCHEMA._asdict(), "cameras": list(SCHEMA.cameras)},
        "limiter": {"samples_per_insert": None, "min_size": 0},
        "metrics_address": "tcp://127.0.0.1:9",
    }
    described = {"replay": service.address, "roles": {"replay": settings}}
    (run / "topology.json").write_text(json.dumps(described))
    (run / "config.yaml").write_text("name: run\n")
    assert service.stop() == 0
    service.process.stdout.close()
    return run


@pytest.fixture(scope="module")
def live(filled, tmp_path_factory):
    """The folder of a run whose service runs; its tests change nothing in it."""
    run = tmp_path_factory.mktemp("live") / "run"
    with started(filled, run):
        yield run


def copy(filled, run):
    shutil.copytree(filled, run, ignore=shutil.ignore_patterns("*.sock", "lock", "address"))


class started:  # noqa: N801
    """A service on a copy of the filled run."""

    def __init__(self, filled, run):
        copy(filled, run)
        (run / "topology.json").unlink()
        self.service = ServiceProcess(run)

    def __enter__(self):
        return self.service

    def __exit__(self, *_):
        self.service.stop()
        self.service.process.stdout.close()


# What needs no service.


def entry(id, episode="e", first_step=0, **fields):
    values = {
        "source": "twin", "task": "lift", "region": "id", "steps": STEPS, "end": 0, "frame_step": None,
        "version": 0, "writer": "w", "sequence": id, "time": 0.0, "file": 1, "offset": 0, "length": 64,
    }  # fmt: skip
    return Entry(id=id, episode=episode, first_step=first_step, **{**values, **fields})


def test_episodes_are_what_a_writer_calls_so():
    """Segments in order of steps, two writers with the same name apart, gaps found."""
    found = episodes(
        [
            entry(1, "a"),
            entry(2, "b", version=7),
            entry(3, "a", 16, end=1, success=True),
            entry(4, "b", writer="other"),
            entry(5, "b", 8, version=9, end=2, marked="lease", time=5.0),
        ]
    )
    a, b, other = found
    assert [e.name for e in found] == ["a", "b", "b"]
    assert (a.outcome, b.outcome, other.outcome) == ("success", "failure", "unfinished")
    assert not a.whole and [len(each) for each in a.stretches()] == [1, 1]
    assert b.whole and b.versions == (7, 9) and b.marked == "lease" and b.time == 5.0
    assert json.dumps(b.row())


def test_every_filter_leaves_something_out():
    found = episodes(
        [
            entry(1, "a", version=3, end=1, time=10.0),
            entry(
                2, "b", source="real", region="ood", writer="arm", end=1, success=True, time=20.0
            ),
            entry(3, "c", task="push", version=-1, end=2, marked="lease", time=30.0),
        ]
    )
    for filters, names in (
        ({}, "abc"),
        ({"source": ("real", "demo")}, "b"),
        ({"task": "li*"}, "ab"),
        ({"region": "ood"}, "b"),
        ({"writer": "?"}, "ac"),
        ({"episode": "[ab]"}, "ab"),
        ({"outcome": "success"}, "b"),
        ({"outcome": "failure"}, "ac"),
        ({"since": 20.0}, "bc"),
        ({"until": 20.0}, "ab"),
        ({"versions": (0, 5)}, "ab"),
        ({"versions": (-1, -1)}, "c"),
        ({"marked": True}, "c"),
    ):
        chosen = Selection(**filters)
        assert "".join(e.name for e in found if chosen.keeps(e)) == names, filters
        assert chosen.everything == (not filters)


def test_an_episode_is_found_by_what_one_remembers_of_it():
    found = episodes(
        [entry(1, "arm-1", time=9.0), entry(2, "arm-12"), entry(3, "arm-12", writer="v")]
    )
    assert find(found, "arm-1") is found[0] and find(found, "#2") is found[1]
    assert find(found, "last") is found[0]
    for wanted, complaint in (("arm", "fits 3"), ("arm-12", "'v'"), ("leg", "no episode 'leg'")):
        with pytest.raises(ConfigError, match=complaint):
            find(found, wanted)
    with pytest.raises(ConfigError, match="passes the filters"):
        find([], "last")


def test_times_versions_and_sizes():
    assert moment("10m", now=1000.0) == 400.0 and moment("1.5h", now=0.0) == -5400.0
    assert moment("2026-11-21T15:30") == time.mktime((2026, 11, 21, 15, 30, 0, 0, 0, -1))
    assert [version_range(text) for text in ("7", "3:7", "3:", ":7", "none")] == [
        *((7, 7), (3, 7), (3, 1 << 62), (0, 7), (-1, -1)),
    ]
    for wrong in ("", ":", "a", "7:3", "-1"):
        with pytest.raises(ConfigError, match=r"policy version|before it begins"):
            version_range(wrong)
    with pytest.raises(ConfigError, match="how long ago"):
        moment("yesterday")
    assert [size(n) for n in (0, 999, 1500, 2.5e6, 3e12)] == [
        *("0 B", "999 B", "1.5 kB", "2.5 MB", "3,000 GB"),
    ]
    assert [ago(s) for s in (3, 90, 7200, 864000)] == ["3 s", "1.5 min", "2.0 h", "10 d"]


def test_joining_keeps_each_observation_and_frame_once():
    """Three segments with different frames and one with a column that the others lack."""
    parts = [Segment(*segment(t, STEPS, frames=f)) for t, f in ((0, [0, 4, 8]), (8, [0, 5]))]
    parts.append(Segment(*segment(16, STEPS, frames=[2, 8], end="truncated")))
    parts[1].columns["label_action"] = np.ones((STEPS, 7), "<f4")
    parts[1].columns["chunk_step"] = np.array([1, 5], "<i4")
    parts[1].columns["policy.noise"] = np.array([[1.0], [5.0]], "<f4")
    joined = join(parts)
    np.testing.assert_array_equal(joined["observation.state"][:, 0], np.arange(25))
    np.testing.assert_array_equal(joined["action"][:, 0], np.arange(24))
    assert joined["frame_step"].tolist() == [0, 4, 8, 13, 18, 24]
    assert joined["observation.images.wrist"][:, 0, 0, 0].tolist() == [0, 4, 8, 13, 18, 24]
    label = joined["label_action"][:, 0]
    assert np.isnan(label[:8]).all() and (label[8:16] == 1).all() and np.isnan(label[16:]).all()
    assert joined["chunk_step"].tolist() == [9, 13]
    assert joined["policy.noise"][:, 0].tolist() == [1, 5]


def test_the_sheet_shows_the_right_frames():
    """The grey of every tile is the step's, thinned evenly, and what a person did is framed in orange."""
    parts = [Segment(*segment(t, STEPS)) for t in (0, 8, 16)]
    for part in parts:
        part.columns["intervention"][:] = part is parts[1]
    seen = track([parts])
    picture = np.asarray(sheet(seen, "an episode", ["a fact"], limit=9))
    assert picture.shape[1] == WIDTH
    shown = choose(seen, 9)
    assert [each.step for each in shown] == [*range(0, 24, 3), 24]
    assert [each.step for each in shown if each.intervention] == [6, 9, 12, 15]
    assert sum(each.reward for each in shown) == pytest.approx(float(seen.reward.sum()))
    side, top = 128, 84 + 24
    orange = [int(TAKEOVER[i : i + 2], 16) for i in (1, 3, 5)]
    for column, each in enumerate(shown):
        x = MARGIN + 64 + column * (side + 6)
        for row in range(len(SCHEMA.cameras)):
            y = top + row * (side + 6)
            assert picture[y + 64, x + 64].tolist() == [each.step] * 3
            assert (picture[y - 1, x + 64].tolist() == orange) == each.intervention


def test_an_episode_without_images_has_a_sheet_too():
    header, columns = segment(0, STEPS)
    columns = {name: c for name, c in columns.items() if "images" not in name}
    seen = track([[Segment(header, {**columns, "frame_step": np.zeros(0, "<i4")})]])
    assert not seen.images and sheet(seen, "blind", []).size[0] == WIDTH


# Against a running service.


def test_every_subcommand_has_help_with_examples():
    for words in ((), ("list",), ("summary",), ("show",), ("export",), ("delete",)):
        text = twinrl(*(("demo", *words) if words else ()), "--help")
        assert "examples:\n  twinrl replay demo" in text, words


def test_list_shows_the_newest_and_filters(live):
    table, error = process(live, "list", "--source", "twin", "--limit", "3")
    assert error == ""
    lines = table.splitlines()
    assert lines[0].split() == [
        *("episode", "source", "task", "region", "steps", "outcome", "policy", "writer"),
        *("age", "size"),
    ]
    assert lines[1].split()[:8] == [
        *("twin-1-3", "twin", "lift", "ood", "24", "success", "30-32", "twin-1"),
    ]
    assert len(lines) == 5 and "3 of 11 episodes; --limit 0 shows all" in lines[-1]
    assert len(rows(live, "list")) == NUMBER + 1
    names = [row["episode"] for row in rows(live, "list", "--source", "demo", "--source", "real")]
    assert names == [*(f"people-{i}" for i in (1, 0)), *(f"arm-{i}" for i in (3, 2, 1, 0))]
    assert {row["outcome"] for row in rows(live, "list", "--failure")} == {"failure"}
    assert [row["episode"] for row in rows(live, "list", "--unfinished")] == ["endless"]
    assert len(rows(live, "list", "--success", "--region", "id")) == 4
    assert [row["versions"] for row in rows(live, "list", "--version", "50:")] == [[50, 52]]
    assert rows(live, "list", "--until", "1h") == []


def test_list_says_what_is_wrong(live):
    assert "no policy version" in twinrl(live, "list", "--version", "x", fails=True)
    assert "invalid choice: 'robot'" in twinrl(live, "list", "--source", "robot", fails=True)
    assert "must be at least 0" in twinrl(live, "list", "--limit", "-1", fails=True)
    assert "there are: run" in twinrl("ran", "--runs", live.parent, "list", fails=True)


def test_summary_counts_and_promises(live):
    text, _ = process(live)  # the default
    assert "everysec: what is acknowledged survives the death of every process" in text
    assert "40 % [12, 77] of 5" in text  # Wilson's interval of the twins' 2 in 5
    told = json.loads(twinrl(live, "summary", "--json"))
    groups = {(g["source"], g["region"]): g for g in told["groups"]}
    assert groups["twin", "id"]["ended"] == 5 and groups["twin", "id"]["episodes"] == 6
    assert told["total"]["transitions"] == 24 * NUMBER + STEPS
    assert {name: w["sequence"] for name, w in told["writers"].items()} == {
        **{name: 3 * count - 1 for name, _, count in WRITERS},
        "twin-0": 18,
    }
    assert told["total"]["bytes"] <= told["bytes_on_disk"]["replay"]
    assert told["waiting"] == [] and told["form"] in ("files", "redis")
    only = json.loads(twinrl(live, "summary", "--json", "--source", "real"))
    assert only["total"]["episodes"] == 4 and len(only["groups"]) == 2


def sample_in_vain(reader):
    with contextlib.suppress(TwinRLError):
        reader.sample(4)


def test_who_waits_for_what_is_shown(tmp_path):
    """A reader that the limiter holds is named, with its reason and how long it has waited."""
    service = ServiceProcess(tmp_path / "run", limiter={"min_size": 1000})
    try:
        with Writer(service.address, service.keys(), "w", schema=SCHEMA) as writer:
            writer.write(*segment(0, STEPS))
        with Reader(service.address, service.keys(), name="learner", deadline=60.0) as reader:
            thread = threading.Thread(target=sample_in_vain, args=(reader,), daemon=True)
            thread.start()
            end, text = time.monotonic() + 60, ""
            while "learner waits" not in text and time.monotonic() < end:
                text = twinrl(tmp_path / "run")
        thread.join(70)
        assert "learner waits" in text and "1000" in text.replace(",", "")
    finally:
        service.stop()
        service.process.stdout.close()


def test_show_writes_a_sheet_and_tells_the_story(live, tmp_path):
    text, _ = process(live, "show", "arm-3", "--png", tmp_path / "a b" / "arm.png")
    for expected in ("lift, OOD: lift the cube", "steps 0-7: 30, 8-15: 31, 16-23: 32", "success"):
        assert expected in text, text
    assert "8 steps: 8-15" in text and socket.gethostname() in text and "TwinRL" in text
    with Image.open(tmp_path / "a b" / "arm.png") as picture:
        assert picture.size[0] == WIDTH and picture.mode == "RGB"
    assert [path.name for path in (tmp_path / "a b").iterdir()] == ["arm.png"]
    told = json.loads(twinrl(live, "show", "last", "--source", "real", "--json"))
    assert told["episode"] == "arm-3" and told["configuration"] == {"number": 3}
    assert told["interventions"] == [[8, 15, True]] and told["frames"] == 25
    (written,) = told["written"]
    assert written["host"] == socket.gethostname() and written["sequences"] == [9, 10, 11]
    for when, stored in zip(written["time"], written["stored"], strict=True):
        assert 0 <= stored - when < 60
    assert told["files"] == [str(live / "episodes" / "arm-3.png")]
    assert Path(told["files"][0]).exists()
    assert "fits" in twinrl(live, "show", "twin", fails=True)


def test_show_makes_a_video(live, tmp_path):
    """A frame for each step at the pace of the episode, and the end for a second."""
    path = tmp_path / "arm.mp4"
    text = twinrl(live, "show", "arm-1", "--video", path)
    assert str(path) in text and not (tmp_path / "arm.png").exists()
    with av.open(str(path)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(10.0)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 24 + 10
    for step in (0, 7, 12, 23):
        assert np.abs(frames[step][100:200, 100:200].astype(int) - (100 + step)).max() <= 4
    assert np.abs(frames[-1][100:200, 100:200].astype(int) - 124).max() <= 4


def test_export_is_exact_and_goes_on_where_it_was(live, tmp_path):
    folder = tmp_path / "data"
    text, _ = process(live, "export", folder, "--source", "real")
    assert text == f"wrote 4 episodes to {folder} ({_size(folder)})\n"
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == [f"arm-{i}.npz" for i in range(4)]
    for number, path in enumerate(files):
        with np.load(path) as file:  # without pickle
            arrays = dict(file)
        header = json.loads(str(arrays.pop("header")))
        assert header["episode"] == f"arm-{number}" and header["finished"]
        assert header["success"] == (number % 3 == 0) and header["steps"] == 24
        assert [each["sequence"] for each in header["segments"]] == [
            *(3 * number + i for i in range(3)),
        ]
        assert header["segments"][0]["provenance"]["host"] == socket.gethostname()
        t = 100 * number + np.arange(25)
        np.testing.assert_array_equal(arrays["step"], np.arange(24))
        np.testing.assert_array_equal(arrays["frame_step"], np.arange(25))
        np.testing.assert_array_equal(arrays["observation.state"][:, 2], t)
        np.testing.assert_array_equal(arrays["action"][:, 6], t[:-1])
        np.testing.assert_array_equal(arrays["reward"], t[:-1].astype("f4") / 10)
        for camera in SCHEMA.cameras:
            images = arrays[f"observation.images.{camera}"]
            assert images.dtype == np.uint8 and (images == (t % 251)[:, None, None, None]).all()
    files[0].write_bytes(files[0].read_bytes()[:-500])  # as after a power cut
    files[1].unlink()
    (folder / ".arm-1.npz.part").write_bytes(b"half")
    before = files[2].stat().st_mtime_ns
    text = twinrl(live, "export", folder, "--source", "real", "--compress")
    assert "wrote 2 episodes" in text and "2 were there already" in text
    assert files[2].stat().st_mtime_ns == before
    assert sorted(path.name for path in folder.iterdir()) == [path.name for path in files]
    with np.load(files[0]) as file:
        np.testing.assert_array_equal(file["action"][:, 0], np.arange(24))


def _size(folder):
    return size(sum(path.stat().st_size for path in folder.iterdir()))


def test_export_says_what_is_wrong(live, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in twinrl(live, "export", tmp_path / "file", fails=True)
    assert "passes the filters" in twinrl(live, "export", tmp_path, "--task", "x", fails=True)


def test_delete_asks_and_spares_people_and_robots(filled, tmp_path):
    with started(filled, tmp_path / "run"):
        run = tmp_path / "run"
        assert "a filter, or --all" in twinrl(run, "delete", "--yes", fails=True)
        text = twinrl(run, "delete", "--success")
        assert "would delete 4 episodes (12 segments" in text and "twin-0-3" in text
        assert len(rows(run, "list")) == NUMBER + 1
        text, error = process(run, "delete", "--success", "--yes")
        assert "deleted 4 episodes" in text and "3 episodes of people and robots stay" in error
        left = {row["episode"] for row in rows(run, "list")}
        assert len(left) == NUMBER + 1 - 4 and {"arm-0", "arm-3", "people-0"} <= left
        assert "deleted 7 episodes" in twinrl(run, "delete", "--all", "--yes")
        words = ("--source", "real", "--episode", "arm-[12]", "--yes")
        assert "deleted 2 episodes" in twinrl(run, "delete", *words)
        left = [row["episode"] for row in rows(run, "list")]
        assert left == ["people-1", "people-0", "arm-3", "arm-0"]


def test_an_episode_with_a_gap_is_listed_shown_and_exported_as_such(filled, tmp_path):
    with started(filled, tmp_path / "run") as service:
        run = tmp_path / "run"
        (row,) = rows(run, "list", "--episode", "twin-1-2")
        with Reader(service.address, service.keys(), run) as reader:
            reader.call("delete", {"ids": row["segments"][1:2]}, 30.0)
        (row,) = rows(run, "list", "--episode", "twin-1-2")
        assert not row["whole"] and row["steps"] == 16
        assert "*16" in twinrl(run, "list", "--episode", "twin-1-2")
        assert "not everything of it is stored" in twinrl(run, "show", "twin-1-2")
        twinrl(run, "export", tmp_path / "data", "--episode", "twin-1-2")
        names = sorted(path.name for path in (tmp_path / "data").iterdir())
        assert names == ["twin-1-2.from00000.npz", "twin-1-2.from00016.npz"]
        with np.load(tmp_path / "data" / names[1]) as file:
            np.testing.assert_array_equal(file["step"], np.arange(16, 24))


def test_an_episode_of_a_lost_writer_is_marked(tmp_path):
    """The service closed it: it counts as a failure, and its export ends truncated."""
    service, run = ServiceProcess(tmp_path / "run", lease=1.0), tmp_path / "run"
    try:
        with Writer(service.address, service.keys(), "w", schema=SCHEMA) as writer:
            writer.write(*segment(0, STEPS, episode="cut off"))
        wait_until(lambda: rows(run, "list", "--marked"), 30, "the end of the lease")
        (row,) = rows(run, "list", "--marked", "--failure")
        assert row["episode"] == "cut off" and row["marked"] == "lease"
        assert "closed for a lost writer" in twinrl(run)
        assert "failure (lease)" in twinrl(run, "list")
        assert "failed (truncated), closed by lease" in twinrl(run, "show", "cut off")
        twinrl(run, "export", tmp_path / "data")
        with np.load(tmp_path / "data" / "cut off.npz") as file:
            assert file["truncated"].tolist() == [False] * (STEPS - 1) + [True]
            assert json.loads(str(file["header"]))["finished"]
    finally:
        service.stop()
        service.process.stdout.close()


# Against the folder of a stopped run.


def test_a_stopped_run_is_served_for_the_command_only(filled, tmp_path):
    """Also one that was copied; nothing in it ends, and nothing goes on afterwards."""
    run = tmp_path / "copied"
    copy(filled, run)
    out, error = process(run, "list", "--json")
    assert f"copied is not running: serving its replay from {run}" in error
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == NUMBER + 1 and not any(row["marked"] for row in found)
    assert not list((run / "redis").glob("*.sock")) or not _answers(run)


def _answers(run):
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(next((run / "redis").glob("*.sock"))))
        except OSError:
            return False
    return True


def test_a_copy_is_not_mistaken_for_the_run_that_is_served(filled, tmp_path):
    """Its settings name the service of the original, and its keys open it: deleting there would be a pity."""
    with started(filled, tmp_path / "original") as service:
        copy(filled, tmp_path / "copy")
        (tmp_path / "copy" / "topology.json").write_text(json.dumps({"replay": service.address}))
        complaint = twinrl(tmp_path / "copy", "delete", "--all", "--yes", fails=True)
        assert f"serves {tmp_path / 'original' / 'replay'}, not" in complaint
        assert len(rows(tmp_path / "original", "list")) == NUMBER + 1


def test_a_job_whose_service_is_away_is_left_alone(filled, tmp_path):
    """Its collector answers: the service comes back by itself, and must find the folder free."""
    run = tmp_path / "job"
    copy(filled, run)
    collector = Collector(run, "tcp://127.0.0.1:0", "tcp://127.0.0.1:0")
    thread = threading.Thread(target=collector.run)
    thread.start()
    try:
        complaint = twinrl(run, "--deadline", "3", "list", fails=True)
    finally:
        collector.stop()
        thread.join(10)
    assert "no replay service answered" in complaint and "serving" not in complaint


def test_a_stopped_run_that_cannot_be_served_says_why(filled, tmp_path):
    run = tmp_path / "broken"
    copy(filled, run)
    described = json.loads((run / "topology.json").read_text())
    described["roles"]["replay"]["schema"]["chunk"] = 5
    (run / "topology.json").write_text(json.dumps(described))
    assert "holds segments of schema" in twinrl(run, "list", fails=True)
    (run / "topology.json").write_text(json.dumps({"replay": described["replay"]}))
    assert "doesn't say how to start its replay" in twinrl(run, "list", fails=True)
