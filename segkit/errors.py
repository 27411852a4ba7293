"""The one exception for mistakes that a user can mend."""

from __future__ import annotations


class InputError(ValueError):
    """A mistake in the input: configuration, data, a checkpoint, a folder.

    The message is one sentence that says what was got, what is allowed, and which key or command mends it.
    The command line prints it without a traceback; set ``SEGKIT_DEBUG=1`` to see one.
    """
