"""Code of the user's: it runs only from a file that the user names, as FILE.py:NAME."""

import importlib.util
from pathlib import Path
from typing import Any


def attribute(what: str, path: Path, name: str) -> Any:
    """What the file calls `name`, None if nothing; the file is run.

    Args:
        what: the setting that names it, for the error.
        path: of the file.
        name: of a function or a class in it.

    Raises:
        ValueError: there is no such file.
    """
    if not path.exists():
        raise ValueError(f"{what} is '{path}:{name}': there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"_{what}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name, None)
