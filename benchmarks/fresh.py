"""A call in a process of its own, which ends when it takes too much memory or time.

The parent imports and never computes, so that a forked child starts with nothing warm and no
thread of any library. A crash of the child is an answer, not the end of the run.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.resident import level, status

MEMORY, TIME = 77, 78  # how the guard ends the process
NO_MEMORY = ("can't allocate memory", "out of memory", "RESOURCE_EXHAUSTED", "OOM when")
Say = Callable[[dict[str, Any]], None]


def resident() -> int:
    """Bytes of this process that no file stands behind; 0 where ``/proc`` does not tell."""
    try:
        return status("RssAnon")
    except OSError:
        return 0


def watch(limit_bytes: int, limit_seconds: float) -> None:
    """End this process beyond either limit."""
    start, base = time.monotonic(), resident()

    def look() -> None:
        while True:
            if resident() - base > limit_bytes:
                os._exit(MEMORY)
            if time.monotonic() - start > limit_seconds:
                os._exit(TIME)
            time.sleep(0.005)

    threading.Thread(target=look, daemon=True).start()


def heights() -> Iterator[int]:
    """Bytes now, then at every request the most since; nothing where it cannot be measured."""
    try:
        base = level()
    except (OSError, AttributeError):
        return
    while True:
        yield max(0, status("VmHWM") - base)


def brief(error: BaseException) -> str:
    """An error in a table's cell."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, ModuleNotFoundError):
        return "not installed"
    if type(error).__name__ == "NotWrittenError":
        return "not written"
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return "too large"
    said = f"{type(error).__name__}: {lines[0]}".replace("|", "/")
    return said if len(said) <= 120 else said[:117] + "..."


def in_child(
    task: Callable[[Say], dict[str, Any]], limit_bytes: int, limit_seconds: float
) -> tuple[list[dict[str, Any]], str]:
    """What ``task`` said and returned, last, and how its process ended: empty if well."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries greet; errors come by the pipe
        with os.fdopen(writer, "w") as stream:

            def say(fact: dict[str, Any]) -> None:
                stream.write(json.dumps(fact) + "\n")
                stream.flush()

            watch(limit_bytes, limit_seconds)
            code = 1
            try:
                say(task(say))
                code = 0
            except BaseException as error:
                say({"failed": brief(error)})
            finally:
                os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = [json.loads(line) for line in stream if line.endswith("\n")]
    _, ended = os.waitpid(child, 0)
    return said, ending(ended)


def ending(code: int) -> str:
    """The wait status in words."""
    if os.WIFSIGNALED(code):
        return f"crash: {signal.Signals(os.WTERMSIG(code)).name}"
    match os.WEXITSTATUS(code):
        case 0:
            return ""
        case 77:
            return "too large"
        case 78:
            return "too slow"
    return "error"
