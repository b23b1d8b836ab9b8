"""The line of `benchmarks.rough_link` loses, doubles and reorders packets, where namespaces are allowed."""

import json
import subprocess
import sys

import pytest

from benchmarks import _packets

pytestmark = pytest.mark.timeout(90)
# In a process of its own: it leaves the network namespace of the tests.
TALK = """
import json, socket, subprocess, sys, threading, time
from benchmarks import _packets as p
p.new_network()
line = p.Line()
echo = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('%s', 5000)); print(1, flush=True)\\n" % p.THERE
echo += "while True: s.sendto(*s.recvfrom(2000))"
other = subprocess.Popen([*line.enter, sys.executable, "-c", echo], stdout=subprocess.PIPE)
other.stdout.readline()
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(1.0)
found = {}
for name, weather, gap in (
    ("calm", ("heal",), 0.001),
    ("bad", ("loss 0.1", "double 0.1", "delay 0.001 0.01"), 0.0005),
    ("cut", ("cut",), 0.0005),
    ("healed", ("heal", "loss 0", "double 0", "delay 0 0"), 0.001),
):
    for each in weather:
        line.tell(each)
    back = []
    def hear():
        while True:
            try:
                back.append(int(s.recvfrom(100)[0]))
            except TimeoutError:
                return
    thread = threading.Thread(target=hear)
    thread.start()
    for number in range(500):
        s.sendto(b"%d" % number, (p.THERE, 5000))
        time.sleep(gap)
    thread.join()
    late = sum(a > b for a, b in zip(back, back[1:]))
    found[name] = [len(set(back)), len(back), late]
print(json.dumps([found, line.counts()]))
other.kill()
line.close()
"""


@pytest.fixture(scope="module")
def allowed():
    reason = _packets.why_not()
    if reason:
        pytest.skip(f"no network namespace with a tunnel device here: {reason}")


def test_packets_are_lost_doubled_and_reordered(allowed):
    done = subprocess.run([sys.executable, "-c", TALK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, counts = json.loads(done.stdout.splitlines()[-1])
    assert found["calm"] == [500, 500, 0] and found["healed"] == [500, 500, 0]
    assert found["cut"][1] == 0
    unique, all_, late = found["bad"]
    # There and back: 0.9^2 arrive, 1.1^2 - 1 more of these twice.
    assert 500 * 0.70 < unique < 500 * 0.93 and all_ > 1.05 * unique and late > 50
    assert counts["lost"] > 500 and counts["doubled"] > 40 and counts["reordered"] > 50
