"""Jobs run by several processes at once.

- processes come from a fork server, which has loaded the modules once and has no threads a fork could freeze
- a worker ends with its parent, however that ends: SIGKILL leaves nobody behind to write into the run
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from schemas.failures import ResourceFailure
from stages.data.encoder import limit_threads

Job = TypeVar("Job")
Result = TypeVar("Result")


def cores() -> int:
    """Cores this process may run on, which in a Slurm job are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """`function` of each job, as they are finished. One worker is this process itself, with all its threads.

    What a job raises is raised here, and jobs not begun are dropped.
    """
    if workers == 1 or len(jobs) < 2:
        yield from map(function, jobs)
        return
    workers = min(workers, len(jobs))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    threads = max(1, cores() // workers)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(threads,)) as pool:
        futures = [pool.submit(function, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise ResourceFailure(
                "a worker process was killed, perhaps for want of memory: run again with fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends the work
    limit_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
