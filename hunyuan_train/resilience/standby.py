"""Ranks without the wait for ``import torch``: forked from a process that has imported it.

Four interpreters that import torch and this package at once take some 15 s on two cores; a fork
takes milliseconds, and the imported code is in memory once. The forking process imports and never
computes: no thread pool, no CUDA context and no process group exists before the fork, so there is
nothing that a fork could break. Where an import did initialise CUDA, the child starts afresh.

It also makes sure that nothing outlives the agent: it sees the agent's end as the end of their
socket and kills the ranks with all they started; if it dies itself, the kernel kills the ranks.
This file is both sides: :class:`Standby` in the agent, :func:`serve` in the forking process.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hunyuan_train.resilience.crashes import record_crash
from hunyuan_train.runtime.env import child_environment

_PR_SET_PDEATHSIG = 1
_MESSAGE_BYTES = 1 << 18
_RUNPY = runpy.run_module.__code__.co_filename


class Standby:
    """The agent's end: starts ranks, signals them, learns how they ended."""

    def __init__(self, preload: Sequence[str] = ()) -> None:
        """Start the forking process; it imports ``preload`` while the agent goes on."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), *preload],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env=_environment(),
        )
        theirs.close()
        self._socket.setblocking(False)
        self._unsent: deque[bytes] = deque()
        self.running: set[int] = set()
        """Keys of the ranks that were started and have not ended."""
        self.pids: dict[int, int] = {}
        """Of the ranks, once they are forked."""
        self.ended_at: dict[int, float] = {}
        """When a rank that has ended did, by the system clock."""

    def start(self, key: int, argv: Sequence[str], env: dict[str, str], log: Path) -> None:
        """Start ``python argv...`` with ``env`` on top of ours and its output added to ``log``."""
        self.pids.pop(key, None)
        self.running.add(key)
        self._send({"start": key, "argv": list(argv), "env": env, "log": str(log)})

    def signal(self, key: int, number: int, *, group: bool = False) -> None:
        """Send a signal to a rank, or with ``group`` to all processes it started, too."""
        self._send({"signal": number, "key": key, "group": group})

    def kill(self) -> None:
        """Kill the forking process, which may hang in an import, and with it all ranks."""
        self._process.kill()

    def ended(self) -> dict[int, int]:
        """Return the exit codes (minus the signal) of the ranks that ended since the last call.

        If the forking process has died, the ranks went with it: they count as killed.
        """
        codes: dict[int, int] = {}
        self._flush()
        while message := self._receive():
            if "pid" in message:
                self.pids[message["key"]] = message["pid"]
            else:
                codes[message["key"]] = message["code"]
                self.ended_at[message["key"]] = message["time"]
        if self._process.poll() is not None:
            codes |= {key: -signal.SIGKILL for key in self.running if key not in codes}
        self.running -= codes.keys()
        return codes

    @property
    def alive(self) -> bool:
        """Whether ranks can be started."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the forking process and every rank."""
        self._socket.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: dict[str, Any]) -> None:
        self._unsent.append(json.dumps(message).encode())
        self._flush()

    def _flush(self) -> None:
        """Send what the other side takes now: it does not read while it imports."""
        with contextlib.suppress(OSError):  # full; or dead, which shows in ended()
            while self._unsent:
                self._socket.send(self._unsent[0])
                self._unsent.popleft()

    def _receive(self) -> dict[str, Any] | None:
        try:
            data = self._socket.recv(_MESSAGE_BYTES)
        except (BlockingIOError, ConnectionError):
            return None
        return json.loads(data) if data else None


def _environment() -> dict[str, str]:
    """Return ours, with the package found where the agent found it, whatever the folder we are in.

    Asking NVML instead of CUDA whether there is a GPU leaves CUDA untouched.
    """
    package = str(Path(__file__).resolve().parents[2])
    search = [package, child_environment().get("PYTHONPATH", "")]
    return child_environment(
        PYTHONPATH=os.pathsep.join(filter(None, search)), PYTORCH_NVML_BASED_CUDA_CHECK="1"
    )


def serve(connection: socket.socket, preload: Sequence[str]) -> None:
    """Import ``preload``, then fork ranks on request until the agent closes or dies."""
    for name in preload:
        try:
            importlib.import_module(name)
        except Exception:  # the rank that needs it says so itself, with its rank and log
            traceback.print_exc()
    gc.freeze()
    agent = os.getppid()
    children: dict[int, int] = {}  # key -> pid
    wake, wakeup = os.pipe()
    for end in (wake, wakeup):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the agent decides
    with selectors.DefaultSelector() as selector, contextlib.suppress(ConnectionError):
        selector.register(connection, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        while os.getppid() == agent:
            ready = {key.fileobj for key, _ in selector.select(timeout=1.0)}
            if wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake, 4096)
            _report_ends(connection, children)
            if connection in ready:
                data = connection.recv(_MESSAGE_BYTES)
                if not data:
                    break
                _obey(connection, children, json.loads(data))
    for pid in children.values():
        _kill_group(pid, signal.SIGKILL)
    os._exit(0)  # what was imported may complain when it is torn down


def _obey(connection: socket.socket, children: dict[int, int], message: dict[str, Any]) -> None:
    if "start" in message:
        pid = os.fork()
        if pid == 0:
            _rank_main(connection, message)
        children[message["start"]] = pid
        _tell(connection, {"key": message["start"], "pid": pid})
    elif (pid := children.get(message["key"])) is not None:
        if message["group"]:
            _kill_group(pid, message["signal"])
        else:
            os.kill(pid, message["signal"])


def _report_ends(connection: socket.socket, children: dict[int, int]) -> None:
    for key, pid in list(children.items()):
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end is None:
            continue
        if end.si_code != os.CLD_EXITED or end.si_status:
            # While the dead rank is not reaped, its number cannot belong to another group.
            _kill_group(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        del children[key]
        _tell(connection, {"key": key, "code": code, "time": time.time()})


def _tell(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        connection.send(json.dumps(message).encode())


def _kill_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)  # before it has made its own group


def _rank_main(connection: socket.socket, message: dict[str, Any]) -> None:
    """Turn the forked child into a rank; does not return."""
    parent = os.getppid()
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            # Asked to stop before the rank listens: the agent asks again until it does.
            signal.signal(number, lambda *_: None)
        end_with_parent(parent)
        connection.close()
        log = os.open(message["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
        faulthandler.enable()
        os.environ.update(message["env"])
        code = _run(message["argv"])
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
    os._exit(code)  # past the destructors of gloo's threads, which can abort a finished rank


def end_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends, by whatever cause."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        os._exit(128 + signal.SIGKILL)


def _run(argv: list[str]) -> int:
    """Do what ``python argv...`` does and return its exit code."""
    torch: ModuleType | None = sys.modules.get("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():
        os.execv(sys.executable, [sys.executable, *argv])
    code = 0
    try:
        if argv[0] == "-m":
            sys.argv = [argv[1], *argv[2:]]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(argv)
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = _exit_code(end.code)
    except BaseException as error:
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename in (__file__, _RUNPY):
            trace = trace.tb_next  # begin where the verb begins
        error.__traceback__ = trace
        record_crash(error)
        traceback.print_exception(error)
        code = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    return code


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)  # noqa: T201
    return 1


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
