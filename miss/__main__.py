"""`python -m miss` and the `miss` command."""

import sys

from miss.cli import run


def main() -> None:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
