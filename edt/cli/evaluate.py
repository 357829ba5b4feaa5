"""Score generated images against a reference, with the numbers of ADM's evaluator.

    python evaluator.py REF SAMPLES
    python evaluator.py make-ref IMAGES OUT.npz --image-size 256
    python evaluator.py convert-inception classify_image_graph_def.pb OUT.safetensors

REF, SAMPLES and IMAGES are an .npz of images, an image folder, a run folder of the sampler, or a
statistics file."""

import argparse
import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from edt.cli.build import COUNT, exit_on_user_error
from edt.data.images import center_crop
from edt.metrics import (
    SCORE_LINES,
    Source,
    check_comparable,
    create_extractor,
    evaluate,
    make_reference,
    open_source,
)
from edt.metrics.extractors import BACKENDS, FEATURES
from edt.metrics.inception_weights import load_weights, save_weights
from edt.utils.errors import UserError
from edt.utils.files import atomic_write, make_folder


def score_parser() -> argparse.ArgumentParser:
    parser = image_parser()
    parser.add_argument("reference", metavar="REF")
    parser.add_argument("samples", metavar="SAMPLES")
    pr_help = "precision and recall in ADM's half precision (default for inception) or in float32 (default for pixels)"
    parser.add_argument("--pr", choices=("adm", "exact"), help=pr_help)
    parser.add_argument(
        "--cache-dir", type=Path, help="keep features here and reuse those of the same images"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the scores and all about them here"
    )
    return parser


def score(args: argparse.Namespace) -> None:
    if args.cache_dir:
        make_folder(args.cache_dir)
    if args.json:
        make_room_for(args.json)
    reference, samples = (open_images(path, args) for path in (args.reference, args.samples))
    check_comparable(reference, samples)
    extractor = create_extractor(args.features, args.backend, args.inception, args.device)
    report = evaluate(
        reference, samples, extractor, args.pr, args.batch_size, args.cache_dir, progress=True
    )
    for label, key in SCORE_LINES[args.features]:
        if key in report:
            print(f"{label}: {report[key]}")
        else:
            logging.warning(
                "%s: not computed, it needs images where only statistics are given", label
            )
    if args.json:
        with atomic_write(args.json) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")


def make_ref_parser() -> argparse.ArgumentParser:
    parser = image_parser()
    parser.add_argument("images", metavar="IMAGES")
    parser.add_argument("out", metavar="OUT.npz", type=Path)
    parser.add_argument(
        "--num-images", type=COUNT, default=10_000, help="images kept for precision and recall"
    )
    return parser


def make_ref(args: argparse.Namespace) -> None:
    make_room_for(args.out)
    source = open_images(args.images, args)
    if source.images is None:
        raise UserError(f"{args.images} holds statistics; a reference is made of images")
    extractor = create_extractor(args.features, args.backend, args.inception, args.device)
    make_reference(
        source.images, extractor, args.out, args.num_images, args.batch_size, progress=True
    )


def convert_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert the Inception weights, for places without the .pb file."
    )
    parser.add_argument("graph", metavar="IN.pb", type=Path)
    parser.add_argument("out", metavar="OUT.safetensors", type=Path)
    return parser


def convert_inception(args: argparse.Namespace) -> None:
    if args.out.suffix != ".safetensors":
        raise UserError(f"{args.out} must end in .safetensors, by which it is recognized")
    make_room_for(args.out)
    save_weights(load_weights(args.graph), args.out)


def image_parser() -> argparse.ArgumentParser:
    """A parser with the options that scoring and make-ref share."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", choices=FEATURES, default="inception")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="torch", help="what runs the Inception network"
    )
    parser.add_argument(
        "--inception", type=Path, metavar="PATH", help="its weights: the .pb file, or one converted"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=COUNT, default=64)
    crop_help = "crop the images of folders to this side, as training does"
    parser.add_argument("--image-size", type=COUNT, metavar="PIXELS", help=crop_help)
    return parser


def open_images(path: str, args: argparse.Namespace) -> Source:
    return open_source(
        path, args.features, partial(center_crop, size=args.image_size) if args.image_size else None
    )


def make_room_for(file: Path) -> None:
    """Make sure of the place of a result before the work begins."""
    if file.is_dir():
        raise UserError(f"{file} is a folder; name a file")
    make_folder(file.parent)


COMMANDS = {
    "make-ref": (make_ref_parser, make_ref),
    "convert-inception": (convert_parser, convert_inception),
}


def parse(argv: list[str]) -> tuple[Callable, argparse.Namespace]:
    """The function that a command line asks for, and its arguments."""
    if argv and argv[0] in COMMANDS:
        parser, command = COMMANDS[argv[0]]
        return command, parser().parse_args(argv[1:])
    return score, score_parser().parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    command, args = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    command(args)
