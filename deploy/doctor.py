"""`twinrl doctor`: checks this machine and says how to mend what is missing."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from robot_bridge import doctor as robot_doctor
from twinrl.findings import FAILED, OK, WARNING, Finding, examine


def check_python() -> Finding:
    """Python's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(OK, f"Python {version} at {sys.executable}")


def check_redis() -> Finding:
    """An embedded Redis starts and answers."""
    from buffer_service.embedded_redis import EmbeddedRedis

    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedRedis(Path(folder))
        try:
            version = server.start().info("server")
            name = version.get("server_name", "redis")
            number = version.get("valkey_version") or version["redis_version"]
            return Finding(OK, f"embedded {name} {number} starts and answers")
        finally:
            server.stop()


def check_ray() -> Finding:
    """Ray can be imported and its shared memory is large enough."""
    import ray

    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    if free < 1 << 30:
        return Finding(
            WARNING,
            f"Ray {ray.__version__}; /dev/shm has {free >> 20} MB free",
            "in a container start it with --shm-size=2g, or lower ray.object_store_mb",
        )
    return Finding(OK, f"Ray {ray.__version__}; /dev/shm has {free >> 20} MB free")


def check_gpu() -> Finding:
    """A GPU is used if there is one."""
    import torch

    gpus = ""
    if shutil.which("nvidia-smi"):
        result = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
        gpus = result.stdout.strip()
    if gpus and not torch.cuda.is_available():
        return Finding(
            FAILED,
            f"{len(gpus.splitlines())} GPU(s), but torch {torch.__version__} cannot use them",
            "make clean && make setup TORCH=cuda",
        )
    if gpus:
        return Finding(OK, f"torch {torch.__version__} sees {torch.cuda.get_device_name(0)}")
    return Finding(OK, f"no GPU; torch {torch.__version__} on {torch.get_num_threads()} threads")


def check_rendering() -> Finding:
    """The ray tracer renders a picture with something in it."""
    import twins

    began = time.monotonic()
    env = twins.make_env("pick-and-place", 1, seed=0)
    observation, _ = env.reset()
    image = observation["observation.images.side"]
    env.close()
    if image.std() < 1:
        return Finding(
            FAILED, "the ray tracer renders empty images", "report this with your CPU type"
        )
    return Finding(OK, f"ray tracer works ({time.monotonic() - began:.1f} s for the first picture)")


def check_ports() -> Finding:
    """Local sockets can be opened."""
    from twinrl.core.sockets import free_port

    return Finding(OK, f"local TCP ports are free, {free_port()} for one")


def check_disk() -> Finding:
    """There is room for a run."""
    free = shutil.disk_usage(".").free
    if free < 5 << 30:
        return Finding(
            WARNING, f"{free >> 20} MB free here", "a demo run writes up to 3 GB to runs/"
        )
    return Finding(OK, f"{free >> 30} GB free here")


def check_memory() -> Finding:
    """There is memory for the demo."""
    import psutil

    available = psutil.virtual_memory().available
    if available < 5 << 30:
        return Finding(
            WARNING,
            f"{available >> 20} MB of memory available",
            "the demo takes up to 6 GB; lower twins.envs and pretrain.scenes",
        )
    return Finding(OK, f"{available >> 30} GB of memory available, {os.cpu_count()} cores")


def check_browser() -> Finding:
    """A browser, for the page and for its tests."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return Finding(OK, f"{name} is here (used by the tests of the page)")
    return Finding(WARNING, "no Chromium; tests of the page are skipped", "apt install chromium")


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": check_python,
    "redis": check_redis,
    "ray": check_ray,
    "gpu": check_gpu,
    "rendering": check_rendering,
    "ports": check_ports,
    "disk": check_disk,
    "memory": check_memory,
    "browser": check_browser,
}


def command(argv: list[str]) -> int:
    """The command `twinrl doctor`; exit code 1 when a check failed."""
    if "--robot" in argv:
        return robot_doctor.command(argv)
    parser = argparse.ArgumentParser(
        prog="twinrl doctor",
        description="Check this machine and say how to mend what is missing.",
        epilog="examples:\n  twinrl doctor\n  twinrl doctor --only redis --only gpu\n  twinrl doctor --json\n"
        "  twinrl doctor --robot --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", choices=list(CHECKS), help="just this check")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--robot", action="store_true", help="check a robot's PC instead")
    arguments = parser.parse_args(argv)
    checks = {name: CHECKS[name] for name in arguments.only or CHECKS}
    return examine(checks, arguments.json, "make setup")
