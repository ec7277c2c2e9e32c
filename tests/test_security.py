"""Security: another user of this machine reads nothing and is obeyed by nobody, checkpoints run no
code, views show text, secrets stay where they are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import zmq
from torch import nn

import flexkernel as fk
from flexkernel.errors import ClusterError, FlexError, LoadError, PromptError
from flexkernel.memory import channel, client, server
from flexkernel.memory.client import Client
from flexkernel.memory.slab import folder_path
from flexkernel.notebook.display import as_html
from flexkernel.session import prompts
from tests.support import bad

two = pytest.mark.engines(2)
root = pytest.mark.skipif(os.getuid() != 0, reason="becoming another user takes root")
NOBODY = 65534
MARKUP = "<img src=x onerror=alert(1)>"
HOME = Path(fk.__file__).parent


# --- another user ---------------------------------------------------------------------


def as_nobody(does: Callable[[], Any]) -> Any:
    """What a child process of another user comes to, as JSON has it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            said = json.dumps({"found": does()})
        except BaseException:
            said = json.dumps({"raised": traceback.format_exc()})
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        said = json.loads(pipe.read())
    os.waitpid(pid, 0)
    assert "found" in said, said["raised"]
    return said["found"]


def can_open(paths: list[str]) -> list[str]:
    """Those of these files that can be read, written or listed."""
    found = []
    for path in paths:
        for flags in (os.O_RDONLY, os.O_RDWR):
            try:
                os.close(os.open(path, flags | os.O_NONBLOCK))
                found.append(path)
            except PermissionError:
                continue
            except IsADirectoryError:
                continue
    return found


def files_of(session) -> list[Path]:
    """Everything that a session has on disk and in shared memory: slabs, heartbeats, the store,
    logs, keys."""
    cluster = session.engines
    profile, name = Path(cluster.ipcluster.profile_dir), cluster.cluster_id
    home = folder_path(cluster.folder)
    mine = [
        home.parent,
        *(p for folder in home.parent.glob(f"{home.name}*") for p in (folder, *folder.rglob("*"))),
    ]
    named = [p for part in ("security", "log", "pid") for p in (profile / part).glob(f"*{name}*")]
    assert len(mine) > 4 and len(named) > 3
    return [*mine, *named, profile / "security"]


@pytest.fixture
def served(session, tiny):
    """A session with a run, and the data server that another host would be answered by."""
    bad.fit(session, tiny("llama"), **bad.TP)
    session.hook("model.layers.1.mlp")
    run = session.run(bad.ROWS)
    address, token = session.engines.call("serve", "a-token-of-this-test", "127.0.0.1", ranks=[0])[
        0
    ]
    region = run["model.layers.1.mlp"]._lies.region
    return session, address, token, region


@two
@root
def test_another_user_can_open_no_file_of_ours(served):
    session = served[0]
    paths = files_of(session)
    for path in paths:
        found = path.lstat()
        assert found.st_uid == os.getuid() and not found.st_mode & 0o077, (path, oct(found.st_mode))
    everything = [*map(str, paths)]
    for pid in (os.getpid(), *session.engines.pids):
        everything += [f"/proc/{pid}/{what}" for what in ("environ", "mem", "maps", "fd")]
    assert as_nobody(lambda: can_open(everything)) == []
    assert can_open(everything) != [], "and the test would see it"


@two
@root
def test_another_user_is_obeyed_by_nobody(served, tiny, tmp_path):
    """He can connect, loopback is open to all. Without the key nothing is done for him; no store
    is there for him."""
    session, address, token, region = served
    tmp_path.chmod(0o777)
    tmp_path.parent.chmod(0o755)
    mark = tmp_path / "mark"
    ports = {
        c.laddr.port
        for p in bad.processes()
        for c in p.net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    }
    orders = [forged(session, mark, key) for key in (b"", b"guessed")]

    def tries() -> str:
        context = zmq.Context()
        for port in ports:
            for frames in orders:
                dealer = context.socket(zmq.DEALER)
                dealer.linger = 200
                dealer.connect(f"tcp://127.0.0.1:{port}")
                dealer.send_multipart(frames)
                dealer.close()
        context.term()
        with Client(address, token[:-1] + "x", timeout_s=1) as client:
            try:
                return str(client.read(region))
            except ClusterError as error:
                return str(error)

    assert "no answer from the data server" in as_nobody(tries)
    with Client(address, token, timeout_s=10) as client:
        assert client.read(region).shape == (2, 5, 64)
    bad.healthy(session, tiny("llama"), **bad.TP)
    assert not mark.exists()
    stores = session.on_ranks(bad.store_of_this_engine)
    assert stores == ["FileStore"] * 2, "a TCPStore has no password"


def forged(session, mark: Path, key: bytes) -> list[bytes]:
    """An order to write a file, as a driver would send it, signed with this key or not at all."""
    from ipyparallel import serialize
    from jupyter_client.session import Session

    other = Session(key=key, packer="json")
    told = {"follow": [], "after": [], "timeout": None, "targets": None, "retries": 0}
    message = other.msg("apply_request", content={}, metadata=told)
    ident = session.engines.client._engines[session.engines[0].id].encode()
    return other.serialize(message, [ident]) + serialize.pack_apply_message(
        bad.note, (str(mark),), {}
    )


# --- other machines -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interface", "curve", "refused"),
    [
        ("tcp://0.0.0.0", None, True),
        ("tcp://*", None, True),
        ("tcp://10.1.2.3", None, True),
        ("tcp://[::]", None, True),
        ("tcp://10.1.2.3", "a-public-key", False),
        ("tcp://127.0.0.1", None, False),
        ("tcp://localhost", None, False),
        ("ipc:///run/user/0/sock", None, False),
    ],
)
def test_a_controller_that_other_machines_reach_has_to_encrypt(
    interface, curve, refused, tmp_path, monkeypatch
):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    security = tmp_path / "profile_default" / "security"
    security.mkdir(parents=True, mode=0o700)
    path = security / "ipcontroller-x-client.json"
    path.write_text(json.dumps({"interface": interface, "curve_serverkey": curve, "key": "k"}))
    path.chmod(0o600)
    with pytest.raises(ClusterError) as caught:
        fk.attach(cluster_id="x")
    assert ("without encryption" in str(caught.value)) == refused, caught.value


@pytest.mark.long
@pytest.mark.slow
def test_a_cluster_that_encrypts_is_attached_to(tiny, tmp_path):
    """ipyparallel's own CURVE, on an address that is not loopback's."""
    address = next((a.address for n in psutil.net_if_addrs().values() for a in n if a.family.name == "AF_INET"
                    and not a.address.startswith("127.")), None)  # fmt: skip
    if address is None:
        pytest.skip("this machine has no address but loopback's")
    env = os.environ | {"IPYTHONDIR": str(tmp_path), "IPP_ENABLE_CURVE": "1"}
    code = [sys.executable, "-c", ENCRYPTED, address, str(tiny("llama"))]
    done = subprocess.run(code, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["right"], done.stderr[-3000:]


ENCRYPTED = """
import sys, ipyparallel as ipp, flexkernel as fk
from tests.support import bad
from pathlib import Path
started = ipp.Cluster(n=2, cluster_id="curve", controller_ip=sys.argv[1], log_level=40)
started.start_cluster_sync()
try:
    session = fk.attach(cluster_id="curve")
    assert session.engines.client.curve_serverkey
    bad.healthy(session, Path(sys.argv[2]), **bad.TP)
    session.close()
    print("right")
finally:
    started.stop_cluster_sync()
"""


# --- checkpoints ----------------------------------------------------------------------


def test_a_tokenizers_own_code_is_not_run(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    ran = tmp_path / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Mine: pass\n")
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"the tokenizer of .* cannot be loaded"):
        prompts.tokenizer(str(folder))
    assert not ran.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(1000000000000) %}x{% endfor %}",
        "{{ messages.clear() }}",
    ],
)
def test_a_chat_template_is_text_and_no_program(template, smollm2):
    tokenizer = prompts.tokenizer(str(smollm2))
    tokenizer.chat_template = template
    with pytest.raises(PromptError, match="the model's chat template refuses these messages"):
        prompts.batch([{"role": "user", "content": "hi"}], tokenizer)


# --- views ----------------------------------------------------------------------------


class Named(nn.Module):
    """A model whose module has a name that a page would run."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 4)
        self.inner = nn.ModuleDict({MARKUP: nn.Linear(4, 4)})

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.inner[MARKUP](self.embed(input_ids))


def test_names_and_tokens_are_text_wherever_they_are_shown():
    with fk.local() as session:
        session.load(Named, reference=Named)
        session.hook("**", groups=MARKUP, name=MARKUP)
        run = session.run([[5, 6]])
        run.tokens = [[MARKUP, "</script>"]]
        shown = [
            run,
            session.hooks,
            session.tree(),
            session.status(),
            as_html(session.loaded.info),
            as_html(session),
        ]
        pages = [page if isinstance(page, str) else page._repr_html_() for page in shown]
        assert len(pages) >= 6
        assert all("<img" not in page for page in pages) and any(
            "&lt;img" in page for page in pages
        )


def test_no_view_makes_a_page_out_of_text():
    sources = {
        path: path.read_text()
        for path in (HOME / "views").rglob("*")
        if path.suffix in (".js", ".py")
    }
    assert len(sources) >= 4
    for path, source in sources.items():
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", source
        ), path


# --- secrets --------------------------------------------------------------------------


@two
def test_secrets_are_in_no_log_no_status_and_no_command_line(served):
    session, _, token, _ = served
    key = session.engines.client.session.key.decode()
    secrets = {key, token, os.environ["HF_TOKEN"]}
    assert session.on_ranks(bad.environ, "HF_TOKEN") == [os.environ["HF_TOKEN"]] * 2, (
        "engines fetch models with it"
    )
    said = [
        repr(thing)
        for thing in (
            session.status(),
            session,
            session.loaded.info,
            session.engines,
            session.store,
        )
    ]
    said += [session.status()._repr_html_(), as_html(session)]
    with pytest.raises(FlexError) as caught:
        session.on_ranks(bad.raises_with_environment)
    said += ["\n".join(caught.value._render_traceback_())]
    said += [
        " ".join(process.cmdline()) for process in bad.processes() if process.pid != os.getpid()
    ]
    logs = [path for path in files_of(session) if path.suffix == ".log"]
    assert len(logs) >= 3
    said += [path.read_text(errors="replace") for path in logs]
    assert not [(secret[:4], text[:80]) for secret in secrets for text in said if secret in text]


def test_nothing_is_unpickled_on_the_data_plane():
    """Its files know no pickle at all; what they get is JSON and bytes."""
    for module in (channel, client, server):
        source = Path(module.__file__).read_text()
        for unpickler in ("import pickle", "torch.load", "recv_pyobj"):
            assert unpickler not in source, module.__name__
