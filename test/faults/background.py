"""Work beside the test, in a thread of its own."""

import threading
from types import TracebackType
from typing import Self


class Background:
    """Runs `_work` within a `with` block: until `stop` is set, which the block's end does."""

    failure: BaseException | None = None

    def __enter__(self) -> Self:
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Raises what has ended the work too early."""
        self.stop.set()
        self.thread.join()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.failure = error

    def _work(self) -> None:
        raise NotImplementedError
