"""Which backend each operator of the fast model is asked for: one for all, and others for single operators."""

from __future__ import annotations

OPERATORS = ("causal_attention", "layer_norm", "linear", "gelu_mlp", "linear_cross_entropy")


def by_operator(backend: str) -> dict[str, str]:
    """The backend that each operator is asked for, from "auto", "triton" or "triton,causal_attention:cuda".

    What stands without an operator is for all others: auto if there is none. Raises ValueError for what no operator or no
    backend is called, and for what is said twice.
    """
    said: dict[str, str] = {}
    for part in backend.split(","):
        operator, colon, name = map(str.strip, part.rpartition(":"))
        check_name(name, backend)
        if colon and operator not in OPERATORS:
            raise ValueError(f"backend is by operator for {', '.join(OPERATORS)}, got {operator!r} in {backend!r}")
        if operator in said:
            whose = operator or "all operators"
            raise ValueError(f"backend must name one for {whose}, got {said[operator]} and {name} in {backend!r}")
        said[operator] = name
    return {operator: said.get(operator, said.get("", "auto")) for operator in OPERATORS}


def check_name(name: str, backend: str) -> None:
    """Raise unless gptkernels has a backend of this name, which stands in the setting `backend`."""
    if name == "auto":
        return
    from gptkernels.backend import BACKENDS  # not at the top: it loads torch, which --help can do without

    if name not in BACKENDS:
        where = "" if name == backend else f" in {backend!r}"
        raise ValueError(
            f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}{where}; "
            f"for one operator add it as in auto,{OPERATORS[0]}:cpu"
        )
