"""The environment of an engine: an allow-list of the notebook's, which may hold keys for others.

`python -m flexkernel.cluster.environment ARGUMENTS` is `python ARGUMENTS` in that environment. The
process gives up the rest itself, whoever started it: a shell, or a batch system.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase

__all__ = ["ALLOWED", "inherited"]

# Names; * stands for anything. HF_TOKEN is among them: engines download models.
ALLOWED = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "TERM", "HOSTNAME", "PWD",
    "TMPDIR", "TMP", "TEMP", "XDG_*", "PYTHON*", "VIRTUAL_ENV", "CONDA_*", "LD_*", "SETUPTOOLS_*", "PYDEVD_*",
    "FLEX_*", "IPP_*", "IPYTHONDIR", "JUPYTER_*_DIR", "HF_*", "HUGGING_FACE_*", "HUGGINGFACE_*", "TRANSFORMERS_*",
    "TOKENIZERS_*", "SAFETENSORS_*", "TORCH*", "PYTORCH_*", "TRITON_*", "CUDA_*", "NVIDIA_*", "NCCL_*", "GLOO_*",
    "UCX_*", "OMP_*", "GOMP_*", "KMP_*", "MKL_*", "OPENBLAS_*", "MALLOC_*", "SLURM_*", "PMI_*", "PMIX_*", "OMPI_*",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_*",
    "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that an engine inherits. FLEX_ENV in it allows more names:
    "WANDB_*,MY_PATH".

    >>> inherited({"PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "...", "MY_DATA": "/data", "FLEX_ENV": "MY_*"})
    {'PATH': '/bin', 'MY_DATA': '/data', 'FLEX_ENV': 'MY_*'}
    """
    allowed = [*ALLOWED, *filter(None, environment.get("FLEX_ENV", "").replace(" ", "").split(","))]
    return {
        name: value
        for name, value in environment.items()
        if any(fnmatchcase(name, pattern) for pattern in allowed)
    }


if __name__ == "__main__":
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], inherited(os.environ))
