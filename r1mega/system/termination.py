"""A last act before SIGTERM ends this process, whatever its main thread is doing.

Python runs signal handlers in the main thread between two steps of the interpreter, which a thread
inside a collective does not come to. The signal's number also goes down a pipe at once, and a
thread of its own waits there.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread


@contextmanager
def before_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """Within the block, SIGTERM runs ``act`` in a thread and then ends the process with 143.

    To be used in the main thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # as Python demands of it

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM:
                act()
                os._exit(128 + signal.SIGTERM)
        os.close(reader)

    handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
    earlier = signal.set_wakeup_fd(writer)
    Thread(target=watch, name="sigterm", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        signal.signal(signal.SIGTERM, handler)
        os.close(writer)  # ends the thread
