"""The whole way through as one command: what ``deltacache run`` and ``deltacache demo`` call."""
