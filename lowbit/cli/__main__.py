"""``python -m lowbit.cli``: the command `lowbit`."""

import sys

from lowbit.cli.command import main

sys.exit(main())
