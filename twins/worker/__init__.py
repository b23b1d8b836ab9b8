"""The side of an out-of-process simulator: serves one Simulation or Env to TwinRL from a Python of its own.

    /opt/simulator/bin/python -m twins.worker --help

It needs numpy, msgpack, pyzmq and the simulator, and runs on Python 3.8 or newer. `twins.backends.remote` is the
other side; docs/simulators.md describes both.
"""

CONTRACT = 1  # of what the two sides say to each other; raised when old and new would misunderstand
