"""Checks the shapes in every signature of core, whenever core has not been imported before (as in `pytest tests/core`).

Run together with other rooms' tests, core may already be there without its checks; the same tests hold then, as they
ask for the errors that users see.
"""

import importlib
import pkgutil
import sys

import jaxtyping
import pytest

if not any(name.startswith("upslope.core.") for name in sys.modules):
    with jaxtyping.install_import_hook("upslope.core", "beartype.beartype"):
        import upslope.core

        for module in pkgutil.iter_modules(upslope.core.__path__):
            importlib.import_module(f"upslope.core.{module.name}")


@pytest.fixture
def as_users_see_it():
    """Without the shape checker, which users do not have: what is refused must be refused by core itself."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
