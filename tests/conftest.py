"""Settings of the whole suite."""

import os

# Read when torch is first imported, here and in every process that a test starts: models this small lose more to
# handing work over between threads than they gain, and on a busy machine they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
