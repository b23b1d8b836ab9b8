"""The robot PC's part of TwinRL as a distribution of its own, `twinrl-robot`: the same files, few dependencies."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
ROOT = Path("../..")  # distutils wants paths that are relative to this folder
PACKAGES = find_packages(
    str(HERE / ROOT), include=["twinrl", "twinrl.core", "robot_bridge", "robot_bridge.*"]
)
# What stays on the cluster. All else comes along, so a new driver or operator needs no line here.
CLUSTER = {
    "twinrl.config",
    "twinrl.env",
    "twinrl.weights",
    "twinrl.weights_client",
    "twinrl.weights_delta",
    "twinrl.weights_publisher",
    "twinrl.weights_slots",
    "twinrl.core.arguments",
    "twinrl.core.checksum",
    "twinrl.core.metrics",
    "robot_bridge.desk",
    "robot_bridge.episodes",
    "robot_bridge.gateway",
    "robot_bridge.incoming",
    "robot_bridge.leases",
    "robot_bridge.policy_link",
    "robot_bridge.relay",
    "robot_bridge.starts",
    "robot_bridge.weights_relay",
    "robot_bridge.drivers.sim",
    "robot_bridge.drivers.sim_arm",
}


class RobotModules(build_py):
    """Leaves out what stays on the cluster, and what an earlier build has left."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [each for each in found if f"{package}.{each[1]}" not in CLUSTER]


class NoSource(sdist):
    """An sdist would hold none of the files, which lie two folders up."""

    def run(self):
        raise SystemExit("twinrl-robot has no sdist: build a wheel from the whole checkout")


def version():
    """The whole's: a robot joins a run of the same series only."""
    path = HERE / ROOT / "twinrl/__init__.py"
    if not path.exists():
        raise SystemExit(
            f"no checkout around {HERE}: pip older than 21.3 builds in a copy, upgrade it"
        )
    text = path.read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


setup(
    name="twinrl-robot",
    version=version(),
    description="Attach a robot to a TwinRL run: what its PC needs, without torch or Ray",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.8",
    packages=PACKAGES,
    package_dir={name: str(ROOT / name.replace(".", "/")) for name in PACKAGES},
    install_requires=[
        "numpy>=1.20",
        "msgpack>=1.0",
        "pyzmq>=26",
        "simplejpeg>=1.7",
    ],
    cmdclass={"build_py": RobotModules, "sdist": NoSource},
    entry_points={"console_scripts": ["twinrl = twinrl.main:main"]},
)
