"""Which AITER is imitated: the environment variable AITER_STANDIN, read at import."""

import os

# In the order of their releases: two tags, main of August 2026, and v0.1.22.post1 to v0.1.27.
VERSIONS = ("v0.1.5", "v0.1.9", "main", "september")
VERSION = os.environ.get("AITER_STANDIN", "september")


def since(version: str) -> bool:
    return VERSIONS.index(VERSION) >= VERSIONS.index(version)
