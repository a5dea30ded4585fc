"""`python -m upslope` is the same program as `upslope`."""

from upslope.cli import run

run()
