"""The status: what a session has, in a few lines that are true."""

from __future__ import annotations

import torch

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
        assert "owned: it ends with this session" in found["engines"] and "runs" not in found


def test_a_loaded_model_is_told_with_its_layout_and_size(session, tiny):
    info = session.load(tiny("llama"), dtype="bfloat16", attn="eager")
    found = rows(session)
    assert found["model"] == (
        f"LlamaForCausalLM from {tiny('llama')}: {info.num_parameters:,} parameters, "
        "one engine, bfloat16, attention eager, on cpu"
    )


def test_hooks_runs_and_slabs_are_counted(session, tiny):
    session.load(tiny("llama"))
    session.hook("model.layers.*.mlp")
    session.store.budget = 10_000_000
    before = rows(session)
    assert before["hooks"] == "1" and before["runs"].startswith("0 stored: 0.0 of 10 MB")
    for _ in range(3):
        session.run(IDS)
    after = rows(session)
    assert after["runs"].startswith("3 stored: 0.1 of 10 MB") and "in 1 files" in after["memory"]
    assert str(session.store.folder) in after["memory"]


def test_it_is_five_lines_and_says_which_edits_there_are(session, tiny):
    session.load(tiny("llama"))
    session.hook("model.layers.1.mlp", edit="scale", value=2)
    assert list(rows(session)) == ["engines", "model", "memory", "hooks", "runs"]
    assert len(repr(session.status()).splitlines()) == 5
    assert rows(session)["hooks"] == "1, 1 of them edits: scale 2 at model.layers.1.mlp"


def test_what_is_guaranteed_is_a_table_of_its_own(session):
    found = dict(session.guarantees().rows)
    assert found["cluster"] == "owned: it ends with this session" and len(found) > 5


def test_a_script_prints_a_session_and_a_model_in_a_few_lines(session, tiny):
    info = session.load(tiny("llama"))
    session.hook("model.layers.1.mlp", edit="add", value=torch.ones(64))
    assert repr(session) == repr(session.status()) and session._repr_html_().startswith("<table")
    assert repr(info).startswith("LlamaForCausalLM: ") and len(repr(info)) < 200
    assert len(repr(list(session.hooks))) < 400 and len(repr(session.hooks.edits)) < 400


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
