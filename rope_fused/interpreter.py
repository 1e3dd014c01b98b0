"""Says no in a subinterpreter, where importing torch breaks the process."""

import importlib


def _is_main() -> bool:
    for name in ("_interpreters", "_xxsubinterpreters"):  # from Python 3.13 on, and before
        try:
            interpreters = importlib.import_module(name)
        except ImportError:
            continue
        return interpreters.get_current() == interpreters.get_main()
    return True


if not _is_main():
    raise ImportError("rope_fused needs the main interpreter of a process, as torch does")
