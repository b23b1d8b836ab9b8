"""What is shipped, and what each part drags in."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = {
    "twinrl", "twins", "policies", "buffer_service", "actors", "learner", "robot_bridge", "dashboard", "deploy",
}  # fmt: skip


def test_the_wheel_holds_exactly_our_packages(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    result = subprocess.run(
        [*command, "-w", str(tmp_path), str(ROOT)], capture_output=True, text=True
    )
    if "No module named 'setuptools'" in result.stderr:
        pytest.fail("setuptools is missing; it is pinned in constraints.txt")
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
    tops = {name.split("/")[0] for name in files if ".dist-info" not in name}
    assert tops == NAMES
    assert any(name.startswith("dashboard/page/") and name.endswith(".html") for name in files)


def test_the_import_rules_hold():
    result = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


def test_the_import_rules_name_every_package():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert set(config["root_packages"]) == NAMES


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("twinrl.main", {"torch", "ray", "mujoco", "pydantic", "aiohttp"}),
        ("robot_bridge.bridge", {"torch", "ray", "mujoco", "pydantic", "redis"}),
        ("robot_bridge.gateway", {"torch", "ray", "mujoco"}),
        ("robot_bridge.teleop", {"torch", "ray", "mujoco", "pydantic", "redis", "pyspacemouse"}),
        ("buffer_service.service", {"torch", "ray", "mujoco"}),
        ("dashboard.server", {"torch", "ray", "mujoco"}),
        ("twins", {"torch", "ray"}),
    ],
)
def test_a_role_loads_only_what_it_needs(module, forbidden):
    code = f"import sys, {module}; print(' '.join(m for m in {forbidden!r} if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_no_module_hides_the_standard_library():
    modules = {
        path.stem
        for name in NAMES
        for path in (ROOT / name).rglob("*.py")
        if path.parent == ROOT / name and path.stem not in ("__init__", "__main__")
    }
    tops = NAMES & set(sys.stdlib_module_names)
    assert tops == set()
    assert modules  # the glob found something
