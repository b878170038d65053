"""`python -m diffusers_infogain.cli`, for launchers such as `accelerate launch -m`."""

import sys

from . import main

sys.exit(main())
