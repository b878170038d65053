"""The page of the demo model, as a Hugging Face Space or on any machine with the packages of requirements.txt."""

import os
import sys

from diffusers_infogain.cli import main

sys.exit(main(["app", "--model", "demo", "--device", "cpu", "--host", "0.0.0.0", "--port", os.environ.get("PORT", "7860")]))
