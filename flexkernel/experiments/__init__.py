"""Many runs over one session: functions that take it, and what they return."""

from .collect import collect
from .dataset import Dataset, open_dataset
from .preview import Preview, preview
from .sweep import Sweep, sweep
from .verification import Verification
from .verify import verify

__all__ = [
    "Dataset",
    "Preview",
    "Sweep",
    "Verification",
    "collect",
    "open_dataset",
    "preview",
    "sweep",
    "verify",
]
