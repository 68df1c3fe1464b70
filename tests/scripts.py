"""Scripts outside the package, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent


def load_script(place: str) -> ModuleType:
    """The script at ``place`` below the checkout, run as the interpreter would run it, but for its ``main``."""
    path = ROOT / place
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Scripts import their neighbours; dataclasses look their module up.
    sys.modules[path.stem] = module
    try:
        with patch.object(sys, "path", [str(path.parent), *sys.path]):
            spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module
