"""The console command ``lslora``; uninstalled ``python -m lslora``.

It stands outside of the package, since importing that registers everything with fairseq, which
takes seconds that help and analyses need not wait for. Its commands import what they use.
"""

import sys

IS_CONSOLE_COMMAND = True  # read by lslora_fairseq/__init__.py


def main():
    """Runs a subcommand; returns its exit status."""
    from lslora_fairseq import cli

    return cli.main()


if __name__ == "__main__":
    import lslora  # once more, under the name that the package looks for

    sys.exit(lslora.main())
