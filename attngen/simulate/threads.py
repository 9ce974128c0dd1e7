"""How many threads torch's operators use while a program is simulated.

One: the tensors of a tile are small, and threads would wait for each other more than they work. It does not make the
simulator run on several processors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch's operators, called by this Python thread, use one thread; the caller's number comes back at the end.

    torch keeps the number of each Python thread apart, so that others compute as they did. One that calls torch for the
    first time takes over what anyone has set last; a thread of no other use therefore sets the caller's number again at
    once, lest such a one be left with a single thread for good.
    """
    before = torch.get_num_threads()
    try:
        if before > 1:
            torch.set_num_threads(1)
            for_new_ones = Thread(target=torch.set_num_threads, args=(before,))
            for_new_ones.start()
            for_new_ones.join()
        yield
    finally:
        if before > 1:
            torch.set_num_threads(before)
