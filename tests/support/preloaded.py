"""Imported last by the server that ranks are forked from.

What is imported by then stays out of the ranks' garbage collections, which would go through it and copy it,
on every rank anew.
"""

import gc

gc.collect()
gc.freeze()
