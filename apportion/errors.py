"""What goes wrong, by name: every error says what was found, what was wanted and what to do next."""


class ApportionError(Exception):
    """Root of every error this library raises on purpose; `exit_code` is what the shell sees."""

    exit_code = 1

    def __init__(self, found: str, *, wanted: str, do: str) -> None:
        self.found, self.wanted, self.do = found, wanted, do
        super().__init__(f"found {found}; wanted {wanted}. {do}")


class PathError(ApportionError):
    """A path that the network cannot take."""

    exit_code = 3


class PlanError(ApportionError):
    """A plan, budget or option that makes no sense."""

    exit_code = 3


class NoEffect(PlanError):
    """A choice that would change nothing."""


class Refused(ApportionError):
    """A model that cannot be read exactly; `found` names the module."""

    exit_code = 4


class DataError(ApportionError):
    """Data that cannot be used: names the file or row."""

    exit_code = 5


class TrainError(ApportionError):
    """A run that cannot go on: a loss that is not finite, a checkpoint that does not fit."""

    exit_code = 6


class EngineError(ApportionError):
    """A shape or back-end that was not built beforehand, or a graph that did not come out whole."""

    exit_code = 7


class BundleError(ApportionError):
    """A bundle that is incomplete, altered, or was measured on another device."""

    exit_code = 8


class ControlError(ApportionError):
    """A table that nothing can be learned from, a collapsed policy, a budget out of reach."""

    exit_code = 9
