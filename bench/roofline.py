"""Print the cost model's table: where fusing can win, and how much at most (GPUs as arguments)."""

import sys

from rope_fused.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "--roofline", *sys.argv[1:]]))
