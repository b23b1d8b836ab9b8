"""What the rest of TwinRL sees of the replay: writers, readers, cursors, draws, and the limiter's settings."""

from buffer_service.cursor import Cursor
from buffer_service.entry import Entry
from buffer_service.gather import Batch
from buffer_service.limiter import RateLimiter
from buffer_service.prefetch import Prefetcher
from buffer_service.reader import Reader
from buffer_service.sampler import Draw
from buffer_service.sharded_reader import ShardedReader
from buffer_service.sharded_writer import ShardedWriter
from buffer_service.writer import Writer

__all__ = [
    "Batch",
    "Cursor",
    "Draw",
    "Entry",
    "Prefetcher",
    "RateLimiter",
    "Reader",
    "ShardedReader",
    "ShardedWriter",
    "Writer",
]
