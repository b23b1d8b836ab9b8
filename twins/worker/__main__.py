"""The worker's command line."""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any, Dict, List

from twinrl.core.errors import ConfigError, TwinRLError
from twinrl.core.keys import Keys, create_keys
from twinrl.parent import PARENT, die_with_parent
from twins.worker.listener import Listener
from twins.worker.pipe import Pipe
from twins.worker.service import Service, serve

HELP = """
examples:
  On the host of the cluster nothing is started by hand: `twins.python: /opt/simulator/bin/python`.

  On another host, beside its simulator (the folder is made, with keys for both sides):
    /opt/simulator/bin/python -m twins.worker --listen tcp://0.0.0.0:5600 --keys worker-keys \\
        --serve twins.worker.example:ExampleSimulation
  Then copy worker-keys/cluster.key to the cluster and set there
    twins.options.worker: {address: "tcp://HOST:5600", keys: cluster.key}

  With an option that this host decides about:
    ... --options '{"device": "cuda:1"}'      or      --options @options.json

The worker serves one client and one simulator, made when the client has said for which task and how many.
It needs numpy, msgpack, pyzmq and the simulator; twinrl and twins may be copied or linked into a folder of
PYTHONPATH without being installed.
"""


def main(arguments: List[str] | None = None) -> int:
    """Run the worker; 2 for a wrong command line."""
    parser = argparse.ArgumentParser(
        prog="python -m twins.worker",
        description="Serve a simulator to TwinRL from a Python of its own.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--listen", metavar="ADDRESS", help="ipc://FILE or tcp://HOST:PORT")
    add(
        "--keys",
        metavar="FOLDER",
        type=Path,
        default=Path("worker-keys"),
        help="the connection's keys, made if there are none",
    )
    add("--serve", required=True, metavar="MODULE:FACTORY", help="what makes the Simulation or Env")
    add(
        "--options",
        default="{}",
        metavar="JSON",
        help="override the client's options; @FILE reads a file",
    )
    # Of TwinRL itself, which starts workers on its own host: the socket to answer on, and the folder to work in.
    add("--pipe", type=int, help=argparse.SUPPRESS)
    add("--directory", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.listen is None and given.pipe is None:
        parser.error("--listen is missing, such as --listen tcp://0.0.0.0:5600")
    logging.basicConfig(
        level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        service = Service(given.serve, read_options(given.options))
        if given.pipe is None:
            create_keys(given.keys)
            keys = Keys.load(given.keys / "server.key")
            allowed = {Keys.load(given.keys / "cluster.key").public: "cluster"}
            Listener(service, given.listen, keys, allowed).run()
        else:
            die_with_parent()
            os.chdir(given.directory)
            end = socket.socket(fileno=given.pipe)
            serve(service, Pipe(end), int(os.environ[PARENT]))
    except TwinRLError as error:
        print(f"twins.worker: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


def read_options(text: str) -> Dict[str, Any]:
    """The options of the command line: a JSON object, or @FILE that holds one."""
    try:
        found = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--options {text:.80}: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(
            f'--options {text:.80} is no JSON object such as \'{{"device": "cuda:1"}}\''
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
