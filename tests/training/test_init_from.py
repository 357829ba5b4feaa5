import golden_rule
import torch

from edt.baselines.mdtv2 import MDTv2
from edt.registry import create_model
from edt.training.init_from import init_from


def mdtv2(**config: int) -> MDTv2:
    layout = {"depth": 3, "decode_layer": 1, "hidden_size": 48, "num_heads": 2}
    return create_model("MDTv2-S/2", **layout, **config)


def test_mdtv2_is_started_from_one_of_another_grid_and_other_classes():
    source = golden_rule.fill(mdtv2(input_size=8, num_classes=5))
    model = mdtv2(input_size=16, num_classes=3)
    report = init_from(model, source.state_dict())
    assert report.new == ["pos_embed", "decoder_pos_embed"]
    bias = "sideblocks.0.attn.rel_pos_bias.relative_position_bias_table"
    assert bias in report.resized
    tables = [network.state_dict()[bias] for network in (source, model)]
    assert [len(table) for table in tables] == [7**2 + 3, 15**2 + 3]
    old, new = (
        table[:-3].unflatten(0, (side, side)) for table, side in zip(tables, (7, 15), strict=True)
    )
    assert torch.allclose(new[::14, ::14], old[::6, ::6], atol=1e-6)  # the corners
    assert torch.equal(tables[0][-3:], tables[1][-3:])
    labels = [network.y_embedder.embedding_table.weight for network in (source, model)]
    assert torch.equal(labels[0][-1], labels[1][-1])
    assert torch.equal(source.mask_token, model.mask_token)


def test_a_table_of_another_form_is_new():
    """Three rows follow the square of offsets in MDTv2's tables."""
    model = mdtv2(input_size=8)
    bias = "sideblocks.0.attn.rel_pos_bias.relative_position_bias_table"
    label = "y_embedder.embedding_table.weight"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name, rows in ((bias, 50), (bias, 0), (label, 0)):
        table = torch.zeros(rows, before[name].shape[1])
        assert init_from(model, {**before, name: table}).new == [name]
        assert torch.equal(model.state_dict()[name], before[name])
