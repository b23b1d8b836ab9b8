"""What the rest of TwinRL sees of the replay: writers, readers, cursors, and the limiter's settings."""

from buffer_service.cursor import Cursor
from buffer_service.entry import Entry
from buffer_service.gather import Batch
from buffer_service.limiter import RateLimiter
from buffer_service.reader import Reader
from buffer_service.writer import Writer

__all__ = ["Batch", "Cursor", "Entry", "RateLimiter", "Reader", "Writer"]
