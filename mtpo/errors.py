"""Every error that mtpo raises on purpose.

MtpoError                    its message is one line that a user can act on; a recipe prints it, exits 1
├── InputError               a value, file or option given by the user is wrong (also a ValueError)
│   └── TemplateError        a chat template cannot be rendered turn by turn
├── EnvironmentFault         something around the model failed: never a label, retried, then recorded
│   ├── SandboxError         the interpreter itself failed
│   ├── EngineError          the engine failed to generate
│   └── JudgeUnavailable     the judge cannot be asked at present
└── GuardError               a run-time guard found that training would be silently wrong

Code that raises inside a healthy interpreter is no error of ours: it is an `Execution` whose text the
model gets to read. An answer that does not parse is data too.
"""


class MtpoError(Exception):
    """Base of all errors that mtpo raises on purpose."""


class InputError(MtpoError, ValueError):
    """A value, file or option is wrong; the message names it and what was expected."""


class TemplateError(InputError):
    """A chat template cannot be rendered turn by turn without changing earlier turns."""


class EnvironmentFault(MtpoError):
    """Something around the model failed; a trajectory that meets it is never a label."""


class SandboxError(EnvironmentFault):
    """The interpreter would not start, or stopped answering in a way that no kill could mend."""


class EngineError(EnvironmentFault):
    """The engine failed to generate."""


class JudgeUnavailable(EnvironmentFault):
    """The judge gives no usable answer at present: pause, and resume when it does."""


class GuardError(MtpoError):
    """A run-time guard found that training would be silently wrong."""
