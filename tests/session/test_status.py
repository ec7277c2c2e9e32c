"""The status: what a session has, in a few lines that are true."""

from __future__ import annotations

import flexkernel as fk
from flexkernel.cluster.guarantees import Origin
from flexkernel.session.status import Status

IDS = [[5, 6, 7]]


def rows(session) -> dict[str, str]:
    return dict(session.status().rows)


def test_before_a_load_there_are_engines_and_no_model():
    with fk.local() as session:
        found = rows(session)
        assert found["engines"].startswith("1 of 1 alive on ") and found["model"] == "none loaded"
        assert found["cluster"].startswith("owned") and "runs" not in found


def test_a_loaded_model_is_told_with_its_layout_and_size(session, tiny):
    info = session.load(tiny("llama"), dtype="bfloat16", attn="eager")
    found = rows(session)
    assert found["model"] == f"LlamaForCausalLM from {tiny('llama')}"
    assert found["layout"].startswith("one engine, bfloat16, attention eager, on cpu")
    assert f"{info.num_parameters:,} in all" in found["parameters"]


def test_hooks_runs_and_slabs_are_counted(session, tiny):
    session.load(tiny("llama"))
    session.hook("model.layers.*.mlp")
    session.store.budget = 10_000_000
    before = rows(session)
    assert before["hooks"] == "1" and before["runs"].startswith("0 stored: 0.0 of 10 MB")
    for _ in range(3):
        session.run(IDS)
    after = rows(session)
    assert after["runs"].startswith("3 stored: 0.1 of 10 MB") and after["slabs"].startswith(
        "1 files"
    )
    assert str(session.store.folder) in after["slabs"]


class Evil:
    size, owned, hosts, cluster_id = 1, False, ["<script>"], "<b>"
    alive = answering = staticmethod(lambda: [False])
    origin = Origin("other", owned=False)


def test_names_of_hosts_and_clusters_are_text_in_html():
    status = Status(Evil, None, None, None)
    page = status._repr_html_()
    assert "<script>" not in page and "<b>" not in page and "&lt;script&gt;" in page
    assert "0 of 1 alive" in repr(status) and "attached: it stays" in repr(status)


def test_every_line_has_a_word_and_a_value(session, tiny):
    session.load(tiny("llama"))
    for line in repr(session.status()).splitlines():
        what, _, value = line.partition("  ")
        assert what.strip() and value.strip()
