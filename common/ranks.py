"""Imports OneFlow as one of the processes that the launcher started: they find each other while it is imported.

A script that trains in several processes imports this first. All others are alone, whatever WORLD_SIZE says.
"""

import common.quiet  # noqa: F401  which looks whether this module is there
