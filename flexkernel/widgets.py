"""The old name of flexkernel.views, for one version."""

from __future__ import annotations

import warnings

from flexkernel.views import tensor_map

__all__ = ["tensor_map"]

warnings.warn(
    "flexkernel.widgets is flexkernel.views now: from flexkernel import tensor_map",
    DeprecationWarning,
    stacklevel=2,
)
