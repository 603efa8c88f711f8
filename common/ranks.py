"""Imports OneFlow as one of the launcher's processes, which find each other meanwhile; without this, one is alone."""

import common.quiet  # noqa: F401  which looks whether this module is there
