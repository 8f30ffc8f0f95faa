"""Work on many files, by several threads where that is quicker than by one."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

FILES_AT_ONCE = 32  # that a thread does between two hand-overs
FILES_A_ROUND = 4096  # until the time of a file is measured again
QUICK = 60e-6  # seconds, twice those of checking and hashing a file of 50 KB that the system holds in memory
File = TypeVar("File")
Result = TypeVar("Result")


def over_files(work: Callable[[File], Result], files: Sequence[File], threads: int) -> Iterator[Result]:
    """`work` of each file, in order. Few are under way at a time, so that memory does not grow with their number.

    Files for which a disk or a decoder must be waited are shared among the threads. Quick ones are done here: threads
    would mostly wait for one another at Python's lock, which each gives up and takes again for every call of the system
    (101,000 files in memory: 2.8 s by one thread, 4.4 s by two on two cores).

    Not by `multiprocessing.pool.ThreadPool`: it needs semaphores, which some hosts lack (AWS Lambda).
    """

    def batch(start: int) -> list[Result]:
        return [work(file) for file in files[start : start + FILES_AT_ONCE]]

    quick = False
    under_way: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(files), FILES_AT_ONCE):
            if start % FILES_A_ROUND == 0:
                while under_way:
                    yield from under_way.popleft().result()
                began = time.perf_counter()
                results = batch(start)
                quick = time.perf_counter() - began < QUICK * len(results)
                yield from results
            elif quick:
                yield from batch(start)
            else:
                under_way.append(pool.submit(batch, start))
                if len(under_way) > 2 * threads:
                    yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
