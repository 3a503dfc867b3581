"""The table between Meta's tensors and ours, and the order of Q and K rows within a head."""

import pytest
import torch
from meta_reference import rotate, rotations
from random_models import ARCHITECTURES, BIASES, TOLERANCE, relative_difference, tiny_config

from conversion.keys import EMBEDDING, OUTPUT, TENSORS, check_names, expand, our_shapes, to_half_split, to_interleaved
from hf_llama_repro import LlamaReproConfig, LlamaReproForCausalLM
from hf_llama_repro.errors import CheckpointError

# (query heads, key/value heads)
HEADS = {"MHA": (4, 4), "9/3": (9, 3), "32/4": (32, 4), "8/1": (8, 1), "64/8": (64, 8), "MQA": (16, 1)}
heads = pytest.mark.parametrize(("query_heads", "key_heads"), HEADS.values(), ids=HEADS)
SIZES = {**ARCHITECTURES, "biases": BIASES, "untied": {}}


def labelled_rows(labels: list[str]) -> torch.Tensor:
    """Rows that bear 100 * head + channel, from labels such as "h1c2"."""
    numbers = [100 * int(label[1]) + int(label[3:]) for label in labels]
    return torch.tensor(numbers).unsqueeze(1).expand(-1, 5)


# fmt: off
# Heads, Meta's order, ours.
ORDERS = {
    "one head (the key of 8/1)": (
        1,
        ["h0c0", "h0c1", "h0c2", "h0c3", "h0c4", "h0c5"],
        ["h0c0", "h0c2", "h0c4", "h0c1", "h0c3", "h0c5"],
    ),
    "two heads": (
        2,
        ["h0c0", "h0c1", "h0c2", "h0c3", "h1c0", "h1c1", "h1c2", "h1c3"],
        ["h0c0", "h0c2", "h0c1", "h0c3", "h1c0", "h1c2", "h1c1", "h1c3"],
    ),
    "three heads (the key of 9/3)": (
        3,
        ["h0c0", "h0c1", "h0c2", "h0c3", "h1c0", "h1c1", "h1c2", "h1c3", "h2c0", "h2c1", "h2c2", "h2c3"],
        ["h0c0", "h0c2", "h0c1", "h0c3", "h1c0", "h1c2", "h1c1", "h1c3", "h2c0", "h2c2", "h2c1", "h2c3"],
    ),
    "heads of a single pair stay": (
        4,
        ["h0c0", "h0c1", "h1c0", "h1c1", "h2c0", "h2c1", "h3c0", "h3c1"],
        ["h0c0", "h0c1", "h1c0", "h1c1", "h2c0", "h2c1", "h3c0", "h3c1"],
    ),
}
# fmt: on


@pytest.mark.parametrize(("heads", "metas", "ours"), ORDERS.values(), ids=ORDERS)
def test_within_each_head_even_channels_come_first(heads, metas, ours):
    assert torch.equal(to_half_split(labelled_rows(metas), heads), labelled_rows(ours))


@heads
@pytest.mark.parametrize("head_dim", [2, 4, 6, 16])
def test_one_order_is_the_inverse_of_the_other(query_heads, key_heads, head_dim):
    for count in (query_heads, key_heads):
        rows = torch.randn(count * head_dim, 7)
        assert torch.equal(to_interleaved(to_half_split(rows, count), count), rows)
        assert torch.equal(to_half_split(to_interleaved(rows, count), count), rows)


@heads
def test_attention_scores_are_those_of_metas_rotation(query_heads, key_heads):
    """Meta turns neighbours, we turn halves: after the reordering the scores of every head are the same."""
    head_dim, seq, width = 8, 10, 12
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(seq, width, generator=generator)
    query = torch.randn(query_heads * head_dim, width, generator=generator)
    key = torch.randn(key_heads * head_dim, width, generator=generator)
    rotation = rotations(seq, head_dim, 100.0)
    cos, sin = rotation.real.repeat(1, 2), rotation.imag.repeat(1, 2)

    def scores(rotated_query, rotated_key):
        repeated = rotated_key.repeat_interleave(query_heads // key_heads, dim=1)
        return torch.einsum("qhd,khd->hqk", rotated_query, repeated)

    def metas(weight):
        return rotate((inputs @ weight.T).unflatten(-1, (-1, head_dim))[None], rotation)[0]

    def ours(weight, count):
        channels = (inputs @ to_half_split(weight, count).T).unflatten(-1, (-1, head_dim))
        first, second = channels.chunk(2, dim=-1)
        return channels * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

    found, expected = scores(ours(query, query_heads), ours(key, key_heads)), scores(metas(query), metas(key))
    assert relative_difference(found, expected) < TOLERANCE


@pytest.mark.parametrize(("query_heads", "key_heads"), [HEADS[name] for name in HEADS if name != "MHA"])
def test_key_reordered_with_the_querys_heads_differs(query_heads, key_heads):
    rows = torch.arange(key_heads * query_heads * 4).unsqueeze(1)
    assert not torch.equal(to_half_split(rows, query_heads), to_half_split(rows, key_heads))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_reordering_leaves_its_argument_alone(heads):
    rows = torch.randn(16, 3)
    before = rows.clone()
    to_half_split(rows, heads)
    to_interleaved(rows, heads)
    assert torch.equal(rows, before)


def test_only_query_and_key_are_reordered():
    reordered = {row.meta: row.heads for row in TENSORS if row.heads is not None}
    assert reordered == {
        "layers.{}.attention.wq.weight": "num_attention_heads",
        "layers.{}.attention.wk.weight": "num_key_value_heads",
    }


@pytest.mark.parametrize("column", ["meta", "ours"])
def test_no_name_stands_twice_in_the_table(column):
    names = [getattr(row, column) for row in TENSORS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("fields", SIZES.values(), ids=SIZES)
def test_table_is_a_bijection_of_every_tensor(fields):
    rows = expand(tiny_config(**fields))
    assert len({meta for _, meta, _ in rows}) == len({ours for _, _, ours in rows}) == len(rows) == 2 * 9 + 3


@pytest.mark.parametrize("layers", [1, 12])
def test_layer_numbers_agree_on_both_sides(layers):
    def number(name):
        return [part for part in name.split(".") if part.isdigit()]

    rows = expand(tiny_config(num_hidden_layers=layers))
    assert [number(meta) for _, meta, _ in rows] == [number(ours) for _, _, ours in rows]


@pytest.mark.parametrize("fields", SIZES.values(), ids=SIZES)
def test_shapes_are_those_of_the_models_state_dict(fields):
    config = tiny_config(**fields)
    with torch.device("meta"):
        model = LlamaReproForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected[OUTPUT]
    assert our_shapes(config) == expected


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-33b", 32_528_943_616),
        ("llama-65b", 65_285_660_672),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
    ],
)
def test_shapes_make_the_papers_number_of_parameters(name, parameters):
    shapes = our_shapes(LlamaReproConfig.from_paper(name))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters


def test_embedding_and_output_are_named_as_in_the_table():
    assert (TENSORS[0].ours, TENSORS[-1].ours) == (EMBEDDING, OUTPUT)


def test_one_error_names_what_is_missing_and_what_is_unknown():
    with pytest.raises(CheckpointError, match=r"HERE .*1 missing tensors \(a\); 2 unknown tensors \(c, d\)"):
        check_names({"b", "c", "d"}, {"a", "b"}, "HERE")


def test_long_lists_of_names_are_shortened():
    with pytest.raises(CheckpointError, match=r"9 missing tensors \(n0, n1, n2, n3, n4, …\)"):
        check_names(set(), {f"n{number}" for number in range(9)}, "HERE")


def test_equal_names_are_accepted():
    check_names({"a"}, {"a"}, "HERE")
