"""`python -m wrapper`: the same as `nativelink_worker_wrapper`."""

import sys

from wrapper.cli import main

sys.exit(main())
