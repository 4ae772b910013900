"""`python -m kvcache`: the command line. Holds only the call; everything is in `kvcache.cli`."""

from kvcache.cli import main

# The demo starts its engines with `spawn`, which imports this file again in every engine process.
if __name__ == "__main__":
    raise SystemExit(main())
