"""The session: what a user gets wrong is one sentence and changes nothing; a hook reads all and
disturbs nothing."""

from __future__ import annotations

import dataclasses
import gc
import re

import pytest
import torch
from torch import nn

import flexkernel as fk
from flexkernel.errors import (
    CaptureError,
    EngineError,
    FlexError,
    HookError,
    LayoutError,
    LoadError,
    PlacementError,
    PromptError,
)
from tests.support import models, on_engines, reference

IDS = [[5, 6, 7, 8]]
MLP = "model.layers.*.mlp"


def num_torch_hooks(session) -> int:
    """Hooks on all modules of the model in this process, but for the one that keeps the logits and
    the watch's."""
    runtime = session.engines.runtime
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in runtime.model.modules())
    return hooks - 1 - len(runtime.watch._handles)


@pytest.fixture
def loaded(session, tiny):
    session.load(tiny("llama"))
    return session


# --- bad input ------------------------------------------------------------------------

BAD = [
    (
        lambda s: s.hook("model.layers.*.mpl"),
        HookError,
        r"no module matches 'model\.layers\.\*\.mpl'.*nearest: model\.layers\.\*\.mlp",
    ),
    (
        lambda s: s.hook("lm_head", at="outputs"),
        HookError,
        "at='outputs' is not one of output, input",
    ),
    (lambda s: s.hook("lm_head", index=3), HookError, "lm_head output has no tensor at index '3'"),
    (
        lambda s: s.hook("", index="logit"),
        HookError,
        r"\(root\) output has no tensor at index 'logit'.*logits",
    ),
    (lambda s: s.hook("lm_head", positions=[]), HookError, "are no positions"),
    (lambda s: s.hook("lm_head", positions="last"), HookError, "positions='last' are no positions"),
    (lambda s: s.hook("lm_head", name="logits"), HookError, "the name 'logits' is taken"),
    (lambda s: s.hook("**.@q", at="input"), HookError, "a point inside attention, it has no input"),
    (lambda s: s.hook("**.@w"), HookError, r"no module matches '\*\*\.@w'"),
    (lambda s: s.unhook("nothing"), HookError, "no hook is called 'nothing'; there are"),
    (lambda s: s.hooks.group("off", "nothing"), HookError, "there is no group 'nothing'"),
    (lambda s: s.hooks.group("flip", "g"), HookError, "not 'flip'"),
    (
        lambda s: s.run(IDS, groups="nothing"),
        HookError,
        r"no hook is in group 'nothing'; groups are \['g'\]",
    ),
    (lambda s: s.run(IDS, stop_at="nothing"), HookError, "no module matches 'nothing'"),
    (
        lambda s: s.run(IDS, stop_at="model.layers.*"),
        HookError,
        r"no module matches 'model\.layers\.\*'",
    ),
    (
        lambda s: s.run(IDS, stop_at="model.layers"),
        HookError,
        "stop_at='model.layers' never fires in a forward",
    ),
    (lambda s: s.run([]), PromptError, "no rows|empty"),
    (lambda s: s.run([[]]), PromptError, "empty|no tokens"),
    (lambda s: s.run([[5] * 5000]), PromptError, r"5000 tokens .* 2048"),
    (
        lambda s: s.run([[5, 256]]),
        PromptError,
        "token id 256 at position 1 is outside the vocabulary",
    ),
    (lambda s: s.run([[5, -1]]), PromptError, "token id -1"),
    (lambda s: s.run("text"), PromptError, "tokenizer"),
    (lambda s: s.run(None), PromptError, "NoneType|None"),
    (
        lambda s: s.tree("model.layer.*"),
        HookError,
        r"no module matches 'model\.layer\.\*'; nearest: model\.layers\.\*",
    ),
    (lambda s: s.load("/no/such/folder"), LoadError, "there is no model folder /no/such/folder"),
    (lambda s: s.load("/tmp"), LoadError, r"/tmp holds no config\.json"),
    (
        lambda s: s.load(s.loaded.info.path, tp=2),
        LayoutError,
        "tp=2 makes 2 ranks, the cluster has 1 engine",
    ),
    (lambda s: s.load(s.loaded.info.path, pp=0), LayoutError, "pp=0 is not a degree"),
    (
        lambda s: s.load(s.loaded.info.path, dtype="float33"),
        LoadError,
        "dtype 'float33' is not one of torch's",
    ),
    (
        lambda s: s.load(s.loaded.info.path, placements={"lm_head": "split"}),
        PlacementError,
        "a placement is 'shard:DIM'",
    ),
    (lambda s: s.load(7), LoadError, "a folder, a hub id or a function that builds it; found int"),
    (lambda s: s.run(IDS)["nothing"], CaptureError, "captured nothing at"),
    (
        lambda s: s.on_ranks(lambda: 1 / 0),
        EngineError,
        "ZeroDivisionError on rank 0: division by zero",
    ),
]


@pytest.mark.parametrize(("does", "kind", "says"), BAD, ids=range(len(BAD)))
def test_what_a_user_gets_wrong_is_one_sentence_and_changes_nothing(does, kind, says, loaded):
    loaded.hook(MLP, groups="g")
    before = loaded.run(IDS)
    hooks, info = loaded.hooks.hook_set, loaded.loaded.info
    with pytest.raises(FlexError) as caught:
        does(loaded)
    assert type(caught.value) is kind and re.search(says, str(caught.value))
    assert len(caught.value._render_traceback_()) <= (1 if kind is not EngineError else 3)
    assert loaded.hooks.hook_set == hooks and loaded.loaded.info is info
    after = loaded.run(IDS)
    assert [c.key for c in after] == [c.key for c in before] and len(after) == 4
    for a, b in zip(before.captures.values(), after.captures.values(), strict=True):
        assert torch.equal(a.tensor(), b.tensor())


def test_a_position_outside_the_run_is_refused_by_that_run_only(loaded):
    loaded.hook("lm_head", positions=[3])
    with pytest.raises(HookError, match="hook 'lm_head' keeps position 3, but the run has 2"):
        loaded.run([[5, 6]])
    assert loaded.run(IDS)["lm_head"].shape == (1, 1, 256)


def test_before_a_load_everything_says_to_load():
    with fk.local() as session:
        for does in (
            lambda: session.run(IDS),
            lambda: session.hook(MLP),
            lambda: session.unhook(),
            lambda: session.hooks.group("list"),
            lambda: session.tree(),
        ):
            with pytest.raises(LoadError, match=r"no model is loaded: session\.load\(path"):
                does()
        assert (
            session.runs == []
            and "none loaded" in repr(session.status())
            and repr(session.hooks) == "no hooks"
        )


def test_a_closed_session_says_that_nothing_is_loaded(tiny):
    session = fk.local()
    session.load(tiny("llama"))
    folder = session.store.folder
    held = session.run(IDS).logits.tensor()
    before = held.clone()
    session.close()
    session.close()
    assert torch.equal(held, before) and not folder.exists()
    with pytest.raises(LoadError, match="no model is loaded"):
        session.run(IDS)


def test_two_sessions_in_one_process_are_apart(loaded, tiny):
    loaded.hook(MLP)
    one = loaded.run(IDS)
    with fk.local() as other:
        other.load(tiny("qwen3"))
        other.hook("model.layers.0.self_attn.@q")
        run = other.run(IDS)
        assert len(run) == 1 and run["model.layers.0.self_attn.@q"].shape == (1, 8, 4, 16)
    assert torch.equal(
        one[MLP.replace("*", "1")].tensor(), loaded.run(IDS)[MLP.replace("*", "1")].tensor()
    )


# --- hooks come and go ----------------------------------------------------------------


def test_hooking_twenty_times_leaves_one_hook(loaded):
    for _ in range(20):
        hooked = loaded.hook(MLP)
    assert len(hooked.modules) == 4 and len(loaded.hooks) == 1 and num_torch_hooks(loaded) == 4
    assert len(loaded.run(IDS)) == 4


def test_a_hook_that_is_changed_is_the_changed_one(loaded):
    loaded.hook(MLP, name="mine")
    loaded.hook("lm_head", name="mine", positions=-1)
    assert num_torch_hooks(loaded) == 1 and [c.shape for c in loaded.run(IDS)] == [(1, 1, 256)]


def test_unhooking_takes_every_torch_hook_away(loaded):
    bare = loaded.run(IDS).logits.tensor()
    loaded.hook("**")
    loaded.hook("**", at="input")
    loaded.hook("**.@*")
    assert num_torch_hooks(loaded) > 100
    assert loaded.unhook() == ["**", "** input", "**.@*"]
    assert num_torch_hooks(loaded) == 0 and loaded.unhook() == []
    run = loaded.run(IDS)
    assert len(run) == 0 and torch.equal(run.logits.tensor(), bare)


def test_loading_again_begins_without_hooks(loaded, tiny):
    loaded.hook(MLP, groups="g")
    loaded.hooks.group("off", "g")
    loaded.load(tiny("llama"))
    assert len(loaded.hooks) == 0 and num_torch_hooks(loaded) == 0 and len(loaded.run(IDS)) == 0


def test_groups_choose_what_a_run_keeps(loaded):
    loaded.hook(MLP, groups=["a", "b"])
    loaded.hook("lm_head", groups="b")
    loaded.hook("model.norm")

    def kept(**how):
        return [
            c.key.module
            for c in loaded.run(IDS, **how)
            if "layers" not in c.key.module or ".0." in c.key.module
        ]

    assert kept() == ["model.layers.0.mlp", "lm_head", "model.norm"]
    assert kept(groups="a") == ["model.layers.0.mlp"] and kept(groups=["b"]) == [
        "model.layers.0.mlp",
        "lm_head",
    ]
    assert kept(groups="a", complement=True) == ["lm_head", "model.norm"]
    assert loaded.hooks.group("off", "a") == {"a": [MLP], "b": [MLP, "lm_head"]}
    assert kept() == ["lm_head", "model.norm"] and kept(groups="a") == ["model.layers.0.mlp"]
    loaded.hooks.group("on", "a")
    loaded.hooks.group("remove", "b", "lm_head")
    assert kept(groups="b") == ["model.layers.0.mlp"]


def test_a_run_that_fails_leaves_hooks_ready(loaded):
    loaded.hook(MLP)
    want = loaded.run(IDS)
    handle = loaded.engines.runtime.model.model.layers[1].register_forward_pre_hook(
        lambda *_: 1 / 0
    )
    for _ in range(3):
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            loaded.run(IDS)
    handle.remove()
    got = loaded.run(IDS)
    assert all(torch.equal(a.tensor(), b.tensor()) for a, b in zip(want, got, strict=True))


# --- what is read ---------------------------------------------------------------------


def test_reading_changes_no_bit(loaded):
    bare = loaded.run([[5, 6, 7], [8]]).logits.tensor()
    loaded.hook("**")
    loaded.hook("**", at="input")
    assert torch.equal(loaded.run([[5, 6, 7], [8]]).logits.tensor(), bare)


def test_the_users_own_hooks_stay_and_see_the_same(loaded):
    seen = []
    module = loaded.engines.runtime.model.model.layers[0].mlp
    handle = module.register_forward_hook(lambda _, args, out: seen.append(out.clone()))
    loaded.hook(MLP)
    run = loaded.run(IDS)
    loaded.unhook()
    assert len(module._forward_hooks) == 1
    handle.remove()
    assert torch.equal(run["model.layers.0.mlp"].tensor(), seen[0])


def test_a_container_that_never_fires_is_said_to(loaded):
    hooked = loaded.hook("model.layers")
    assert "1 of them never fire in a forward: model.layers" in repr(hooked)
    with pytest.raises(CaptureError, match=r"'model\.layers' never fires in a forward"):
        loaded.run(IDS)["model.layers"]
    assert loaded.hook("**").silent == ("model.layers",)


def test_a_module_called_by_keyword_is_read_at_its_input(loaded, tiny):
    """FlexModel saw nothing: transformers calls self_attn(hidden_states=...)."""
    batch = models.ids_and_mask([4])
    truth = reference.reference(
        reference.load(tiny("llama")), **{**batch, "input_ids": torch.tensor(IDS)}
    )
    loaded.hook("model.layers.*.self_attn", at="input", index="hidden_states")
    loaded.hook("model.layers.*.self_attn", at="input", index="position_embeddings.1")
    run = loaded.run(IDS)
    for layer in range(4):
        name = f"model.layers.{layer}.self_attn"
        for index in ("hidden_states", "position_embeddings.1"):
            assert torch.equal(run[name, "input", index].tensor(), truth.inputs[name, 0, index])


def test_half_precision_is_read_bit_for_bit(session, tiny):
    session.load(tiny("llama"), dtype="bfloat16")
    session.hook("**")
    run = session.run([[5, 6, 7], [8]])
    batch = {
        k: torch.tensor(v)
        for k, v in zip(("input_ids", "attention_mask", "position_ids"), parts(run), strict=True)
    }
    truth = reference.reference(reference.load(tiny("llama"), dtype=torch.bfloat16), **batch)
    assert len(run) > 40
    for capture in run:
        k = capture.key
        assert capture.dtype in (torch.bfloat16, torch.float32) and torch.equal(
            capture.tensor(), truth.outputs[k.module, k.call, k.index]
        )


def parts(run) -> tuple:
    return run.plan.ids, run.plan.mask, run.plan.positions


@dataclasses.dataclass
class Answer:
    kept: torch.Tensor
    scores: dict[str, torch.Tensor]


class Outputs(nn.Module):
    """One module for each kind of output that is hard to read, and one that fires twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.twice = nn.Embedding(32, 4), nn.Linear(4, 4)
        self.tuple_, self.dict_, self.data = Returns(tuple_of), Returns(dict_of), Returns(data_of)
        self.nothing, self.inplace, self.scalar = (
            Returns(none_of),
            nn.ReLU(inplace=True),
            Returns(torch.sum),
        )
        self.strided, self.empty, self.bools = (
            Returns(strided_of),
            Returns(empty_of),
            Returns(bools_of),
        )

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        x = self.twice(self.twice(self.embed(input_ids)))
        self.nothing(x)
        self.scalar(x)
        self.strided(x)
        self.empty(x)
        self.bools(x)
        a, (b, _) = self.tuple_(x)
        x = x + a + b + self.dict_(x)["a.b"] + self.data(x).scores["s"]
        return self.inplace(x * 1)


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def tuple_of(x):
    return x + 1, (x + 2, None)


def dict_of(x):
    return {"none": None, "a.b": x * 2, "c": [x * 3]}


def data_of(x):
    return Answer(x - 1, {"s": x - 2})


def none_of(x):
    return None


def strided_of(x):
    return x.transpose(0, 2)


def empty_of(x):
    return x[:0]


def bools_of(x):
    return x > 0


@pytest.fixture
def outputs():
    torch.manual_seed(3)
    model = Outputs()
    truth, inputs = reference.record(
        model,
        {
            "input_ids": torch.tensor([[5, 6, 7], [8, 9, 1]]),
            "attention_mask": None,
            "position_ids": None,
        },
    )
    return model, truth, inputs


@pytest.mark.parametrize("with_reference", [True, False])
def test_every_kind_of_output_is_read_whole(with_reference, outputs, session):
    model, truth, _ = outputs
    session.load(lambda: model, reference=Outputs if with_reference else None)
    for name, indices in {
        "tuple_": ["0", "1.0"],
        "dict_": ["a.b", "c.0"],
        "data": ["kept", "scores.s"],
        **dict.fromkeys(
            ("twice", "scalar", "strided", "empty", "bools", "inplace", "embed"), ("",)
        ),
    }.items():
        for index in indices:
            session.hook(name, index=index)
    run = session.run([[5, 6, 7], [8, 9, 1]])
    expected = {k: v for k, v in truth.items() if k[0] not in ("", "nothing")}
    assert {(c.key.module, c.key.call, c.key.index) for c in run} == set(expected)
    for (name, call, index), want in expected.items():
        got = run[name, "output", index, call].tensor()
        assert got.dtype == want.dtype and torch.equal(got, want), (name, call, index)


def test_an_output_without_a_tensor_is_said_to_be_none(outputs, session):
    session.load(lambda: outputs[0], reference=Outputs)
    session.hook("nothing")
    run = session.run([[5, 6, 7]])
    assert len(run) == 0
    with pytest.raises(CaptureError, match=r"captured nothing|never fires"):
        run["nothing"]


def test_an_input_is_read_before_the_module_changes_it(outputs, session):
    """ReLU in place: what went in is not what came out."""
    model, truth, inputs = outputs
    session.load(lambda: model, reference=Outputs)
    session.hook("inplace", at="input")
    run = session.run([[5, 6, 7], [8, 9, 1]])
    got = run["inplace"].tensor()
    assert torch.equal(got, inputs["inplace", 0, "0"]) and (got < 0).any()
    assert not torch.equal(got, truth["inplace", 0, ""])


def test_a_module_that_fires_more_often_than_scanned_is_read_each_time(session):
    class Loops(Outputs):
        def forward(self, input_ids, **_):
            x = self.embed(input_ids)
            for _ in range(1 if input_ids.is_meta else 3):
                x = self.twice(x)
            return x

    session.load(Loops, reference=Loops)
    session.hook("twice")
    run = session.run([[5, 6]])
    calls = [run["twice", "output", "", call].tensor() for call in range(3)]
    assert len(run) == 3 and not torch.equal(calls[0], calls[1])
    model = session.engines.runtime.model
    assert torch.equal(model.twice(calls[1]), calls[2])


def test_a_module_that_fires_less_often_than_scanned_says_so(session):
    class Skips(Outputs):
        def forward(self, input_ids, **_):
            x = self.embed(input_ids)
            return self.twice(x) if input_ids.is_meta else x

    session.load(Skips, reference=Skips)
    session.hook("twice")
    with pytest.raises(CaptureError, match="twice: it did not fire in this run"):
        session.run([[5, 6]])["twice"].tensor()


def test_a_batch_is_read_row_by_row_as_alone(loaded):
    loaded.hook("model.layers.3")
    rows = [[5, 6, 7, 8], [9, 10], [11]]
    together = loaded.run(rows)["model.layers.3"].tensor()
    for i, row in enumerate(rows):
        alone = loaded.run([row])["model.layers.3"].tensor()
        torch.testing.assert_close(together[i, -len(row) :], alone[0], atol=1e-5, rtol=1e-5)


def test_a_run_costs_nothing_per_module(loaded):
    """Ten runs of a model that is planned already touch no list of all modules or names."""
    loaded.hook("lm_head")
    loaded.run(IDS)
    info = loaded.loaded.info

    class Counts(tuple):
        looked = 0

        def __iter__(self):
            Counts.looked += 1
            return super().__iter__()

    object.__setattr__(info, "modules", Counts(info.modules))
    try:
        for _ in range(10):
            loaded.run(IDS)
        assert Counts.looked == 0
    finally:
        object.__setattr__(info, "modules", tuple(info.modules))


@pytest.mark.slow
def test_hundreds_of_runs_leak_no_tensors_descriptors_or_threads(loaded):
    import psutil

    loaded.hook("**")
    loaded.store.budget = 10 * loaded.run(IDS).num_bytes + (8 << 20)
    loaded.store.most_runs = 20  # each stored run has a tensor of its own, its mask
    process = psutil.Process()

    def census():
        gc.collect()
        tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        return (
            tensors,
            process.num_fds(),
            process.num_threads(),
            len(process.memory_maps(grouped=False)),
        )

    for i in range(30):
        held = loaded.run([[5 + i, 6, 7]])["model.layers.1.mlp"].tensor()
    before = census()
    for i in range(60):
        held = loaded.run([[5 + i, 6, 7]])["model.layers.1.mlp"].tensor()
    after = census()
    assert held is not None and all(b <= a + 3 for a, b in zip(before, after, strict=True)), (
        before,
        after,
    )


# --- on engines -----------------------------------------------------------------------


@pytest.mark.engines(2)
def test_on_stages_hooks_come_and_go_and_a_container_is_no_place_to_stop(session, tiny):
    def num_hooks():
        modules = on_engines.runtime().model.modules()
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    session.load(tiny("llama"), pp=2)
    before = session.on_ranks(num_hooks)
    bare = session.run(IDS).logits.tensor()
    for _ in range(5):
        session.hook(MLP)
    session.hook("**", at="input")
    held = [a - b for a, b in zip(session.on_ranks(num_hooks), before, strict=True)]
    # not the root, not the @ points
    assert min(held) > 20 and sum(held) == 4 + len(session.loaded.info.names) - 1 - 20
    with pytest.raises(HookError, match="never fires in a forward"):
        session.run(IDS, stop_at="model.layers")
    run = session.run(IDS)
    assert torch.equal(run.logits.tensor(), bare) and len(list(run)) > 40
    session.unhook()
    assert session.on_ranks(num_hooks) == before


@pytest.mark.engines(2)
def test_a_load_that_is_refused_leaves_the_loaded_model_on_the_engines(session, tiny):
    session.load(tiny("llama"), tp=2)
    session.hook(MLP)
    want = session.run(IDS)["model.layers.2.mlp"].tensor()
    for bad, kind, says in (
        ({"tp": 2, "source": "/no/such"}, LoadError, "no model folder"),
        ({"tp": 2, "source": tiny("gpt2")}, LayoutError, "no tensor-parallel plan"),
        ({"pp": 2, "source": tiny("gpt2")}, LayoutError, "cannot be split into stages"),
        (
            {"tp": 4, "source": tiny("llama")},
            LayoutError,
            "tp=4 makes 4 ranks, the cluster has 2 engines",
        ),
        (
            {"fsdp": 3, "source": tiny("llama")},
            LayoutError,
            "fsdp=3 makes 3 ranks, the cluster has 2 engines",
        ),
    ):
        with pytest.raises(kind, match=says):
            session.load(**bad)
        assert torch.equal(session.run(IDS)["model.layers.2.mlp"].tensor(), want)
