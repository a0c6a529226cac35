"""Importing fairseq without what takes a third of its start and is not used."""

import sys
from contextlib import contextmanager
from types import ModuleType

# for a criterion and a task that classify sentences and sounds
UNUSED = {"sklearn": "metrics", "scipy": "stats"}


@contextmanager
def without_unused():
    """What is imported from the modules in :data:`UNUSED` while this lasts is None; they can be
    imported afterwards."""
    if sys.modules.keys() & UNUSED.keys():
        yield
        return
    stand_ins = {}
    for package, name in UNUSED.items():
        stand_ins[package], module = ModuleType(package), ModuleType(f"{package}.{name}")
        stand_ins[module.__name__] = module
        module.__getattr__ = lambda name: None
        setattr(stand_ins[package], name, module)
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
