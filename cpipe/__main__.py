"""`cpipe`, `python -m cpipe`, `torchrun -m cpipe`."""

import sys

from cpipe.app import build_app


def main() -> None:
    """Run the command line."""
    build_app(asked=sys.argv[1] if len(sys.argv) > 1 else "")()


if __name__ == "__main__":
    main()
