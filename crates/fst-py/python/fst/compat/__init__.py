"""Modules with the names of other packages, which load by fst.

`install()` makes `import safetensors` (and `fastsafetensors`, if asked for) find these, also in packages that are
imported later, so that programs need no change:

    import fst.compat
    fst.compat.install()
    from safetensors.torch import load_file       # fst's
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys

_PACKAGES = ("safetensors", "fastsafetensors")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a package's modules in `fst.compat`: the same ones, by another name."""

    def __init__(self, package):
        self._package = package

    def find_spec(self, name, path=None, target=None):
        if name != self._package and not name.startswith(f"{self._package}."):
            return None
        own = f"{__name__}.{name}"
        found = importlib.util.find_spec(own)
        if found is None:
            return None
        is_package = found.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(name, self, origin=found.origin, is_package=is_package)

    def create_module(self, spec):
        module = importlib.import_module(f"{__name__}.{spec.name}")
        # What the import system is about to replace.
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state


def install(*packages):
    """Has imports of these packages ("safetensors" if none is named, "fastsafetensors") find the modules of
    `fst.compat`. What was imported from the packages themselves before stays as it is."""
    for package in packages or ("safetensors",):
        if package not in _PACKAGES:
            raise ValueError(f"fst.compat has no {package!r}")
        if any(isinstance(finder, _Finder) and finder._package == package for finder in sys.meta_path):
            continue
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Finder(package))
