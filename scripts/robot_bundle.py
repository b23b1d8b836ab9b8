"""`make robot-bundle`: twinrl-robot and all that it needs in one file, for a robot's PC without internet."""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "packaging/robot"
GLIBC = 28  # 2.28: Debian 10, Ubuntu 20.04 and JetPack 5 have it or a newer one
PYTHONS = ("3.8", "3.9", "3.10", "3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")


def build(folder: Path) -> Path:
    """The wheel of this checkout."""
    command = [*_pip("wheel"), "--no-deps", "--no-build-isolation", "-w", str(folder), str(SOURCE)]
    subprocess.run(command, check=True)
    return next(folder.glob("twinrl_robot-*.whl"))


def download(wheel: Path, folder: Path, python: str, machine: str) -> None:
    """What the wheel needs there, and a pip: an old one does not know the names of newer wheels."""
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC, 16, -1)]
    platforms.append(f"manylinux2014_{machine}")
    command = [*_pip("download"), "--only-binary=:all:", "--python-version", python]
    command += [word for platform in platforms for word in ("--platform", platform)]
    subprocess.run([*command, "-d", str(folder), str(wheel), "pip"], check=True)


def pack(target: Path, wheels: Path, python: str, machine: str) -> None:
    """One archive of the wheels, their checksums and the script that installs them."""
    files = {f"wheels/{path.name}": path.read_bytes() for path in sorted(wheels.glob("*.whl"))}
    script = (SOURCE / "install.sh").read_text(encoding="utf-8")
    script = script.replace("@PYTHON@", python).replace("@MACHINE@", machine)
    files["install.sh"] = script.encode()
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}" for name, data in files.items()]
    files["SHA256SUMS"] = ("\n".join(lines) + "\n").encode()
    top = target.name[: -len(".tar.gz")]
    with tarfile.open(target, "w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"{top}/{name}")
            entry.size, entry.mode = len(data), 0o755 if name == "install.sh" else 0o644
            archive.addfile(entry, io.BytesIO(data))


def main() -> None:
    """Read the options, write the archive and its checksum."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--python", choices=PYTHONS, default=here, help="the PC's (%(default)s)")
    parser.add_argument("--machine", choices=MACHINES, default="x86_64", help="%(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder (%(default)s)")
    arguments = parser.parse_args()
    python, machine = arguments.python, arguments.machine
    with tempfile.TemporaryDirectory() as folder:
        wheels = Path(folder)
        wheel = build(wheels)
        try:
            download(wheel, wheels, python, machine)
        except subprocess.CalledProcessError:
            sys.exit(f"no complete set of wheels for Python {python} on {machine}: pip says why")
        version = wheel.name.split("-")[1]
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = f"twinrl-robot-{version}-python{python}-{machine}.tar.gz"
        target = arguments.out / name
        pack(target, wheels, python, machine)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    target.with_name(name + ".sha256").write_text(f"{digest}  {name}\n")
    print(f"{target}  {target.stat().st_size / 1e6:.1f} MB\nsha256 {digest}")


def _pip(command: str) -> list[str]:
    return [sys.executable, "-m", "pip", command, "-q", "--disable-pip-version-check"]


if __name__ == "__main__":
    main()
