"""Provenance: complete, plain, and never a reason to fail."""

import os
import shutil
import socket
import subprocess
import time

import pytest

from twinrl import __version__
from twinrl.core import provenance as module
from twinrl.core import wire
from twinrl.core.provenance import commit, provenance

AUTHOR = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")


def git(folder, *words):
    done = subprocess.run(
        ["git", "-C", str(folder), *AUTHOR, *words], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one commit on the branch `work/a`."""
    if shutil.which("git") is None:
        pytest.skip("no git here")
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    git(folder, "checkout", "-q", "-b", "work/a")
    git(folder, "commit", "-q", "--allow-empty", "-m", "first")
    return folder


def test_it_says_who_where_when_and_what():
    before = time.time()
    found = provenance()
    assert set(found) == {"host", "pid", "user", "version", "commit", "time"}
    assert found["host"] == socket.gethostname() and found["pid"] == os.getpid()
    assert found["version"] == __version__ and found["user"]
    assert before <= found["time"] <= time.time()
    header, _ = wire.unpack([bytes(f) for f in wire.pack({"provenance": found})])
    assert header["provenance"] == found


def test_callers_cannot_change_the_next_answer():
    provenance()["host"] = "elsewhere"
    assert provenance()["host"] == socket.gethostname()


def test_a_user_without_a_name_is_a_number(monkeypatch):
    def no_name():
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(module.getpass, "getuser", no_name)
    assert module._user() == str(os.getuid())


def test_the_commit_is_that_of_git(checkout):
    expected = git(checkout, "rev-parse", "HEAD")
    assert commit(checkout) == expected
    git(checkout, "pack-refs", "--all")
    assert not (checkout / ".git" / "refs" / "heads" / "work" / "a").exists()
    assert commit(checkout) == expected
    git(checkout, "checkout", "-q", "--detach")
    assert commit(checkout) == expected


def test_the_commit_of_a_worktree(checkout, tmp_path):
    git(checkout, "worktree", "add", "-q", "-b", "other", str(tmp_path / "other"))
    git(tmp_path / "other", "commit", "-q", "--allow-empty", "-m", "second")
    assert commit(tmp_path / "other") == git(tmp_path / "other", "rev-parse", "HEAD")
    assert commit(tmp_path / "other") != commit(checkout) != ""


@pytest.mark.parametrize("head", [b"", b"ref:", b"ref: refs/heads/none", b"\xff\xfe", b"zz" * 20])
def test_what_is_no_checkout_has_no_commit(tmp_path, head):
    assert commit(tmp_path) == ""
    (tmp_path / ".git").mkdir()
    assert commit(tmp_path) == ""
    (tmp_path / ".git" / "HEAD").write_bytes(head)
    assert commit(tmp_path) == ""
