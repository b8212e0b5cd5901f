"""Entry point of the `stagewise` command and of `python -m stagewise`."""

import sys

from stagewise.cli import main

if __name__ == "__main__":
    sys.exit(main())
