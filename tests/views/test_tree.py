"""The model tree: repeated layers fold, columns say where pieces lie, names are text."""

from __future__ import annotations

import re

from flexkernel.views.tree import ModelTree, ModuleRow


def llama(
    num_layers: int = 30, hooked: tuple[int, ...] = (), second_stage: int = 99
) -> list[ModuleRow]:
    rows = [
        ModuleRow("", "Llama"),
        ModuleRow("model.embed", "Embedding", 28_311_552, (1, 5, 576), "Shard(-1)", [0, 1]),
    ]
    for i in range(num_layers):
        ranks = [0, 1] if i < second_stage else [2, 3]
        hooks = [("mlps", ["early", "all"])] if i in hooked else []
        rows.append(
            ModuleRow(f"model.layers.{i}", "Block", 3_540_096, "(B, S, 576)", "Replicate", ranks)
        )
        rows.append(
            ModuleRow(
                f"model.layers.{i}.mlp", "MLP", 2_654_208, "(B, S, 576)", "Replicate", ranks, hooks
            )
        )
    return [*rows, ModuleRow("lm_head", "Linear")]


def lines(tree) -> list[str]:
    return str(tree).splitlines()


def test_thirty_equal_layers_are_one_line():
    tree = ModelTree(llama())
    folded = [line for line in lines(tree) if "×30" in line]
    assert len(folded) == 1
    assert "0–29 ×30" in folded[0] and "3.54 M each" in folded[0]
    assert len(lines(tree)) == 1 + 7


def test_a_hooked_layer_stands_by_itself():
    tree = ModelTree(llama(hooked=(7,)))
    labels = re.findall(r"^\s+(\d[^ ]*(?: ×\d+)?)", str(tree), re.MULTILINE)
    assert labels == ["0–6 ×7", "7", "8–29 ×22"]
    assert "mlps (early all)" in str(tree)


def test_the_same_hook_on_every_layer_still_folds():
    assert "0–29 ×30" in str(ModelTree(llama(hooked=tuple(range(30)))))


def test_layers_of_two_stages_fold_stage_by_stage():
    text = str(ModelTree(llama(second_stage=15)))
    assert "0–14 ×15" in text and "15–29 ×15" in text
    assert re.search(r"15–29 ×15 .* 2–3$", text, re.MULTILINE)


def test_every_column_is_there():
    text = str(ModelTree(llama(), title="Llama · tp 2"))
    assert text.splitlines()[0] == "Llama · tp 2"
    row = next(line for line in text.splitlines() if "embed" in line)
    assert re.split(r"\s{2,}", row.strip()) == [
        "embed",
        "Embedding",
        "28.31 M",
        "(1, 5, 576)",
        "Shard(-1)",
        "0–1",
    ]


def test_html_has_no_script_and_names_are_text():
    tree = ModelTree(
        [ModuleRow("<script>alert(1)</script>", "A&B", hooks=[("<img src=x>", ["g"])])]
    )
    page = tree._repr_mimebundle_()["text/html"]
    assert "&lt;script&gt;" in page and "A&amp;B" in page
    assert not re.search(r"<(script|img|svg|style)", page)


def test_html_unfolds_where_there_is_something_below():
    page = ModelTree(llama(hooked=(7,)))._repr_html_()
    assert page.count("<details") == page.count("</details>") == 5  # model, layers, 0–6, 7, 8–29
    assert ">below<" in page  # a closed line tells of hooks inside
    assert len(page) < 30_000


def test_a_container_no_row_names_is_made_up():
    text = lines(ModelTree([ModuleRow("layers.0.mlp", "MLP")]))
    assert [line.split() for line in text[1:]] == [["layers"], ["0"], ["mlp", "MLP"]]


def test_only_neighbours_in_number_fold():
    text = str(
        ModelTree(
            [ModuleRow("layers.0", "A"), ModuleRow("layers.2", "A"), ModuleRow("layers.3", "A")]
        )
    )
    assert "2–3 ×2" in text and "0–2" not in text


def test_an_empty_tree_is_a_header():
    assert str(ModelTree([])).startswith("module")
