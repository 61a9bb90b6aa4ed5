"""``python -m deltacache`` is the ``deltacache`` command."""

from deltacache.cli import main

if __name__ == "__main__":
    main()
