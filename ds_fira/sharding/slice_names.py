"""The names of slices: of what a rank has of a parameter that tensor parallelism cuts.

All ranks know a parameter by its name in the module. What is saved of it counts elements of a slice, each of which has
a name of its own therefore: NAME@RANK/SIZE. `ds_fira.checkpoint.cuts` says which rows or columns a slice has.

These names stand in saved files.
"""

from __future__ import annotations

_MARK = "@"


def slice_name(param: str, number: int, slices: int) -> str:
    """The name of a slice.

    Args:
        param: the name of the parameter.
        number: of the slice.
        slices: into how many the parameter is cut.
    """
    return f"{param}{_MARK}{number}/{slices}"


def param_of(name: str) -> str:
    """The name of the parameter of which a name is that of a slice, or of all of it.

    Args:
        name: of either.
    """
    param, _, of_ranks = name.rpartition(_MARK)
    # What stages of a pipeline have beside a tied weight is called tied_modules.KEY@1.bias.
    return param if "/" in of_ranks else name
