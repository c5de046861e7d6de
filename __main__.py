"""`python -m embershard`: the same as the `embershard` command."""

from .cluster.cli import main

if __name__ == "__main__":
    main()
