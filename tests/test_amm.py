import math
import re

import golden_rule
import pytest
import torch
from conftest import ROOT

from edt.amm import modulation_matrix
from edt.nn.attention import attention

GOLDEN = {
    name: value for name, value in golden_rule.load("edt.npz").items() if name.startswith("amm")
}


@pytest.mark.parametrize("name", GOLDEN)
def test_matrices_are_those_of_the_release(name):
    form, grid = name.removeprefix("amm").split(".n")
    torch.testing.assert_close(
        modulation_matrix(int(grid), form), torch.from_numpy(GOLDEN[name]), atol=1e-6, rtol=0
    )


def test_a_small_grid_by_hand():
    matrix = modulation_matrix(2)  # d_max = sqrt(2), T = 4 sqrt(2), R = sqrt(5)
    near, far = (
        0.5 * math.exp(math.cos(2 * math.pi / (4 * math.sqrt(2)))),
        0.5 * math.exp(math.cos(math.pi / 2)),
    )
    expected = torch.tensor(
        [
            [math.e / 2, near, near, far],
            [near, math.e / 2, far, near],
            [near, far, math.e / 2, near],
            [far, near, near, math.e / 2],
        ]
    )
    torch.testing.assert_close(matrix, expected)
    assert torch.equal(modulation_matrix(1), torch.ones(1, 1))
    assert torch.equal(modulation_matrix(1, "512"), torch.ones(1, 1))


@pytest.mark.parametrize("form", ["256", "512"])
@pytest.mark.parametrize("grid", [4, 8, 16])
def test_the_radius_includes_its_ties(grid, form):
    matrix = modulation_matrix(grid, form)
    assert torch.equal(matrix, matrix.T)
    edge = (grid - 1) ** 2 + 4  # reached exactly by the offset (2, grid - 1)
    tie = matrix[0, 2 * grid + grid - 1]
    assert tie > 0 and matrix[0, 3 * grid + grid - 1] == 0
    torch.testing.assert_close(modulation_matrix(grid, form, radius=math.sqrt(edge)), matrix)
    assert modulation_matrix(grid, form, radius=math.sqrt(edge) - 1e-3)[0, 2 * grid + grid - 1] == 0
    assert modulation_matrix(grid, form, radius=0).count_nonzero() == grid * grid
    assert (
        modulation_matrix(grid, form, radius=2.0 * grid).count_nonzero() >= (grid * grid) ** 2 - 4
    )


def test_impossible_matrices_are_refused():
    with pytest.raises(ValueError, match="form '128'"):
        modulation_matrix(8, "128")
    with pytest.raises(ValueError, match="radius"):
        modulation_matrix(8, radius=-1)


def test_readme_modulates_another_transformer_as_edt_does():
    (example,) = [
        code
        for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        if "(q @" in code
    ]
    qkv = torch.randn(2, 256, 3, 4, 64)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    names = {"q": q, "k": k, "v": v}
    exec(example, names)
    expected = attention(qkv, torch.zeros(4, 256, 256), names["amm_matrix"])
    torch.testing.assert_close(names["out"].transpose(1, 2).flatten(2), expected)
