"""Score generated images against a reference, with the numbers of ADM's evaluator.

    python evaluator.py REF SAMPLES

REF and SAMPLES are an .npz of images, an image folder, a run folder of the sampler, or a statistics file.
"""

import argparse
import json
import logging
import sys
from functools import partial
from pathlib import Path

import torch

from edt.cli import exit_on_user_error
from edt.images import center_crop
from edt.metrics import SCORE_LINES, check_comparable, create_extractor, evaluate, open_source
from edt.metrics.extractors import BACKENDS


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", metavar="REF")
    parser.add_argument("samples", metavar="SAMPLES")
    parser.add_argument("--features", choices=tuple(SCORE_LINES), default="inception")
    parser.add_argument("--backend", choices=BACKENDS, default="torch", help="what runs the Inception network")
    parser.add_argument("--inception", type=Path, metavar="PATH", help="its weights: the .pb file, or one converted")
    pr_help = "precision and recall in ADM's half precision (default for inception) or in float32 (default for pixels)"
    parser.add_argument("--pr", choices=("adm", "exact"), help=pr_help)
    parser.add_argument("--image-size", type=positive, help="crop the images of folders to this side, as training does")
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cache-dir", type=Path, help="keep features here and reuse those of the same images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores and all about them here")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    crop = partial(center_crop, size=args.image_size) if args.image_size else None
    reference, samples = (open_source(path, args.features, crop) for path in (args.reference, args.samples))
    check_comparable(reference, samples)
    extractor = create_extractor(args.features, args.backend, args.inception, args.device)
    report = evaluate(
        reference, samples, extractor, pr=args.pr, batch_size=args.batch_size, cache_dir=args.cache_dir, progress=True
    )
    for label, key in SCORE_LINES[args.features]:
        if key in report["scores"]:
            print(f"{label}: {report['scores'][key]}")
        else:
            logging.warning("%s: not computed, it needs images where only statistics are given", label)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
