"""Which backend each operator of the fast model is asked for: one for all, and others for single operators."""

from __future__ import annotations

OPERATORS = ("causal_attention", "layer_norm", "linear", "gelu_mlp", "linear_cross_entropy")


def by_operator(backend: str) -> dict[str, str]:
    """The backend that each operator is asked for, from "auto", "triton" or "triton,causal_attention:cuda".

    What stands without an operator is for all others: auto if there is none. Raises ValueError for what no operator or no
    backend is called, and for what is said twice.
    """
    from gptkernels.backend import BACKENDS  # not at the top: it loads torch, which --help can do without

    said: dict[str, str] = {}
    for part in backend.split(","):
        operator, _, name = part.strip().rpartition(":")
        if name != "auto" and name not in BACKENDS:
            raise ValueError(
                f"backend must be one of auto, {', '.join(BACKENDS)}, for one operator auto,{OPERATORS[0]}:NAME, "
                f"got {name!r}" + (f" in {backend!r}" if name != backend else "")
            )
        if operator and operator not in OPERATORS:
            raise ValueError(f"backend is by operator for {', '.join(OPERATORS)}, got {operator!r} in {backend!r}")
        if operator in said:
            whose = operator or "all operators"
            raise ValueError(f"backend must name one for {whose}, got {said[operator]} and {name} in {backend!r}")
        said[operator] = name
    return {operator: said.get(operator, said.get("", "auto")) for operator in OPERATORS}
