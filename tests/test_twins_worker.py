"""Simulators out of process: real workers, really killed."""

import ast
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from twinrl.core.errors import ConfigError, ProcessDied, Rejected, RemoteError, WireError
from twinrl.core.sockets import free_port, wait_until
from twins import describe, make_env
from twins.backends import remote_channel, remote_link
from twins.backends.contract import SimulationLost
from twins.backends.remote import RemoteEnv, RemoteSimulation
from twins.backends.remote_memory import Pieces
from twins.backends.remote_process import PREFIX
from twins.env import TwinEnv
from twins.scene_description import describe_scene
from twins.tasks import make_task
from twins.worker.example import ExampleSimulation
from twins.worker.pipe import Pipe
from twins.worker.tree import Body, Packed, unpack

ROOT = Path(__file__).parent.parent
PATIENCE = 60.0  # s; the machine may be busy
EXAMPLE = "twins.worker.example:ExampleSimulation"
# A worker is tested in this Python, and in an older one where there is one (with numpy, msgpack and pyzmq).
PYTHONS = [sys.executable, *filter(None, [os.environ.get("TWINRL_PYTHON38")])]
OPTIONS = {"cameras": ("side", "wrist"), "image_size": 16}

TROUBLE = """
import ctypes, os, time
from pathlib import Path
from twins.backends.contract import SimulationLost
from twins.worker.example import ExampleSimulation

class Troubled(ExampleSimulation):
    def __init__(self, scene, count, *, trouble, **options):
        super().__init__(scene, count, **options)
        self.trouble = Path(trouble)
        self._what("made")

    def step(self, ids, path, gripper):
        self._what("step")
        super().step(ids, path, gripper)

    def _what(self, when):
        what = self.trouble.read_text().split() if self.trouble.exists() else []
        if what[:1] != [when]:
            return
        if what[1] != "always":
            self.trouble.unlink()
        if what[-1] == "hang":
            Path(str(self.trouble) + ".hangs").touch()
            time.sleep(600)
        if what[-1] == "segfault":
            ctypes.string_at(0)
        if what[-1] == "speak":
            print("the last words", flush=True)
            os._exit(3)
        if what[-1] == "mistake":
            raise ValueError("joints of the wrong kind")
        if what[-1] == "lost":
            raise SimulationLost("the GPU is gone")
        if what[-1] == "cuda":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


@pytest.fixture(scope="module")
def scene():
    return describe_scene(make_task("pick-and-place"))


@pytest.fixture
def make(scene, tmp_path):
    """Makes remote example simulations, which end with the test."""
    made = []

    def make(count=3, target=EXAMPLE, worker=None, options=OPTIONS, **more):
        settings = {"python": sys.executable, "call_seconds": PATIENCE, **(worker or {})}
        made.append(
            RemoteSimulation(scene, count, target=target, worker=settings, **options, **more)
        )
        return made[-1]

    yield make
    for simulation in made:
        simulation.close()


class Troubled:
    """Makes simulations in which `cause("step once hang")` makes trouble."""

    target = "troubled:Troubled"

    def __init__(self, make, folder):
        (folder / "troubled.py").write_text(TROUBLE)
        self._make, self._folder, self._trouble = make, folder, folder / "trouble"

    def __call__(self, count=3, worker=None, **more):
        return self._make(
            count, self.target, self.settings | (worker or {}), **self.options, **more
        )

    @property
    def settings(self):
        return {"path": (str(self._folder),)}

    @property
    def options(self):
        return {"trouble": str(self._trouble)}

    def cause(self, what):
        self._trouble.write_text(what)

    def hangs(self):
        return Path(f"{self._trouble}.hangs").exists()


@pytest.fixture
def troubled(make, tmp_path):
    return Troubled(make, tmp_path)


def configurations(count, first=0):
    return [
        {
            "joints": [0.01 * (first + i)] * 7,
            "object": [0.4 + 0.01 * i, 0.1, 0.3],
            "basket": [0.6, -0.1 - 0.01 * i],
            "draw": {},
        }
        for i in range(count)
    ]


def flat(value):
    """All arrays of a nested value, in order, by where they are."""
    if isinstance(value, dict):
        return {(k, *rest): a for k, v in value.items() for rest, a in flat(v).items()}
    if isinstance(value, tuple):
        return {(i, *rest): a for i, v in enumerate(value) for rest, a in flat(v).items()}
    return {(): np.asarray(value)}


def tuple_of(chunk):
    """A ChunkStep without what is None."""
    return (
        tuple(value for value in chunk if value is not None) if isinstance(chunk, tuple) else chunk
    )


def same(first, second):
    """Whether two nested values hold the same bytes."""
    first, second = flat(first), flat(second)
    assert first.keys() == second.keys()
    for where, array in first.items():
        assert array.dtype == second[where].dtype, where
        np.testing.assert_array_equal(array, second[where], str(where))
    return True


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid), PATIENCE, "the worker's death")


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]


def play(simulation, steps=3):
    """The states and pictures that a few steps of a simulation lead to."""
    ids, some = np.arange(simulation.count), np.array([0, 2])
    simulation.configure(ids, configurations(len(ids)))
    seen = [simulation.snapshot(ids), simulation.joints(ids)]
    for n in range(steps):
        joints = simulation.joints(some) + 0.02 * (n + 1)
        simulation.step(some, joints[:, None], np.array([1.0, 0.2]))
        seen += [simulation.snapshot(some), simulation.joints(ids), simulation.images(some)]
    simulation.configure(some[1:], configurations(1, first=7))
    return (*seen, simulation.snapshot(ids), simulation.images(ids))


class TestBorder:
    @pytest.mark.parametrize("python", PYTHONS)
    @pytest.mark.parametrize("memory_mb", [64, 0])
    def test_nothing_changes_on_its_way(self, make, scene, python, memory_mb):
        remote = make(worker={"python": python, "memory_mb": memory_mb})
        if python == sys.executable:  # another version of NumPy may round differently
            assert same(play(remote), play(ExampleSimulation(scene, 3, **OPTIONS)))
        else:
            there, here = flat(play(remote)), flat(play(ExampleSimulation(scene, 3, **OPTIONS)))
            for where in here:
                np.testing.assert_allclose(there[where], here[where], atol=1e-9)
        assert remote.capabilities == ExampleSimulation.capabilities
        assert (remote.stats()["worker/shared_mb"] > 0) == (memory_mb > 0)

    def test_mujoco_is_bit_for_bit_the_same_out_of_process(self):
        seen = []
        for python in (None, sys.executable):
            env = make_env(num_envs=2, seed=4, randomisation="full", image_size=16, python=python)
            chunks = [env.reset()[0]]
            chunks += [env.step_chunk(np.stack([env.expert()] * 2, 1)) for _ in range(3)]
            seen.append(chunks)
        assert isinstance(env.simulation, RemoteSimulation)
        env.simulation.close()
        assert same(*(tuple(map(tuple_of, chunks)) for chunks in seen))

    def test_a_control_step_is_one_message(self, make):
        remote, ids = make(), np.arange(3)
        remote.configure(ids, configurations(3))
        before = remote.stats()["worker/calls"]
        for _ in range(4):
            remote.hide(ids, {})
            remote.step(ids, remote.joints(ids)[:, None], np.ones(3))
            remote.snapshot(ids[1:]), remote.joints(ids)
        assert remote.stats()["worker/calls"] - before == 4

    def test_pictures_that_are_held_do_not_change(self, make):
        remote, ids = make(), np.arange(3)
        remote.configure(ids, configurations(3))
        held = []
        for n in range(4):
            remote.configure(ids, configurations(3, first=10 * n))
            seen = remote.images(ids)
            held.append((seen, {camera: picture.copy() for camera, picture in seen.items()}))
        for seen, copied in held:
            assert same(seen, copied)
        assert (held[0][0]["side"] != held[3][0]["side"]).any()
        most = remote.stats()["worker/shared_mb"]
        del held, seen
        for _ in range(4):
            remote.images(ids)
        assert remote.stats()["worker/shared_mb"] <= most

    def test_only_the_contract_can_be_called(self, make):
        remote = make()
        for method in ("close", "__init__", "_pixels", "scene"):
            with pytest.raises(Rejected, match="no method"):
                remote._link.call([(method, [])])

    def test_a_mistake_comes_back_with_the_workers_traceback(self, troubled):
        remote, ids = troubled(), np.arange(3)
        remote.configure(ids, configurations(3))
        pid = remote.pid
        troubled.cause("step once mistake")
        with pytest.raises(RemoteError, match=r"(?s)in step.*ValueError: joints of the wrong kind"):
            remote.step(ids, remote.joints(ids)[:, None], np.ones(3))
        remote.step(ids, np.zeros((3, 1, 7)), np.ones(3))  # and nothing is lost
        assert remote.pid == pid


class TestLoss:
    @pytest.mark.parametrize(
        ("what", "words"),
        [
            ("segfault", "was killed by SIGSEGV"),
            ("speak", r"(?s)ended with code 3.*the last words"),
            ("lost", "the GPU is gone"),
            ("cuda", "illegal memory access"),
        ],
    )
    def test_what_was_under_way_is_lost_and_the_next_reset_revives(self, troubled, what, words):
        remote, ids = troubled(), np.arange(3)
        remote.configure(ids, configurations(3))
        before, pid = remote.snapshot(ids), remote.pid
        troubled.cause(f"step once {what}")
        with pytest.raises(SimulationLost, match=words):
            remote.step(ids, np.zeros((3, 1, 7)), np.ones(3))
        with pytest.raises(SimulationLost, match=r"environments \[1\] went with their worker"):
            remote.step(ids[1:2], np.zeros((1, 1, 7)), np.ones(1))
        assert not alive(pid)
        remote.configure(ids, configurations(3))
        assert same(remote.snapshot(ids), before)
        assert remote.stats()["worker/restarts"] == 1

    def test_killed_in_the_middle_of_a_step(self, troubled):
        remote, ids = troubled(), np.arange(3)
        remote.configure(ids, configurations(3))
        troubled.cause("step once hang")

        def kill():
            wait_until(troubled.hangs, PATIENCE, "the step")
            os.kill(remote.pid, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        with pytest.raises(SimulationLost, match=r"step.* was killed by SIGKILL"):
            remote.step(ids, np.zeros((3, 1, 7)), np.ones(3))
        thread.join()

    def test_a_hanging_worker_is_killed(self, troubled):
        remote, ids = troubled(worker={"call_seconds": 2.0}), np.arange(3)
        remote.configure(ids, configurations(3))
        pid = remote.pid
        troubled.cause("step once hang")
        with pytest.raises(SimulationLost, match=r"did not do step.* within 2 s"):
            remote.step(ids, np.zeros((3, 1, 7)), np.ones(3))
        assert not alive(pid)
        remote.configure(ids, configurations(3))

    def test_one_that_died_unnoticed_ends_the_others_episodes_too(self, make):
        remote, ids = make(), np.arange(3)
        remote.configure(ids, configurations(3))
        kill(remote.pid)
        with pytest.raises(SimulationLost):
            remote.configure(ids[:1], configurations(1))
        remote.configure(ids, configurations(3))

    def test_episodes_become_invalid_and_the_environment_goes_on(self, troubled):
        factory = partial(
            RemoteSimulation,
            target=troubled.target,
            worker={"python": sys.executable, **troubled.settings},
            **troubled.options,
        )
        env = TwinEnv(make_task("pick-and-place"), 3, factory, seed=4, image_size=16)
        first, _ = env.reset()
        actions = np.zeros((3, 2, 7), np.float32)
        assert not env.step_chunk(actions).invalid.any()
        configurations = env.configurations()
        troubled.cause("step once segfault")
        lost = env.step_chunk(actions)
        assert lost.invalid.all() and lost.done.all() and not lost.mask.any()
        again, _ = env.reset(options={"configurations": configurations})
        assert same(again, first)
        assert env.step_chunk(actions).mask.all()
        kill(env.simulation.pid)  # between chunks
        assert env.step_chunk(actions).invalid.all()
        env.reset()
        assert env.step_chunk(actions).mask.all()
        assert env.simulation.stats()["worker/restarts"] == 2
        env.simulation.close()

    def test_given_up_after_too_many_deaths(self, troubled, monkeypatch):
        monkeypatch.setattr(remote_link, "MAX_RESTARTS", 2)
        monkeypatch.setattr(remote_link, "BACK_OFF", 0.01)
        remote, ids = troubled(), np.arange(3)
        remote.configure(ids, configurations(3))
        troubled.cause("made always speak")
        kill(remote.pid)
        with pytest.raises(SimulationLost):
            remote.step(ids, np.zeros((3, 1, 7)), np.ones(3))
        with pytest.raises(ProcessDied, match=r"(?s)lost 3 times.*given up.*the last words"):
            remote.configure(ids, configurations(3))


class TestProcess:
    def test_a_factory_that_fails_says_where(self, troubled):
        troubled.cause("made once mistake")
        with pytest.raises(RemoteError, match=r"(?s)in __init__.*joints of the wrong kind"):
            troubled()

    @pytest.mark.parametrize(
        ("target", "words"),
        [
            ("twins.worker.example:Example", "has no 'Example'"),
            ("twins.worker.exampel:ExampleSimulation", "No module named 'twins.worker.exampel'"),
            ("twins.worker.example", "must be MODULE:FACTORY"),
        ],
    )
    def test_a_wrong_target(self, make, target, words):
        with pytest.raises(RemoteError, match=words):
            make(target=target)

    def test_a_worker_that_dies_while_it_makes_its_simulator(self, troubled):
        troubled.cause("made once speak")
        with pytest.raises(
            ProcessDied, match=r"(?s)make its simulator, ended with code 3.*last words"
        ):
            troubled()

    def test_a_python_that_lacks_what_is_needed(self, make, tmp_path):
        bare = tmp_path / "bare"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
        with pytest.raises(
            ProcessDied, match=r"(?s)ended with code 1.*No module named '(numpy|msgpack|zmq)'"
        ):
            make(worker={"python": str(bare / "bin" / "python")})

    @pytest.mark.parametrize(
        ("worker", "words"),
        [
            ({"python": "/opt/nowhere/bin/python"}, "no program that can be run"),
            ({"pyhton": "python3"}, "did you mean 'python'"),
            ({"python": None}, "either `python`.* or `address`"),
            ({"python": None, "address": "tcp://127.0.0.1:1"}, "needs `keys`"),
        ],
    )
    def test_wrong_settings(self, make, worker, words):
        with pytest.raises(ConfigError, match=words):
            make(worker=worker)

    def test_it_sees_none_of_our_packages_but_two(self, make):
        remote = make()
        found = Path(f"/proc/{remote.pid}/environ").read_bytes().decode().split("\0")
        (path,) = [line.partition("=")[2] for line in found if line.startswith("PYTHONPATH=")]
        assert sorted(entry.name for entry in Path(path).iterdir()) == ["twinrl", "twins"]

    def test_it_ends_with_its_parent_and_leaves_nothing(self, scene, tmp_path):
        code = f"""
            import sys, time
            from twins.backends.remote import RemoteSimulation
            scene = {scene!r}
            remote = RemoteSimulation(scene, 2, target={EXAMPLE!r}, worker={{"python": sys.executable}})
            print(remote.pid, remote._link._folder.path, flush=True)
            time.sleep(600)
        """
        before = shared_memory()
        parent = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, cwd=ROOT
        )
        with parent:
            pid, folder = parent.stdout.readline().decode().split()
            assert alive(int(pid))
            parent.kill()
        wait_until(lambda: not alive(int(pid)), PATIENCE, "the orphan's end")
        assert shared_memory() == before
        os.utime(folder, (0, 0))  # a young one might still be locked
        remote = RemoteSimulation(scene, 1, target=EXAMPLE, worker={"python": sys.executable})
        remote.close()
        assert not Path(folder).exists()

    def test_close_leaves_nothing(self, scene):
        before = shared_memory(), folders()
        remote = RemoteSimulation(
            scene, 3, target=EXAMPLE, worker={"python": sys.executable}, **OPTIONS
        )
        play(remote)
        pid = remote.pid
        assert alive(pid) and shared_memory() == before[0]  # it has no name at all
        remote.close()
        remote.close()
        assert not alive(pid)
        assert (shared_memory(), folders()) == before
        with pytest.raises(SimulationLost):
            remote.step(np.arange(3), np.zeros((3, 7)), np.ones(3))

    def test_one_that_is_forgotten_ends(self, scene):
        remote = RemoteSimulation(scene, 1, target=EXAMPLE, worker={"python": sys.executable})
        pid = remote.pid
        del remote
        wait_until(lambda: not alive(pid), PATIENCE, "the worker's end")


def shared_memory():
    return sorted(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else []


def folders():
    return sorted(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))


class ByHand:
    """A worker that is started like on another host."""

    def __init__(self, folder, *arguments, modules=ROOT):
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self._folder, self._arguments, self._modules = folder, arguments, modules
        self.start()

    def start(self):
        command = [sys.executable, "-m", "twins.worker", "--listen", self.address]
        command += ["--keys", str(self._folder / "worker-keys"), "--serve", EXAMPLE]
        environment = {k: v for k, v in os.environ.items() if k != "TWINRL_PARENT"}
        self.popen = subprocess.Popen(
            [*command, *self._arguments], cwd=self._modules, env=environment
        )

    @property
    def settings(self):
        keys = self._folder / "worker-keys" / "cluster.key"
        wait_until(keys.exists, PATIENCE, "the keys")
        return {"python": None, "address": self.address, "keys": str(keys)}

    def stop(self):
        self.popen.kill()
        self.popen.wait(PATIENCE)


@pytest.fixture
def by_hand(tmp_path):
    workers = []

    def start(*arguments, **more):
        workers.append(ByHand(tmp_path, *arguments, **more))
        return workers[-1]

    yield start
    for worker in workers:
        worker.stop()


class TestByHand:
    def test_clients_follow_each_other_and_share_the_simulator(self, make, by_hand, scene):
        worker = by_hand()
        first = make(worker=worker.settings)
        assert same(play(first), play(ExampleSimulation(scene, 3, **OPTIONS)))
        with pytest.raises(Rejected, match="serves another client, heard"):
            make(worker=worker.settings)
        pid = first.pid
        first.close()
        with pytest.raises(Rejected, match=r"made for count: 3.*start the worker again"):
            make(2, worker=worker.settings)
        second = make(worker=worker.settings)
        assert second.pid == pid == worker.popen.pid
        second.configure(np.arange(3), configurations(3))

    def test_started_again_it_is_found_again(self, make, by_hand, monkeypatch):
        monkeypatch.setattr(remote_channel, "PING_SECONDS", 0.1)
        worker, ids = by_hand(), np.arange(3)
        remote = make(worker=worker.settings)
        remote.configure(ids, configurations(3))
        worker.stop()
        worker.start()
        with pytest.raises(SimulationLost, match=r"restarted|started again"):
            remote.step(ids, np.zeros((3, 1, 7)), np.ones(3))
        remote.configure(ids, configurations(3))
        assert remote.pid == worker.popen.pid

    def test_a_silent_worker_is_lost(self, make, by_hand, monkeypatch):
        monkeypatch.setattr(remote_channel, "PING_SECONDS", 0.1)
        worker, ids = by_hand(), np.arange(3)
        remote = make(worker={**worker.settings, "silent_seconds": 1.0})
        remote.configure(ids, configurations(3))
        worker.stop()
        with pytest.raises(SimulationLost, match="no sign of life"):
            remote.step(ids, np.zeros((3, 1, 7)), np.ones(3))

    def test_options_of_the_command_line_come_first(self, make, by_hand):
        worker = by_hand("--options", '{"image_size": 32}')
        with pytest.raises(
            ConfigError, match="made image_size 32 where 16 was asked for: set image_size to 32"
        ):
            make(worker=worker.settings)

    @pytest.mark.parametrize(
        ("file", "old", "new", "words"),
        [
            ("twins/worker/__init__.py", "CONTRACT = 1", "CONTRACT = 99", "speaks contract 99"),
            ("twinrl/core/wire.py", "PROTOCOL = 2", "PROTOCOL = 98", "speaks 98"),
        ],
    )
    def test_another_version(self, make, by_hand, tmp_path, file, old, new, words):
        (tmp_path / "twinrl").mkdir()
        for name in ("twinrl", "twins"):
            for path in (ROOT / name).rglob("*.py"):
                copy = tmp_path / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(path.read_text())
        text = (tmp_path / file).read_text()
        assert old in text
        (tmp_path / file).write_text(text.replace(old, new))
        worker = by_hand(modules=tmp_path)
        with pytest.raises(Rejected, match=f"{words}.*run the same TwinRL on both sides"):
            make(worker=worker.settings)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--options", "[1]"], "no JSON object"),
            (["--options", "@nowhere.json"], "No such file"),
            (["--listen", "nonsense"], "cannot listen on nonsense"),
        ],
    )
    def test_a_wrong_command_line(self, tmp_path, arguments, words):
        command = [sys.executable, "-m", "twins.worker", "--listen", "tcp://127.0.0.1:0"]
        command += ["--keys", str(tmp_path / "keys"), "--serve", EXAMPLE, *arguments]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
        assert found.returncode == 2 and words in found.stderr, found.stderr


CARTPOLE = {
    "target": "twins.backends.gymnasium_env:GymnasiumEnv",
    "worker": {"python": sys.executable},
    "seed": 5,
}


class TestRemoteEnv:
    def test_it_is_the_env_that_it_stands_for(self):
        from twins.backends.gymnasium_env import GymnasiumEnv

        here = GymnasiumEnv("CartPole-v1", 3, seed=5)
        there = RemoteEnv("CartPole-v1", 3, **CARTPOLE)
        assert there.spec == here.spec
        for name in ("cameras", "image_size", "state_dim", "privileged_dim", "max_steps"):
            assert getattr(there, name) == getattr(here, name), name
        assert there.observation_space == here.observation_space
        assert there.action_space == here.action_space
        assert same(there.reset(seed=3)[0], here.reset(seed=3)[0])
        rng = np.random.default_rng(0)
        for _ in range(12):
            actions = rng.uniform(-1, 1, (3, 4, 7)).astype(np.float32)
            first, second = there.step_chunk(actions), here.step_chunk(actions)
            assert same(*(tuple_of(c._replace(invalid=None)) for c in (first, second)))
            again = {"reset_mask": first.done}
            assert same(there.reset(options=again)[0], here.reset(options=again)[0])
        assert there.configurations() == here.configurations()
        there.close()

    def test_its_episodes_are_invalid_when_the_worker_dies(self):
        env = RemoteEnv("CartPole-v1", 4, **CARTPOLE)
        env.reset()
        actions = np.zeros((4, 2, 7), np.float32)
        good = env.step_chunk(actions)
        assert good.mask.all() and not good.done.any()
        kill(env.pid)
        lost = env.step_chunk(actions)
        assert lost.invalid.all() and lost.done.all() and not lost.mask.any()
        assert same(lost.observation, good.observation)
        assert not env.step_chunk(actions).invalid.any()  # told once
        some = np.array([True, False, True, False])
        seen, _ = env.reset(options={"reset_mask": some})
        for key, value in seen.items():
            np.testing.assert_array_equal(value[~some], good.observation[key][~some])
        after = env.step_chunk(actions)
        np.testing.assert_array_equal(after.mask.all(axis=1), some)
        assert not after.invalid.any() and env.invalid_episodes == 4
        env.reset(options={"reset_mask": ~some})
        assert env.step_chunk(actions).mask.all()
        kill(env.pid)  # between the chunk and a reset of some
        env.reset(options={"reset_mask": some})
        np.testing.assert_array_equal(env.step_chunk(actions).invalid, ~some)
        assert env.stats()["worker/restarts"] == 2
        env.close()

    def test_one_started_by_hand_can_be_described_and_then_used(self, by_hand):
        worker = by_hand("--serve", CARTPOLE["target"])
        options = {"worker": {**worker.settings, "python": None}}
        spec = describe("CartPole-v1", backend="gymnasium", options=options)
        env = make_env("CartPole-v1", 5, backend="gymnasium", options=options)
        assert env.spec == spec and env.num_envs == 5
        assert env.pid == worker.popen.pid
        env.reset()
        assert env.step_chunk(np.zeros((5, 1, 7), np.float32)).mask.all()
        env.close()

    def test_wrong_calls(self):
        env = RemoteEnv("CartPole-v1", 2, **CARTPOLE)
        env.reset()
        with pytest.raises(ValueError, match=r"environments \[1\] are not finite"):
            env.step_chunk(np.array([[[0.0] * 7], [[np.nan] * 7]]))
        with pytest.raises(ValueError, match="expected"):
            env.step_chunk(np.zeros((3, 1, 7)))
        with pytest.raises(NotImplementedError, match="no scripted expert"):
            env.expert()
        with pytest.raises(RemoteError, match=r"(?s)Traceback.*CartPool"):
            RemoteEnv("CartPool-v1", 2, **CARTPOLE)
        env.close()


class TestTree:
    VALUE = {  # noqa: RUF012
        "none": None,
        "plain": [True, 7, -1.5, "text", b"bytes", {"a": (1, (2.0,))}],
        ("a", "pair"): np.arange(6, dtype=np.int16).reshape(2, 3),
        "strided": np.arange(12.0).reshape(3, 4)[:, 1:3],
        "empty": np.zeros((0, 3), bool),
        "scalars": (np.float64(0.1), np.int32(3), np.bool_(True)),
    }

    def test_values_come_back(self):
        packed = Packed(self.VALUE)
        found = unpack(packed.data, packed.body())
        assert found["plain"] == self.VALUE["plain"] and found["none"] is None
        assert found["scalars"] == (0.1, 3, True)
        for key in (("a", "pair"), "strided", "empty"):
            np.testing.assert_array_equal(found[key], self.VALUE[key])
            assert found[key].dtype == self.VALUE[key].dtype

    def test_what_lies_in_the_body_is_not_copied(self):
        body = Body(np.zeros(4096, np.uint8))
        inside = body.empty((3, 5), np.float32)
        inside[:] = 7.0
        packed = Packed([inside, np.ones(4)], body)
        packed.write(body.memory)
        found = unpack(packed.data, body.memory)
        assert np.shares_memory(found[0], inside)
        np.testing.assert_array_equal(found[1], 1.0)
        assert body.empty((4096,), np.uint8) is None

    @pytest.mark.parametrize("value", [object(), {1j}, np.array([object()]), lambda: 0])
    def test_nothing_else_is_sent(self, value):
        with pytest.raises(WireError):
            Packed([value])

    @pytest.mark.parametrize(
        "place", [[0, 9], [-8, 8], [4, 8], [0, -1], [2**70, 8], ["0", 8], [0.0, 8]]
    )
    def test_arrays_outside_of_the_body_are_refused(self, place):
        import msgpack

        payload = msgpack.packb(["<f8", [1], *place]) if place[0] != 2**70 else b"\xc1"
        with pytest.raises(WireError):
            unpack(msgpack.packb(msgpack.ExtType(1, payload)), np.zeros(8, np.uint8))

    def test_a_piece_is_free_when_the_last_view_is_gone(self):
        pieces = Pieces(1 << 20)
        piece, memory = pieces.borrow(1000)
        packed = Packed(np.arange(9.0))
        packed.write(memory)
        view = unpack(packed.data, memory)
        del memory
        row = view[3:].reshape(2, 3)[1]
        del view
        assert not piece.free
        other, _ = pieces.borrow(1000)
        assert other is not piece
        del row
        assert piece.free
        assert pieces.borrow(2 << 20) is None


class TestPipe:
    @pytest.fixture
    def ends(self):
        ends = [Pipe(end) for end in socket.socketpair()]
        yield ends
        for end in ends:
            end.close()

    @staticmethod
    def soon():
        """Give up after PATIENCE."""
        deadline = time.monotonic() + PATIENCE

        def look():
            assert time.monotonic() < deadline

        return look

    @pytest.mark.parametrize("sizes", [[0], [3, 0, 5], [7, 5 << 20, 1], []])
    def test_messages_arrive_whole_and_in_order(self, ends, sizes):
        messages = [[bytes([k + n]) * size for n, size in enumerate(sizes)] for k in range(3)]
        sender = threading.Thread(
            target=lambda: [ends[0].send(message, self.soon()) for message in messages]
        )
        sender.start()
        for message in messages:
            assert [bytes(frame) for frame in ends[1].receive(self.soon())] == message
        sender.join()

    def test_nobody_there(self, ends):
        ends[0].close()
        with pytest.raises(EOFError):
            ends[1].receive(self.soon())
        with pytest.raises(EOFError):
            ends[1].send([b"x"] * 1000, self.soon())

    def test_waiting_ends_when_it_is_not_worth_it(self, ends):
        def look():
            raise TimeoutError

        with pytest.raises(TimeoutError):
            ends[1].receive(look)
        with pytest.raises(TimeoutError):
            ends[1].send([bytes(64 << 20)], look)

    @pytest.mark.parametrize("words", [[1 << 40], [0], [8, 3], [16, 1, 99], [24, 1, 2, 0]])
    def test_damaged_lengths(self, words):
        first, second = socket.socketpair()
        with first:
            pipe = Pipe(second)
            first.sendall(np.array(words, "<u8").tobytes())
            with pytest.raises(WireError):
                pipe.receive(self.soon())
            pipe.close()


class TestPython38:
    """What a worker imports runs in Python 3.8 with three packages; `TWINRL_PYTHON38` tries one that is there."""

    @pytest.fixture(scope="class")
    def loaded(self):
        code = """
            import sys
            before = set(sys.modules)
            import twins.worker.__main__, twins.worker.example, twins.backends.contract, twinrl.env
            import twins.backends.lockstep
            for name in set(sys.modules) - before:
                print(name, getattr(sys.modules[name], "__file__", None))
        """
        command = [sys.executable, "-c", textwrap.dedent(code)]
        output = subprocess.check_output(command, cwd=ROOT, text=True, timeout=PATIENCE)
        return dict(line.split(" ", 1) for line in output.splitlines())

    def test_it_needs_three_packages(self, loaded):
        packages = {name.split(".")[0] for name, file in loaded.items() if "site-packages" in file}
        assert packages <= {"numpy", "msgpack", "zmq"}

    def test_its_syntax(self, loaded):
        ours = [
            Path(file) for name, file in loaded.items() if name.split(".")[0] in ("twinrl", "twins")
        ]
        assert len(ours) > 15
        for path in ours:
            tree = ast.parse(path.read_text(), str(path), feature_version=(3, 8))
            assert list(generics(tree)) == [], path


def generics(tree):
    """Lines that would evaluate what Python 3.8 has not: list[int] outside of annotations, zip(strict=)."""
    annotations = set()
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if getattr(node, field, None) is not None:
                annotations.update(ast.walk(getattr(node, field)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and node not in annotations:
            if getattr(node.value, "id", "") in {"tuple", "list", "dict", "set", "type"}:
                yield node.lineno
        elif isinstance(node, ast.keyword) and node.arg == "strict":
            yield node.lineno
