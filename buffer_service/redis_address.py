"""Where Redis is and how it is reached: one address for every kind of Redis, and clear words for every refusal.

    redis://[USER:PASSWORD@]HOST:PORT[/DB]                     one server
    rediss://...                                               the same over TLS
    unix://[USER:PASSWORD@]/PATH[?db=DB]                       one server on this host
    redis+sentinel://[USER:PASSWORD@]HOST:PORT,.../SERVICE[/DB]  the master that these Sentinels name
    redis+cluster://[USER:PASSWORD@]HOST:PORT,...              a Redis Cluster, found through any of these nodes

`rediss+sentinel://` and `rediss+cluster://` speak TLS. What stands behind `?` goes to redis-py, for instance
`ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`; `sentinel_username` and `sentinel_password` go to the Sentinels.
All keys of a run hold its name as a hash tag: in a Cluster they lie on one node, so a transaction can hold them all.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import parse_url
from redis.exceptions import (
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
)
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel

from twinrl.core.errors import ConfigError, TwinRLError

log = logging.getLogger(__name__)
Redis = redis.Redis | RedisCluster
RedisError = redis.RedisError
AWAY = (redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError)
FORGETFUL = (
    *AWAY,
    ReadOnlyError,
)  # who answers next may not know the last second: it is told again
# A wait of the service's own is interruptible and shows its reason; one inside redis-py is not.
CLIENT_OPTIONS: dict[str, Any] = {
    "socket_timeout": 10.0,
    "socket_connect_timeout": 5.0,
    "retry": Retry(NoBackoff(), 0),
}
CURE = "write redis://[[USER]:PASSWORD@]HOST:PORT/0, unix://PATH, or rediss, redis+sentinel, redis+cluster"
# What a user of Redis's access lists needs, for a run of any name.
ACL = "~twinrl:* +@read +@write +@transaction +@connection +info +config|get"
_REFUSALS = {  # the first word of Redis's answer: what it means and what mends it
    "OOM": "Redis is out of memory: raise its maxmemory (replay.redis_memory_mb for the run's own), "
    "or delete segments",
    "MISCONF": "Redis cannot write to its disk and refuses to take anything: make room there",
    "READONLY": "this Redis has become a read-only copy: waiting for it, or Sentinel, to name the master",
    "NOPERM": f"the Redis user may not do this: ACL SETUSER ... {ACL}",
    "NOREPLICAS": "this Redis has fewer copies than its min-replicas-to-write: start them again",
    "CLUSTERDOWN": "the Redis Cluster has no node for this run's keys: bring its node back",
    "MASTERDOWN": "this Redis is a copy that has lost its master",
    "LOADING": "Redis is loading its data",
    "NOAUTH": "Redis wants a password now",
    "WRONGPASS": "Redis refuses the password now",
}


def prefix(run: str) -> str:
    """What every key of `run` begins with."""
    return f"twinrl:{{{run}}}:"


def connect(
    url: str,
    *,
    password_file: str = "",
    tls_ca: str = "",
    tls_certificate: str = "",
    tls_key: str = "",
) -> Redis:
    """Connect to the Redis at `url` and look at it; ConfigError says what is wrong and what would be right.

    password_file: holds the password, for an address without one. tls_ca: certificate of the authority that
    signed the server's, by default the system's authorities; tls_certificate, tls_key: this client's own.
    """
    shown = without_password(url)
    files = {"ssl_ca_certs": tls_ca, "ssl_certfile": tls_certificate, "ssl_keyfile": tls_key}
    for path in (password_file, *files.values()):
        if path and not Path(path).is_file():
            raise ConfigError(f"redis.url {shown!r}: there is no file {path}")
    options = {name: path for name, path in files.items() if path}
    if options and not urlsplit(url).scheme.startswith("rediss"):
        raise ConfigError(
            f"redis.url {shown!r} uses no TLS, but redis.tls_* is set: write rediss://"
        )
    if password_file:
        options["password"] = Path(password_file).read_text().strip()
    try:
        client = _client(url, options)
        client.ping()
    except (ValueError, RedisClusterException) as error:
        if isinstance(error.__cause__, redis.ConnectionError) or "cannot be connected" in str(
            error
        ):
            raise ConfigError(_unreachable(shown, error)) from None
        raise ConfigError(f"redis.url {shown!r} is no address: {error}; {CURE}") from None
    except redis.AuthenticationError:
        raise ConfigError(
            f"redis.url {shown!r}: Redis refuses the password or the user; write them into the address: "
            "redis://USER:PASSWORD@HOST:PORT/0 (or redis.password_file)"
        ) from None
    except NoPermissionError as error:
        raise ConfigError(f"redis.url {shown!r}: {explain(error)}") from None
    except MasterNotFoundError as error:
        raise ConfigError(
            f"redis.url {shown!r}: no Sentinel there names a master: {error}; "
            "write redis+sentinel://HOST:PORT,HOST:PORT/SERVICE with the Sentinels' own addresses"
        ) from None
    except redis.RedisError as error:
        raise ConfigError(_unreachable(shown, error)) from None
    _look_at(client, shown)
    return client


def explain(error: Exception) -> str:
    """Why Redis did not do what it was told, and what mends it."""
    text = str(error)
    if isinstance(error, TwinRLError):
        return text
    # redis-py puts the whole command before what Redis said of it.
    text = text.partition(" of pipeline caused error: ")[2] or text
    for word, meaning in _REFUSALS.items():
        if text.startswith(word) or (word == "OOM" and isinstance(error, OutOfMemoryError)):
            return f"{meaning} ({text})"
    # redis-py cuts the first word off some answers.
    for kind, word in ((ReadOnlyError, "READONLY"), (NoPermissionError, "NOPERM")):
        if isinstance(error, kind):
            return f"{_REFUSALS[word]} ({text})"
    if isinstance(error, AWAY):
        return f"Redis is away ({text})"
    return f"Redis refuses ({text})"


def information(client: Redis, section: str) -> dict[str, Any]:
    """INFO's section of this client's server; empty where that is forbidden, or in a Cluster."""
    with contextlib.suppress(RedisError):
        if isinstance(client, redis.Redis):
            return client.info(section)
    return {}


def setting(client: Redis, name: str) -> str:
    """A setting of the server; "" where nobody may ask, as with most hosted ones."""
    with contextlib.suppress(RedisError):
        if isinstance(client, redis.Redis):
            return str(client.config_get(name).get(name, ""))
    return ""


def appendfsync(client: Redis) -> str:
    """When this server syncs what it was told: always, everysec, no; "off" without a log, "" if unknown."""
    if setting(client, "appendonly") == "no":
        return "off"
    return setting(client, "appendfsync")


def without_password(url: str) -> str:
    """The address as it may be shown."""
    with contextlib.suppress(ValueError):
        secret = urlsplit(url).password
        if secret:
            url = url.replace(f":{secret}@", ":***@")
    for name in ("password=", "sentinel_password="):
        head, found, tail = url.partition(name)
        if found:
            url = head + found + "***" + "".join(tail.partition("&")[1:])
    return url


def _client(url: str, options: dict[str, Any]) -> Redis:
    scheme, _, rest = url.partition("://")
    scheme, _, kind = scheme.partition("+")
    if kind not in ("", "sentinel", "cluster") or scheme not in ("redis", "rediss", "unix"):
        raise ValueError(f"it begins with {url.split(':')[0]!r}")
    if not kind:
        return redis.Redis.from_url(url, **CLIENT_OPTIONS, **options)
    head, slash, path = rest.partition("/")
    user, at, hosts = head.rpartition("@")
    nodes = [_node(each) for each in hosts.split(",")]
    service = ""
    if kind == "sentinel":
        service, _, path = path.partition("?")[0].strip("/").partition("/")
        path += "?" + rest.partition("?")[2]
        if not service:
            raise ValueError("it names no service behind the Sentinels")
    told = {**parse_url(f"{scheme}://{user}{at}host{slash}{path}"), **CLIENT_OPTIONS, **options}
    for name in ("host", "port", "connection_class"):
        told.pop(name, None)
    if scheme == "rediss":
        told["ssl"] = True
    if kind == "cluster":
        told.pop("db", None)
        told["retry"] = Retry(NoBackoff(), 1)  # of looking for the node anew
        startup = [ClusterNode(host, port) for host, port in nodes]
        return RedisCluster(startup_nodes=startup, **told)
    secret = {
        name: told.pop(f"sentinel_{name}")
        for name in ("username", "password")
        if f"sentinel_{name}" in told
    }
    transport = {k: v for k, v in told.items() if k.startswith(("ssl", "socket_", "retry"))}
    sentinel = Sentinel(nodes, sentinel_kwargs={**transport, **secret}, **told)
    return sentinel.master_for(service)


def _node(text: str) -> tuple[str, int]:
    parts = urlsplit("//" + text)
    if not parts.hostname or not parts.port:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return parts.hostname, parts.port


def _unreachable(shown: str, error: Exception) -> str:
    text = f"{error} {error.__cause__ or ''} {error.__context__ or ''}"
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text:
        cure = "its certificate is not trusted: set redis.tls_ca to the authority that signed it"
    elif isinstance(error.__context__, ssl.SSLError) or "SSL" in text:
        cure = "TLS failed: look at redis.tls_certificate and redis.tls_key"
    elif shown.startswith("rediss") and isinstance(error, redis.TimeoutError):
        cure = "write redis:// if it speaks no TLS"
    elif "Connection closed by server" in text or "reset by peer" in text:
        cure = "it hung up: write rediss:// if it speaks TLS"
    else:
        cure = "start one, or leave redis.url empty and the run starts its own"
    return f"redis.url {shown!r}: no Redis answers there ({error}); {cure}"


def _look_at(client: Redis, shown: str) -> None:
    """Refuse what would lose data silently; warn of what would lose a little."""
    replication = information(client, "replication")
    if replication.get("role") == "slave":
        master = f"{replication.get('master_host')}:{replication.get('master_port')}"
        raise ConfigError(
            f"redis.url {shown!r} is a read-only copy of {master}: give that address, "
            "or the Sentinels' (redis+sentinel://)"
        )
    policy = information(client, "memory").get("maxmemory_policy", "noeviction")
    if policy.startswith("allkeys"):
        raise ConfigError(
            f"redis.url {shown!r} may drop any key when its memory is full (maxmemory-policy {policy}): "
            "segments would be lost; CONFIG SET maxmemory-policy noeviction"
        )
    if appendfsync(client) == "off":
        log.warning("Redis at %s keeps no append-only file: its restart forgets everything", shown)
