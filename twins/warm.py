"""`python -m twins.warm`: compile the ray tracer's kernels once, so that no first episode waits for them."""

from __future__ import annotations

import time

import twins
from twins.tasks import TASKS


def main() -> None:
    """Render one image of every task on the CPU; warp keeps the compiled kernels in its cache."""
    for name in TASKS:
        start = time.perf_counter()
        env = twins.make_env(name, 1)
        env.reset(seed=0)
        env.close()
        print(f"{name}: ray tracer ready after {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
