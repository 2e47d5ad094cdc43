"""The one error style of the package: function, argument, expected, got, and what to do."""

from __future__ import annotations

from typing import Any


class DeviceUnavailableError(ValueError, RuntimeError):
    """A device was asked for by name and cannot be used here.

    Both a ``ValueError`` (the name that was given is not usable) and a ``RuntimeError`` (something
    is missing from this machine or build), so that either ``except`` clause catches it.
    """


def message(function: str, argument: str, expected: str, got: Any, hint: str = "") -> str:
    """Builds ``function: argument x: expected ..., got .... hint``."""
    text = f"{function}: argument {argument}: expected {expected}, got {got}"
    return f"{text}. {hint}" if hint else text


def type_error(function: str, argument: str, expected: str, got: Any, hint: str = "") -> TypeError:
    """A ``TypeError`` in the package's error style."""
    return TypeError(message(function, argument, expected, got, hint))


def value_error(
    function: str, argument: str, expected: str, got: Any, hint: str = ""
) -> ValueError:
    """A ``ValueError`` in the package's error style."""
    return ValueError(message(function, argument, expected, got, hint))


def device_absent(where: str, device: str, reason: str) -> DeviceUnavailableError:
    """The error for a device that was asked for by name and is not here."""
    return DeviceUnavailableError(f"{where}: device {device!r} is not available: {reason}")


def wrong_platform(function: str, what: str, serves: str, platform: str) -> DeviceUnavailableError:
    """The error for a device or method that does not serve arrays of this XLA platform."""
    return DeviceUnavailableError(
        f"{function}: {what} serves arrays on the {serves} platform, got platform {platform!r}. "
        "Use device 'auto' or 'xla', or move the array with jax.device_put"
    )
