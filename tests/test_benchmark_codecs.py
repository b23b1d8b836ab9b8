"""The benchmark of codecs runs, and the defaults are what its results say."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import codecs
from twinrl.core import codec

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/codecs.json"


def test_it_measures_every_codec_on_every_scene(capsys):
    generator = np.random.default_rng(0)
    columns = [generator.integers(0, 40, (17, 16, 16, 3), np.uint8) for _ in range(2)]
    found = codecs.report({16: columns}, 1)
    assert len(found["rows"]) == len(codec.CODECS) * 4
    assert {row["codec"] for row in found["rows"]} == set(codec.CODECS)
    assert all(row["ratio"] > 0.9 for row in found["rows"] if codec.CODECS[row["codec"]].lossless)
    assert found["figures"]["raw_ratio_16_step_clean"] == 1.0
    assert len(found["best"]) == 4 * len(codecs.LINKS)
    json.dumps(found)
    assert "zstd-delta" in capsys.readouterr().out


def test_a_link_is_as_fast_as_the_slowest_part():
    row = {"ratio": 2.0, "encode_MB_per_s": 500.0, "decode_MB_per_s": 300.0}
    assert [codecs.effective(row, link) for link in (6.0, 118.0, 1e4)] == [12.0, 236.0, 300.0]


@pytest.mark.parametrize(
    ("link", "chosen"),
    [("loopback", codec.SAME_HOST), ("1GbE", codec.ETHERNET), ("wifi", codec.WIFI)],
)
def test_defaults_are_near_the_best_lossless_codec(link, chosen):
    """For noisy frames of 128 pixels, whether a frame is kept each step or each chunk."""
    assert codec.CODECS[chosen].lossless
    rows = [
        row
        for row in json.loads(RESULTS.read_text())["rows"]
        if row["size"] == 128 and row["noise"] == "mild" and codec.CODECS[row["codec"]].lossless
    ]
    for interval in codecs.EVERY:
        rates = {row["codec"]: row[f"{link}_MB_per_s"] for row in rows if row["frames"] == interval}
        assert rates[chosen] >= 0.95 * max(rates.values())


def test_the_default_for_storage_halves_noisy_frames():
    assert codec.CODECS[codec.STORAGE].lossless
    rows = json.loads(RESULTS.read_text())["rows"]
    stored = [row["ratio"] for row in rows if row["codec"] == codec.STORAGE and row["size"] == 128]
    assert min(stored) > 1 / 0.6
