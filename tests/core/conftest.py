"""Checks the shapes in every signature of core: the hook must be in place before core is first imported."""

from jaxtyping import install_import_hook

with install_import_hook("upslope.core", "beartype.beartype"):
    import upslope.core.advantages
    import upslope.core.divergences
    import upslope.core.reductions
    import upslope.core.returns
    import upslope.core.surrogates
    import upslope.core.values  # noqa: F401
