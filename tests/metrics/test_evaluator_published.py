"""OpenAI's published scores, computed from OpenAI's own files.

The files have 12 GB, so the test does not download them. ``EDT_ADM_FILES`` names the folder that
holds them (default: the working directory); see docs/evaluation.md.
"""

import os
from pathlib import Path

import pytest
from evaluation_helpers import printed_scores

from evaluator import main

FOLDER = Path(os.environ.get("EDT_ADM_FILES", "."))
FILES = {
    "reference": FOLDER / "VIRTUAL_imagenet256_labeled.npz",
    "samples": FOLDER / "admnet_guided_upsampled_imagenet256.npz",
    "weights": FOLDER / "classify_image_graph_def.pb",
}
# The scores in guided-diffusion's evaluations/README.md for these files, with our tolerances.
PUBLISHED = {
    "Inception Score": (215.8370, 0.2),
    "FID": (3.942557, 0.01),
    "sFID": (6.140434, 0.01),
    "Precision": (0.8265, 0.003),
    "Recall": (0.5309, 0.003),
}


@pytest.mark.slow
@pytest.mark.timeout(0)  # minutes on a GPU, hours on a CPU
def test_published_scores_are_reproduced(capsys):
    missing = [path.name for path in FILES.values() if not path.exists()]
    if missing:
        pytest.skip(f"not in {FOLDER.resolve()}: {', '.join(missing)} (see docs/evaluation.md)")
    main([str(FILES["reference"]), str(FILES["samples"]), "--inception", str(FILES["weights"])])
    scores = printed_scores(capsys.readouterr().out)
    assert list(scores) == list(PUBLISHED)
    for name, (expected, tolerance) in PUBLISHED.items():
        assert scores[name] == pytest.approx(expected, abs=tolerance), name
