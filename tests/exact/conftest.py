"""Checks the shapes in every signature of exact's solvers: the hook must be in place before they are first imported."""

from jaxtyping import install_import_hook

with install_import_hook(
    [
        "upslope.exact.dynamic_programming",
        "upslope.exact.evaluation",
        "upslope.exact.laboratory",
        "upslope.exact.measurement",
        "upslope.exact.pairs",
        "upslope.exact.sampled",
        "upslope.exact.soft",
        "upslope.exact.surrogate_studies",
        "upslope.exact.undiscounted",
    ],
    "beartype.beartype",
):
    import upslope.exact  # noqa: F401
