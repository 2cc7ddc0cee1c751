"""Every type of manifest there is, found among the schemas: a new stage's are known without being listed."""

import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib import import_module

import schemas
from schemas.manifest import Manifest


@cache
def manifest_types() -> tuple[type[Manifest], ...]:
    """All types that the schemas define, by the name of their folder."""
    for module in pkgutil.iter_modules(schemas.__path__):
        import_module(f"schemas.{module.name}")
    found = {kind for kind in _below(Manifest) if kind.__module__.startswith("schemas.")}
    return tuple(sorted(found, key=lambda kind: (kind.folder, kind.__name__)))


def _below(kind: type[Manifest]) -> Iterator[type[Manifest]]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)
