"""What an acknowledgement promises, in words: the one place that knows, for `info`, `status` and the docs."""

from __future__ import annotations

_FILES = {
    "always": "and of the machine",
    "everysec": "; if the machine dies, what was acknowledged in its last second or so may be missing",
    "never": "; if the machine dies, what the system had not written yet is missing, often half a minute",
}
_REDIS = {
    "always": "and of Redis's machine",
    "everysec": "; if Redis's machine dies, what was acknowledged in its last two seconds may be missing",
    "no": "; if Redis's machine dies, what its system had not written yet is missing, often half a minute",
    "off": "but Redis's, which keeps no append-only file: its restart brings back only what the service "
    "still has in its segment files",
    "": "; what the death of Redis's machine takes is for its administrator to say (CONFIG GET is forbidden)",
}
_INDEX = {
    "off": ". Redis keeps no append-only file: its restart loses cursors and priorities, no segment",
}


def promise(flush: str, appendfsync: str, form: str) -> str:
    """What an acknowledged segment survives, as a sentence.

    flush: the service's policy (always, everysec, never). appendfsync: that of Redis's append-only file (always,
    everysec, no; "off" without one, "" when unknown). form: "files" or "redis", where the payload lies.
    """
    where = _FILES[flush] if form == "files" else _REDIS[appendfsync]
    gap = "" if where.startswith(";") else " "
    index = _INDEX.get(appendfsync, "") if form == "files" else ""
    return f"what is acknowledged survives the death of every process{gap}{where}{index}"


def keeps(flush: str, appendfsync: str, form: str) -> str:
    """Empty when a Redis that syncs so can keep what `flush` asks for; else what to change.

    In the files form the payload is synced by the service itself, and the index can be made again from it.
    """
    order = ("off", "no", "everysec", "always")
    wanted = {"always": "always", "everysec": "everysec", "never": "no"}[flush]
    if form == "files" or not appendfsync or order.index(appendfsync) >= order.index(wanted):
        return ""
    now = "appendonly no" if appendfsync == "off" else f"appendfsync {appendfsync}"
    wish = "appendonly yes" + ("" if wanted == "no" else f" and appendfsync {wanted}")
    return (
        f"replay.flush is {flush}, but this Redis runs with {now}: set its {wish}, or a lower flush"
    )
