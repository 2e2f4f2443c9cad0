"""Python imports this at its start where the folder is on PYTHONPATH: fairscale's FSDP then runs on CPU."""

from tests.support.fairscale_shim import install

install()
