"""These tests are of `make test-lmms`, which names the environment with lmms-eval; nothing of them runs without it."""

import os

collect_ignore_glob = [] if "VAOPD_LMMS_PYTHON" in os.environ else ["test_*.py"]
