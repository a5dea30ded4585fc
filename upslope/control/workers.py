"""Worker processes that share tensors: how they start, report, fail, are lost and end.

They are spawned, not forked, and each has a pipe of its own to the parent: a worker that is killed while it writes can
hold no lock that others wait for. What is sent through a pipe is small and plain; tensors lie in shared memory.
"""

import os
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch import multiprocessing

JOIN_SECONDS = 5.0  # that a worker which is done may take to end its process


class Failure(NamedTuple):
    """What a worker that raised sends last."""

    message: str
    notes: tuple[str, ...]


class Ended(NamedTuple):
    """A worker's process is gone."""

    exit_code: int  # 0: it was done; -9: killed


class Workers:
    """Processes that all run `body(worker, send, *arguments)`."""

    def __init__(self, body: Callable[..., None]) -> None:
        self._body = body
        self._running: dict[int, tuple[BaseProcess, Connection]] = {}

    @property
    def running(self) -> list[int]:
        """The numbers of the workers whose end was not reported yet."""
        return sorted(self._running)

    def start(self, worker: int, *arguments: Any) -> None:
        """Start a process as the worker of this number."""
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_main, args=(self._body, worker, sender, arguments))
        self._running[worker] = process, receiver
        process.start()
        sender.close()  # the worker's copy is the only one: its end is the end of the pipe

    def wait(self, seconds: float) -> list[tuple[int, Any]]:
        """What came within the time, in each worker's order: what it sent, or `Ended`, the last of it.

        Raises:
            ValueError: a worker raised; the message and its notes are that error's.
        """
        ready = wait([pipe for _, pipe in self._running.values()], seconds)
        messages: list[tuple[int, Any]] = []
        for worker, (process, pipe) in list(self._running.items()):
            gone = process.exitcode is not None  # asked first: what it sent before is then all in the pipe
            if pipe in ready or gone:
                gone |= _receive(pipe, worker, messages)
            if gone:
                process.join(JOIN_SECONDS)
                process.kill()
                process.join()
                pipe.close()
                del self._running[worker]
                messages.append((worker, Ended(int(process.exitcode or 0))))
        for worker, message in messages:
            if isinstance(message, Failure):
                error = ValueError(f"worker {worker}: {message.message}")
                for note in message.notes:
                    error.add_note(note)
                raise error
        return messages

    def close(self) -> None:
        """End every worker that still runs."""
        for process, _ in self._running.values():
            if process.pid is not None:
                process.kill()
        for process, pipe in self._running.values():
            if process.pid is not None:
                process.join()
            pipe.close()
        self._running.clear()


def _receive(pipe: Connection, worker: int, messages: list[tuple[int, Any]]) -> bool:
    """Take what lies in the pipe; True if nothing will come any more."""
    try:
        while pipe.poll():
            messages.append((worker, pipe.recv()))
    except (EOFError, OSError):  # a worker killed while it wrote leaves half a message
        return True
    return False


def _main(body: Callable[..., None], worker: int, sender: Connection, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as in the parent's run
    try:
        body(worker, sender.send, *arguments)
    except Exception as error:
        known = isinstance(error, ValueError)
        notes = (*getattr(error, "__notes__", ()), *(() if known else ("".join(traceback.format_exception(error)),)))
        sender.send(Failure(str(error) if known else f"{type(error).__name__}: {error}", notes))


def _follow_parent() -> None:
    """No orphans: this process ends when its parent does, whatever it is busy with."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)
