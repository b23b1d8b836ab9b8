"""`twinrl status` and the progress of `twinrl launch`."""

import io
import json
import threading

import pytest
from rich.console import Console

from dashboard.collector import Collector
from dashboard.progress import Progress
from dashboard.status import command, status
from twinrl.core.errors import ConfigError
from twinrl.core.keys import Keys, create_keys
from twinrl.core.metrics import Reporter
from twinrl.core.sockets import wait_until

ANY = "tcp://127.0.0.1:0"
REPORTS = (
    ("actor", "twin-0", {"env/steps_per_s": 800.0, "env/success_id": 0.9, "policy/lag": 1}),
    ("actor", "twin-1", {"env/steps_per_s": 700.0, "env/success_id": 0.7, "policy/lag": 2}),
    ("learner", "learner", {"learner/updates_per_s": 12.5, "policy/version": 41}),
    (
        "replay",
        "replay",
        {
            "replay/transitions/twin": 480_000,
            "replay/waiting": 1,
            "replay/waiting_for": "twin-0 inserts",
            "replay/promise": "what is acknowledged survives",
        },
    ),
    ("robot", "gateway", {"robot/arm-1/state": "held", "robot/arm-1/minutes": 3.5}),
    ("run", "run", {"run/stage": "twin RL", "run/progress": 0.4, "eval/sft/twin/ood": 0.25}),
)


@pytest.fixture
def runs(tmp_path):
    """A folder of runs with one live run in it."""
    folder = tmp_path / "demo"
    create_keys(folder / "keys")
    collector = Collector(folder, ANY, ANY)
    thread = threading.Thread(target=collector.run)
    thread.start()
    keys = Keys.load(folder / "keys" / "cluster.key")
    reporters = [Reporter(collector.metrics_address, keys, r, n) for r, n, _ in REPORTS]
    for reporter, (_, _, data) in zip(reporters, REPORTS, strict=True):
        reporter.stats(data)
    reporters[0].event("error", "it broke", traceback="Traceback [of it]")
    wait_until(lambda: collector.record.snapshot()["number"] == 7, 10, "all reports")
    yield tmp_path
    for reporter in reporters:
        reporter.close()
    collector.stop()
    thread.join(10)


def test_status_shows_the_figures(runs):
    """The same figures as on the page, found without naming the run."""
    console = Console(file=io.StringIO(), width=120)
    assert status(None, runs, console=console) == 0
    text = console.file.getvalue()
    for expected in (
        "demo",
        "twin RL  40 %",
        "700",  # twin-0 has crashed: its last rate no longer counts
        "12.5",
        "41",
        "480k twin",
        "held",
        "25 %",
        "twin-0 inserts",
        "what is acknowledged survives",
        "crashed",
        "Traceback [of it]",
    ):
        assert expected in text, (expected, text)


def test_status_as_json(runs, capsys):
    """Programs read the same."""
    status("demo", runs, as_json=True)
    figures = json.loads(capsys.readouterr().out)
    assert figures["replay_promise"] == "what is acknowledged survives"
    assert figures["live"] and figures["policy_version"] == 41 and figures["policy_lag"] == 2
    assert figures["evaluations"]["sft"]["twin/ood"]["rate"] == 0.25
    assert figures["robots"]["arm-1"] == {"state": "held", "minutes": 3.5}
    assert len(figures["processes"]) == 6


def test_the_command_line(runs, capsys):
    """`twinrl status RUN --json`; an unknown run is an error that lists the known ones."""
    assert command(["demo", "--runs", str(runs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "demo"
    with pytest.raises(ConfigError, match="there are: "):
        command(["dmeo", "--runs", str(runs)])


def test_progress_without_a_terminal_is_plain_lines():
    """Logs get one line for each stage's begin and end, no control characters, no wrapping."""
    console = Console(file=io.StringIO(), width=40)
    with Progress("http://127.0.0.1:8265/?token=abc", console) as progress:
        progress.stage("supervised fine-tuning", 1500, "steps")
        for i in range(1500):
            progress.update(i + 1, loss=0.125)
        progress.line("saved a checkpoint [red] " + "x" * 80)
        progress.stage("evaluation")
        progress.update(success="81 %")
    lines = console.file.getvalue().splitlines()
    assert [line.split("] ", 1)[1] for line in lines] == [
        "dashboard: http://127.0.0.1:8265/?token=abc",
        "supervised fine-tuning: 1,500 steps ...",
        "saved a checkpoint [red] " + "x" * 80,
        "supervised fine-tuning: 1,500/1,500 steps in 0:00  loss 0.125",
        "evaluation ...",
        "evaluation: done in 0:00  success 81 %",
    ]


def test_progress_in_a_terminal_shows_bars_and_gives_it_back():
    """Bars, the address, and the cursor afterwards."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    progress = Progress("http://127.0.0.1:8265", console)
    progress.stage("twin RL", 300_000, "steps")
    progress.update(150_000, success_ood="42 %")
    progress.line("a line above")
    progress.close()
    progress.close()
    text = console.file.getvalue()
    for expected in ("twin RL", "150k/300k steps", "success ood 42 %", "127.0.0.1:8265", "a line"):
        assert expected in text
    assert text.rstrip().endswith("\x1b[?25h"), "the cursor is shown again"


def test_a_stage_that_fails_is_not_ticked_off():
    """An exception passes through and its stage is said to have stopped, not to be done."""
    console = Console(file=io.StringIO(), width=80)
    with pytest.raises(RuntimeError), Progress(None, console) as progress:
        progress.stage("twin RL", 100, "steps")
        progress.update(40)
        raise RuntimeError("broke")
    assert "twin RL: stopped at 40/100 steps after 0:00" in console.file.getvalue()


def test_progress_is_used_in_order():
    with pytest.raises(ValueError, match="before the first stage"):
        Progress(None, Console(file=io.StringIO())).update(1)
