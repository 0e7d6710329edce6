"""A plugin of pytest: what the tests import by the names of other packages are the modules of `fst.compat`."""

import os

import fst.compat

fst.compat.install(*os.environ["FST_PEERS"].split())
