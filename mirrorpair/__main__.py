"""`python -m mirrorpair`: the same command."""

from __future__ import annotations

from mirrorpair.cli import main

if __name__ == "__main__":
    main()
