"""Keeping a reader's index equal to the service's, and telling the service what was drawn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from buffer_service.entry import Entry
from buffer_service.index import Index
from twinrl.core.errors import DeadlineError, Rejected, RemoteError, TwinRLError
from twinrl.core.sockets import Client

FOLLOW_SECONDS = 1.0  # how long the service may hold the question for news
NEWS_SECONDS = 1.5  # beyond that; a question that met a dying service is never answered
LOCKED = 100  # entries that are taken in at a time
PRIORITY_SECONDS = 0.5  # between two messages with priorities
PRIORITIES = 10_000  # in one


class Follower:
    """A thread that asks the service for news of the replay, in long polls."""

    def __init__(
        self,
        client: Client,
        index: Index,
        changed: threading.Condition,
        forgotten: Callable[[Iterable[int], bool], None],
    ) -> None:
        """`changed` guards `index`. forgotten(ids, anew) is called, under it, after segments were taken out; with
        `anew` the service is another process than before."""
        self._client, self._index, self._changed = client, index, changed
        self._forgotten = forgotten
        self._boot, self._seen, self._evicted_to = "", 0, 0
        self._sampled = 0  # transitions to be reported
        self._priorities: dict[int, float] = {}  # to be sent
        self._under_way = 0  # priorities
        self._sent_at = 0.0  # monotonic s, of the last priorities
        self.open = False  # the limiter asks for no permits
        self.trouble = ""  # why the service did not answer last
        self.stopped = False
        self._thread = threading.Thread(target=self._run, name="replay index", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop following; the client must be closed next, which ends the question under way."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()
        try:
            self._send_priorities()
        except (DeadlineError, RemoteError) as error:
            self.trouble = str(error)

    def join(self) -> None:
        """Until the thread has ended."""
        self._thread.join(5)

    def newest(self) -> int:
        """The highest id that is known."""
        with self._changed:
            return next(reversed(self._index.entries), 0)

    @property
    def known(self) -> dict[str, Any]:
        """What a question for news says of what is known already."""
        return {"boot": self._boot, "seen": self._seen, "evicted_to": self._evicted_to}

    def report(self, sampled: int) -> None:
        """Tell the service, with the next question, that so many transitions were drawn."""
        with self._changed:
            self._sampled += sampled

    def prioritise(self, priorities: dict[int, float]) -> None:
        """Send priorities of segments soon."""
        with self._changed:
            self._priorities |= priorities

    @property
    def unsent(self) -> int:
        """Priorities that the service did not confirm yet."""
        return len(self._priorities) + self._under_way

    def hurry(self) -> None:
        """Send priorities at the next turn."""
        self._sent_at = 0.0

    def _run(self) -> None:
        while not self.stopped:
            with self._changed:
                sampled, self._sampled = self._sampled, 0
            try:
                self._learn(sampled)
                sampled = 0
                if time.monotonic() - self._sent_at >= PRIORITY_SECONDS:
                    self._send_priorities()
                self.trouble = ""
            except TwinRLError as error:  # whatever it is, the next turn may be better
                with self._changed:
                    self._sampled += sampled
                    self.trouble = str(error)
                    self._changed.wait(0.2)

    def _send_priorities(self) -> None:
        with self._changed:
            ids = list(self._priorities)[:PRIORITIES]
            sending = {id: self._priorities.pop(id) for id in ids}
            self._under_way, self._sent_at = len(sending), time.monotonic()
        if not sending:
            return
        args = {"ids": ids, "values": list(sending.values())}
        try:
            self._client.call("priorities", args, timeout=NEWS_SECONDS)
        except Rejected:
            raise  # sent again they would be refused again
        except (DeadlineError, RemoteError):
            with self._changed:
                self._priorities = sending | self._priorities
            raise
        finally:
            with self._changed:
                self._under_way = 0
                self._changed.notify_all()

    def _learn(self, sampled: int) -> None:
        """Ask for news and take them in; after a restart of the service, or far behind, compare everything."""
        news = self._ask(self.newest(), self._seen, sampled, FOLLOW_SECONDS)
        if news["boot"] != self._boot or news["gone"] is None:
            self._compare()
            return
        changed = [Entry(*fields) for fields in news["changed"]]
        fresh = [Entry(*fields) for fields in news["entries"]]
        with self._changed:  # one that is not known yet comes later, as it is then
            changed = [entry for entry in changed if entry.id in self._index.entries]
        for place in range(0, len(fresh), LOCKED):  # between them a batch may be drawn
            with self._changed:
                self._take(fresh[place : place + LOCKED])
        with self._changed:
            self._take(changed, news["gone"])
            self._note(news)

    def _compare(self) -> None:
        """Make the index equal to the service's."""
        priorities: dict[int, float] = {}
        while True:
            after = {"after": max(priorities, default=0)}
            page = self._client.call("priorities_read", after, timeout=NEWS_SECONDS)[0]
            priorities |= zip(page["ids"], page["values"], strict=True)
            if not page["ids"]:
                break
        entries: dict[int, Entry] = {}
        begin = None
        while True:
            seen = 0 if begin is None else begin["seen"]
            news = self._ask(next(reversed(entries), 0), seen, 0, 0.0)
            begin = begin or news
            if news["boot"] != begin["boot"]:
                return  # again, from the start
            page = [Entry(*fields) for fields in news["entries"]]
            entries.update((entry.id, entry) for entry in page)
            if not page:
                break
        with self._changed:
            gone = []
            for id, mine in self._index.entries.items():
                theirs = entries.get(id)  # after a crash of the machine a number may come again
                if not theirs or (theirs.writer, theirs.sequence) != (mine.writer, mine.sequence):
                    gone.append(id)
            self._take([], gone, anew=begin["boot"] != self._boot)
            for id in priorities.keys() & entries.keys():
                self._index.priority.setdefault(id, priorities[id])
            self._take(entries.values())
            self.open = False
            self._note(begin)

    def _take(self, entries: Iterable[Entry], gone: Iterable[int] = (), anew: bool = False) -> None:
        for entry in entries:
            self._index.put(entry)
        for id in gone:
            self._index.remove(id)
        if gone or anew:
            self._forgotten(gone, anew)
        self._changed.notify_all()

    def _note(self, news: dict[str, Any]) -> None:
        self._boot, self._seen = news["boot"], news["seen"]
        self._evicted_to = news.get("evicted_to", 0)

    def _ask(self, after: int, seen: int, sampled: int, wait: float) -> dict[str, Any]:
        args = {**self.known, "after": after, "seen": seen, "sampled": sampled, "wait": wait}
        return self._client.call("index", args, timeout=wait + NEWS_SECONDS)[0]
