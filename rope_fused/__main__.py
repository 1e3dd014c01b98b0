"""python -m rope_fused: the command rope-fused; without arguments, its doctor."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["doctor"]))
