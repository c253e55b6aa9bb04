"""`python -m fusion` is the `fusion` command."""

from fusion.cli import main

if __name__ == "__main__":
    main()
