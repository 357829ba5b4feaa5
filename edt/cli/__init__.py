"""Command line: the bodies of the scripts, and what they share."""

import os

# Threads of OpenMP wait for work by spinning, by default for so long that one busy neighbour on the
# machine slows every small operation down (docs/performance.md has figures). With a shorter spin
# they sleep sooner. OpenMP reads the variable when torch is loaded, so it is set before, at the
# first import of a script. A user's own setting wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
