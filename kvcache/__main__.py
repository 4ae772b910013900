"""`python -m kvcache`: runs the command line of `kvcache.cli`."""

from kvcache.cli import main

# The demo starts engines with `spawn`, which imports this module again in each engine process.
if __name__ == "__main__":
    raise SystemExit(main())
