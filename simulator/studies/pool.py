"""Runs many independent calls: on the processes of one machine, or on a Dask cluster.

Both give `(item, result, error)` in the order of completion. A call that raises is that item's
error; a call whose process dies (killed, out of memory) is tried once more on its own, so that
the item that kills processes is told from those that merely ran beside it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

from simulator.errors import InputError

T = TypeVar("T")
Outcome = tuple[T, Any, BaseException | None]


class WorkerDied(Exception):
    """The process that worked on an item was killed or crashed."""


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def _context() -> multiprocessing.context.BaseContext:
    """How worker processes are made.

    `fork` where it is safe (Linux, no other thread of this process): workers start at once with
    everything imported. Otherwise `forkserver` or `spawn`.
    """
    methods = multiprocessing.get_all_start_methods()
    if sys.platform == "linux" and threading.active_count() == 1:
        return multiprocessing.get_context("fork")
    return multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")


def _prepare_worker(parent: int) -> None:
    """One process per core: no thread pools inside; Ctrl-C is the parent's to handle."""
    import signal

    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    """A worker whose parent was killed would wait for work forever; end it instead."""
    first = os.getppid()
    while os.getppid() == first and _alive(parent):
        time.sleep(0.5)
    os._exit(1)


def _alive(process: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _executor(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        jobs, mp_context=_context(), initializer=_prepare_worker, initargs=(os.getpid(),)
    )


class Pool(Generic[T]):
    """A pool of processes that outlives the death of its workers.

    Parameters
    ----------
    function:
        Called with each item, in a worker; importable by name.
    jobs:
        Processes; 1 calls in this process.
    """

    def __init__(self, function: Callable[[T], Any], jobs: int) -> None:
        self.function = function
        self.jobs = jobs
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> ProcessPoolExecutor:
        if self._executor is None:
            self._executor = _executor(self.jobs)
        return self._executor

    def close(self) -> None:
        """Stop the workers; what has not begun is dropped."""
        if self._executor is not None:
            processes = list((self._executor._processes or {}).values())
            self._executor.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            for process in processes:
                process.join(5.0)
            self._executor = None

    def map(self, items: Iterable[T]) -> Iterator[Outcome[T]]:
        """Outcomes as they come; items are taken as workers become free."""
        if self.jobs <= 1:
            for item in items:
                yield self._here(item)
            return
        source = iter(items)
        pending: dict[Future[Any], T] = {}
        suspects: list[T] = []
        exhausted = False
        while True:
            # two per worker: one at work, one waiting, so that no worker idles between them
            while not exhausted and len(pending) < 2 * self.jobs:
                try:
                    item = next(source)
                except StopIteration:
                    exhausted = True
                    break
                try:
                    pending[self._start().submit(self.function, item)] = item
                except BrokenProcessPool:
                    suspects.append(item)
                    break
            done: Iterable[Future[Any]] = ()
            if pending and not suspects:
                done = wait(pending, return_when=FIRST_COMPLETED).done
            elif pending:
                done = wait(pending).done  # the pool is broken: every future ends at once
            for future in sorted(done, key=lambda f: list(pending).index(f)):
                item = pending.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    suspects.append(item)
                else:
                    yield item, (future.result() if error is None else None), error
            if suspects and not pending:
                self.close()
                for item in suspects:
                    yield self._alone(item)
                suspects = []
            if exhausted and not pending and not suspects:
                return

    def _here(self, item: T) -> Outcome[T]:
        try:
            return item, self.function(item), None
        except Exception as error:
            return item, None, error

    def _alone(self, item: T) -> Outcome[T]:
        """The item in a process of its own."""
        with _executor(1) as executor:
            future = executor.submit(self.function, item)
            try:
                return item, future.result(), None
            except BrokenProcessPool:
                return item, None, WorkerDied("the process that simulated it was killed or crashed")
            except Exception as error:
                return item, None, error


class DaskPool(Generic[T]):
    """The same on a Dask cluster.

    Parameters
    ----------
    function:
        Called with each item; importable by name on the workers.
    scheduler:
        Address such as `tcp://host:8786`, a `distributed.Client`, or the path of a scheduler file.

    Raises
    ------
    InputError
        If `distributed` is not installed, the scheduler does not answer, or a worker has another
        version of the simulator.
    """

    def __init__(self, function: Callable[[T], Any], scheduler: Any, timeout: float = 5.0) -> None:
        try:
            import distributed
        except ImportError:
            raise InputError(
                "a Dask cluster needs the package `distributed`: "
                "pip install 'cluster-simulator[dask]'",
                place="--scheduler",
            ) from None
        self.function = function
        self._owned = isinstance(scheduler, str)
        if self._owned:
            given = {"scheduler_file": scheduler} if scheduler.endswith(".json") else {
                "address": scheduler
            }  # fmt: skip
            try:
                self.client = distributed.Client(**given, timeout=timeout)
            except (OSError, TimeoutError, ValueError) as error:
                raise InputError(
                    f"no Dask scheduler answers at {scheduler!r}: {error}", place="--scheduler"
                ) from None
        else:
            self.client = scheduler
        self._check_versions()

    def _check_versions(self) -> None:
        from simulator import __version__

        for address, version in sorted(self.client.run(_version).items()):
            if version != __version__:
                self.close()
                raise InputError(
                    f"worker {address} has simulator {version}, this is {__version__}",
                    place="--scheduler",
                )

    def __enter__(self) -> DaskPool[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection if it was made here."""
        if self._owned:
            self.client.close()

    def map(self, items: Iterable[T]) -> Iterator[Outcome[T]]:
        """Outcomes as they come; a window of items is with the scheduler at a time.

        Dask itself runs the items of a dead worker again elsewhere.
        """
        import distributed

        source = iter(items)
        pending: dict[Any, T] = {}
        futures = distributed.as_completed()

        def more() -> None:
            window = 4 * max(1, sum(self.client.nthreads().values()))
            while len(pending) < window:
                try:
                    item = next(source)
                except StopIteration:
                    return
                future = self.client.submit(self.function, item, pure=False)
                pending[future.key] = item
                futures.add(future)

        more()
        while pending:
            future = next(futures)
            item = pending.pop(future.key)
            error = future.exception()
            if isinstance(error, distributed.KilledWorker):
                error = WorkerDied("the worker that simulated it died, several times")
            yield item, (future.result() if error is None else None), error
            more()


def _version() -> str:
    from simulator import __version__

    return __version__


def open_pool(
    function: Callable[[T], Any], *, jobs: int | None = None, scheduler: Any = None
) -> Pool[T] | DaskPool[T]:
    """A Dask pool if a scheduler is given, else a pool of `jobs` (default: all cores) processes.

    Raises
    ------
    InputError
        See `DaskPool`; or if `jobs` is not positive.
    """
    if scheduler is not None:
        return DaskPool(function, scheduler)
    if jobs is not None and jobs < 1:
        raise InputError(f"expected at least 1, got {jobs}", place="--jobs")
    return Pool(function, jobs or cores())


__all__: Sequence[str] = ["DaskPool", "Pool", "WorkerDied", "cores", "open_pool"]
