"""What the tests of the CPU's Python package share with these is found beside them."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[2] / "python"))
