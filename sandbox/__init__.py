"""The code interpreter: Jupyter kernels that run the code of a trajectory."""

from sandbox.limits import Limits
from sandbox.pool import InterpreterPool, run_code

__all__ = ["InterpreterPool", "Limits", "run_code"]
