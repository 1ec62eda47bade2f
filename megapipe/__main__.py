"""`python -m megapipe` is the command `megapipe`."""

import os
import sys

import megapipe


def _forget_current_directory() -> None:
    """Take it from where Python looks for modules, unless megapipe itself lies there: with `-m` it
    comes first, and it may be a downloaded model's with a torch.py in it. Python has imported sys
    and os before."""
    home = os.path.dirname(os.path.dirname(megapipe.__file__))
    try:
        here = os.getcwd()
    except OSError:  # it is gone, as the command will say
        return
    if sys.path[:1] == [here] and here != home:
        del sys.path[0]


if __name__ == "__main__":
    _forget_current_directory()
    from megapipe.tools.cli import main

    sys.exit(main())
