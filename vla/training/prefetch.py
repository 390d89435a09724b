"""Batches made ahead of time in a thread; a batch is a pure function of its step, so nothing has to be saved."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor


def prefetch[T](make: Callable[[int], T], first: int, stop: int, ahead: int = 3) -> Iterator[tuple[int, T, float]]:
    """Yield (step, make(step), seconds waited) for first <= step < stop, made `ahead` steps early in one thread."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        pending = deque(pool.submit(make, step) for step in range(first, min(first + ahead, stop)))
        try:
            for step in range(first, stop):
                asked = time.perf_counter()
                batch = pending.popleft().result()
                waited = time.perf_counter() - asked
                if step + ahead < stop:
                    pending.append(pool.submit(make, step + ahead))
                yield step, batch, waited
        finally:
            for future in pending:
                future.cancel()
