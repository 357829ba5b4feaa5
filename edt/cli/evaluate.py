"""Score generated images against a reference. The scores reproduce those of ADM's evaluator.

    python evaluator.py REF SAMPLES
    python evaluator.py make-ref IMAGES OUT.npz --image-size 256
    python evaluator.py convert-inception classify_image_graph_def.pb OUT.safetensors

REF, SAMPLES and IMAGES are an .npz file of images, an image folder, or a folder of samples that
image_generator_ddp.py wrote. REF and SAMPLES can also be an .npz file of statistics (mu, sigma).
"""

import argparse
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from edt.cli.arguments import COUNT, HelpFormatter, nonempty_path
from edt.cli.main import exit_on_user_error
from edt.data.images import center_crop
from edt.metrics import (
    SCORE_LINES,
    Backend,
    FeatureExtractor,
    FeatureName,
    PrecisionRecallMode,
    Source,
    check_comparable,
    create_extractor,
    evaluate,
    make_reference,
    open_source,
)
from edt.metrics.images import FolderImages
from edt.metrics.inception_weights import load_weights, save_weights
from edt.utils.choices import choices
from edt.utils.errors import UserError
from edt.utils.files import make_folder, output_file, write_json


def image_parser() -> argparse.ArgumentParser:
    """A parser with the options that scoring and make-ref share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--features",
        choices=choices(FeatureName),
        default="inception",
        help="compare Inception features, or the pixels themselves (up to 64x64)",
    )
    parser.add_argument(
        "--backend",
        choices=choices(Backend),
        default="torch",
        help="library that runs the Inception network",
    )
    parser.add_argument(
        "--inception",
        type=nonempty_path,
        metavar="PATH",
        help="the Inception weights: the .pb file, or one that convert-inception made; "
        "default: the .pb file here or in ~/.cache/edt, else it is downloaded",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="torch device (default on this machine: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=COUNT, default=64, help="images per pass of the network"
    )
    parser.add_argument(
        "--image-size",
        type=COUNT,
        metavar="PIXELS",
        help="crop the images of folders to squares of this side, as training does; default: as "
        "they are",
    )
    return parser


def score_parser() -> argparse.ArgumentParser:
    parser = image_parser()
    parser.add_argument("reference", type=nonempty_path, metavar="REF")
    parser.add_argument("samples", type=nonempty_path, metavar="SAMPLES")
    parser.add_argument(
        "--pr",
        choices=choices(PrecisionRecallMode),
        help="arithmetic of precision and recall: ADM's half precision (adm, the default for "
        "inception) or float32 (exact, the default for pixels)",
    )
    parser.add_argument(
        "--cache-dir",
        type=nonempty_path,
        help="keep features here, and reuse those of the same images; default: nowhere",
    )
    parser.add_argument(
        "--json",
        type=nonempty_path,
        metavar="FILE",
        help="write the scores and how they were computed; default: no file",
    )
    return parser


def score(args: argparse.Namespace) -> None:
    """Print the scores of samples against a reference."""
    if args.cache_dir:
        make_folder(args.cache_dir)
    if args.json:
        check_output(args.json)
    reference = open_images(args.reference, args)
    samples = open_images(args.samples, args)
    check_comparable(reference, samples)  # before the weights are downloaded or loaded
    extractor = make_extractor(args)
    report = evaluate(
        reference, samples, extractor, args.pr, args.batch_size, args.cache_dir, progress=True
    )
    for label, key in SCORE_LINES[extractor.name]:
        if key in report:
            print(f"{label}: {report[key]}")
        else:
            logging.warning("%s: not computed; it needs images, not statistics alone", label)
    if args.json:
        write_json(args.json, report)


def make_ref_parser() -> argparse.ArgumentParser:
    parser = image_parser()
    parser.add_argument("images", type=nonempty_path, metavar="IMAGES")
    parser.add_argument("out", metavar="OUT.npz", type=nonempty_path)
    parser.add_argument(
        "--num-images", type=COUNT, default=10_000, help="images to keep for precision and recall"
    )
    return parser


def make_ref(args: argparse.Namespace) -> None:
    """Write a reference file."""
    check_output(args.out)
    source = open_images(args.images, args)
    if source.images is None:
        raise UserError(f"{args.images} holds statistics only; give images to make a reference")
    extractor = make_extractor(args)
    make_reference(
        source.images, extractor, args.out, args.num_images, args.batch_size, progress=True
    )


def convert_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert the Inception weights to a file that any safetensors reader opens."
    )
    parser.add_argument("graph", metavar="IN.pb", type=nonempty_path)
    parser.add_argument("out", metavar="OUT.safetensors", type=nonempty_path)
    return parser


def convert_inception(args: argparse.Namespace) -> None:
    """Convert the Inception weights to safetensors."""
    if args.out.suffix != ".safetensors":
        raise UserError(f"{args.out} must end in .safetensors, which tells --inception the format")
    check_output(args.out)
    save_weights(load_weights(args.graph), args.out)


def make_extractor(args: argparse.Namespace) -> FeatureExtractor:
    return create_extractor(args.features, args.backend, args.inception, args.device)


def open_images(path: Path, args: argparse.Namespace) -> Source:
    crop = partial(center_crop, size=args.image_size) if args.image_size else None
    source = open_source(path, args.features, crop)
    if isinstance(source.images, FolderImages):
        print(source.images.folder.describe(), file=sys.stderr)
    return source


def check_output(file: Path) -> None:
    """Check, before hours of work, that a result can be written; make its folder."""
    make_folder(output_file(file).parent)


COMMANDS = {
    "make-ref": (make_ref_parser, make_ref),
    "convert-inception": (convert_parser, convert_inception),
}


def parse(argv: list[str]) -> tuple[Callable[[argparse.Namespace], None], argparse.Namespace]:
    """The function that a command line asks for, and its arguments."""
    # argparse's subparsers cannot have a default, and ADM's command line has no subcommand.
    if argv and argv[0] in COMMANDS:
        parser, command = COMMANDS[argv[0]]
        return command, parser().parse_args(argv[1:])
    return score, score_parser().parse_args(argv)


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    command, args = parse(sys.argv[1:] if argv is None else argv)
    # Stdout has the scores alone, so that other programs can read them.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    command(args)
