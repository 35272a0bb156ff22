"""``python -m taylorfx``: the command, as `taylorfx.cli` has it."""

import sys

from taylorfx.cli import main

if __name__ == "__main__":
    sys.exit(main())
