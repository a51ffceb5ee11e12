"""The code interpreter: Jupyter kernels that run the code of a trajectory."""

from typing import TYPE_CHECKING, Any

from sandbox.limits import Limits
from sandbox.pool import InterpreterPool, run_code

if TYPE_CHECKING:
    from sandbox.remote import RemoteInterpreter

__all__ = ["TOKEN_VARIABLE", "InterpreterPool", "Limits", "RemoteInterpreter", "run_code"]

TOKEN_VARIABLE = "MTPO_SANDBOX_TOKEN"
"""Of the environment: the token of a sandbox service, for itself and for its clients."""


def __getattr__(name: str) -> Any:
    if name == "RemoteInterpreter":  # imports an HTTP client, which only its users should wait for
        from sandbox.remote import RemoteInterpreter

        return RemoteInterpreter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
