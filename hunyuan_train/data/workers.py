"""Workers: threads that read and processes that decode; one that hangs or dies is replaced.

Both kinds take jobs from one queue and answer with futures. A job that takes longer than the limit,
or whose process ends, costs its worker, not the run: the worker is named in a warning and replaced,
the job is tried once more, and if that fails too, the sample is bad. So is a sample at which the
function raises. Other errors (a process that cannot even start) reach whoever waits for the future.
"""

import atexit
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from hunyuan_train.data.child_process import Child, Closed, Lost, as_sample_error
from hunyuan_train.data.quarantine import Reason, SampleError

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_CLOSE_S = 5.0
"""How long :meth:`close` waits for a thread that is busy; one that hangs ends with the program."""


class Workers(Protocol):
    """What the loader needs of either kind."""

    def submit(self, name: str, *arguments: Any) -> "Future[Any]":
        """Queue the function's call with ``arguments`` for the sample ``name``.

        Returns:
            A future of what the function returns; its exception is a SampleError when the sample
            is bad.
        """
        ...

    def stop(self) -> None:
        """Cancel the futures that are not done and let the workers end, without waiting."""
        ...

    def close(self) -> None:
        """Stop and wait for the workers."""
        ...


@dataclass(eq=False, slots=True)
class _Job:
    name: str
    arguments: tuple[Any, ...]
    future: "Future[Any]" = field(default_factory=Future)
    attempts: int = 0

    def settle(self, value: Any, error: BaseException | None) -> None:
        with suppress(InvalidStateError):  # cancelled by close()
            if error is None:
                self.future.set_result(value)
            else:
                self.future.set_exception(error)


class _Jobs:
    """The queue that the workers of one kind share."""

    def __init__(self) -> None:
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._open: set[_Job] = set()
        self.closed = False

    def put(self, job: _Job) -> None:
        with self._changed:
            if self.closed:
                job.future.cancel()
                return
            self._open.add(job)
            self._waiting.append(job)
            self._changed.notify()

    def take(self) -> _Job | None:
        """Wait for a job; None says that the workers are closed."""
        with self._changed:
            while not self._waiting and not self.closed:
                self._changed.wait()
            if self.closed:
                return None
            job = self._waiting.popleft()
            job.attempts += 1
            return job

    def done(self, job: _Job, value: Any, error: BaseException | None) -> None:
        with self._changed:
            self._open.discard(job)
        job.settle(value, error)

    def lost(self, job: _Job, worker: str, what: str) -> None:
        """Warn about a worker that was lost on ``job``, and try the job again or give it up."""
        again = job.attempts < 2
        logger.warning(
            "data worker %s %s on sample %s; the worker is replaced and the sample %s",
            *(worker, what, job.name, "tried once more" if again else "given up"),
        )
        if not again:
            detail = f"its worker {what}, at the second attempt too"
            self.done(job, None, SampleError(job.name, Reason.unreadable, detail))
            return
        with self._changed:
            self._waiting.appendleft(job)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._waiting.clear()
            unfinished, self._open = self._open, set()
            self._changed.notify_all()
        for job in unfinished:
            job.future.cancel()


@dataclass(eq=False, slots=True)
class _Slot:
    """One worker thread and the job it is at."""

    number: int
    thread: threading.Thread | None = None
    job: _Job | None = None
    since: float = 0.0


class ThreadWorkers:
    """Threads of this process, for jobs that wait for files.

    Args:
        function: What the workers call.
        number: How many.
        timeout_s: Seconds that one call may take. A thread cannot be ended: one that takes longer
            is left behind, and what it returns at last is ignored.
    """

    def __init__(self, function: Callable[..., Any], number: int, timeout_s: float) -> None:
        self._function = function
        self._timeout_s = timeout_s
        self._jobs = _Jobs()
        self._lock = threading.Lock()
        self._slots = [self._start(index) for index in range(number)]
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="data-watch", daemon=True)
        self._watcher.start()

    def submit(self, name: str, *arguments: Any) -> "Future[Any]":
        """Queue a call; see :class:`Workers`."""
        job = _Job(name, arguments)
        self._jobs.put(job)
        return job.future

    def stop(self) -> None:
        """Cancel what is not done; see :class:`Workers`."""
        self._jobs.close()
        self._closing.set()

    def close(self) -> None:
        """Stop and wait for the threads, except for one that hangs."""
        self.stop()
        self._watcher.join()
        until = time.monotonic() + _CLOSE_S
        for slot in self._slots:
            assert slot.thread is not None
            slot.thread.join(max(0.0, until - time.monotonic()))

    def _start(self, number: int) -> _Slot:
        slot = _Slot(number)
        name = f"data-read-{number}"
        slot.thread = threading.Thread(target=self._serve, args=(slot,), name=name, daemon=True)
        slot.thread.start()
        return slot

    def _serve(self, slot: _Slot) -> None:
        while (job := self._jobs.take()) is not None:
            with self._lock:
                slot.job, slot.since = job, time.monotonic()
            value, error = None, None
            try:
                value = self._function(*job.arguments)
            except Exception as raised:
                error = as_sample_error(job.name, raised)
            with self._lock:
                if slot.job is not job:
                    return  # took too long: another thread has this place
                slot.job = None
            self._jobs.done(job, value, error)
            del job, value

    def _watch(self) -> None:
        while not self._closing.wait(min(_POLL_S, self._timeout_s / 4)):
            for slot in list(self._slots):
                with self._lock:
                    job, seconds = slot.job, time.monotonic() - slot.since
                    if job is None or seconds <= self._timeout_s:
                        continue
                    slot.job = None
                assert slot.thread is not None
                worker = f"{slot.number} (thread {slot.thread.name}, pid {os.getpid()})"
                self._slots[slot.number] = self._start(slot.number)
                self._jobs.lost(job, worker, f"took more than {self._timeout_s:g} s")


class ProcessWorkers:
    """Processes, for jobs that compute or may crash. They end with this process, however it ends.

    Arrays come back through a pipe, outside of the pickle and straight into their memory: 4 ms for
    12.8 MB (a clip of 65 x 256 x 256), against 23 ms inside of it. Nothing is left behind when a
    process is killed, as segments of shared memory would be.

    Args:
        function: What the workers call; it, its arguments and its result can be pickled.
        number: How many.
        timeout_s: Seconds that one call may take.
    """

    def __init__(self, function: Callable[..., Any], number: int, timeout_s: float) -> None:
        self._function = function
        self._timeout_s = timeout_s
        self._jobs = _Jobs()
        self._threads = [
            threading.Thread(target=self._serve, args=(n,), name=f"data-decode-{n}", daemon=True)
            for n in range(number)
        ]
        _OPEN.add(self)
        for thread in self._threads:
            thread.start()

    def submit(self, name: str, *arguments: Any) -> "Future[Any]":
        """Queue a call; see :class:`Workers`."""
        job = _Job(name, arguments)
        self._jobs.put(job)
        return job.future

    def stop(self) -> None:
        """Cancel what is not done; see :class:`Workers`."""
        self._jobs.close()

    def close(self) -> None:
        """End the processes and wait for them."""
        self.stop()
        for thread in self._threads:
            thread.join()
        _OPEN.discard(self)

    def _is_closed(self) -> bool:
        return self._jobs.closed

    def _serve(self, number: int) -> None:
        """Feed one process, and replace it when it is lost."""
        child: Child | None = None
        try:
            while (job := self._jobs.take()) is not None:
                try:
                    if child is not None and not child.alive():
                        logger.warning(
                            "data worker %d (pid %d) %s while it was idle; it is replaced",
                            *(number, child.process.pid, child.exit()),
                        )
                        child = None
                    if child is None:
                        child = Child(self._function)
                        child.wait_until_ready(self._is_closed)
                    value, problem = child.call(job.arguments, self._timeout_s, self._is_closed)
                except Lost as lost:
                    assert child is not None
                    worker = f"{number} (pid {child.process.pid})"
                    child.end()
                    child = None
                    self._jobs.lost(job, worker, str(lost))
                except Closed:
                    return
                except Exception as error:  # a process that does not start: nothing would work
                    self._jobs.done(job, None, error)
                    if child is not None:
                        child.end()
                    child = None
                else:
                    error = None if problem is None else SampleError(job.name, *problem)
                    self._jobs.done(job, value, error)
                    del value  # pixels of a clip, while it waits for the next job
                del job
        finally:
            if child is not None:
                child.end()


_OPEN: "weakref.WeakSet[ProcessWorkers]" = weakref.WeakSet()


@atexit.register
def _close_open_workers() -> None:
    """End the decoding processes of a program that ends without closing its workers.

    Runs before multiprocessing's own exit function, which would send them SIGTERM, which they
    ignore, and wait for them.
    """
    for workers in list(_OPEN):
        workers.close()
