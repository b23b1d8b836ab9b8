"""2,048 state-based twins in 2 Ray actors stream through the replay service for a minute."""

import time

import numpy as np
import pytest
import ray

from buffer_service.client import Cursor, Reader
from deploy.launch import Job
from deploy.ray_weights import RayWeightSink
from deploy.run_folder import RunFolder
from policies.registry import make_policy
from policies.weights import to_arrays
from twinrl.config import make_config

SECONDS = 60.0
ACTORS, ENVS, ROUND, MAX_LAG = 2, 1024, 4, 1


@pytest.mark.timeout(300)
def test_two_thousand_twins_for_a_minute(tmp_path, capsys):
    config = make_config(
        {
            "name": "wide",
            "runs": str(tmp_path / "runs"),
            "task": {"cameras": []},
            "twins": {"actors": ACTORS, "envs": ENVS},
            "policy": {"hidden": 64, "latent": 32, "critics": 0},
            "ray": {"object_store_mb": 100},
            "dashboard": {"port": 0},
        }
    )
    job = Job(config, RunFolder.create(config))
    try:
        job.start()
        rates = _stream(job)
    finally:
        job.close()
    with capsys.disabled():
        print(
            f"\n2,048 twins in 2 actors: {rates['steps_per_s']:.0f} control steps/s through the replay "
            f"service, {rates['versions']} versions, policy lag mean {rates['lag_mean']:.2f} max "
            f"{rates['lag_max']}"
        )
    assert rates["steps_per_s"] > 200
    assert rates["versions"] >= 3
    assert (
        rates["lag_max"] <= MAX_LAG + 1
    )  # a round is at most one version old, its segments cross the next
    assert rates["repeats"] == 0


def _stream(job):
    """Consume as a learner would: every segment once, a new version after each round."""
    sink = RayWeightSink(str(job.run.path))
    arrays = {k: v.copy() for k, v in to_arrays(make_policy(job.topology["job"]["policy"])).items()}
    sink.publish(0, arrays)
    collecting = [
        actor.collect.remote(
            start_version=0, steps=10**9, round_chunks=ROUND, max_lag=MAX_LAG, randomisation="none"
        )
        for actor in job.cluster.twins
    ]
    reader = Reader(job.topology["replay"], job.run.keys("cluster"), run_dir=job.run.path)
    cursor = Cursor(reader, "wide", source="twin", position=0)
    version, steps, lags, seen = 0, 0, [], set()
    repeats = 0
    began = None
    while began is None or time.monotonic() - began < SECONDS:
        segments = cursor.take(min_segments=ACTORS * ENVS, timeout=60.0)
        began = began or time.monotonic()  # the first round warms up
        for segment in segments:
            name = (segment.header["writer"], segment.header["sequence"])
            repeats += name in seen
            seen.add(name)
            lags.append(version - segment.columns["policy_version"])
        steps += sum(segment.steps for segment in segments)
        version += 1
        sink.publish(version, arrays)
    seconds = time.monotonic() - began
    ray.get([actor.stop.remote() for actor in job.cluster.twins], timeout=30)
    ray.get(collecting, timeout=90)
    reader.close()
    lags = np.concatenate(lags)
    return {
        "steps_per_s": steps / seconds,
        "versions": version,
        "lag_mean": float(lags.mean()),
        "lag_max": int(lags.max()),
        "repeats": repeats,
    }
