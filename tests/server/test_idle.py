"""What the engine's loop does while it has no request: it gets ready for later ones, and then rests."""

from __future__ import annotations

import time
from pathlib import Path

from server_harness import engine_thread, wait_until

from kvik.distributed.mock import MockExecutor


class Unready(MockExecutor):
    """Has a number of things left to do before it is ready."""

    left = 5
    calls = 0

    def get_ready(self) -> bool:
        self.calls += 1
        self.left -= self.left > 0
        return self.left > 0


def test_the_loop_gets_ready_and_then_rests(tmp_path: Path) -> None:
    executor = Unready(block_size=16)
    with engine_thread(tmp_path, executor=executor):
        wait_until(lambda: executor.left == 0)
        calls = executor.calls
        time.sleep(0.3)
        assert executor.calls - calls <= 2, "it asks again and again"
