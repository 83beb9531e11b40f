"""The methods that the study compares, each on a page; nothing of them is in the library."""

from examples.reproduction.transfer.prototypes.full import Adam, ColumnSGD, Muon
from examples.reproduction.transfer.prototypes.moving import Moving
from examples.reproduction.transfer.prototypes.normalized import Normalized
from examples.reproduction.transfer.prototypes.published import Apollo, Fira, GaLore

METHODS = {
    "adam": Adam,
    "muon": Muon,
    "column_sgd": ColumnSGD,
    "galore": GaLore,
    "fira": Fira,
    "apollo": Apollo,
    "normalized": Normalized,
    "moving": Moving,
}
