"""The EDT network: an encoder-decoder diffusion transformer on latents (paper, section 3.1 and
Figure 3).

Masks, labels and noise come in from outside: nothing here draws a random number after
initialisation. State-dict names and shapes are those of the authors' released checkpoints."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import torch
from timm.layers import PatchEmbed
from torch import nn

from edt.amm import Modulation, Placement, modulation_matrix, paper_radius
from edt.masking import TokenMasks
from edt.nn.attention import PATHS
from edt.nn.layers import (
    HEAD_DIM,
    Block,
    DownSample,
    FinalLayer,
    LabelEmbedder,
    LongSkip,
    TimestepEmbedder,
    UpSample,
    sincos_table,
)
from edt.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class EDTConfig:
    """Everything that fixes the network; saved as JSON beside the weights."""

    input_size: int = 32
    """Side of the square latent."""
    in_channels: int = 4
    """Latent channels; the output has twice as many, noise and variance range."""
    num_classes: int = 1000
    """Classes besides the null class; 0 is unconditional."""
    patch_size: int = 2
    depths: tuple[int, ...] = (2, 2, 2, 3, 3)
    """Blocks of the five stages."""
    heads: tuple[int, ...] = (6, 8, 10)
    """Heads of stages 1, 2 and 3, each 52 wide; stages 4 and 5 mirror 2 and 1, as the long skips
    require.
    """
    tie: bool = True
    """Token information enhancement: AdaLN in down-sampling and long skips (paper, Table 4)."""
    pes: bool = True
    """Positional encoding supplement: a position table added after them (paper, Table 4)."""
    mid_mask_block: int | None = None
    """Block of stage 1 in front of which TokenMasks.mid acts (released EDT-XL: 4)."""
    amm: Placement | None = None
    """Blocks that set_amm("auto") modulates; None where no placement is known."""

    def __post_init__(self):
        object.__setattr__(self, "depths", tuple(self.depths))
        object.__setattr__(self, "heads", tuple(self.heads))
        if self.amm is not None:
            low, high, at_512 = self.amm
            object.__setattr__(
                self,
                "amm",
                Placement(tuple(low), tuple(high), None if at_512 is None else tuple(at_512)),
            )
        if (
            len(self.depths) != 5
            or len(self.heads) != 3
            or min(self.depths) < 1
            or min(self.heads) < 1
        ):
            raise UserError(
                f"EDT has five depths and three head counts of at least 1, got {self.depths}, {self.heads}"
            )
        if self.input_size < 1 or self.input_size % (4 * self.patch_size):
            raise UserError(
                f"latent side {self.input_size} is not supported with patch size {self.patch_size}: "
                f"choose an image size whose latent side is a multiple of {4 * self.patch_size}"
            )
        if self.num_classes < 0:
            raise UserError(f"number of classes must be 0 or more, got {self.num_classes}")
        if self.mid_mask_block is not None and not 0 <= self.mid_mask_block < self.depths[0]:
            raise UserError(
                f"mid_mask_block {self.mid_mask_block} is not a block of stage 1 ({self.depths[0]} blocks)"
            )

    @property
    def grid(self) -> int:
        """Tokens per side in stage 1."""
        return self.input_size // self.patch_size

    @classmethod
    def from_dict(cls, values: dict) -> "EDTConfig":
        """Inverse of ``dataclasses.asdict``; an unknown key is an error."""
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise UserError(
                f"unknown model configuration {', '.join(sorted(unknown))}; is it from a newer version?"
            )
        return cls(**values)

    @classmethod
    def from_state_dict(cls, weights: dict[str, torch.Tensor]) -> "EDTConfig":
        """Read the configuration off the tensors of a checkpoint that carries none.

        Neighbouring stages differ in width and grid, so runs of equal (qkv width, bias table) are
        the stages.

        Raises:
            UserError: these are not the tensors of an EDT.
        """
        try:
            width, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
            blocks = 1 + max(
                int(name.split(".")[1]) for name in weights if name.startswith("blocks.")
            )
            kinds = [
                (
                    weights[f"blocks.{i}.attn.qkv.weight"].shape[1],
                    weights[f"blocks.{i}.attn.rel_pos_bias.relative_position_bias_table"].shape[0],
                )
                for i in range(blocks)
            ]
            stages = [(kind[0], len(list(run))) for kind, run in itertools.groupby(kinds)]
            tokens = weights["pos_embed"].shape[1]
            num_classes = weights["y_embedder.embedding_table.weight"].shape[0] - 1
        except (KeyError, ValueError) as error:
            raise UserError(
                f"the checkpoint is not an EDT: {error} is missing or misshapen"
            ) from None
        layout = {
            "heads": tuple(w // HEAD_DIM for w, _ in stages[:3]),
            "depths": tuple(depth for _, depth in stages),
        }
        known = [preset for preset in PRESETS.values() if preset["heads"] == layout["heads"]]
        exact = [preset for preset in known if preset["depths"] == layout["depths"]]
        mid = next((preset.get("mid_mask_block") for preset in exact + known), None)
        return cls(
            input_size=math.isqrt(tokens) * patch_size,
            in_channels=in_channels,
            num_classes=num_classes,
            patch_size=patch_size,
            tie="down_blocks.0.adaLN_modulation.1.weight" in weights,
            pes="down_blocks.0.pos_embed" in weights,
            mid_mask_block=mid if mid is not None and mid < layout["depths"][0] else None,
            amm=exact[0]["amm"] if exact else None,
            **layout,
        )


class EDT(nn.Module):
    """Efficient Diffusion Transformer: predicts noise and variance range of a noised latent.

    ``c`` below is the condition, timestep plus label embedding, (B, D) with D the width of stage 1.

    Attributes:
        modulations: the AMM in use, as :meth:`set_amm` left it.
    """

    def __init__(self, config: EDTConfig):
        super().__init__()
        self.modulations: tuple[Modulation, ...] = ()
        self.config = config
        self.in_channels, self.num_classes = config.in_channels, config.num_classes
        grid, tie_pes = config.grid, (config.tie, config.pes)
        w1, w2, w3 = (HEAD_DIM * heads for heads in config.heads)
        self.x_embedder = PatchEmbed(config.input_size, config.patch_size, config.in_channels, w1)
        self.t_embedder = TimestepEmbedder(w1)
        self.y_embedder = LabelEmbedder(config.num_classes, w1)
        self.register_buffer("pos_embed", sincos_table(w1, grid))
        stages = zip(
            config.depths,
            (w1, w2, w3, w2, w1),
            (grid, grid // 2, grid // 4, grid // 2, grid),
            strict=True,
        )
        self.blocks = nn.ModuleList(
            Block(width, side, w1) for depth, width, side in stages for _ in range(depth)
        )
        self.down_blocks = nn.ModuleList(
            [
                DownSample(w1, w2, w1, grid // 2, *tie_pes),
                DownSample(w2, w3, w1, grid // 4, *tie_pes),
            ]
        )
        self.up_blocks = nn.ModuleList([UpSample(w3, w2), UpSample(w2, w1)])
        self.concat_blocks = nn.ModuleList(
            [LongSkip(w2, w1, grid // 2, *tie_pes), LongSkip(w1, w1, grid, *tie_pes)]
        )
        self.final_layer = FinalLayer(w1, config.patch_size, 2 * config.in_channels, w1)
        self._initialize()

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor | None = None,
        masks: TokenMasks | None = None,
    ) -> torch.Tensor:
        """One pass of Figure 3.

        Args:
            x: noised latents, (B, C, S, S).
            t: timesteps of the 1000-step process, (B,).
            y: class labels, (B,) int; the null class is ``num_classes``, and None means it for all.
            masks: hide tokens inside the down-sampling modules (training's masked pass). Masks of k
                B rows put every image through k times, as if the batch had been repeated; what
                comes before the first mask is the same for all k and is computed once.

        Returns:
            (B, 2C, S, S), or (k B, 2C, S, S): noise, then variance range.
        """
        keep = masks or TokenMasks(None, None)
        if y is None:
            y = torch.full_like(t, self.num_classes, dtype=torch.long)
        # fmt: off
        c = self.t_embedder(t) + self.y_embedder(y)                             # (B, D)
        x = embedded = self.x_embedder(x) + self.pos_embed                      # (B, T, w1)
        x = self._stage(0, x, c, stop=self._first_mask)                         # (B, T, w1)
        x, embedded, c = keep.fork(x, embedded, c)                              # B is k B from here on
        x = self._hide(x, keep.mid)                                             # (B, T, w1)
        x = self._stage(0, x, c, start=self._first_mask)                        # (B, T, w1)
        x = reduced = self.down_blocks[0](x, c, keep.down0)                     # (B, T/4, w2)
        x = self._stage(1, x, c)                                                # (B, T/4, w2)
        x = self.down_blocks[1](x, c, keep.down1)                               # (B, T/16, w3)
        x = self._stage(2, x, c)                                                # (B, T/16, w3)
        x = self.concat_blocks[0](self.up_blocks[0](x), reduced, c)             # (B, T/4, w2)
        x = self._stage(3, x, c)                                                # (B, T/4, w2)
        x = self.concat_blocks[1](self.up_blocks[1](x), embedded, c)            # (B, T, w1)
        x = self._stage(4, x, c)                                                # (B, T, w1)
        return self.final_layer(x, c)                                           # (B, 2C, S, S)
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
        """Classifier-free guidance, eps_uncond + s (eps_cond - eps_uncond), on the first 3 of 4
        noise channels.

        The release guides 3 channels of its 4; latents with another number of channels are guided
        in all. The remaining channels come from the conditional half. Scale 1 is the conditional
        forward itself.

        Args:
            x, t, y: as in :meth:`forward`, one row an image.
            cfg_scale: guidance scale s.
            channels: how many noise channels are guided, the first ones; None is as said.

        Returns:
            (B, 2C, S, S).
        """
        if cfg_scale == 1 or y is None:
            return self(x, t, y)
        null = torch.full_like(y, self.num_classes)
        cond, uncond = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
        if channels is None:
            channels = 3 if self.in_channels == 4 else self.in_channels
        eps = uncond[:, :channels] + cfg_scale * (cond[:, :channels] - uncond[:, :channels])
        return torch.cat([eps, cond[:, channels:]], dim=1)

    def set_amm(
        self,
        blocks: str | Sequence[int] | None,
        *,
        form: str | None = None,
        radius: float | None = None,
        cfg_scale: float = 1.0,
    ) -> tuple[int, ...]:
        """Modulate the attention of some blocks (see edt.amm), or of none. Off after construction.

        Args:
            blocks: None switches AMM off; "auto" takes the preset's placement for the resolution
                and ``cfg_scale``; otherwise 0-based block indices.
            form: "256" or "512"; None follows the resolution.
            radius: in tokens; None is the paper's.
            cfg_scale: guidance scale that "auto" follows.

        Returns:
            The blocks now modulated.

        Raises:
            UserError: no such block, or "auto" without a known placement.
        """
        at_512 = self.config.input_size >= 64
        if blocks is None:
            blocks = ()
        elif blocks == "auto":
            blocks = self._auto_blocks(cfg_scale, at_512)
        form = form or ("512" if at_512 else "256")
        wrong = [i for i in blocks if not 0 <= i < len(self.blocks)]
        if wrong:
            raise UserError(
                f"AMM block {wrong[0]} does not exist; the model has blocks 0 to {len(self.blocks) - 1}"
            )
        biases = [block.attn.rel_pos_bias for block in self.blocks]
        radii = {i: paper_radius(biases[i].grid) if radius is None else radius for i in blocks}
        matrices = {i: modulation_matrix(biases[i].grid, form, radii[i]) for i in blocks}
        for i, block in enumerate(self.blocks):
            block.attn.modulation = (
                matrices[i].to(biases[i].relative_position_bias_table) if i in matrices else None
            )
        self.modulations = tuple(Modulation(i, form, radii[i]) for i in blocks)
        return tuple(blocks)

    def set_attention(self, path: str) -> None:
        """How attention is computed: a key of edt.nn.attention.PATHS."""
        if path not in PATHS:
            raise UserError(f"unknown attention path {path!r}; choose one of {', '.join(PATHS)}")
        for block in self.blocks:
            block.attn.path = path

    def _auto_blocks(self, cfg_scale: float, at_512: bool) -> tuple[int, ...]:
        placement = self.config.amm
        if placement is None:
            raise UserError(
                "no AMM placement is known for this layout; name the blocks with --amm-blocks, e.g. 7,10"
            )
        if at_512 and placement.at_512 is not None:
            return placement.at_512
        return placement.low_cfg if cfg_scale < 2 else placement.high_cfg

    @property
    def _first_mask(self) -> int:
        """How many blocks of stage 1 come before any mask."""
        return (
            self.config.depths[0]
            if self.config.mid_mask_block is None
            else self.config.mid_mask_block
        )

    def _stage(
        self, stage: int, x: torch.Tensor, c: torch.Tensor, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Blocks ``start`` to ``stop`` of a stage."""
        first = sum(self.config.depths[:stage])
        blocks = list(self.blocks)[first : first + self.config.depths[stage]]
        for block in blocks[start:stop]:
            x = block(x, c)
        return x

    def _hide(self, x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """EDT-XL's mask inside stage 1: a hidden token keeps its position only."""
        if keep is None or self.config.mid_mask_block is None:
            return x
        keep = keep.unsqueeze(-1).to(x.dtype)
        return x * keep + self.pos_embed * (1 - keep)

    def _initialize(self) -> None:
        """DiT's initialisation; the AdaLN of down-sampling and long skips are, as in the release,
        not zeroed.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(len(patch.weight), -1))
        nn.init.zeros_(patch.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for index in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[index].weight, std=0.02)
        for block in self.blocks:
            nn.init.trunc_normal_(block.attn.rel_pos_bias.relative_position_bias_table, std=0.02)
        for module in (
            *(block.adaLN_modulation[1] for block in self.blocks),
            self.final_layer.adaLN_modulation[1],
            self.final_layer.linear,
        ):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


# Model sizes. Parameters and multiply-accumulates (the paper's "GFLOPs") at 256 px are pinned by
# tests/test_models.py. Published: S 38.32 M, 2.66 G; B 152.2 M, 10.20 G; XL 708.44 M, 51.83 G,
# which the released XL layout does not have and the "-paper" layout does.
_SMALL_AMM = Placement(low_cfg=(7, 10), high_cfg=(8,), at_512=(10,))
_XL_AMM = Placement(low_cfg=(23, 25), high_cfg=(24,))
_XL = {"heads": (18, 24, 30), "patch_size": 2, "mid_mask_block": 4, "amm": _XL_AMM}
PRESETS: dict[str, dict] = {
    "EDT-S/2": {"heads": (6, 8, 10), "depths": (2, 2, 2, 3, 3), "patch_size": 2, "amm": _SMALL_AMM},
    "EDT-B/2": {
        "heads": (12, 16, 20),
        "depths": (2, 2, 2, 3, 3),
        "patch_size": 2,
        "amm": _SMALL_AMM,
    },
    "EDT-XL/2": {**_XL, "depths": (6, 4, 4, 7, 7)},
    "EDT-XL/2-paper": {**_XL, "depths": (5, 5, 4, 7, 7)},
    # For the demo and the tests: a few minutes on a CPU. Placement by analogy: the last block of
    # stages 4 and 5.
    "EDT-Tiny/2": {
        "heads": (2, 3, 4),
        "depths": (1, 1, 1, 2, 2),
        "patch_size": 2,
        "amm": Placement((4, 6), (4,)),
    },
}


def _build(
    preset: dict, input_size: int = 32, in_channels: int = 4, num_classes: int = 1000, **config
) -> EDT:
    if (
        "depths" in config or "heads" in config
    ):  # block indices of a preset mean nothing in another layout
        preset = {**preset, "amm": None, "mid_mask_block": None}
    return EDT(EDTConfig(input_size, in_channels, num_classes, **{**preset, **config}))


EDT_models = {name: functools.partial(_build, preset) for name, preset in PRESETS.items()}
# The release spells "never modulated" as a model of its own; the network and its tensors are the
# same.
EDT_models |= {
    f"{name}_noAMM": functools.partial(_build, {**preset, "amm": None})
    for name, preset in PRESETS.items()
}
