"""Ctrl-C and SIGTERM during training: noted when they come, raised where nothing gets lost."""

import signal
import threading
from typing import Any


class Signals:
    """Lets the first Ctrl-C or SIGTERM only be noted, until `raise_the_first` is called.

    An exception at any point of the code could be lost, for example in a destructor of Ray. Then
    training would continue. The second signal acts as usual. Nothing changes in other threads than
    the main one, and for signals that the program handles itself.
    """

    def __init__(self):
        self.noted, self.before = [], {}
        if threading.current_thread() is not threading.main_thread():
            return
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        for number, handler in usual.items():
            if signal.getsignal(number) is handler:
                self.before[number] = signal.signal(number, self._note)

    def _note(self, number: int, _: Any) -> None:
        self.noted.append(number)
        signal.signal(number, self.before[number])

    def raise_the_first(self) -> None:
        """Raise the exception of the signal that was noted, if any."""
        if self.noted and self.noted[0] == signal.SIGINT:
            raise KeyboardInterrupt
        if self.noted:
            raise SystemExit(128 + self.noted[0])  # as shells report it; `finally` blocks run

    def undo(self) -> None:
        """Install the handlers that were there."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
