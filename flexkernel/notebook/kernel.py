"""FlexKernel: the IPython kernel with flexkernel's magics already loaded.

`%load_ext flexkernel` does the same in any Python notebook. Jupyter runs
`python -m flexkernel.notebook.kernel -f CONNECTION_FILE`; `install` registers that with Jupyter.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp
from jupyter_client.kernelspec import KernelSpecManager

from flexkernel._version import __version__
from flexkernel.errors import FlexError

__all__ = ["FlexKernel", "install"]

NAME = "flexkernel"
SOURCES = (  # where the kernelspec is: in the source tree, or where a wheel puts it
    Path(__file__).parents[2] / "kernel_spec",
    Path(sys.prefix) / "share" / "jupyter" / "kernels" / NAME,
)


class FlexKernel(IPythonKernel):
    """An IPython kernel that loads the extension before it takes the first request."""

    implementation = "flexkernel"
    implementation_version = __version__

    @property
    def banner(self) -> str:  # type: ignore[override]  # ipykernel's own is a property too
        about = "look inside sharded models (%flex_cluster, %flex_load)"
        return f"FlexKernel {__version__}: {about}\n{super().banner}"

    def start(self) -> None:
        self.load_extension()
        super().start()

    def load_extension(self) -> None:
        """Load the magics; log why not. A kernel that dies at start could not say what is wrong."""
        if self.shell is None:
            return
        try:
            self.shell.extension_manager.load_extension("flexkernel")
            self.shell.magics_manager.registry["FlexMagics"].current.promise()
        except Exception:
            self.log.exception(
                "flexkernel's magics could not be loaded; %%load_ext flexkernel shows why"
            )


def install(user: bool = True, prefix: str | None = None) -> str:
    """Register the kernelspec with Jupyter, for this Python. Returns its folder.

    FlexError: the kernelspec is missing, or the folder cannot be written.
    """
    source = next((folder for folder in SOURCES if (folder / "kernel.json").exists()), None)
    if source is None:
        raise FlexError(
            f"no kernel.json in {' or '.join(map(str, SOURCES))}: install flexkernel again"
        )
    with tempfile.TemporaryDirectory() as temp:
        staged = Path(temp) / NAME
        shutil.copytree(source, staged)
        _name_this_python(staged / "kernel.json")
        try:
            return KernelSpecManager().install_kernel_spec(
                str(staged), NAME, user=user and not prefix, prefix=prefix
            )
        except OSError as error:
            raise FlexError(
                f"the kernelspec cannot be written: {error}; --user and --prefix name other places"
            ) from error


def _name_this_python(spec: Path) -> None:
    # Jupyter may run in another environment than the kernel: its "python" would be another one.
    content = json.loads(spec.read_text())
    content["argv"][0] = sys.executable
    spec.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    IPKernelApp.launch_instance(kernel_class=FlexKernel)
