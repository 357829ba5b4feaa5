"""The EDT network: an encoder-decoder diffusion transformer (paper, section 3.1 and Figure 3).

Masks, labels and noise are inputs: nothing here draws a random number after initialisation.
State-dict names and shapes are those of the authors' released checkpoints.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import nn

from edt.amm import (
    AMMForm,
    Modulation,
    Placement,
    auto_blocks,
    check_auto,
    default_form,
    set_amm_matrices,
)
from edt.masking import TokenMasks
from edt.nn.config import ModelConfig
from edt.nn.initialisation import initialize_as_dit
from edt.nn.layers import (
    Attention,
    Block,
    DownSample,
    FinalLayer,
    LabelEmbedder,
    LongSkip,
    RelativePositionBias,
    TimestepEmbedder,
    UpSample,
    sincos_table,
)
from edt.nn.transformer import DiffusionTransformer, guide
from edt.utils.errors import UserError

HEAD_DIM = 52  # head width in every stage of every size of EDT


@dataclasses.dataclass(frozen=True)
class EDTConfig(ModelConfig):
    """Everything that fixes the network; saved as JSON beside the weights."""

    family: str = dataclasses.field(default="EDT", init=False)
    depths: tuple[int, ...] = (2, 2, 2, 3, 3)
    """Blocks of the five stages."""
    num_heads: tuple[int, ...] = (6, 8, 10)
    """Heads of stages 1, 2 and 3. Stages 4 and 5 mirror 2 and 1, as the long skips require."""
    tie: bool = True
    """Token information enhancement: AdaLN in down-sampling and long skips (paper, Table 4)."""
    pes: bool = True
    """Positional encoding supplement: position table after down-sampling and skips (Table 4)."""
    mid_mask_block: int | None = None
    """Block of stage 1 before which TokenMasks.mid acts (released EDT-XL: 4)."""
    amm: Placement | None = None
    """Blocks that set_amm("auto") modulates; None where no placement is known."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))
        object.__setattr__(self, "num_heads", tuple(self.num_heads))
        if self.amm is not None:  # JSON gives lists
            low_cfg, high_cfg, at_512 = self.amm
            at_512 = None if at_512 is None else tuple(at_512)
            object.__setattr__(self, "amm", Placement(tuple(low_cfg), tuple(high_cfg), at_512))
        if len(self.depths) != 5 or min(self.depths) < 1:
            raise UserError(f"EDT has five depths of at least 1, got {self.depths}")
        if len(self.num_heads) != 3 or min(self.num_heads) < 1:
            raise UserError(f"EDT has three head counts of at least 1, got {self.num_heads}")
        super().__post_init__()
        if self.mid_mask_block is not None and not 0 <= self.mid_mask_block < self.depths[0]:
            raise UserError(f"mid_mask_block {self.mid_mask_block} is not a block of stage 1")

    @property
    def input_multiple(self) -> int:
        """The patch size, doubled by each of the two down-sampling modules."""
        return 4 * self.patch_size

    def with_width_of(self, other: "EDTConfig") -> "EDTConfig":
        """Copy with the widths and patch size of ``other``. The checkpoint decides the depths."""
        return dataclasses.replace(self, num_heads=other.num_heads, patch_size=other.patch_size)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EDTConfig":
        """Inverse of ``dataclasses.asdict``; reads the older key "heads" too.

        Raises:
            UserError: a key is unknown.
        """
        renamed = {"num_heads" if key == "heads" else key: value for key, value in values.items()}
        return super().from_dict(renamed)

    @classmethod
    def from_state_dict(cls, weights: Mapping[str, torch.Tensor]) -> "EDTConfig":
        """Read the configuration off the tensors of a checkpoint that carries none.

        Raises:
            UserError: these are not the tensors of an EDT.
        """
        try:
            width, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
            last_block = max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
            # A stage is a run of blocks with equal qkv width and bias-table length. The width alone
            # would merge stages with equal head counts; the bias table shows their grids.
            kinds = []
            for block in range(last_block + 1):
                attention = f"blocks.{block}.attn"
                table = weights[f"{attention}.rel_pos_bias.relative_position_bias_table"]
                kinds.append((weights[f"{attention}.qkv.weight"].shape[1], table.shape[0]))
            tokens = weights["pos_embed"].shape[1]
            num_classes = weights["y_embedder.embedding_table.weight"].shape[0] - 1
        except (KeyError, ValueError) as error:
            raise UserError(
                f"the checkpoint is not an EDT: a tensor is missing or has another shape ({error})"
            ) from None
        stages = [(stage[0] // HEAD_DIM, len(list(run))) for stage, run in itertools.groupby(kinds)]
        all_heads, depths = zip(*stages, strict=True)
        num_heads = all_heads[:3]
        return cls(
            input_size=math.isqrt(tokens) * patch_size,
            in_channels=in_channels,
            num_classes=num_classes,
            patch_size=patch_size,
            depths=depths,
            num_heads=num_heads,
            tie="down_blocks.0.adaLN_modulation.1.weight" in weights,
            pes="down_blocks.0.pos_embed" in weights,
            **_preset_of_layout(num_heads, depths),
        )


class EDT(DiffusionTransformer):
    """Efficient Diffusion Transformer: predicts noise and variance range of a noised latent.

    In the comments, c is the condition (timestep plus label embedding), w1 to w3 are the stages'
    widths, D = w1 is the width of c, and T is the number of stage-1 tokens.
    """

    config: EDTConfig
    pos_embed: torch.Tensor  # (1, T, w1)
    maskings = ("edt", "none")
    can_batch_passes = True

    def __init__(self, config: EDTConfig) -> None:
        super().__init__()
        self.config = config
        self.in_channels, self.num_classes = config.in_channels, config.num_classes
        self.modulations: tuple[Modulation, ...] = ()
        tie, pes = config.tie, config.pes
        g1, g2, g3 = (config.grid_size // factor for factor in (1, 2, 4))  # tokens per side
        h1, h2, h3 = config.num_heads
        w1, w2, w3 = (HEAD_DIM * num_heads for num_heads in config.num_heads)
        self.x_embedder = PatchEmbed(config.input_size, config.patch_size, config.in_channels, w1)
        self.t_embedder = TimestepEmbedder(w1)
        self.y_embedder = LabelEmbedder(config.num_classes, w1)
        self.register_buffer("pos_embed", sincos_table(w1, g1))
        self.blocks = nn.ModuleList()
        stages = zip(config.depths, (h1, h2, h3, h2, h1), (g1, g2, g3, g2, g1), strict=True)
        for depth, num_heads, grid_size in stages:
            for _ in range(depth):
                bias = RelativePositionBias(grid_size, num_heads)
                self.blocks.append(Block(HEAD_DIM * num_heads, num_heads, w1, grid_size, bias))
        down1 = DownSample(w1, w2, w1, g2, tie, pes)
        down2 = DownSample(w2, w3, w1, g3, tie, pes)
        self.down_blocks = nn.ModuleList([down1, down2])
        self.up_blocks = nn.ModuleList([UpSample(w3, w2), UpSample(w2, w1)])
        skip1 = LongSkip(w2, w1, g2, tie, pes)
        skip2 = LongSkip(w1, w1, g1, tie, pes)
        self.concat_blocks = nn.ModuleList([skip1, skip2])
        self.final_layer = FinalLayer(w1, config.patch_size, 2 * config.in_channels, w1)
        initialize_as_dit(self)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor | None = None,
        masks: TokenMasks | None = None,
    ) -> torch.Tensor:
        """One pass of Figure 3. A long skip carries a stage's input, not its output as in U-ViT.

        Args:
            x: noised latents, (B, C, S, S).
            t: timesteps of the 1000-step process, (B,).
            y: class labels, (B,) int; the null class is ``num_classes``, and None means it for all.
            masks: hide tokens inside the down-sampling modules (training's masked pass). They have
                B rows, or k B rows for k passes of the same B images in one call. The layers before
                the first mask are equal in all k passes, so they run once, on B rows.

        Returns:
            (B, 2C, S, S), or (k B, 2C, S, S): noise, then variance range.
        """
        keep = masks or TokenMasks(None, None)
        if y is None:
            y = torch.full_like(t, self.num_classes, dtype=torch.long)
        mid_block = self.config.mid_mask_block
        first_mask = self.config.depths[0] if mid_block is None else mid_block  # block of stage 1
        # fmt: off
        c = self.t_embedder(t) + self.y_embedder(y)                         # (B, D)
        x = embedded = self.x_embedder(x) + self.pos_embed                  # (B, T, w1), unmasked
        x = self._stage(0, x, c, stop=first_mask)                           # (B, T, w1)
        if masks is not None:
            x, embedded, c = masks.repeat_rows(x, embedded, c)              # B is k B from here on
        x = self._mask_stage_1(x, keep.mid)                                 # (B, T, w1)
        x = self._stage(0, x, c, start=first_mask)                          # (B, T, w1)
        x = reduced = self.down_blocks[0](x, c, keep.down0)                 # (B, T/4, w2)
        x = self._stage(1, x, c)                                            # (B, T/4, w2)
        x = self.down_blocks[1](x, c, keep.down1)                           # (B, T/16, w3)
        x = self._stage(2, x, c)                                            # (B, T/16, w3)
        x = self.concat_blocks[0](self.up_blocks[0](x), reduced, c)         # (B, T/4, w2)
        x = self._stage(3, x, c)                                            # (B, T/4, w2)
        x = self.concat_blocks[1](self.up_blocks[1](x), embedded, c)        # (B, T, w1)
        x = self._stage(4, x, c)                                            # (B, T, w1)
        return self.final_layer(x, c)                                       # (B, 2C, S, S)
        # fmt: on

    def forward_with_cfg(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor | None,
        cfg_scale: float,
        *,
        channels: int | None = None,
    ) -> torch.Tensor:
        """Predict with classifier-free guidance; see DiffusionTransformer."""
        if cfg_scale == 1 or y is None:
            return self(x, t, y)
        labels = torch.cat([y, torch.full_like(y, self.num_classes)])
        return guide(self(torch.cat([x, x]), torch.cat([t, t]), labels), cfg_scale, channels)

    def attention_blocks(self) -> list[Attention]:
        """The attention module of every block, by block number."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def compilable_modules(self) -> list[nn.Module]:
        """The transformer blocks."""
        return list(self.blocks)

    def set_amm(
        self,
        blocks: str | Sequence[int] | None,
        *,
        form: AMMForm | None = None,
        radius: float | None = None,
        cfg_scale: float = 1.0,
    ) -> tuple[int, ...]:
        """Switch AMM (see edt.amm) on in these blocks and off in all others. A new model has none.

        Args:
            blocks: None switches AMM off. "auto" takes the placement that is known for the model's
                size, its resolution and ``cfg_scale``. A sequence gives 0-based block indices.
            form: "256" or "512"; None follows the resolution.
            radius: in tokens; None takes the paper's.
            cfg_scale: guidance scale that "auto" follows.

        Returns:
            the blocks that are modulated now.

        Raises:
            UserError: a block does not exist, or "auto" has no known placement.
        """
        uses_512_amm = self.config.uses_512_amm
        if isinstance(blocks, str):
            check_auto(blocks)
            blocks = auto_blocks(self.config.amm, cfg_scale, uses_512_amm)
        form = form or default_form(uses_512_amm)
        self.modulations = set_amm_matrices(self.attention_blocks(), blocks or (), form, radius)
        return tuple(modulation.block for modulation in self.modulations)

    def _stage(
        self, stage: int, x: torch.Tensor, c: torch.Tensor, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Run blocks ``start`` to ``stop`` of a stage."""
        first = sum(self.config.depths[:stage])
        blocks = list(self.blocks)[first : first + self.config.depths[stage]]
        for block in blocks[start:stop]:
            x = block(x, c)
        return x

    def _mask_stage_1(self, x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """EDT-XL's extra mask: a hidden token becomes its position embedding alone."""
        if keep is None or self.config.mid_mask_block is None:
            return x
        keep = keep.unsqueeze(-1).to(x.dtype)
        return x * keep + self.pos_embed * (1 - keep)


# ---------------------------------------------------------------------------------------------
# Sizes. Published parameters and multiply-accumulates (the paper's "GFLOPs") at 256 pixels:
# S 38.32 M, 2.66 G; B 152.2 M, 10.20 G; XL 708.44 M, 51.83 G. The released XL layout does not have
# the published XL totals; the layout "-paper" does. tests/test_models.py pins all of them.

_SMALL_AMM = Placement(low_cfg=(7, 10), high_cfg=(8,), at_512=(10,))
_XL_AMM = Placement(low_cfg=(23, 25), high_cfg=(24,))
_TINY_AMM = Placement(low_cfg=(4, 6), high_cfg=(4,))  # ours: the last blocks of stages 4 and 5

_S = {"num_heads": (6, 8, 10), "depths": (2, 2, 2, 3, 3), "patch_size": 2, "amm": _SMALL_AMM}
_B = {**_S, "num_heads": (12, 16, 20)}
_XL = {"num_heads": (18, 24, 30), "patch_size": 2, "mid_mask_block": 4, "amm": _XL_AMM}
# EDT-Tiny serves the demo and the tests: it trains in minutes on a CPU.
_TINY = {"num_heads": (2, 3, 4), "depths": (1, 1, 1, 2, 2), "patch_size": 2, "amm": _TINY_AMM}

PRESETS: dict[str, dict[str, Any]] = {
    "EDT-S/2": _S,
    "EDT-B/2": _B,
    "EDT-XL/2": {**_XL, "depths": (6, 4, 4, 7, 7)},
    "EDT-XL/2-paper": {**_XL, "depths": (5, 5, 4, 7, 7)},
    "EDT-Tiny/2": _TINY,
}


def _create(
    preset: dict[str, Any],
    input_size: int = 32,
    in_channels: int = 4,
    num_classes: int = 1000,
    **config: Any,
) -> EDT:
    if "depths" in config or "num_heads" in config:
        # A custom layout is a new model: the preset's block numbers were chosen for another one.
        preset = {**preset, "amm": None, "mid_mask_block": None}
    return EDT(EDTConfig(input_size, in_channels, num_classes, **{**preset, **config}))


def _preset_of_layout(num_heads: tuple[int, ...], depths: tuple[int, ...]) -> dict[str, Any]:
    """Fields that no tensor records: amm of the same layout, mid_mask_block of the same width."""
    same_size = [preset for preset in PRESETS.values() if preset["num_heads"] == num_heads]
    for preset in same_size:
        if preset["depths"] == depths:
            return {"mid_mask_block": preset.get("mid_mask_block"), "amm": preset["amm"]}
    mid_mask_block = same_size[0].get("mid_mask_block") if same_size else None
    is_in_stage_1 = mid_mask_block is not None and mid_mask_block < depths[0]
    return {"mid_mask_block": mid_mask_block if is_in_stage_1 else None, "amm": None}


EDT_models = {name: functools.partial(_create, preset) for name, preset in PRESETS.items()}
# The release has separate names for networks without AMM. Their tensors are the same.
EDT_models |= {
    f"{name}_noAMM": functools.partial(_create, {**preset, "amm": None})
    for name, preset in PRESETS.items()
}
