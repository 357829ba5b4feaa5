"""Draw images of chosen classes as a grid: with AMM, without, and their difference.

    python image_generator.py --model EDT-XL/2 --ckpt EDT-XL.pt \\
        --classes "golden retriever" 360 --cfg-scale 4

The images with and without AMM start from the same noise. The settings are recorded in a .json file
beside the picture, and a picture of other settings has another name.
"""

import argparse
import hashlib
import json
from typing import Any

import torch

from edt.cli.arguments import (
    COUNT,
    HelpFormatter,
    add_sampling_arguments,
    from_arguments,
    nonempty_path,
    true_or_false,
)
from edt.cli.build import LoadedModel, load_for_sampling, set_amm_from_arguments, settings_of
from edt.cli.main import exit_on_user_error
from edt.data.class_names import class_names, find_class
from edt.sampling.config import SamplingConfig
from edt.sampling.generate import generate
from edt.sampling.image_grid import difference, make_captioned_grid
from edt.sampling.sidecar import library_versions
from edt.utils.distributed import get_distributed_env
from edt.utils.files import atomic_write, make_folder, shorten_name, write_json

# The release's: two sharks, sea anemone, two dogs, cat, goldfinch, magpie, titmouse.
IMAGENET_CLASSES = (2, 3, 108, 230, 232, 281, 11, 18, 19)


def both_true_or_false(text: str) -> str | bool:
    """Argument type of --amm: both, True or False."""
    return "both" if text.lower() == "both" else true_or_false(text)


def parser() -> argparse.ArgumentParser:
    """The command line of the script that draws classes."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_sampling_arguments(
        p,
        amm_type=both_true_or_false,
        amm_values="both|True|False",
        amm_default="both, that is with AMM and without",
    )
    p.add_argument(
        "--classes",
        "--class-labels",
        nargs="+",
        metavar="CLASS",
        help="class indices or names (of ImageNet, or of your folders); index:2 and name:2 where "
        "folders are named by numbers; default: for ImageNet nine classes of the release, else the "
        "first nine",
    )
    p.add_argument("--num-variations", type=COUNT, default=5, help="images per class")
    p.add_argument("--per-proc-batch-size", type=COUNT, default=50, help="images per batch")
    p.add_argument("--seed", "--global-seed", type=int, help="fixes the noise")
    p.add_argument(
        "--output-dir",
        "--results-dir",
        type=nonempty_path,
        default="visual",
        metavar="DIR",
        help="folder of the pictures",
    )
    p.set_defaults(amm="both", cfg_scale=4.0, seed=1)
    return p


def choose_classes(names: list[str] | None, known: list[list[str]]) -> list[int]:
    """Class indices by index or name; without names the release's, or the first nine.

    Args:
        names: what the user gave.
        known: the names of each class.
    """
    if names:
        return [find_class(name, known) for name in names]
    if len(known) == 1000:
        return list(IMAGENET_CLASSES)
    return list(range(min(9, len(known))))


def sample_images(
    loaded: LoadedModel,
    config: SamplingConfig,
    classes: list[int],
    variations: int,
    batch_size: int,
) -> torch.Tensor:
    """Draw images of some classes, (classes, variations, H, W, 3) uint8."""
    labels = torch.tensor(classes).repeat_interleave(variations)
    batches = generate(
        loaded.model,
        loaded.vae,
        config,
        torch.arange(len(labels)),
        batch_size,
        labels=labels,
        progress=True,
    )
    images = torch.cat([batch.images for batch in batches])
    return images.unflatten(0, (len(classes), variations))


def grid_settings(
    args: argparse.Namespace, loaded: LoadedModel, config: SamplingConfig, classes: list[int]
) -> dict[str, Any]:
    """Everything that the picture depends on, as JSON values."""
    settings = settings_of(loaded, config)
    del settings["labels"]  # the classes take their place
    return {
        **settings,
        "classes": classes,
        "num_variations": args.num_variations,
        "with_and_without_amm": args.amm == "both",
    }


def grid_name(settings: dict[str, Any]) -> str:
    """Name of the picture of some settings, without a suffix. Other settings have another name."""
    blocks = "-".join(map(str, settings["amm"]["blocks"]))
    amm = f"amm-{blocks}" if blocks else "noamm"
    if settings["with_and_without_amm"]:
        amm += "-and-without"
    classes = "-".join(map(str, settings["classes"]))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    parts = ["grid", classes, settings["solver"], settings["num_sampling_steps"], amm]
    return "-".join([*(shorten_name(part, 40) for part in parts), digest])


@exit_on_user_error()
def main(argv: list[str] | None = None) -> int:
    """Draw; returns the exit code."""
    args = parser().parse_args(argv)
    env = get_distributed_env()
    if env.rank > 0:
        return 0  # one process draws the one picture
    config: SamplingConfig = from_arguments(SamplingConfig, args)
    loaded = load_for_sampling(args, env.device)
    model = loaded.model
    names = class_names(model.num_classes, loaded.info.features.classes)
    classes = choose_classes(args.classes, names)
    set_amm_from_arguments(model, args)
    settings = grid_settings(args, loaded, config, classes)
    folder = make_folder(args.output_dir / f"seed{args.seed}-cfg{args.cfg_scale}")

    drawing = (loaded, config, classes, args.num_variations, args.per_proc_batch_size)
    images = sample_images(*drawing)
    column_captions: list[str] = []
    if args.amm == "both":
        blocks = [str(modulation.block) for modulation in model.modulations]
        model.set_amm(None)
        without = sample_images(*drawing)
        images = torch.stack([images, without, difference(images, without)], dim=2).flatten(1, 2)
        captions = [f"AMM {', '.join(blocks)}", "without", "difference"]
        column_captions = captions * args.num_variations

    row_captions = []
    for label in classes:
        first_name = names[label][0]
        is_number = first_name == str(label)  # a folder that is named by its index
        row_captions.append(first_name if is_number else f"{label} {first_name}")
    path = folder / f"{grid_name(settings)}.png"
    write_json(path.with_suffix(".json"), {**settings, "versions": library_versions()})
    with atomic_write(path) as temporary:
        make_captioned_grid(images, row_captions, column_captions).save(temporary, format="png")
    print(f"rows: {'; '.join(row_captions)}\n{path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
