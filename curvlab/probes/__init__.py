"""PROBES: functions of a frame that return what an `xarray.Dataset` takes, one file a kind."""

# The order in which these enter their probes is that of PROBES.
# isort: off
from curvlab.probes.damping import fractions
from curvlab.probes import bounds as _bounds  # noqa: F401
from curvlab.probes import against_exact as _against  # noqa: F401
from curvlab.probes import noise as _noise  # noqa: F401
from curvlab.probes.directions import cosines_to

# isort: on
from curvlab.probes.base import (
    PROBES,
    Frame,
    Probe,
    ProbeRecord,
    Variable,
    asked,
    check_probes,
    probe,
    select_probes,
)

__all__ = [
    "PROBES",
    "Frame",
    "Probe",
    "ProbeRecord",
    "Variable",
    "asked",
    "check_probes",
    "cosines_to",
    "fractions",
    "probe",
    "select_probes",
]
