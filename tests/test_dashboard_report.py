"""The report of a synthetic run: every number is in it, and what is absent is said."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ET

import av
import numpy as np
import pytest

from dashboard.report import write_report
from dashboard.statistics import paired_gain, success_rate

STAGES = ("sft", "stage1", "stage2", "stage3")
RATES = {
    "sft": (0.62, 0.18, 0.5, 0.12),
    "stage1": (0.66, 0.52, 0.55, 0.36),
    "stage2": (0.95, 0.86, 0.8, 0.64),
    "stage3": (0.97, 0.9, 0.93, 0.84),
}
PLACES = [(world, region) for world in ("twin", "real") for region in ("id", "ood")]
EPISODES = 200
COMMAND = "twinrl launch configs/demo.yaml twins.actors=2"


def placements(region):
    """The same resets for every stage: ID in a square of 12 cm, OOD around it on 36 x 28 cm."""
    generator = np.random.default_rng(7)
    if region == "id":
        return generator.uniform((0.39, -0.06), (0.51, 0.06), (EPISODES, 2))
    points = generator.uniform((0.27, -0.14), (0.63, 0.14), (4 * EPISODES, 2))
    outside = np.abs(points - (0.45, 0)).max(1) > 0.06
    return points[outside][:EPISODES]


def outcomes(stage, world, region):
    """Hard resets are hard for every stage, as in a real evaluation; far placements are harder."""
    generator = np.random.default_rng(len(world) + len(region))
    hardness = generator.random(EPISODES)
    far = np.abs(placements(region) - (0.45, 0)).max(1)
    order = np.argsort(0.5 * hardness + 3 * far)
    successes = np.zeros(EPISODES, int)
    rate = RATES[stage][PLACES.index((world, region))]
    successes[order[: round(rate * EPISODES)]] = 1
    return successes.tolist()


def video(path, seconds=2):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        for i in range(10 * seconds):
            image = np.full((180, 320, 3), (40, 60, 80), np.uint8)
            image[80:110, 10 + 12 * i : 40 + 12 * i] = (240, 180, 60)
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "pick-and-place"
    folder.mkdir()
    figures = {"wall_s": 1724.5, "robot_minutes": 8.25, "takeovers": 17}
    figures.update(intervention_minutes=1.46, intervention_rate=0.183)
    with (folder / "evaluations.jsonl").open("w") as file:
        for i, stage in enumerate(STAGES):
            for world, region in PLACES:
                successes = outcomes(stage, world, region)
                cell = {"stage": stage, "world": world, "region": region, "n": EPISODES}
                cell |= {"successes": successes, "placements": placements(region).tolist()}
                file.write(json.dumps({**cell, "policy_version": 40 * i}) + "\n")
                rate = success_rate(successes)
                key = f"{stage}_{world}_{region}"
                figures |= {key: rate.rate, f"{key}_low": rate.low, f"{key}_high": rate.high}
    figures |= {
        "gain_stage2_real": 0.265,
        "gain_stage2_real_low": 0.21,
        "gain_stage2_real_high": 0.32,
    }
    about = {"machine": {"cpu": "2 cores <test>", "gpu": None}, "command": COMMAND}
    (folder / "report.json").write_text(json.dumps({**about, "figures": figures}))
    (folder / "config.yaml").write_text("name: pick-and-place\ntwins:\n  actors: 2\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for second in range(600):
            share = second / 600
            stage, loss = ("sft", "flow") if second < 200 else ("ppo", "value")
            data = {
                "learner": {
                    "learner/stage": stage,
                    "learner/updates": 10 * second,
                    "learner/updates_per_s": 12.5,
                    f"loss/{loss}": 1 / (1 + second % 200),
                },
                "actor": {"env/steps_per_s": 777.0, "env/success_id": 0.6 + 0.3 * share}
                | {"env/success_ood": 0.2 + 0.6 * share},
            }
            for role, values in data.items():
                message = {"kind": "stats", "role": role, "name": role, "time": 1e9 + second}
                file.write(json.dumps({**message, "data": values}) + "\n")
    video(folder / "video.mp4")
    return folder


def test_every_number_is_in_the_report(run_dir):
    """Rates and intervals of all sixteen cells, gains with intervals, robot time, throughput, origin."""
    path = write_report(run_dir)
    html = path.read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    for stage in STAGES:
        for world, region in PLACES:
            rate = success_rate(outcomes(stage, world, region))
            shown = f"{100 * rate.rate:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}] of 200"
            assert shown in text, (stage, world, region)
            assert f"{stage}_{world}_{region}" in text
    for world in ("twin", "real"):
        before = outcomes("stage1", world, "id") + outcomes("stage1", world, "ood")
        after = outcomes("stage2", world, "id") + outcomes("stage2", world, "ood")
        gain = paired_gain(before, after)
        assert f"{100 * gain.gain:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] 400" in text
    for expected in (
        "28:44",
        "8.25",
        "17",
        "1.5 min, 18% of the arms' steps, by a person",
        "777",
        "12.5",
        COMMAND,
        "actors: 2",
        "2 cores &lt;test",
    ):
        assert expected in text, expected
    assert "0.265 [0.21, 0.32]" in text
    assert "Missing from this report" not in text


def test_the_report_is_one_file_that_opens(run_dir):
    """Nothing is fetched; pictures and the video inside are whole."""
    html = write_report(run_dir).read_text()
    assert (
        not re.findall(r'(?:src|href)="(?!data:)', html) and "http" not in html.split("base64")[0]
    )
    found = re.findall(r'src="data:([\w/+]+);base64,([^"]+)"', html)
    kinds = [kind for kind, _ in found]
    assert kinds.count("image/svg+xml") == 2 and kinds.count("image/png") == 1
    for kind, data in found:
        content = base64.b64decode(data)
        if kind == "image/svg+xml":
            assert ET.fromstring(content).tag.endswith("svg")
        elif kind == "image/png":
            assert content.startswith(b"\x89PNG")
        else:
            assert kind == "video/mp4"
            with av.open(io.BytesIO(content)) as container:
                assert sum(1 for _ in container.decode(video=0)) == 20


def test_an_empty_folder_gives_an_honest_report(tmp_path):
    """Each part says that it has nothing, and the files are named."""
    html = write_report(tmp_path).read_text()
    for said in (
        "success is unknown",
        "No placements",
        "No learning curves",
        "No throughput",
        "No video was recorded",
        "Missing from this report",
        "report.json",
        "evaluations.jsonl",
        "metrics.jsonl",
        "config.yaml",
    ):
        assert said in html, said


def test_figures_without_episodes_are_shown_as_reported(tmp_path):
    """report.json alone fills the table; a broken evaluation line is named."""
    figures = {"stage2_real_ood": 0.5, "stage2_real_ood_low": 0.4, "stage2_real_ood_high": 0.6}
    (tmp_path / "report.json").write_text(json.dumps(figures))
    (tmp_path / "evaluations.jsonl").write_text('{"stage": "sft"}\n')
    html = write_report(tmp_path).read_text()
    assert "<b>50.0 %</b><small>[40.0, 60.0]</small>" in html
    assert "evaluations.jsonl, line 1" in html and "not evaluated" in html


def test_passwords_stay_out_of_the_report(tmp_path):
    """A report is handed on; the addresses in configuration and command stay readable."""
    url, query = "redis://me:s3cret@host:6379/0", "unix:///redis.sock?password=s3cret&db=1"
    (tmp_path / "config.yaml").write_text(f"redis:\n  url: {url}\nother: {query}\n")
    command = ["twinrl", "launch", f"redis.url={url}"]
    (tmp_path / "report.json").write_text(json.dumps({"command": command, "figures": {}}))
    html = write_report(tmp_path).read_text()
    assert "s3cret" not in html
    assert "redis://me:***@host:6379/0" in html and "password=***&amp;db=1" in html
