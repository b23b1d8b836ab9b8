"""CURVE keys of a run: every socket is encrypted and authenticated from the first day.

A run's `keys/` folder holds one file a role: `server` (services), `cluster` (processes of the cluster) and
`robot` (what is copied to a robot PC: enough to dial in, not enough to pose as a service).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Iterable, NamedTuple

import zmq

from twinrl.core.errors import ConfigError

ROLES = ("server", "cluster", "robot")


class Keys(NamedTuple):
    """One role's key pair and the public key of the run's services (all Z85 text)."""

    role: str
    public: str
    secret: str
    server: str

    def save(self, path: Path) -> None:
        """Write as JSON, readable by the owner only."""
        descriptor = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(self._asdict(), file, indent=1)

    @classmethod
    def load(cls, path: str | Path) -> Keys:
        """Read a key file; ConfigError says what is wrong with it."""
        try:
            return cls(**json.loads(Path(path).read_text()))
        except FileNotFoundError:
            raise ConfigError(
                f"no key file {path}; a run writes its keys to runs/NAME/keys/"
            ) from None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path} is not a TwinRL key file: {error}") from None


def create_keys(folder: Path) -> None:
    """Create the key files of a run in `folder`; existing ones stay, so a resumed run keeps its keys."""
    folder.mkdir(parents=True, exist_ok=True)
    if all((folder / f"{role}.key").exists() for role in ROLES):
        return
    pairs = {role: [key.decode() for key in zmq.curve_keypair()] for role in ROLES}
    for role, (public, secret) in pairs.items():
        Keys(role, public, secret, pairs["server"][0]).save(folder / f"{role}.key")


def allowed_publics(folder: Path, roles: Iterable[str]) -> frozenset[str]:
    """The public keys that a service of this run lets in."""
    return frozenset(Keys.load(folder / f"{role}.key").public for role in roles)


def secure_server(socket: zmq.Socket, keys: Keys) -> None:
    """Make `socket` a CURVE server. Who may connect is the context's authenticator's business."""
    socket.curve_server = True
    socket.curve_publickey = keys.public.encode()
    socket.curve_secretkey = keys.secret.encode()
    socket.zap_domain = b"twinrl"


def secure_client(socket: zmq.Socket, keys: Keys) -> None:
    """Make `socket` a CURVE client of the run's services."""
    socket.curve_serverkey = keys.server.encode()
    socket.curve_publickey = keys.public.encode()
    socket.curve_secretkey = keys.secret.encode()
