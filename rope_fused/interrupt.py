"""Lets Ctrl-C end the command rope-fused in one line while torch is being imported, too."""

import os
import signal
import sys
import threading


def _is_command() -> bool:
    """Whether this process is `rope-fused ...` or `python -m rope_fused ...`."""
    arguments = getattr(sys, "argv", None) or [""]
    if arguments[0] == "-m":  # as long as runpy looks for the module that it was told
        module = sys.orig_argv[-len(arguments)].removeprefix("-m")
        return module in ("rope_fused", "rope_fused.__main__")
    return os.path.basename(arguments[0]) == "rope-fused"


def _leave(*_):
    os.write(2, b"rope-fused: interrupted\n")
    os._exit(130)


def disarm() -> None:
    """Leave Ctrl-C to who catches KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    and _is_command()
):
    signal.signal(signal.SIGINT, _leave)  # until disarm()
