"""Versions of the operators: known without loading them."""

# raise one whenever the same seed begins to give another operator
VERSIONS = {"affd": 2}


def version_of(kind: str) -> int:
    """Of a kind of sketch; part of its identity."""
    return VERSIONS.get(kind, 1)
