"""`python -m freedave.cli`, for where the `freedave` script is not on the PATH."""

import sys

from freedave.cli import main

sys.exit(main())
