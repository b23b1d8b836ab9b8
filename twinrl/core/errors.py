"""Every error that TwinRL raises on purpose.

TwinRLError
  +- ConfigError      the configuration or the command line is wrong
  +- WireError        bytes that are no message, or a message that breaks its schema
  |    +- SchemaMismatch  the peer speaks of other columns, shapes or dtypes
  +- DeadlineError    a wait ended without what it waited for
  +- RemoteError      the peer refused or failed; carries its message
  |    +- Rejected    the peer refused on purpose (wrong run, version, schema, name taken)
  +- ResumeError      a run cannot be continued whole, so it is not continued at all
  +- ProcessDied      a supervised process ended and could not be brought back
"""

from __future__ import annotations


class TwinRLError(Exception):
    """Base of all deliberate errors."""


class ConfigError(TwinRLError, ValueError):
    """The configuration or a command-line value is wrong; the message says where and what would be right."""


class WireError(TwinRLError, ValueError):
    """Bytes that are not a valid message."""


class SchemaMismatch(WireError):
    """The peer's columns, shapes or dtypes differ from ours."""


class DeadlineError(TwinRLError, TimeoutError):
    """A wait ended without what it waited for; the message says for what, whom and how long."""


class RemoteError(TwinRLError):
    """The peer answered with an error."""


class Rejected(RemoteError):
    """The peer refused on purpose; the message is the one line that mends it."""


class ResumeError(TwinRLError):
    """A run's saved state is incomplete or does not belong together."""


class ProcessDied(TwinRLError):
    """A supervised process ended and stays dead."""
